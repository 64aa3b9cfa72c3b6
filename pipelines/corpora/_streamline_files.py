"""What the formats of streamlines share: which files they are, how those are opened, how large ones are cut."""

import io
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from jaxtyping import Float32

from pipelines import storage
from pipelines.errors import Failed, Refused
from pipelines.storage import Entry

EXTENSIONS = (".trk", ".tck", ".trx")
SLICE_BYTES = 64 << 20
"""Where large files are cut: well under the 256 MiB of a part, so that parts come out even."""
COMPRESSED_SLICE_BYTES = 256 << 20
"""Each slice of a compressed archive's member unpacks all that lies before it, so there are as few as may be."""
MOST_POINTS = 1_000_000
"""Of one streamline. More is damage: at a tenth of a millimetre a step it would be 100 m long."""
MOST_UNITS = 1 << 18
"""Streamlines of a slice: a chunk may hold any of its slice, so a worker has all of them in memory, 0.2 GB at 64 points
each."""
TOO_LONG = f"damaged: a streamline of more than {MOST_POINTS:,} points; copy or write the file again"
CUT_OFF = "the file is cut off before this streamline: copy or write it again"
MOST_RATIO, SMALL_MEMBER = 100, 16 << 20
"""An archive's member may unpack to so many times its size, or to so many bytes: coordinates shrink to a half or so."""

EMPTY = "the file is empty: copy or write it again, or leave it out"
BROKEN_ARCHIVE = "the archive is cut off or damaged: a whole .zip or .trx is needed; copy or write it again"

Points = Float32[np.ndarray, "P 3"]
Wanted = Callable[[int], bool]
Found = Iterator[tuple[int, Points]]


class Unreadable(ValueError):
    """Why a file, or what is left of it, holds no streamlines that can be had."""


DAMAGE = (
    Unreadable,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    Refused,
    Failed,
)
"""What opening and reading a damaged file or archive raises. RuntimeError: zipfile has it for encrypted members."""


@dataclass(frozen=True)
class Cut:
    """Some successive streamlines of a file."""

    units: int
    bytes: int
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON values its format needs to read them; a `reason` where they cannot be read."""


class Source(NamedTuple):
    """One file of streamlines, perhaps inside an archive."""

    uri: str
    name: str
    """Relative to the source, through the archive: `bundles.zip/sub_1/AF_L.trk`."""
    bytes: int
    member: int | None = None
    """Place in the archive's directory."""
    compressed: bool = False
    refusal: str | None = None
    """Why it is not opened."""

    @property
    def slice_bytes(self) -> int:
        return COMPRESSED_SLICE_BYTES if self.compressed else SLICE_BYTES


@contextmanager
def opened(uri: str, member: int | None) -> Iterator[BinaryIO]:
    """A seekable file, or one member of a zip read in place: nothing is extracted."""
    with storage.open_read(uri) as raw:
        if member is None:
            yield raw
            return
        with zipfile.ZipFile(raw) as archive, member_of(archive, raw, archive.infolist()[member]) as file:
            yield file


def member_of(archive: zipfile.ZipFile, raw: BinaryIO, info: zipfile.ZipInfo) -> BinaryIO:
    """One member as a seekable file. What is stored as it is, is read in place: zipfile would read up to it."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return cast(BinaryIO, archive.open(info))
    raw.seek(info.header_offset)
    head = raw.read(30)
    if head[:4] != b"PK\3\4" or len(head) < 30:
        raise Unreadable(BROKEN_ARCHIVE)
    first = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
    return cast(BinaryIO, io.BufferedReader(_Window(raw, first, info.file_size)))


class _Window(io.RawIOBase):
    """Bytes [first, first + size) of a file, which it leaves open."""

    def __init__(self, raw: BinaryIO, first: int, size: int) -> None:
        self._raw, self._first, self._size, self._at = raw, first, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, into: Any) -> int:
        self._raw.seek(self._first + self._at)
        data = self._raw.read(max(0, min(len(into), self._size - self._at)))
        into[: len(data)] = data
        self._at += len(data)
        return len(data)


def is_streamlines(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def is_zip(name: str) -> bool:
    return name.lower().endswith(".zip")


def is_hidden(name: str) -> bool:
    """Names that belong to a file system and hold no data, such as the `._AF.trk` that macOS puts into archives."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts)


def why_ignored(name: str) -> str:
    """Why a file is no unit, in words that are few over a whole corpus."""
    if is_hidden(name):
        return "hidden file"
    suffix = PurePosixPath(name).suffix.lower()
    known = len(suffix) <= 6 and suffix[1:].isalnum() and not suffix[1:].isdigit()
    return f"not a streamline file ({suffix if known else 'no suffix'})"


def sources_in(entries: Sequence[Entry], prefix: str) -> tuple[list[Source], Counter[str]]:
    """Files of streamlines, those inside zips too, in the order of their names; and what else there is."""
    found: list[Source] = []
    ignored: Counter[str] = Counter()
    for entry in entries:
        name = prefix + entry.name
        if is_hidden(entry.name) or not (is_streamlines(entry.name) or is_zip(entry.name)):
            ignored[why_ignored(entry.name)] += 1
        elif is_zip(entry.name):
            members, left = _members(entry, name)
            found += members
            ignored.update(left)
        else:
            found.append(Source(entry.uri, name, entry.bytes, refusal=None if entry.bytes else EMPTY))
    return found, ignored


def _members(entry: Entry, name: str) -> tuple[list[Source], Counter[str]]:
    found: list[Source] = []
    ignored: Counter[str] = Counter()
    try:
        with storage.open_read(entry.uri) as raw, zipfile.ZipFile(raw) as archive:
            for place, info in enumerate(archive.infolist()):
                if info.is_dir():
                    continue
                if is_hidden(info.filename) or not is_streamlines(info.filename):
                    ignored[why_ignored(info.filename)] += 1
                    continue
                compressed = info.compress_type != zipfile.ZIP_STORED
                refusal = refused_member(info, entry.bytes) or (None if info.file_size else EMPTY)
                found.append(Source(entry.uri, f"{name}/{info.filename}", info.file_size, place, compressed, refusal))
    except DAMAGE:
        return [Source(entry.uri, name, entry.bytes, refusal=BROKEN_ARCHIVE)], Counter()
    return sorted(found, key=lambda source: source.name), ignored


def refused_member(info: zipfile.ZipInfo, archive_bytes: int) -> str | None:
    """Why a member is not even opened, from the archive's directory alone."""
    path = PurePosixPath(info.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        return "its path climbs out of the archive: pack it again under a path inside"
    if info.flag_bits & 1:
        return "it is encrypted: pack it again without a password"
    if info.compress_size > archive_bytes:
        return BROKEN_ARCHIVE
    if info.file_size > max(SMALL_MEMBER, MOST_RATIO * info.compress_size):
        return f"it unpacks to more than {MOST_RATIO} times its size, as bombs do: pack it uncompressed"
    return None


class Cutter:
    """Cuts a file into runs of successive streamlines as their ends become known; only the cuts are kept."""

    def __init__(self, start: int, most_bytes: int, multiple: int) -> None:
        """`multiple`: cuts hold so many streamlines or a multiple, where that many fit, so that no chunk is cut."""
        self.cuts: list[tuple[int, int, int]] = []
        """(first byte, bytes, streamlines)."""
        self.units = 0
        self._start, self._most, self._multiple = start, most_bytes, multiple
        self._ends = np.empty(0, np.int64)

    def add(self, ends: Sequence[int] | np.ndarray) -> None:
        """First byte behind each of the next streamlines."""
        self._ends = np.concatenate([self._ends, np.asarray(ends, np.int64)])
        self.units += len(ends)
        while len(self._ends) and (self._ends[-1] - self._start > self._most or len(self._ends) > MOST_UNITS):
            fit = max(1, int(np.searchsorted(self._ends, self._start + self._most, side="right")))
            fit = min(fit, MOST_UNITS)
            self._cut(fit - fit % self._multiple or fit)

    def close(self) -> list[tuple[int, int, int]]:
        if len(self._ends):
            self._cut(len(self._ends))
        return self.cuts

    def _cut(self, units: int) -> None:
        stop = int(self._ends[units - 1])
        self.cuts.append((self._start, stop - self._start, units))
        self._start, self._ends = stop, self._ends[units:]
