"""Records of text: CSV, TSV, lines, whole documents and Parquet, plain or .gz, cut into slices of whole records."""

import csv
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.corpora import Bad, Slice
from pipelines.corpora import _text_records as scan
from pipelines.errors import Failed, Refused, nearest_names
from pipelines.storage import Entry

Layout = Literal["csv", "tsv", "lines", "document", "parquet"]
Wanted = Callable[[int], bool]
Units = Iterator[tuple[int, dict[str, Any] | Bad, bytes]]

SUFFIXES: dict[str, Layout] = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".tsv": "tsv",
    ".tsv.gz": "tsv",
    ".txt": "lines",
    ".txt.gz": "lines",
    ".parquet": "parquet",
}
DELIMITERS = {"csv": ",", "tsv": "\t", "lines": ""}
TEXT = "text"
"""The one column of lines and documents."""

SLICE_BYTES = 64 << 20
MOST_SLICE_BYTES = 256 << 20
"""Of a .gz, unpacked: each slice unpacks all that lies before it, so there are few."""
ROWS_AT_ONCE = 1024

TOO_LONG = "a quote opened in it is never closed, or it is longer than a record may be"
NOT_UTF8 = "not UTF-8 text"
PARQUET_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)


def layout_of(name: str) -> Layout | None:
    """The layout that a file's name promises; None where it is no table of text."""
    return next((layout for suffix, layout in SUFFIXES.items() if name.lower().endswith(suffix)), None)


def columns_of(entry: Entry, layout: Layout, *, header: bool = True, quoted: bool | None = None) -> list[str]:
    """The columns of a table in its own order; [] where it cannot be read (`of_table` makes that a bad unit).

    Without a header they are called column_1, column_2, ...
    """
    if layout in ("lines", "document"):
        return [TEXT]
    try:
        if layout == "parquet":
            with storage.open_read(entry.uri) as file:
                return list(pq.ParquetFile(file).schema_arrow.names)
        first = next(scan.records(entry.uri, DELIMITERS[layout], _quotes(layout, quoted), 0, None), None)
        fields = _fields(first[2], DELIMITERS[layout], _quotes(layout, quoted)) if first and first[2] else []
    except (*PARQUET_DAMAGE, scan.Damaged, Refused, ValueError, csv.Error):
        return []
    return fields if header else [f"column_{place}" for place in range(1, len(fields) + 1)]


def of_table(
    entry: Entry,
    prefix: str,
    layout: Layout,
    columns: Sequence[str] | None = None,
    *,
    header: bool = True,
    quoted: bool | None = None,
    slice_bytes: int = SLICE_BYTES,
) -> list[Slice]:
    """A table's records as slices; the whole file is read once to count them (of a Parquet file its footer alone).

    Nothing where there is a header and no record. A file that cannot be read at all is one bad unit.

    Args:
        columns: what records hold; default all. `header=False` names them column_1, column_2, ...
        quoted: whether `"` quotes fields. Default: in CSV, but not in TSV, where it is an ordinary character.
        slice_bytes: where to cut. Smaller where much work is done for a record.

    Raises:
        Refused: a column that is not there, or is there twice; the message names those there are.
    """
    if layout == "document":
        return [Slice(entry.uri, prefix + entry.name, 0, 1, entry.bytes, {"layout": "document"})]
    if not entry.bytes and layout != "parquet":
        return unreadable(entry, prefix, "the file is empty")
    there = columns_of(entry, layout, header=header, quoted=quoted)
    if not there:
        return unreadable(entry, prefix, _why_no_columns(entry, layout))
    taken = list(dict.fromkeys(there if columns is None else columns))
    for name in taken:
        if name not in there:
            raise Refused(f"{entry.uri} has no column {name!r}; {nearest_names(name, there)}.")
        if there.count(name) > 1:
            raise Refused(f"{entry.uri} has {there.count(name)} columns {name!r}; rename all but the right one.")
    if layout == "parquet":
        return _of_parquet(entry, prefix, taken, slice_bytes)
    meta = {
        "layout": layout,
        "quoted": _quotes(layout, quoted),
        "fields": len(there),
        "columns": {name: there.index(name) for name in taken},
    }
    return _of_text(entry, prefix, meta, 1 if header and layout != "lines" else 0, slice_bytes)


def read_table(piece: Slice, wanted: Wanted) -> Units:
    """(unit, column -> value or what is wrong with the record, sha256 of the record) for every wanted record.

    Values are strings, of Parquet what its columns hold (None where empty).
    """
    layout = piece.meta["layout"]
    if layout == "unreadable":
        if wanted(0):
            yield 0, Bad(piece.name, piece.meta["reason"]), piece.meta["reason"].encode()
        return
    if layout == "document":
        yield from _read_document(piece, wanted)
        return
    count, unit = piece.stop - piece.start, 0
    reason = piece.meta.get("lost", "the file ends before this record")
    read = _read_parquet if layout == "parquet" else _read_text
    try:
        for found in islice(read(piece), count):
            if wanted(unit):
                values, fingerprint = found()
                yield unit, Bad(unit_name(piece, unit), values) if isinstance(values, str) else values, fingerprint
            unit += 1
    except (*PARQUET_DAMAGE, scan.Damaged, Refused, Failed) as trouble:
        reason = first_line(trouble)
    for lost in range(unit, count):
        if wanted(lost):
            yield lost, Bad(unit_name(piece, lost), reason), reason.encode()


def unreadable(entry: Entry, prefix: str, reason: str) -> list[Slice]:
    """A whole file as one unit that goes to the quarantine."""
    return [Slice(entry.uri, prefix + entry.name, 0, 1, 0, {"layout": "unreadable", "reason": reason})]


Read = Callable[[], tuple[dict[str, Any] | str, bytes]]
"""A record not decoded yet: () -> (its values or what is wrong with it, its fingerprint)."""


def _of_text(entry: Entry, prefix: str, meta: dict[str, Any], skip: int, slice_bytes: int) -> list[Slice]:
    packed = entry.name.lower().endswith(".gz")
    most = min(MOST_SLICE_BYTES, max(slice_bytes, entry.bytes // 4)) if packed else slice_bytes
    slices: list[Slice] = []
    first, units, begin, end = 0, 0, 0, 0

    def cut() -> None:
        nonlocal first, begin  # and `meta`, which knows of damage when the last slice is cut
        if units > first:
            place = {**meta, "offset": begin, "length": end - begin}
            slices.append(Slice(entry.uri, prefix + entry.name, first, units, end - begin, place))
        first, begin = units, end

    try:
        for _, stop, record in scan.records(entry.uri, DELIMITERS[meta["layout"]], meta["quoted"], 0, None):
            if skip:
                skip, begin, end = skip - 1, stop, stop
                continue
            if record is not None and not record.strip(b"\r\n") and meta["layout"] != "lines":
                continue
            if units > first and stop - begin > most:
                cut()
            units, end = units + 1, stop
    except scan.Damaged as trouble:
        # One unit stands for all that is lost.
        units, meta = units + 1, {**meta, "lost": str(trouble)}
    cut()
    return slices


def _read_text(piece: Slice) -> Iterator[Read]:
    meta = piece.meta
    layout, quoted, fields, columns = meta["layout"], meta["quoted"], meta["fields"], meta["columns"]
    # The csv module's own bound (128 KiB a field) is lower; it is one for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), scan.MOST_RECORD_BYTES))

    def parsed(record: bytes | None) -> tuple[dict[str, Any] | str, bytes]:
        if record is None:
            return TOO_LONG, TOO_LONG.encode()
        digest = hashlib.sha256(record).digest()
        try:
            values = _fields(record, DELIMITERS[layout], quoted)
        except UnicodeDecodeError:
            return NOT_UTF8, digest
        except csv.Error as trouble:
            return f"not a CSV record: {trouble}", digest
        if len(values) != fields:
            return f"it has {'more' if len(values) > fields else 'fewer'} fields than the header", digest
        return {name: values[place] for name, place in columns.items()}, digest

    for _, _, record in scan.records(piece.uri, DELIMITERS[layout], quoted, meta["offset"], meta["length"]):
        if record is None or record.strip(b"\r\n") or layout == "lines":
            yield partial(parsed, record)


def _read_document(piece: Slice, wanted: Wanted) -> Units:
    if not wanted(0):
        return
    data, reason = b"", None
    try:
        for block in scan.blocks(piece.uri, 0, scan.MOST_RECORD_BYTES + 1):
            data += block
    except (scan.Damaged, OSError, Refused, Failed) as trouble:
        reason = first_line(trouble)
    digest = hashlib.sha256(data).digest()
    if len(data) > scan.MOST_RECORD_BYTES:
        reason = f"more than {scan.MOST_RECORD_BYTES:,} bytes"
    try:
        text = data.removeprefix(scan.BOM).decode()
    except UnicodeDecodeError:
        reason = reason or NOT_UTF8
    yield 0, Bad(piece.name, reason) if reason else {TEXT: text}, digest


def _of_parquet(entry: Entry, prefix: str, columns: list[str], slice_bytes: int) -> list[Slice]:
    with storage.open_read(entry.uri) as file:
        parquet = pq.ParquetFile(file)
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
    slices, first = [], 0
    for number, group in enumerate(groups):
        pieces = max(1, min(group.num_rows, -(-group.total_byte_size // slice_bytes)))
        for low, high in pairwise(group.num_rows * n // pieces for n in range(pieces + 1)):
            meta = {"layout": "parquet", "columns": columns, "group": number, "skip": low}
            size = group.total_byte_size // pieces
            slices.append(Slice(entry.uri, prefix + entry.name, first + low, first + high, size, meta))
        first += group.num_rows
    return [piece for piece in slices if piece.stop > piece.start]


def _read_parquet(piece: Slice) -> Iterator[Read]:
    columns, left = piece.meta["columns"], piece.meta["skip"]
    with storage.open_read(piece.uri) as file:
        parquet = pq.ParquetFile(file)
        for batch in parquet.iter_batches(ROWS_AT_ONCE, [piece.meta["group"]], columns):
            for row in range(min(left, batch.num_rows), batch.num_rows):
                yield partial(_parquet_record, batch, row)
            left = max(0, left - batch.num_rows)


def _parquet_record(batch: pa.RecordBatch, row: int) -> tuple[dict[str, Any] | str, bytes]:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[row].as_py()
        except UnicodeDecodeError:
            return NOT_UTF8, NOT_UTF8.encode()
    return values, hashlib.sha256(repr(values).encode("utf-8", "backslashreplace")).digest()


def _fields(record: bytes, delimiter: str, quoted: bool) -> list[str]:
    text = record.decode()
    if not delimiter:
        return [text.rstrip("\r\n")]
    return next(csv.reader([text], delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE), [])


def _quotes(layout: str, quoted: bool | None) -> bool:
    return layout == "csv" if quoted is None else quoted


def _why_no_columns(entry: Entry, layout: str) -> str:
    try:
        if layout == "parquet":
            with storage.open_read(entry.uri) as file:
                pq.ParquetFile(file)
            return "a Parquet file without columns"
        first = next(scan.records(entry.uri, DELIMITERS[layout], _quotes(layout, None), 0, None), None)
    except (*PARQUET_DAMAGE, scan.Damaged, Refused) as trouble:
        return f"could not be read: {first_line(trouble)}"
    return "its first record is no header of a table" if first else "the file is empty"


def unit_name(piece: Slice, unit: int) -> str:
    return f"{piece.name}/{piece.start + unit}"


def first_line(trouble: Exception) -> str:
    if isinstance(trouble, Refused | Failed) or (isinstance(trouble, OSError) and trouble.filename):
        # The message names the path, which the source of a bad unit names already.
        return f"could not be read: {getattr(trouble, 'strerror', None) or type(trouble).__name__}"
    return str(trouble).strip().partition("\n")[0][:120] or type(trouble).__name__
