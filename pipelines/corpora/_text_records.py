"""Where records of text begin and end, in plain and in gzip files, without holding a file in memory.

What a record is follows Python's csv module: line ends are LF, CRLF or CR, and do not count inside quotes. One scanner
finds the records both when a file is surveyed and when a slice of it is read, so both see the same ones.
"""

import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache as once
from typing import Any

from pipelines import storage

MOST_RECORD_BYTES = 16 << 20
"""A record that is longer is quarantined: an open quote or a bomb, and nothing that a row could hold."""
BLOCK_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"


class Damaged(Exception):
    """The rest of a file cannot be read; what came before it is good."""


def records(
    uri: str, delimiter: str, quoted: bool, offset: int, length: int | None
) -> Iterator[tuple[int, int, bytes | None]]:
    """(start, stop, bytes or None where they are too many) of the records in a range that begins with one.

    Blank lines are among them: of a table they are no records, but start and stop must not jump.

    Raises:
        Damaged: what follows cannot be read.
    """
    pattern = _pattern(delimiter, quoted)
    pieces = blocks(uri, offset, length)
    data, base, final, too_long = b"", offset, False, None
    while not final:
        block = next(pieces, b"")
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


def lines(uri: str, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int, bytes | None]]:
    """`records` of a file whose records are its lines."""
    return records(uri, "", False, offset, length)


def blocks(uri: str, offset: int, length: int | None) -> Iterator[bytes]:
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
def _pattern(delimiter: str, quoted: bool) -> re.Pattern[bytes]:
    """One record with its line end; its group `open` took part where a quote is open at the end of the data.

    A quote opens only at the start of a field. Nothing in the pattern goes back, so it runs in linear time.
    """
    if not quoted:
        return re.compile(rb"[^\r\n]*+(?:\r\n?|\n|\Z)(?P<open>(?!))?")
    first = rb'(?<![^\r\n%s])"' % re.escape(delimiter.encode())
    return re.compile(rb'(?:%s(?:[^"]++|"")*+(?:"|(?P<open>\Z))|[^"\r\n]++|")*+(?:\r\n?|\n|\Z)' % first)


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
