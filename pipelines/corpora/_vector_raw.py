"""Arrays that lie in a file as they are (.npy, safetensors): any range of samples is one range of bytes."""

import io
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.corpora._vector_arrays import (
    CHUNK_BYTES,
    SLICE_BYTES,
    Array,
    Block,
    Blocks,
    Found,
    Needed,
    Unreadable,
    check_numbers,
    item_bytes,
    viewed,
)
from pipelines.storage import Entry

HEAD_BYTES = 16 << 10
"""A .npy header is 128 bytes as a rule; NumPy refuses to parse more than 10,000."""
MOST_HEADER = 100 << 20
"""Of safetensors, as its own library has it."""
MOST_LACKING = 16
"""Of a cut-off array, each lost sample is a bad unit; where the header promises this many times the file, the file is
one: a header that lies must not make a million million units."""

SAFETENSORS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}


def of_npy(entry: Entry) -> list[Found]:
    """The array of a .npy file. Only its head is read.

    Raises:
        Unreadable: another kind of file, objects, or a header that promises far more than there is.
    """
    head = storage.read_bytes(entry.uri, 0, min(entry.bytes, HEAD_BYTES))
    return [raw("", npy_head(head), entry.bytes)]


def npy_head(head: bytes) -> tuple[tuple[int, ...], str, str, int]:
    """(shape, dtype, order, bytes of the header) from the first bytes of a .npy file.

    Raises:
        Unreadable: not a .npy file; NoNumbers: one of objects.
    """
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        raise Unreadable("not a .npy file" if head else "the file is empty") from None
    # 3.0 differs in the encoding of field names alone, and records are no vectors.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file)
    except Exception as odd:  # The header is a Python literal; what its parsers raise is not documented.
        raise Unreadable(f"its .npy header cannot be read ({type(odd).__name__})") from None
    check_numbers(dtype)
    return shape, dtype.str, "F" if fortran and len(shape) > 1 else "C", file.tell()


def raw(key: str, head: tuple[tuple[int, ...], str, str, int], size: int, base: int = 0) -> Found:
    """An array whose header of `head` begins at byte `base` of a file of `size` bytes."""
    shape, dtype, order, header = head
    offset = base + header
    place: dict[str, Any] = {"offset": offset, "order": order}
    found = Found(key, shape, dtype, "raw", place, shape[0] if shape else 0)
    wanted, have = math.prod(shape) * item_bytes(dtype), max(0, size - offset)
    if have >= wanted:
        return found
    lost = f"the file is cut off: its header promises {wanted:,} bytes of numbers, {have:,} are there"
    if order == "F" or len(shape) < 2 or have * MOST_LACKING < wanted:
        raise Unreadable(lost)
    return replace(found, there=have // found.sample_bytes)


def of_safetensors(entry: Entry) -> list[Found]:
    """The tensors of a safetensors file. Only its header is read.

    Raises:
        Unreadable: another kind of file, cut off, or a header that does not describe what there is.
    """
    length = int.from_bytes(storage.read_bytes(entry.uri, 0, min(8, entry.bytes)), "little")
    if entry.bytes < 8 or length > min(MOST_HEADER, entry.bytes - 8):
        raise Unreadable("not a safetensors file, or cut off inside its header" if entry.bytes else "the file is empty")
    try:
        header = json.loads(storage.read_bytes(entry.uri, 8, 8 + length))
        return [
            _tensor(name, said, 8 + length, entry.bytes)
            for name, said in sorted(header.items())
            if name != "__metadata__" and said["dtype"] in SAFETENSORS
        ]
    except Unreadable:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as odd:
        raise Unreadable(f"its safetensors header cannot be read ({type(odd).__name__})") from None


def _tensor(name: str, said: dict[str, Any], base: int, size: int) -> Found:
    shape, dtype = tuple(int(n) for n in said["shape"]), SAFETENSORS[said["dtype"]]
    first, last = (int(n) for n in said["data_offsets"])
    if min(shape, default=0) < 0 or first < 0 or last - first != math.prod(shape) * item_bytes(dtype):
        raise Unreadable("its safetensors header contradicts itself")
    if base + last > size:
        raise Unreadable(f"the file is cut off: its header promises {base + last:,} bytes, {size:,} are there")
    return Found(name, shape, dtype, "raw", {"offset": base + first, "order": "C"}, shape[0] if shape else 0)


def read_raw(uri: str, found: Found, start: int, stop: int, needed: Needed) -> Blocks:
    """Samples [start, stop) that are needed, by ranges. Mapped, a file that shrinks meanwhile would kill the process.

    Raises:
        Unreadable: the bytes are no longer there.
    """
    size = found.sample_bytes
    whole = _read_fortran(uri, found, start, stop) if found.place["order"] == "F" and needed(start, stop) else None
    # From a store, a slice is one request.
    step = max(1, (CHUNK_BYTES if storage.is_local(uri) else SLICE_BYTES) // size)
    for low in range(start, stop, step):
        high = min(low + step, stop)
        if not needed(low, high):
            continue
        if whole is not None:
            yield Block(low, whole[low - start : high - start])
            continue
        data = storage.read_bytes(uri, found.place["offset"] + low * size, found.place["offset"] + high * size)
        if len(data) < (high - low) * size:
            raise Unreadable("the file became shorter while it was read")
        yield Block(low, viewed(data, found.dtype, (high - low, *found.shape[1:])))


def _read_fortran(uri: str, found: Found, start: int, stop: int) -> Array:
    """The first axis runs fastest, so a range of samples is one run of bytes for every number of a sample."""
    # Thousands of short reads: from a store, the whole file once is cheaper.
    local, run = str(storage.local_copy(uri)), (stop - start) * item_bytes(found.dtype)
    runs = memoryview(bytearray(math.prod(found.shape[1:]) * run))
    with storage.open_read(local) as file:
        for number in range(math.prod(found.shape[1:])):
            file.seek(found.place["offset"] + (number * found.shape[0] + start) * item_bytes(found.dtype))
            if file.readinto(runs[number * run : (number + 1) * run]) < run:  # type: ignore[attr-defined]
                raise Unreadable("the file became shorter while it was read")
    return viewed(runs, found.dtype, (stop - start, *found.shape[1:]), order="F")
