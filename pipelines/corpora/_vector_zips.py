"""Arrays of .npz archives, never extracted. Deflated and small members are read through, and checked by their checksum
before a row of them goes out; of large stored ones any range is read, unchecked as in a .npy file."""

import struct
import zipfile
import zlib
from functools import lru_cache
from typing import IO, Any

from pipelines import storage
from pipelines.corpora._vector_arrays import (
    CHUNK_BYTES,
    SLICE_BYTES,
    Block,
    Blocks,
    Found,
    Needed,
    NoNumbers,
    Unreadable,
    viewed,
)
from pipelines.corpora._vector_raw import HEAD_BYTES, npy_head, raw
from pipelines.errors import Failed, Refused
from pipelines.storage import Entry

MOST_RATIO = 200
"""Deflate can reach 1,032; numbers that shrink this much are a bomb or hold next to nothing."""
FREE_BYTES = 64 << 20
"""Below this, any ratio is let pass: an array of zeros is no danger."""
MOST_FORTRAN = 256 << 20
"""A deflated array in Fortran order is inflated as a whole for every slice."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
# zipfile: RuntimeError for what is encrypted, NotImplementedError for methods it does not know.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    struct.error,
)


def of_npz(entry: Entry) -> list[Found]:
    """The arrays of an archive. Its directory and the head of each member are read.

    Raises:
        Unreadable: no zip, cut off, or a member whose sizes contradict each other or promise a bomb.
    """
    try:
        with storage.open_read(entry.uri) as file, zipfile.ZipFile(file) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            if sum(info.compress_size for info in members) > entry.bytes:
                raise Unreadable("its members overlap: the archive is a bomb or damaged")
            return _numbers(archive, file, members, entry)
    except (Unreadable, Refused, Failed):
        raise
    except DAMAGE as damage:
        raise Unreadable(f"not a .npz archive that can be read ({type(damage).__name__})") from None


def _numbers(archive: zipfile.ZipFile, file: IO[bytes], members: list[zipfile.ZipInfo], entry: Entry) -> list[Found]:
    found, others = [], None
    for info in members:
        try:
            found.append(_member(archive, file, info, entry))
        except NoNumbers as reason:
            # Beside arrays of numbers, names or objects are no harm: they are never read.
            others = others or reason
    if others and not found:
        raise others
    return found


def _member(archive: zipfile.ZipFile, file: IO[bytes], info: zipfile.ZipInfo, entry: Entry) -> Found:
    if info.file_size > max(FREE_BYTES, MOST_RATIO * info.compress_size):
        ratio = info.file_size // max(1, info.compress_size)
        raise Unreadable(f"a member would inflate to {ratio:,} times its size: at most {MOST_RATIO} times is read")
    with archive.open(info) as member:
        head = npy_head(member.read(HEAD_BYTES))
    key = info.filename.removesuffix(".npy")
    found = raw(key, head, info.file_size)
    if found.there < (found.shape[0] if found.shape else 0):
        raise Unreadable("a member is shorter than its own header promises")
    stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    if stored and info.file_size > SLICE_BYTES:
        return raw(key, head, entry.bytes, _data_offset(file, info))
    if found.place["order"] == "F" and info.file_size > MOST_FORTRAN:
        raise Unreadable("a deflated array in Fortran order of more than 256 MiB: save it in C order")
    place = {**found.place, "member": info.filename}
    return Found(key, found.shape, found.dtype, "zipped", place, found.there, coarse=True)


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: its local header may be longer than the directory's entry."""
    file.seek(info.header_offset)
    mark, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    if mark != b"PK\3\4":
        raise Unreadable("not a .npz archive that can be read (a member is not where its directory says)")
    return info.header_offset + LOCAL_HEADER.size + int(name) + int(extra)


def read_zipped(uri: str, found: Found, start: int, stop: int, needed: Needed) -> Blocks:
    """Samples [start, stop) of a deflated or small member: what lies before them is inflated and dropped.

    Raises:
        Unreadable: the member is damaged.
    """
    if not needed(start, stop):
        return
    size = found.sample_bytes
    step = max(1, CHUNK_BYTES // size)
    try:
        _check_sum(uri, found.place["member"])
        with (
            storage.open_read(uri) as file,
            zipfile.ZipFile(file) as zipped,
            zipped.open(found.place["member"]) as data,
        ):
            data.seek(found.place["offset"])
            if found.place["order"] == "F":
                whole = data.read(found.shape[0] * size)
                yield Block(start, viewed(whole, found.dtype, found.shape, order="F")[start:stop])
                return
            _skip(data, start * size)
            for low in range(start, stop, step):
                high = min(low + step, stop)
                some = data.read((high - low) * size)
                if needed(low, high):
                    yield Block(low, viewed(some, found.dtype, (high - low, *found.shape[1:])))
    except (Refused, Failed):
        raise
    except DAMAGE as damage:
        raise Unreadable(f"its member of the archive is damaged ({type(damage).__name__})") from None


@lru_cache(maxsize=1024)
def _check_sum(uri: str, member: str) -> None:
    """Read a member to its end, where zipfile compares the checksum; once a process.

    Damaged bytes can inflate to numbers that look like any others, and only the end tells. Rows that went out before
    could not be called back.
    """
    with storage.open_read(uri) as file, zipfile.ZipFile(file) as archive, archive.open(member) as data:
        while data.read(CHUNK_BYTES):
            pass


def _skip(data: Any, count: int) -> None:
    while count and (dropped := len(data.read(min(count, CHUNK_BYTES)))):
        count -= dropped
