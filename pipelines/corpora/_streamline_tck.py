"""MRtrix .tck: a text header, then float32 points in RAS mm; NaN NaN NaN ends a streamline, inf inf inf the file."""

import re
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from pipelines.corpora._streamline_files import MOST_POINTS, TOO_LONG, Cut, Cutter, Found, Unreadable, Wanted

MOST_HEADER_BYTES = 1 << 20
BLOCK_POINTS = 1 << 20
POINT = 12
CUT_OFF = "the file is cut off: its end mark is missing; copy or write it again"


def cuts(file: BinaryIO, size: int, most_bytes: int, multiple: int) -> list[Cut]:
    """Runs of streamlines; a last unit stands for what was cut off.

    Counts in the header are often wrong (a tool that was stopped), so the file is read once to look for the ends of
    streamlines, at about 1 GB/s from a local disk. A streamline without points is none, as in nibabel.

    Raises:
        Unreadable: no header.
    """
    first, order = _header(file)
    if first > size:
        raise Unreadable(
            "the file is cut off inside its header: the points begin behind its end; copy or write it again"
        )
    cutter = Cutter(first, most_bytes, multiple)
    trouble = _scan(file, first, size, order, cutter)
    meta = {"order": order}
    found = [Cut(units, length, {**meta, "first": start, "bytes": length}) for start, length, units in cutter.close()]
    return [*found, Cut(1, 0, {"reason": trouble})] if trouble else found


def read(file: BinaryIO, meta: Mapping[str, Any], units: int, wanted: Wanted) -> Found:
    """(unit, points in RAS mm) of wanted streamlines."""
    file.seek(meta["first"])
    data = file.read(meta["bytes"])
    points = np.frombuffer(data, meta["order"] + "f4", len(data) // POINT * 3).reshape(-1, 3)
    ends = np.flatnonzero(np.isnan(points).all(1))
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    real = ends > starts
    for unit, (start, end) in enumerate(zip(starts[real], ends[real], strict=True)):
        if wanted(unit):
            yield unit, points[start:end].astype("<f4")
    if real.sum() < units:
        raise Unreadable("the file has changed since it was looked at: ingest again into a new folder")


def _header(file: BinaryIO) -> tuple[int, str]:
    """(first byte of data, byte order). Defaults are nibabel's."""
    head = file.read(MOST_HEADER_BYTES)
    if not head.startswith(b"mrtrix tracks"):
        raise Unreadable("it does not begin as a .tck file does, with 'mrtrix tracks': give it its own suffix")
    end = re.search(rb"\nEND[ \t\r]*\n", head)
    if end is None:
        raise Unreadable(
            f"the file is cut off inside its header: no line END in its first {MOST_HEADER_BYTES:,} bytes; copy or"
            " write it again"
        )
    pairs = [line.partition(b":") for line in head[: end.start()].splitlines()[1:]]
    told = {key.strip(): value.strip() for key, colon, value in pairs if colon}
    kind, where = told.get(b"datatype", b"Float32LE"), told.get(b"file", b". %d" % end.end())
    if kind not in (b"Float32", b"Float32LE", b"Float32BE"):
        raise Unreadable(
            f"its numbers are not float32 but {_shown(kind)}: Float32, Float32LE and Float32BE are read; convert it"
        )
    place = re.fullmatch(rb"\.\s+(\d{1,18})", where)
    if place is None:
        raise Unreadable(
            f"the header points outside the file ({_shown(where)}): 'file: . OFFSET' is read; join the two files"
        )
    return int(place[1]), ">" if kind.endswith(b"BE") else "<"


def _shown(value: bytes) -> str:
    """What a header says, for people."""
    return repr(value[:40].decode("ascii", "backslashreplace"))


def _scan(file: BinaryIO, first: int, size: int, order: str, cutter: Cutter) -> str | None:
    """Find the ends of all streamlines; why the end is none, if so."""
    file.seek(first)
    total = (size - first) // POINT
    # Counted in points from `first`: where the block begins, and the end mark of the streamline before.
    base, before = 0, -1
    last = np.zeros(3, np.float32)
    while base < total:
        data = file.read(min(BLOCK_POINTS, total - base) * POINT)
        block = np.frombuffer(data, order + "f4", len(data) // POINT * 3).reshape(-1, 3)
        if not len(block):
            return CUT_OFF
        ends = np.flatnonzero(np.isnan(block[:, 0]))
        ends = ends[np.isnan(block[ends]).all(1)] + base
        gaps = np.diff(ends, prepend=before) - 1
        if (gaps > MOST_POINTS).any() or (not len(ends) and base + len(block) - before > MOST_POINTS):
            good = ends[: int(np.argmax(gaps > MOST_POINTS))] if len(ends) else ends
            cutter.add(first + (good[gaps[: len(good)] > 0] + 1) * POINT)
            return TOO_LONG
        cutter.add(first + (ends[gaps > 0] + 1) * POINT)
        before = int(ends[-1]) if len(ends) else before
        base += len(block)
        last = block[-1]
    whole = (size - first) % POINT == 0 and base - before == 2 and np.isinf(last).all()
    return None if whole else CUT_OFF
