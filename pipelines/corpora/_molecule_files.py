"""Where molecules come from: tables with a column of SMILES, lists of SMILES (.smi), and SDF."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pipelines.corpora import Bad, Slice
from pipelines.corpora import _molecule_sdf as sdf
from pipelines.corpora import _text_tables as tables
from pipelines.errors import Refused
from pipelines.storage import Entry

SMILES_NAMES = ("smiles", "canonical_smiles", "isomeric_smiles", "smiles_canonical", "mol", "smi")
SMI_SUFFIXES = (".smi", ".smi.gz", ".smiles")
SLICE_BYTES = 256 << 10
"""Some 4,000 molecules of a table: RDKit takes seconds for them, so small files are shared out too."""
ROW_BYTES_A_BYTE = 16
"""A molecule's row is so many times longer than its SMILES; parts are cut by it."""
SAMPLE = 1000
SAMPLED_SLICES = 8


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
    columns = columns_of(entry, layout)
    if is_smi(entry.name):
        column: str | None = tables.TEXT
    else:
        column = smiles if smiles is not None or not columns else _smiles_column(columns, entry.uri)
    if columns and column is None:
        return None
    # All columns that are there once, for the sample; `with_columns` leaves those that are needed.
    others = [name for name in columns if columns.count(name) == 1]
    taken = list(dict.fromkeys([column, *others])) if column is not None else None
    slices = tables.of_table(entry, prefix, layout, taken, quoted=_quoted(layout), slice_bytes=SLICE_BYTES)
    sample = _sampled(slices) if columns and layout != "lines" else []
    slices = [replace(piece, bytes=piece.bytes * ROW_BYTES_A_BYTE) for piece in slices]
    return Source(entry, slices, column, others if sample else [], sample)


def columns_of(entry: Entry, layout: tables.Layout) -> list[str]:
    return tables.columns_of(entry, layout, quoted=_quoted(layout))


def _quoted(layout: tables.Layout) -> bool | None:
    # Names of compounds are quoted in TSV too (pandas writes it so), and may hold line ends.
    return True if layout == "tsv" else None


def open_sdf(entry: Entry, prefix: str) -> Source:
    """An SDF file; of many records the properties are known from a sample."""
    slices = sdf.of_sdf(entry, prefix)
    sample = []
    for piece in _spread(slices):
        texts = islice(sdf.records(piece), SAMPLE // SAMPLED_SLICES)
        sample += [sdf.properties(text.decode("utf-8", "replace")) for _, text in texts if text]
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
        for unit, record, digest in sdf.read_sdf(piece, wanted):
            if isinstance(record, Bad):
                yield unit, record, digest
            else:
                yield unit, Found(tables.unit_name(piece, unit), record, sdf.properties(record)), digest
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


def _smiles_column(columns: Sequence[str], uri: str) -> str | None:
    lower = {name: name.strip().lower() for name in columns}
    for wanted in SMILES_NAMES:
        named = [name for name in columns if lower[name] == wanted]
        if len(named) > 1:
            raise Refused(f"{uri} has several columns that could be the SMILES: {named}; name one with smiles=...")
        if named:
            return named[0]
    return None


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
