"""TrackVis .trk: a header of 1,000 bytes, then for each streamline a count, points with scalars, and properties."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from pipelines.corpora._streamline_files import (
    CUT_OFF,
    MOST_POINTS,
    MOST_UNITS,
    TOO_LONG,
    Cut,
    Cutter,
    Found,
    Unreadable,
    Wanted,
)

HEADER_BYTES = 1000
WALK_ABOVE = 16 << 20
"""Smaller files are one slice on their header's word. Larger ones are walked from count to count to find where slices
begin, and that reads them once more (about 1 GB/s from a local disk)."""
BLOCK = 8 << 20
MOST_LISTED = 100_000
"""Lost streamlines of a walked file that are a unit each; of more, quarantine rows would fill the memory."""
MOVED_AT_ONCE = 1 << 15
WITH_IMAGE = "write the file again with its image as reference"
SINGULAR = f"the header's affine (vox_to_ras) is singular: it must turn voxels into mm; {WITH_IMAGE}"
NO_ROOM = "its header promises more streamlines than it has room for: copy or write it again"
NEGATIVE = "damaged: a streamline of a negative number of points; copy or write the file again"


class Header(NamedTuple):
    streamlines: int
    """0: not recorded."""
    floats: int
    """Of a point: x, y, z and scalars."""
    properties: int
    order: str
    affine: list[float]
    """4 x 4, row by row: stored coordinates (voxel corner, mm) to RAS mm (voxel centre)."""
    lacks: list[str]
    """Fields that tell where the file lies in space and are not filled in."""

    @property
    def least_bytes(self) -> int:
        """Of a streamline that is one: two points."""
        return 4 + 8 * self.floats + 4 * self.properties


def cuts(file: BinaryIO, size: int, most_bytes: int, multiple: int) -> list[Cut]:
    """Runs of streamlines, and last what the header promises and the file does not hold.

    Raises:
        Unreadable: no header, or one whose affine leads nowhere.
    """
    header = _header(file)
    meta = {"floats": header.floats, "properties": header.properties, "order": header.order, "affine": header.affine}
    if header.lacks:
        meta["lacks"] = header.lacks
    room = (size - HEADER_BYTES) // header.least_bytes
    if 0 < header.streamlines <= min(room, MOST_UNITS) and size <= WALK_ABOVE:
        return [Cut(header.streamlines, size, {**meta, "first": HEADER_BYTES, "bytes": size - HEADER_BYTES})]
    cutter = Cutter(HEADER_BYTES, most_bytes, multiple)
    trouble = _walk(file, size, header, cutter)
    found = [Cut(units, length, {**meta, "first": first, "bytes": length}) for first, length, units in cutter.close()]
    missing = header.streamlines - cutter.units if header.streamlines else int(trouble is not None)
    if missing > 0:
        reason = trouble or CUT_OFF
        if header.streamlines > room:
            missing, reason = 1, NO_ROOM
        elif missing > MOST_LISTED:
            missing, reason = 1, f"{reason} ({missing - 1:,} more behind it are lost too)"
        found.append(Cut(missing, 0, {"reason": reason}))
    return found


def read(file: BinaryIO, meta: Mapping[str, Any], units: int, wanted: Wanted) -> Found:
    """(unit, points in RAS mm) of wanted streamlines. Raises Unreadable where the file ends too early."""
    file.seek(meta["first"])
    data = file.read(meta["bytes"])
    affine = np.array(meta["affine"]).reshape(4, 4)
    waiting: list[tuple[int, np.ndarray]] = []
    size = 0
    trouble = None
    for unit, points in enumerate(_stored(data, meta, units)):
        if isinstance(points, str):
            trouble = points
            break
        if wanted(unit):
            waiting.append((unit, points))
            size += len(points)
        if size > MOVED_AT_ONCE:
            yield from _moved(waiting, affine)
            waiting, size = [], 0
    yield from _moved(waiting, affine)
    if trouble:
        raise Unreadable(trouble)


def _stored(data: bytes, meta: Mapping[str, Any], units: int) -> Iterator[np.ndarray | str]:
    """Points as they are stored, and where it goes no further, why."""
    count, kind = struct.Struct(meta["order"] + "i"), np.dtype(meta["order"] + "f4")
    floats, behind = meta["floats"], 4 * meta["properties"]
    at = 0
    for _ in range(units):
        points = count.unpack_from(data, at)[0] if at + 4 <= len(data) else 0
        first, at = at + 4, at + 4 + 4 * points * floats + behind
        if points < 0 or at > len(data):
            yield NEGATIVE if points < 0 else CUT_OFF
            return
        yield np.frombuffer(data, kind, points * floats, first).reshape(points, floats)[:, :3]


def _moved(stored: Sequence[tuple[int, np.ndarray]], affine: np.ndarray) -> Found:
    """Stored coordinates to RAS mm, summed in float64: a product in BLAS has other bits on another kind of CPU."""
    if not stored:
        return
    points = np.concatenate([values for _, values in stored]).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        moved = points[:, :1] * affine[:3, 0] + points[:, 1:2] * affine[:3, 1] + points[:, 2:] * affine[:3, 2]
        world = (moved + affine[:3, 3]).astype(np.float32)
    first = 0
    for unit, values in stored:
        yield unit, world[first : first + len(values)]
        first += len(values)


def _header(file: BinaryIO) -> Header:
    head = file.read(HEADER_BYTES)
    if head[:5] != b"TRACK":
        raise Unreadable("it does not begin as a .trk file does, with TRACK: give it its own suffix")
    if len(head) < HEADER_BYTES:
        raise Unreadable("the file is cut off inside its header of 1,000 bytes: copy or write it again")
    # nibabel's reader of whole files would begin to read streamlines, too.
    from nibabel.streamlines.trk import header_2_dtype

    order: Literal["<", ">"] = "<" if head[-4:] == struct.pack("<i", HEADER_BYTES) else ">"
    found = np.frombuffer(head, header_2_dtype.newbyteorder(order))[0]
    if found["hdr_size"] != HEADER_BYTES or found["version"] not in (1, 2, 3):
        raise Unreadable(
            f"its header is of no known version ({found['version']}, {found['hdr_size']} bytes): 1 to 3 of 1000 bytes"
            " are read; write the file again"
        )
    scalars, properties = int(found["nb_scalars_per_point"]), int(found["nb_properties_per_streamline"])
    streamlines = int(found["nb_streamlines"])
    if min(scalars, properties, streamlines) < 0:
        raise Unreadable(
            f"the header says {scalars} scalars, {properties} properties and {streamlines} streamlines: none may be"
            " negative; write the file again"
        )
    affine = [float(value) for value in _affine(found).ravel()]
    lacks = (["vox_to_ras"] if _no_affine(found) else []) + ([] if found["voxel_order"] else ["voxel_order"])
    return Header(streamlines, 3 + scalars, properties, order, affine, lacks)


def _no_affine(header: np.void) -> bool:
    """Files of before TrackVis 0.5 and of programs that know no image."""
    return bool(header["version"] == 1 or header["voxel_to_rasmm"][3, 3] == 0)


def _affine(header: np.void) -> np.ndarray:
    """What brings stored coordinates to RAS mm, [4, 4]. What the header leaves out is what nibabel takes it for."""
    from nibabel.orientations import aff2axcodes
    from nibabel.streamlines.trk import get_affine_trackvis_to_rasmm

    recorded = header["voxel_to_rasmm"].astype(np.float32)
    if _no_affine(header):
        recorded = np.eye(4, dtype=np.float32)
    fields = {
        "voxel_to_rasmm": recorded,
        "voxel_sizes": header["voxel_sizes"].astype(np.float32),
        "voxel_order": np.bytes_(header["voxel_order"] or b"LPS"),
        "dimensions": header["dimensions"],
    }
    sizes = np.array([recorded.ravel().sum(), *fields["voxel_sizes"]], np.float64)
    if not np.isfinite(sizes[1:]).all() or not sizes[1:].all():
        raise Unreadable(f"the header's voxel_size is 0 or not finite: three sizes in mm are needed; {WITH_IMAGE}")
    if not np.isfinite(sizes[0]) or np.linalg.matrix_rank(recorded) < 4:
        raise Unreadable(SINGULAR)
    try:
        with np.errstate(all="ignore"):
            affine = get_affine_trackvis_to_rasmm(fields) if None not in aff2axcodes(recorded) else None
    except (ValueError, KeyError, IndexError, np.linalg.LinAlgError):
        given = bytes(header["voxel_order"]).decode("ascii", "backslashreplace")
        raise Unreadable(
            f"the header's voxel_order is {given!r}: three letters such as RAS or LPS are needed; {WITH_IMAGE}"
        ) from None
    if affine is None or not np.isfinite(affine).all():
        raise Unreadable(SINGULAR)
    return affine


def _walk(file: BinaryIO, size: int, header: Header, cutter: Cutter) -> str | None:
    """From count to count; why it had to stop early, if so. What lies behind the promised streamlines is no data."""
    ends: list[int] = []
    trouble = None
    for end in _ends(file, size, header):
        if isinstance(end, str):
            trouble = end
            break
        ends.append(end)
        if len(ends) == 65_536:
            cutter.add(ends)
            ends = []
    cutter.add(ends)
    return trouble


def _ends(file: BinaryIO, size: int, header: Header) -> Iterator[int | str]:
    count = struct.Struct(header.order + "i")
    # data[0] lies at `base` in the file; the next count is `at` bytes behind it.
    base, at, data = HEADER_BYTES, 0, b""
    file.seek(base)
    found = 0
    while not header.streamlines or found < header.streamlines:
        if len(data) - at < 4:
            if at > len(data):
                file.seek(base + at)
                data = file.read(BLOCK)
            else:
                data = data[at:] + file.read(BLOCK)
            base, at = base + at, 0
            if len(data) < 4:
                if data or header.streamlines:
                    yield CUT_OFF
                return
        (points,) = count.unpack_from(data, at)
        if not 0 <= points <= MOST_POINTS:
            yield NEGATIVE if points < 0 else TOO_LONG
            return
        at += 4 + 4 * (points * header.floats + header.properties)
        if base + at > size:
            yield CUT_OFF
            return
        found += 1
        yield base + at
