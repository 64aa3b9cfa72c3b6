"""Records of text: CSV, TSV, lines, whole documents and Parquet, plain or .gz, cut into slices of whole records.

What a record is follows Python's csv module: line ends are LF, CRLF or CR, and do not count inside quotes. One scanner
finds the records both when the file is surveyed and when a slice of it is read, so both see the same ones.
"""

import csv
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache as once
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.corpora import Bad, Slice
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
MOST_RECORD_BYTES = 16 << 20
"""A record that is longer is quarantined: an open quote or a bomb, and nothing that a row could hold."""
BLOCK_BYTES = 4 << 20
ROWS_AT_ONCE = 1024

BOM = b"\xef\xbb\xbf"
TOO_LONG = "a quote opened in it is never closed, or it is longer than a record may be"
NOT_UTF8 = "not UTF-8 text"
PARQUET_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)


class Damaged(Exception):
    """The rest of a file cannot be read; what came before it is good."""


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
        first = next(text_records(entry.uri, layout, quoted, 0, None), None)
        fields = _fields(first[2], DELIMITERS[layout], _quotes(layout, quoted)) if first and first[2] else []
    except (*PARQUET_DAMAGE, Damaged, Refused, ValueError, csv.Error):
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
    except (*PARQUET_DAMAGE, Damaged, Refused, Failed) as trouble:
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
        for _, stop, record in text_records(entry.uri, meta["layout"], meta["quoted"], 0, None):
            if skip:
                skip, begin, end = skip - 1, stop, stop
                continue
            if record is not None and not record.strip(b"\r\n") and meta["layout"] != "lines":
                continue
            if units > first and stop - begin > most:
                cut()
            units, end = units + 1, stop
    except Damaged as trouble:
        # One unit stands for all that is lost.
        units, meta = units + 1, {**meta, "lost": str(trouble)}
    cut()
    return slices


def _read_text(piece: Slice) -> Iterator[Read]:
    meta = piece.meta
    layout, quoted, fields, columns = meta["layout"], meta["quoted"], meta["fields"], meta["columns"]
    # The csv module's own bound (128 KiB a field) is lower; it is one for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), MOST_RECORD_BYTES))

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

    for _, _, record in text_records(piece.uri, layout, quoted, meta["offset"], meta["length"]):
        if record is None or record.strip(b"\r\n") or layout == "lines":
            yield partial(parsed, record)


def _read_document(piece: Slice, wanted: Wanted) -> Units:
    if not wanted(0):
        return
    data, reason = b"", None
    try:
        for block in _blocks(piece.uri, 0, MOST_RECORD_BYTES + 1):
            data += block
    except (Damaged, OSError, Refused, Failed) as trouble:
        reason = first_line(trouble)
    digest = hashlib.sha256(data).digest()
    if len(data) > MOST_RECORD_BYTES:
        reason = f"more than {MOST_RECORD_BYTES:,} bytes"
    try:
        text = data.removeprefix(BOM).decode()
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


def text_records(
    uri: str, layout: str, quoted: bool | None, offset: int, length: int | None
) -> Iterator[tuple[int, int, bytes | None]]:
    """(start, stop, bytes or None where they are too many) of the records in a range that begins with one.

    Blank lines are among them: of a table they are no records, but start and stop must not jump.
    """
    pattern = _record_pattern(DELIMITERS[layout], _quotes(layout, quoted))
    blocks = _blocks(uri, offset, length)
    data, base, final, too_long = b"", offset, False, None
    while not final:
        block = next(blocks, b"")
        final = not block
        if base == 0 and BOM.startswith((data + block)[: len(BOM)]):
            data += block
            if len(data) < len(BOM) and not final:
                continue
            block, data, base = data.removeprefix(BOM), b"", len(BOM) if data.startswith(BOM) else 0
        data += block
        if too_long is not None:
            end = _line_end(data, 0, final)
            if end is None and not final:
                # The last byte may be the CR of a CRLF.
                base, data = base + len(data) - 1, data[-1:]
                continue
            end = len(data) if end is None else end
            yield too_long, base + end, None
            base, data, too_long = base + end, data[end:], None
        done = 0
        for start, stop, good in _complete_records(data, final, pattern):
            if stop is None:
                too_long, done = base + start, len(data) - 1
                break
            yield base + start, base + stop, data[start:stop] if good else None
            done = stop
        base, data = base + done, data[done:]


def _complete_records(data: bytes, final: bool, pattern: re.Pattern[bytes]) -> Iterator[tuple[int, int | None, bool]]:
    """(start, stop, whether it is good) of the records that end in `data`, which begins with one.

    Of one that is too long its first line is bad, and reading goes on in the next line: one stray quote must not
    swallow the rest of a file. Where even that line has no end yet, stop is None.
    """
    start = 0
    while start < len(data):
        for match in pattern.finditer(data, start):
            start, stop = match.span()
            if start == stop:
                return
            opened = match["open"] is not None
            if stop - start > MOST_RECORD_BYTES or (opened and final):
                break
            # At the end of a block, whether CR is followed by LF or a quote by a quote is not known yet.
            if not final and (opened or (stop == len(data) and not data.endswith(b"\n"))):
                return
            yield start, stop, True
        else:
            return
        end = _line_end(data, start, final)
        if end is None:
            yield start, len(data) if final else None, False
            return
        yield start, end, False
        start = end


def _line_end(data: bytes, start: int, final: bool) -> int | None:
    """Where the first line end from `start` on ends; None where there is none, or not yet."""
    feed = data.find(b"\n", start)
    carriage = data.find(b"\r", start, feed if feed >= 0 else len(data))
    if carriage < 0:
        return feed + 1 if feed >= 0 else None
    if carriage + 1 == len(data) and not final:
        return None
    return carriage + (2 if carriage + 1 == feed else 1)


@once
def _record_pattern(delimiter: str, quoted: bool) -> re.Pattern[bytes]:
    """One record with its line end; its group `open` took part where a quote is open at the end of the data.

    A quote opens only at the start of a field. Nothing in the pattern goes back, so it runs in linear time.
    """
    if not quoted:
        return re.compile(rb"[^\r\n]*+(?:\r\n?|\n|\Z)(?P<open>(?!))?")
    first = rb'(?<![^\r\n%s])"' % re.escape(delimiter.encode())
    return re.compile(rb'(?:%s(?:[^"]++|"")*+(?:"|(?P<open>\Z))|[^"\r\n]++|")*+(?:\r\n?|\n|\Z)' % first)


def _fields(record: bytes, delimiter: str, quoted: bool) -> list[str]:
    text = record.decode()
    if not delimiter:
        return [text.rstrip("\r\n")]
    return next(csv.reader([text], delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE), [])


def _quotes(layout: str, quoted: bool | None) -> bool:
    return layout == "csv" if quoted is None else quoted


def _blocks(uri: str, offset: int, length: int | None) -> Iterator[bytes]:
    """The bytes [offset, offset + length) of a file, of a .gz of what it unpacks to.

    Raises:
        Damaged: what cannot be read, after all that can.
    """
    with storage.open_read(uri) as file:
        if not uri.lower().endswith(".gz"):
            file.seek(offset)
            while block := file.read(BLOCK_BYTES if length is None else min(BLOCK_BYTES, length)):
                length = None if length is None else length - len(block)
                yield block
            return
        for block in _unpacked(file):
            kept = block[offset:] if length is None else block[offset : offset + length]
            offset = max(0, offset - len(block))
            length = None if length is None else length - len(kept)
            if kept:
                yield kept
            if length == 0:
                return


def _unpacked(file: Any) -> Iterator[bytes]:
    """What a gzip file of one or more members unpacks to, in blocks. gzip.GzipFile loses what it read before damage."""
    packed, engine, fresh = b"", zlib.decompressobj(31), True
    while packed := (packed or file.read(1 << 16)):
        before = engine.copy()
        try:
            block = engine.decompress(packed, BLOCK_BYTES)
        except zlib.error as trouble:
            yield _until_damage(before, packed)
            raise Damaged(f"the gzip stream is damaged: {trouble}") from None
        packed, fresh = engine.unconsumed_tail, False
        if block:
            yield block
        if engine.eof:
            # Padding with zeros may follow a member.
            packed = engine.unused_data.lstrip(b"\0")
            engine, fresh = zlib.decompressobj(31), True
    if not fresh:
        raise Damaged("the gzip stream is cut off")


def _until_damage(engine: Any, packed: bytes) -> bytes:
    """A call that fails gives nothing of what it unpacked: byte by byte, all that comes before the damage is had."""
    good: list[bytes] = []
    with suppress(zlib.error):
        good.extend(engine.decompress(packed[place : place + 1]) for place in range(len(packed)))
    return b"".join(good)


def _why_no_columns(entry: Entry, layout: str) -> str:
    try:
        if layout == "parquet":
            with storage.open_read(entry.uri) as file:
                pq.ParquetFile(file)
            return "a Parquet file without columns"
        first = next(text_records(entry.uri, layout, None, 0, None), None)
    except (*PARQUET_DAMAGE, Damaged, Refused) as trouble:
        return f"could not be read: {first_line(trouble)}"
    return "its first record is no header of a table" if first else "the file is empty"


def unit_name(piece: Slice, unit: int) -> str:
    return f"{piece.name}/{piece.start + unit}"


def first_line(trouble: Exception) -> str:
    if isinstance(trouble, Refused | Failed) or (isinstance(trouble, OSError) and trouble.filename):
        # The message names the path, which the source of a bad unit names already.
        return f"could not be read: {getattr(trouble, 'strerror', None) or type(trouble).__name__}"
    return str(trouble).strip().partition("\n")[0][:120] or type(trouble).__name__
