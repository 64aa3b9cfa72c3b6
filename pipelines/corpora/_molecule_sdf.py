"""SDF: records of a molecule and its properties, each ended by a line of four dollars."""

import hashlib
from collections.abc import Iterator
from itertools import islice

from pipelines.corpora import Bad, Slice
from pipelines.corpora import _text_records as scan
from pipelines.corpora import _text_tables as tables
from pipelines.errors import Refused
from pipelines.storage import Entry

SUFFIXES = (".sdf", ".sdf.gz", ".sd", ".mol")
SLICE_BYTES = 4 << 20


def is_sdf(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def of_sdf(entry: Entry, prefix: str) -> list[Slice]:
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
        for _, stop, _ in _cuts(entry.uri, 0, None):
            units, end = units + 1, stop
            if end - begin >= SLICE_BYTES:
                cut()
    except (scan.Damaged, Refused) as trouble:
        units += 1
        lost = {"lost": tables.first_line(trouble)}
    cut()
    return slices


def _cuts(uri: str, offset: int, length: int | None) -> Iterator[tuple[int, int, bytes | None]]:
    """(start, stop, bytes or None where they are too many) of the records, each with its line of four dollars."""
    lines: list[bytes] = []
    size, begin, end = 0, None, offset
    for start, stop, line in scan.lines(uri, offset, length):
        begin, end = start if begin is None else begin, stop
        size += scan.MOST_RECORD_BYTES + 1 if line is None else len(line)
        if size <= scan.MOST_RECORD_BYTES and line is not None:
            lines.append(line)
        if line is not None and line.startswith(b"$$$$"):
            yield begin, end, b"".join(lines) if size <= scan.MOST_RECORD_BYTES else None
            lines, size, begin = [], 0, None
    if begin is not None and (size > scan.MOST_RECORD_BYTES or b"".join(lines).strip()):
        yield begin, end, b"".join(lines) if size <= scan.MOST_RECORD_BYTES else None


def records(piece: Slice) -> Iterator[tuple[int, bytes | None]]:
    if piece.meta["layout"] == "sdf":
        cuts = _cuts(piece.uri, piece.meta["offset"], piece.meta["length"])
        for unit, (_, _, record) in enumerate(islice(cuts, piece.stop - piece.start)):
            yield unit, record


def read_sdf(piece: Slice, wanted: tables.Wanted) -> Iterator[tuple[int, str | Bad, bytes]]:
    unit, count = -1, piece.stop - piece.start
    reason = piece.meta.get("lost", "the file ends before this record")
    try:
        for unit, record in records(piece):
            if not wanted(unit):
                continue
            name = tables.unit_name(piece, unit)
            if record is None:
                yield unit, Bad(name, f"more than {scan.MOST_RECORD_BYTES:,} bytes"), b"too long"
                continue
            try:
                yield unit, record.decode(), hashlib.sha256(record).digest()
            except UnicodeDecodeError:
                yield unit, Bad(name, tables.NOT_UTF8), hashlib.sha256(record).digest()
    except (scan.Damaged, OSError, Refused) as trouble:
        reason = tables.first_line(trouble)
    for lost in range(unit + 1, count):
        if wanted(lost):
            yield lost, Bad(tables.unit_name(piece, lost), reason), reason.encode()


def properties(text: str) -> dict[str, str]:
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
