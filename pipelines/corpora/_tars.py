"""Tar archives as slices of members, found by their headers and read in place. Nothing is ever extracted."""

import gzip
import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pipelines import storage
from pipelines.corpora import Bad, Slice
from pipelines.storage import Entry

SLICE_BYTES = 64 << 20
"""Where an archive is cut: well under the 256 MiB of a part, so that parts come out even."""
COMPRESSED_SLICE_BYTES = 256 << 20
"""Each slice of a compressed tar unpacks all that lies before it, so there are as few as a part's size allows."""
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError)


class Member(NamedTuple):
    """One unit of a tar; a JSON list in a slice's meta."""

    name: str
    offset: int
    bytes: int
    refusal: str | None
    """Why it is not read."""
    label: int | None = None


Choose = Callable[[tarfile.TarInfo, tarfile.TarFile], str | None]
"""None for a member that is a unit; else why it is left out, or "" where it is metadata and not counted."""


def is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def list_members(entry: Entry, choose: Choose, most_bytes: int) -> tuple[list[Member], Counter[str]]:
    """The units of a tar and the reasons why other members are none. Only headers are read, and what `choose` reads.

    Members that could do harm to who unpacks the archive, or have more than `most_bytes`, are units with a refusal.
    Where the archive ends before its end mark, the last unit says so.
    """
    members: list[Member] = []
    ignored: Counter[str] = Counter()
    trouble = None
    try:
        with storage.open_read(entry.uri) as raw:
            compressed = _is_compressed(entry.name)
            unpacked: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
            # Buffered, so that looking back at the end mark does not unpack a compressed tar once more. Of a plain one
            # little more is read than the headers.
            file = io.BufferedReader(unpacked, 1 << 20 if compressed else 1 << 14)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header it has seen
                    if info.isdir():
                        continue
                    if refusal := _unsafe(info, most_bytes):
                        members.append(Member(info.name, -1, 0, refusal))
                    elif (reason := choose(info, tar)) is None:
                        members.append(Member(info.name, info.offset_data, info.size, None))
                    elif reason:
                        ignored[reason] += 1
                trouble = _missing_end(file, tar.offset)
    except DAMAGE as damage:
        trouble = f"the archive is cut off or damaged: {damage}"
    if trouble:
        members.append(Member("", -1, 0, f"{trouble} (after {len(members)} members)"))
    return members, ignored


def slices_of(entry: Entry, prefix: str, members: list[Member], meta: dict[str, Any]) -> list[Slice]:
    """The members as slices, each with their places in the archive beside `meta`."""
    compressed = _is_compressed(entry.name)
    most = COMPRESSED_SLICE_BYTES if compressed else SLICE_BYTES
    slices, first = [], 0
    while first < len(members):
        stop, size = first, 0
        while stop < len(members) and (stop == first or size + members[stop].bytes <= most):
            size += members[stop].bytes
            stop += 1
        places = {"members": [list(m) for m in members[first:stop]], "compressed": compressed}
        slices.append(Slice(entry.uri, prefix + entry.name, 0, stop - first, size, {**meta, **places}))
        first = stop
    return slices


def read_members(piece: Slice, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Member, bytes | Bad]]:
    """(unit, member, its bytes or why there are none) of every wanted member of a slice."""
    with storage.open_read(piece.uri) as raw:
        # Offsets count unpacked bytes; members come in order, so seeking in a compressed tar only goes forward.
        file: Any = gzip.GzipFile(fileobj=raw) if piece.meta["compressed"] else raw
        for unit, fields in enumerate(piece.meta["members"]):
            if not wanted(unit):
                continue
            member = Member(*fields)
            name = f"{piece.name}/{member.name}" if member.name else piece.name
            if member.refusal:
                yield unit, member, Bad(name, member.refusal)
                continue
            try:
                file.seek(member.offset)
                data = file.read(member.bytes)
            except DAMAGE as trouble:
                yield unit, member, Bad(name, f"could not be read from the archive: {trouble}")
                continue
            cut = len(data) < member.bytes
            yield unit, member, Bad(name, "the archive is cut off inside it") if cut else data


def _is_compressed(name: str) -> bool:
    return not name.lower().endswith(".tar")


def _missing_end(file: io.BufferedReader, offset: int) -> str | None:
    """tarfile stops without a word at a header it cannot read, so whether the end is the end is looked at here."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "the archive has no end mark: it was cut off"
    return "the archive is damaged: what follows is no header" if block.strip(b"\0") else None


def _unsafe(info: tarfile.TarInfo, most_bytes: int) -> str | None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        return "its path climbs out of the archive"
    if not info.isreg() or info.issparse():
        return "it is a link, a device or a sparse file, not plain data"
    if info.size > most_bytes:
        return f"it has {info.size:,} bytes; at most {most_bytes:,} are read"
    return None
