"""Chunks of rows: all of a row in order, or one that a step draws anew."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipelines.recipe import Batch, Share
from vqcore import noise

MEMBERS = 1 << 20
"""Of a row, for keys."""


def every(batch: Batch, size: int) -> tuple[Float[Tensor, "C size n 3"], Bool[Tensor, "C size"]]:
    """(points as stored, which streamlines are real) of every chunk of every row, in order."""
    real = batch.columns["real"] & batch.mask.unsqueeze(1)
    return batch.columns["points"].unflatten(1, (-1, size)).flatten(0, 1), real.reshape(-1, size)


def drawn(batch: Batch, size: int, share: Share) -> tuple[Float[Tensor, "B size n 3"], Bool[Tensor, "B size"]]:
    """One chunk of each row: its real streamlines in an order of the step's own, with repeats where there are too few.

    The order follows from the run's seed, the step and the row's key alone.
    """
    real = batch.columns["real"] & batch.mask.unsqueeze(1)
    names = batch.keys.unsqueeze(1) * MEMBERS + torch.arange(real.shape[1], device=real.device)
    times = noise.race(share.seed, share.step, names.flatten()).view(names.shape)
    order = times.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)
    place = torch.arange(size, device=real.device)
    held = real.sum(1, keepdim=True)
    chosen = order.gather(1, place % held.clamp(min=1))
    index = chosen.view(*chosen.shape, 1, 1).expand(-1, -1, *batch.columns["points"].shape[2:])
    return batch.columns["points"].gather(1, index), place < held


def keys_of(batch: Batch, chunks: int) -> Int64[Tensor, " C"]:
    """A key of every chunk of every row, of `chunks` a row."""
    number = torch.arange(chunks, device=batch.keys.device)
    return (batch.keys.unsqueeze(1) * chunks + number).flatten()


def spread(codes: Int64[Tensor, "H h w"], held: Bool[Tensor, " C"], chunks: int) -> Int64[Tensor, "B chunks h w"]:
    """Codes of the chunks that hold something as those of all, by row; -1 elsewhere."""
    every = torch.full((len(held), *codes.shape[1:]), -1, device=held.device)
    every[held] = codes
    return every.unflatten(0, (-1, chunks))
