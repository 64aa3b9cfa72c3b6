"""Where molecules come from: tables with a SMILES column, lists of SMILES (.smi) and SDF; their labels and splits."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

from pipelines.corpora import Bad, Slice
from pipelines.corpora import _text_tables as tables
from pipelines.errors import Refused
from pipelines.storage import Entry

SMILES_NAMES = ("smiles", "canonical_smiles", "isomeric_smiles", "smiles_canonical", "mol", "smi")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("valid", "validation", "val", "dev"), "valid"
)
MISSING = ("", "nan", "na", "n/a", "none", "null")
SDF_SUFFIXES = (".sdf", ".sdf.gz", ".sd", ".mol")
SMI_SUFFIXES = (".smi", ".smi.gz", ".smiles")
SLICE_BYTES = 256 << 10
"""Some 4,000 molecules of a table: RDKit takes seconds for them, so small files are shared out too."""
ROW_BYTES_A_BYTE = 16
"""A molecule's row is so many times longer than its SMILES; parts are cut by it."""
SDF_SLICE_BYTES = 4 << 20
SAMPLE = 1000
SAMPLED_SLICES = 8
MOST_CLASSES = 1000


@dataclass(frozen=True)
class Source:
    """One file: its slices, and the columns (of SDF the properties) seen in a sample of its records."""

    entry: Entry
    slices: list[Slice]
    smiles: str | None
    """The column of SMILES."""
    columns: list[str]
    sample: list[dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """One record before its chemistry is looked at."""

    name: str
    text: str
    """SMILES, or a record of SDF."""
    values: dict[str, Any]
    """Its label columns and its split column; of SDF all properties."""


def is_sdf(name: str) -> bool:
    return name.lower().endswith(SDF_SUFFIXES)


def is_smi(name: str) -> bool:
    return name.lower().endswith(SMI_SUFFIXES)


def open_table(entry: Entry, prefix: str, smiles: str | None) -> Source | None:
    """A CSV, TSV, Parquet or .smi file; None where no column is SMILES.

    Raises:
        Refused: `smiles` is not a column; several could be the SMILES.
    """
    layout = "lines" if is_smi(entry.name) else tables.layout_of(entry.name)
    if layout is None or (layout == "lines" and not is_smi(entry.name)):
        return None
    columns = tables.columns_of(entry, layout)
    if is_smi(entry.name):
        column: str | None = tables.TEXT
    else:
        column = smiles if smiles is not None or not columns else _smiles_column(columns, entry.uri)
    if columns and column is None:
        return None
    # All columns that are there once, for the sample; `with_columns` leaves those that are needed.
    others = [name for name in columns if columns.count(name) == 1]
    taken = list(dict.fromkeys([column, *others])) if column is not None else None
    slices = tables.of_table(entry, prefix, layout, taken, slice_bytes=SLICE_BYTES)
    sample = _sampled(slices) if columns and layout != "lines" else []
    slices = [replace(piece, bytes=piece.bytes * ROW_BYTES_A_BYTE) for piece in slices]
    return Source(entry, slices, column, others if sample else [], sample)


def open_sdf(entry: Entry, prefix: str) -> Source:
    """An SDF file; of many records the properties are known from a sample."""
    slices = _sdf_slices(entry, prefix)
    sample = []
    for piece in _spread(slices):
        texts = islice(_sdf_records(piece), SAMPLE // SAMPLED_SLICES)
        sample += [_properties(text.decode("utf-8", "replace")) for _, text in texts if text]
    return Source(entry, slices, None, list(dict.fromkeys(name for row in sample for name in row)), sample)


def with_columns(source: Source, labels: Sequence[str], split: str | None) -> list[Slice]:
    """The slices of a source, each with the columns to read."""
    mine = [name for name in (*labels, split) if name in source.columns]
    layout = tables.layout_of(source.entry.name)
    slices = []
    for piece in source.slices:
        meta = {**piece.meta, "smiles": source.smiles, "labels": [name for name in mine if name != split]}
        meta["split"] = split if split in mine else None
        if source.smiles and layout == "parquet":
            meta["columns"] = list(dict.fromkeys([source.smiles, *mine]))
        elif source.smiles and "columns" in meta:
            meta["columns"] = {name: meta["columns"][name] for name in [source.smiles, *mine]}
        slices.append(replace(piece, meta=meta))
    return slices


def read(piece: Slice, wanted: tables.Wanted) -> Iterator[tuple[int, Found | Bad, bytes]]:
    """Every wanted record of a slice, and its digest."""
    if piece.meta["layout"] == "sdf":
        yield from _read_sdf(piece, wanted)
        return
    for unit, found, digest in tables.read_table(piece, wanted):
        if isinstance(found, Bad):
            yield unit, found, digest
            continue
        smiles = found[piece.meta["smiles"] or tables.TEXT]
        if piece.meta["layout"] == "lines":
            # What follows the SMILES in a .smi file is a name.
            smiles = (smiles.split(None, 1) or [""])[0]
        yield unit, Found(tables.unit_name(piece, unit), str(smiles or ""), found), digest


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in MISSING) or value != value


def as_number(value: Any) -> float | None:
    """None where it is none."""
    if isinstance(value, bytes | list | dict):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def numeric_columns(source: Source) -> list[str]:
    """Columns that hold numbers, apart from those that only count the rows."""
    return [
        name
        for name in source.columns
        if name and name != source.smiles and is_numeric(source, name) and not _counts(_numbers(source, name))
    ]


def is_numeric(source: Source, column: str) -> bool:
    """Whether what the sample has of a column are numbers; False where it has nothing."""
    numbers = _numbers(source, column)
    return bool(numbers) and None not in numbers


def distinct(source: Source, column: str) -> list[str]:
    """The values of a column that are not missing, sorted. All of the file is read for it.

    Raises:
        Refused: so many that they are no classes.
    """
    values: Counter[str] = Counter()
    for piece in with_columns(source, [column], None):
        for _, found, _ in read(piece, lambda _: True):
            if isinstance(found, Found):
                value = found.values.get(column)
                values.update([] if is_missing(value) else [str(value).strip()])
        if len(values) > MOST_CLASSES:
            raise Refused(
                f"column {column!r} of {source.entry.uri} is text with more than {MOST_CLASSES:,} different values, "
                "so it is no label; name columns of numbers or of classes with labels=..."
            )
    return sorted(values)


def _smiles_column(columns: Sequence[str], uri: str) -> str | None:
    lower = {name: name.strip().lower() for name in columns}
    for wanted in SMILES_NAMES:
        named = [name for name in columns if lower[name] == wanted]
        if len(named) > 1:
            raise Refused(f"{uri} has several columns that could be the SMILES: {named}; name one with smiles=...")
        if named:
            return named[0]
    return None


def _numbers(source: Source, column: str) -> list[float | None]:
    return [as_number(row[column]) for row in source.sample if not is_missing(row.get(column))]


def _counts(numbers: Sequence[float | None]) -> bool:
    """Whether whole numbers only rise: an index, not a label."""
    whole = [number for number in numbers if number is not None and number == int(number if abs(number) < 1e18 else 0)]
    rising = all(low < high for low, high in pairwise(whole))
    return len(whole) == len(numbers) > 2 and rising


def _spread(slices: Sequence[Slice]) -> list[Slice]:
    """A few slices, from the first on evenly over the file."""
    return list(slices[:: max(1, -(-len(slices) // SAMPLED_SLICES))])


def _sampled(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    rows = []
    some = _spread(slices)
    for piece in some:
        most = max(1, SAMPLE // len(some))
        for _, found, _ in islice(tables.read_table(piece, range(most).__contains__), most):
            rows += [found] if isinstance(found, dict) else []
    return rows


def _sdf_slices(entry: Entry, prefix: str) -> list[Slice]:
    if not entry.bytes:
        return tables.unreadable(entry, prefix, "the file is empty")
    slices: list[Slice] = []
    first = units = begin = end = 0
    lost: dict[str, str] = {}

    def cut() -> None:
        nonlocal first, begin
        if units > first:
            meta = {"layout": "sdf", "offset": begin, "length": end - begin, **lost}
            slices.append(Slice(entry.uri, prefix + entry.name, first, units, end - begin, meta))
        first, begin = units, end

    try:
        for _, stop, _ in _sdf_cuts(entry.uri, 0, None):
            units, end = units + 1, stop
            if end - begin >= SDF_SLICE_BYTES:
                cut()
    except (tables.Damaged, Refused) as trouble:
        units += 1
        lost = {"lost": tables.first_line(trouble)}
    cut()
    return slices


def _sdf_cuts(uri: str, offset: int, length: int | None) -> Iterator[tuple[int, int, bytes | None]]:
    """(start, stop, bytes or None where they are too many) of the records, each with its line of four dollars."""
    lines: list[bytes] = []
    size, begin, end = 0, None, offset
    for start, stop, line in tables.text_records(uri, "lines", None, offset, length):
        begin, end = start if begin is None else begin, stop
        size += tables.MOST_RECORD_BYTES + 1 if line is None else len(line)
        if size <= tables.MOST_RECORD_BYTES and line is not None:
            lines.append(line)
        if line is not None and line.startswith(b"$$$$"):
            yield begin, end, b"".join(lines) if size <= tables.MOST_RECORD_BYTES else None
            lines, size, begin = [], 0, None
    if begin is not None and (size > tables.MOST_RECORD_BYTES or b"".join(lines).strip()):
        yield begin, end, b"".join(lines) if size <= tables.MOST_RECORD_BYTES else None


def _sdf_records(piece: Slice) -> Iterator[tuple[int, bytes | None]]:
    if piece.meta["layout"] == "sdf":
        cuts = _sdf_cuts(piece.uri, piece.meta["offset"], piece.meta["length"])
        for unit, (_, _, record) in enumerate(islice(cuts, piece.stop - piece.start)):
            yield unit, record


def _read_sdf(piece: Slice, wanted: tables.Wanted) -> Iterator[tuple[int, Found | Bad, bytes]]:
    unit, count = -1, piece.stop - piece.start
    reason = piece.meta.get("lost", "the file ends before this record")
    try:
        for unit, record in _sdf_records(piece):
            if not wanted(unit):
                continue
            name = tables.unit_name(piece, unit)
            if record is None:
                yield unit, Bad(name, f"more than {tables.MOST_RECORD_BYTES:,} bytes"), b"too long"
                continue
            try:
                text = record.decode()
                yield unit, Found(name, text, _properties(text)), hashlib.sha256(record).digest()
            except UnicodeDecodeError:
                yield unit, Bad(name, tables.NOT_UTF8), hashlib.sha256(record).digest()
    except (tables.Damaged, OSError, Refused) as trouble:
        reason = tables.first_line(trouble)
    for lost in range(unit + 1, count):
        if wanted(lost):
            yield lost, Bad(tables.unit_name(piece, lost), reason), reason.encode()


def _properties(text: str) -> dict[str, str]:
    """SDF data items, without parsing the molecule: `> <NAME>`, its lines, a blank line."""
    found, name = {}, None
    for line in text.splitlines():
        if line.startswith(">") and "<" in line:
            name = line.partition("<")[2].rpartition(">")[0]
            found[name] = ""
        elif name is not None and line.strip() and not line.startswith("$$$$"):
            found[name] = f"{found[name]}\n{line}" if found[name] else line
        else:
            name = None
    return found
