"""WebDataset tars: members with one key (the name up to its first dot) are one example. Nothing is ever extracted."""

import gzip
import io
import json
import tarfile
import zlib
from collections import Counter
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pipelines import storage
from pipelines.corpora import Bad, Slice
from pipelines.corpora._image_units import (
    MOST_IMAGE_BYTES,
    SLICE_BYTES,
    Found,
    Units,
    Wanted,
    is_hidden,
    is_image,
    why_ignored,
)
from pipelines.storage import Entry

COMPRESSED_SLICE_BYTES = 256 << 20
"""Each slice of a compressed tar unpacks all that lies before it, so there are as few as a part's size allows."""
LABEL_SUFFIXES = (".cls", ".json")
MOST_LABEL_BYTES = 1 << 20
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError)


class Member(NamedTuple):
    """One image of a tar; a JSON list in a slice's meta."""

    name: str
    offset: int
    bytes: int
    refusal: str | None
    """Why it is not read."""
    label: int | None


def is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def of_tar(entry: Entry, prefix: str) -> tuple[list[Slice], Counter[str]]:
    """The images of a tar, each with its place in it, and what else it holds. Only headers and labels are read."""
    members, ignored = _listed(entry)
    compressed = not entry.name.lower().endswith(".tar")
    most = COMPRESSED_SLICE_BYTES if compressed else SLICE_BYTES
    slices, first = [], 0
    while first < len(members):
        stop, size = first, 0
        while stop < len(members) and (stop == first or size + members[stop].bytes <= most):
            size += members[stop].bytes
            stop += 1
        meta = {"layout": "tar", "members": [list(m) for m in members[first:stop]], "compressed": compressed}
        slices.append(Slice(entry.uri, prefix + entry.name, 0, stop - first, size, meta))
        first = stop
    return slices, ignored


def read_tar(piece: Slice, wanted: Wanted) -> Units:
    with storage.open_read(piece.uri) as raw:
        # Offsets count unpacked bytes; members come in order, so seeking in a compressed tar only goes forward.
        file: Any = gzip.GzipFile(fileobj=raw) if piece.meta["compressed"] else raw
        for unit, fields in enumerate(piece.meta["members"]):
            if not wanted(unit):
                continue
            member = Member(*fields)
            name = f"{piece.name}/{member.name}" if member.name else piece.name
            if member.refusal:
                yield unit, Bad(name, member.refusal)
                continue
            try:
                file.seek(member.offset)
                data = file.read(member.bytes)
            except DAMAGE as trouble:
                yield unit, Bad(name, f"could not be read from the archive: {trouble}")
                continue
            if len(data) < member.bytes:
                yield unit, Bad(name, "the archive is cut off inside it")
            else:
                yield unit, Found(name, data, member.label, group=f"{piece.name}/{_key(member.name)}")


def _listed(entry: Entry) -> tuple[list[Member], Counter[str]]:
    members: list[Member] = []
    labels: dict[str, int] = {}
    ignored: Counter[str] = Counter()
    trouble = None
    try:
        with storage.open_read(entry.uri) as raw:
            plain = entry.name.lower().endswith(".tar")
            unpacked: Any = raw if plain else gzip.GzipFile(fileobj=raw)
            # Buffered, so that looking back at the end mark does not unpack a compressed tar once more. Of a plain one
            # little more is read than the headers.
            file = io.BufferedReader(unpacked, 1 << 14 if plain else 1 << 20)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header it has seen
                    _sort_in(info, tar, members, labels, ignored)
                trouble = _missing_end(file, tar.offset)
    except DAMAGE as damage:
        trouble = f"the archive is cut off or damaged: {damage}"
    found = [member._replace(label=labels.get(_key(member.name))) for member in members]
    if trouble:
        found.append(Member("", -1, 0, f"{trouble} (after {len(members)} images)", None))
    return found, ignored


def _missing_end(file: io.BufferedReader, offset: int) -> str | None:
    """tarfile stops without a word at a header it cannot read, so whether the end is the end is looked at here."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "the archive has no end mark: it was cut off"
    return "the archive is damaged: what follows is no header" if block.strip(b"\0") else None


def _sort_in(
    info: tarfile.TarInfo, tar: tarfile.TarFile, members: list[Member], labels: dict[str, int], ignored: Counter[str]
) -> None:
    if info.isdir():
        return
    if refusal := _unsafe(info):
        members.append(Member(info.name, -1, 0, refusal, None))
    elif is_image(info.name) and not is_hidden(info.name):
        members.append(Member(info.name, info.offset_data, info.size, None, None))
    elif info.name.endswith(LABEL_SUFFIXES) and info.size <= MOST_LABEL_BYTES:
        labels.update(_label(info, tar))
    else:
        ignored[why_ignored(info.name)] += 1


def _unsafe(info: tarfile.TarInfo) -> str | None:
    """Members that could do harm to who unpacks the archive are not taken for images here either."""
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        return "its path climbs out of the archive"
    if not info.isreg() or info.issparse():
        return "it is a link, a device or a sparse file, not plain data"
    if info.size > MOST_IMAGE_BYTES:
        return f"it has {info.size:,} bytes; at most {MOST_IMAGE_BYTES:,} are read"
    return None


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _label(info: tarfile.TarInfo, tar: tarfile.TarFile) -> dict[str, int]:
    """A whole number, alone or as `label` or `cls` of a JSON object. Anything else is other metadata."""
    file = tar.extractfile(info)
    try:
        value = json.loads(file.read() if file else b"")
    except (ValueError, RecursionError):
        return {}
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    return {_key(info.name): value} if isinstance(value, int) and not isinstance(value, bool) else {}
