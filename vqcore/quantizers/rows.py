"""What every quantizer does to its input first: check it, flatten it, widen it, and set apart what it must not use."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from vqcore import noise
from vqcore.codebook import finite_rows, known_all, known_finite, only


class Rows(NamedTuple):
    """A quantizer's input as N vectors."""

    x: Float[Tensor, "N D"]
    """In the codebook's type, attached to the graph; 0, without a gradient, where not valid."""
    valid: Bool[Tensor, " N"]
    """Neither masked nor non-finite."""
    non_finite: Int64[Tensor, ""]
    """Number of unmasked vectors with a NaN or an infinity."""
    whole: bool
    """Known to be all valid, so that nothing has to be set apart. Only ever known on CPU, where asking is free."""


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside, whatever the device: a bfloat16 product assigns about 2 % of the rows to other codes."""
    if not isinstance(device, torch.device):  # NumPy's arrays have a device too, a string
        raise ValueError(f"x is on a device {device!r} of another library; give a tensor, as torch.from_numpy(x) makes")
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def rows_of(
    x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None, code_dim: int, dtype: torch.dtype
) -> Rows:
    """Flatten `x` to N vectors of `dtype`. Raises ValueError where shapes or types do not fit."""
    if x.ndim == 0 or x.shape[-1] != code_dim or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; this quantizer takes floating point [..., {code_dim}]"
        )
    flat = x.reshape(-1, code_dim).to(dtype)
    with torch.no_grad():
        if mask is None and known_finite(flat):
            every = torch.ones(len(flat), dtype=torch.bool)
            return Rows(flat, every, torch.zeros((), dtype=torch.int64), True)
        valid = finite = finite_rows(flat)
        bad = ~finite
        if mask is not None:
            wanted = _flat("mask", mask, x, torch.bool)
            valid, bad = finite & wanted, wanted & bad
        whole = known_all(valid)
    return Rows(flat if whole else only(valid, flat), valid, bad.sum(), whole)


def keys_of(
    keys: Int64[Tensor, "*shape"] | None, x: Float[Tensor, "*shape D"], rank: int, seen: int
) -> Int64[Tensor, " N"]:
    """The flat keys of `x`; without keys they are (rank, position), positions going on after the `seen` vectors that
    this worker has shown in the same update. Raises ValueError on another shape or type."""
    if keys is None:
        count = x[..., 0].numel()
        return noise.default_keys(count, rank, x.device, start=seen)
    return _flat("keys", keys, x, torch.int64)


def _flat(name: str, value: Shaped[Tensor, "*shape"], x: Tensor, dtype: torch.dtype) -> Tensor:
    if value.shape != x.shape[:-1] or value.dtype != dtype:
        raise ValueError(
            f"{name} is {value.dtype} of shape {tuple(value.shape)}; "
            f"x of shape {tuple(x.shape)} needs {dtype} of shape {tuple(x.shape[:-1])}"
        )
    return value.reshape(-1)
