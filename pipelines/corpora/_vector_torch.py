"""Tensors of .pt files: mapped, with weights_only=True, so that nothing in a file is ever run."""

import re
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipelines import storage
from pipelines.corpora._vector_arrays import CHUNK_BYTES, Block, Blocks, Found, Needed, NoNumbers, Unreadable, floats_of
from pipelines.storage import Entry

MOST_DEPTH = 8
"""Of dicts in dicts: a pickle can hold itself."""
MOST_REPEATS = 64
"""How many times a tensor may show each stored number: expand() makes a tensor of any size of a few bytes."""
DTYPES = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "bfloat16",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int16: "<i2",
    torch.int8: "|i1",
    torch.uint8: "|u1",
    torch.bool: "|b1",
}


def of_pt(entry: Entry) -> list[Found]:
    """The tensor of a .pt file, or those of a dict (of dicts; keys joined by dots). Numbers are mapped, not read.

    Raises:
        Unreadable: not what torch.save writes, cut off, or pickled classes in it.
    """
    found = []
    for key, tensor in tensors_in(entry.uri):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise Unreadable("a tensor in it is sparse, quantized or without values")
        if tensor.dtype not in DTYPES:
            raise NoNumbers(f"its elements are {tensor.dtype}, not floats or whole numbers of at most 64 bits")
        if tensor.numel() * tensor.element_size() > MOST_REPEATS * max(1, tensor.untyped_storage().nbytes()):
            raise Unreadable("a tensor in it repeats a few stored numbers without end (expand): save a copy (.clone())")
        shape = tuple(tensor.shape)
        found.append(Found(key, shape, DTYPES[tensor.dtype], "pt", {}, shape[0] if shape else 0))
    return found


def read_pt(uri: str, found: Found, start: int, stop: int, needed: Needed) -> Blocks:
    """Samples [start, stop) of one tensor that are needed."""
    tensor = dict(tensors_in(uri))[found.key].reshape(found.shape)
    step = max(1, CHUNK_BYTES // found.sample_bytes)
    for low in range(start, stop, step):
        high = min(low + step, stop)
        if needed(low, high):
            some = tensor[low:high].contiguous()
            is_brain = some.dtype == torch.bfloat16
            yield Block(low, floats_of(some.view(torch.int16).numpy().view(np.uint16)) if is_brain else some.numpy())


def tensors_in(uri: str) -> list[tuple[str, torch.Tensor]]:
    """(key, tensor) of all tensors in a .pt file, mapped. From a store, the file is copied to this node first.

    Raises:
        Unreadable: as `of_pt`.
    """
    path = str(storage.local_copy(uri))
    _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # Unpickling errors, and whatever a crafted pickle makes torch raise.
        raise Unreadable(_why(error)) from None
    found = list(_walk(content, "", 0))
    if not found:
        raise NoNumbers(f"it holds a {type(content).__name__} without tensors: save a tensor or a dict of tensors")
    return [(key, tensor.detach()) for key, tensor in found]


def _check_zip(path: str) -> None:
    """What torch.save writes is stored, never deflated, so its sizes can be trusted before anything is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise Unreadable(
            "not a file of torch.save, cut off, or in its old format: load it where it was made and save it again"
        ) from None
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in members):
        raise Unreadable("not a file of torch.save: its members are compressed")


def _walk(value: Any, key: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield key, value
    elif isinstance(value, dict) and depth < MOST_DEPTH:
        for name, item in value.items():
            yield from _walk(item, f"{key}.{name}" if key else str(name), depth + 1)


def _why(error: Exception) -> str:
    if blocked := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it holds a pickled {blocked[1]}; only tensors and plain values are loaded, never classes or code"
    return f"torch.load refused it ({type(error).__name__})"
