"""TRX: a zip of plain arrays, positions [V, 3] in RAS mm and offsets [S + 1], beside a header in JSON.

Read here member by member: trx-python opens files for writing, and unpacks compressed ones to disk by their own names.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipelines.corpora._streamline_files import (
    CUT_OFF,
    MOST_POINTS,
    MOST_UNITS,
    TOO_LONG,
    Cut,
    Found,
    Unreadable,
    Wanted,
    member_of,
    refused_member,
)

MOST_HEADER_BYTES = 1 << 20
POSITIONS = re.compile(r"positions\.3\.(float16|float32|float64)")
OFFSETS = re.compile(r"offsets\.(uint8|uint16|uint32|uint64|int16|int32|int64)")


class Array(NamedTuple):
    info: zipfile.ZipInfo
    kind: np.dtype
    items: int


def cuts(file: BinaryIO, size: int, most_bytes: int, multiple: int) -> list[Cut]:
    """Runs of streamlines of about equal size, from the header and the sizes of the arrays alone.

    Raises:
        Unreadable: no arrays, or arrays that do not fit the header.
    """
    with zipfile.ZipFile(file) as archive:
        streamlines, points = _counts(archive)
        positions, offsets = _array(archive, POSITIONS, size), _array(archive, OFFSETS, size)
    if positions.items != 3 * points or offsets.items != streamlines + 1:
        raise Unreadable("its arrays have other sizes than its header says: write it again")
    if not streamlines:
        return []
    each = positions.kind.itemsize * 3 * points / streamlines + offsets.kind.itemsize
    units = max(1, min(MOST_UNITS, int(most_bytes / each)))
    units = units - units % multiple or units
    starts = range(0, streamlines, units)
    counts = [min(units, streamlines - first) for first in starts]
    return [Cut(n, int(n * each), {"first": first, "size": size}) for first, n in zip(starts, counts, strict=True)]


def read(file: BinaryIO, meta: Mapping[str, Any], units: int, wanted: Wanted) -> Found:
    """(unit, points in RAS mm) of wanted streamlines."""
    with zipfile.ZipFile(file) as archive:
        positions = _array(archive, POSITIONS, meta["size"])
        offsets = _array(archive, OFFSETS, meta["size"])
        with member_of(archive, file, offsets.info) as member:
            member.seek(meta["first"] * offsets.kind.itemsize)
            bounds = np.frombuffer(member.read((units + 1) * offsets.kind.itemsize), offsets.kind).astype(np.int64)
        lengths = np.diff(bounds)
        if len(bounds) <= units or bounds[0] < 0 or (lengths < 0).any() or 3 * bounds[-1] > positions.items:
            raise Unreadable("damaged: its offsets do not rise from 0 to the number of points; write it again")
        if (lengths > MOST_POINTS).any():
            raise Unreadable(TOO_LONG)
        point = 3 * positions.kind.itemsize
        with member_of(archive, file, positions.info) as member:
            member.seek(int(bounds[0]) * point)
            for unit, length in enumerate(lengths.tolist()):
                data = member.read(length * point)
                if len(data) < length * point:
                    raise Unreadable(CUT_OFF)
                if wanted(unit):
                    with np.errstate(over="ignore"):
                        found = np.frombuffer(data, positions.kind).reshape(-1, 3).astype("<f4")
                    yield unit, found


def _counts(archive: zipfile.ZipFile) -> tuple[int, int]:
    """(streamlines, points) as the header says."""
    try:
        info = archive.getinfo("header.json")
        if info.file_size > MOST_HEADER_BYTES:
            raise ValueError(info.file_size)
        header = json.loads(archive.read(info))
        streamlines, points = header["NB_STREAMLINES"], header["NB_VERTICES"]
        if min(streamlines, points) < 0 or not isinstance(streamlines, int) or not isinstance(points, int):
            raise ValueError(streamlines, points)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise Unreadable(
            "the header is not that of a .trx file: NB_STREAMLINES and NB_VERTICES are needed in header.json"
        ) from None
    return streamlines, points


def _array(archive: zipfile.ZipFile, name: re.Pattern[str], size: int) -> Array:
    for info in archive.infolist():
        if found := name.fullmatch(info.filename):
            if refusal := refused_member(info, size):
                raise Unreadable(refusal)
            kind = np.dtype(found[1]).newbyteorder("<")
            return Array(info, kind, info.file_size // kind.itemsize)
    raise Unreadable(
        "it holds no positions or no offsets: positions.3.float32 and offsets.uint64 are needed, or other widths"
    )
