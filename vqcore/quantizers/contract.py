"""What every quantizer is to the code around it."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vqcore.quantizers.rows import Rows


@dataclass(frozen=True)
class Quantized:
    """What a quantizer's forward returns. `...` are the leading dimensions of its input."""

    vectors: Float[Tensor, "... D"]
    """Quantized vectors with the estimator's gradient; 0 where masked or non-finite."""
    codes: Int64[Tensor, "..."]
    """Codes in [0, K); -1 where masked or non-finite. Quantizers with levels or heads add trailing dimensions."""
    loss: Float[Tensor, ""]
    """The quantizer's own loss, already scaled so that the *mean* over workers is the global mean (W x sum / n)."""
    squared_error: Float[Tensor, ""]
    """float64, detached: this worker's sum over valid vectors and over D of |x - code vector|^2."""
    valid: Int64[Tensor, ""]
    """This worker's number of vectors that were neither masked nor non-finite."""
    non_finite: Int64[Tensor, ""]
    """This worker's number of unmasked vectors that were dropped because they held a NaN or an infinity."""


def quantized(
    x: Float[Tensor, "... D"],
    rows: Rows,
    vectors: Float[Tensor, "N D"],
    codes: Int64[Tensor, "N ..."],
    loss: Float[Tensor, ""],
    squared_error: Float[Tensor, ""],
) -> Quantized:
    """Flat results in the shape of the input `x` that `rows` were made of."""
    return Quantized(
        vectors=vectors.reshape(x.shape),
        codes=codes.reshape(*x.shape[:-1], *codes.shape[1:]),
        loss=loss,
        squared_error=squared_error.detach().double(),
        valid=rows.valid.sum(),
        non_finite=rows.non_finite,
    )


def passed_on(x: Float[Tensor, "... D"], rows: Rows, levels: tuple[int, ...] = ()) -> Quantized:
    """What a training forward returns while seeding gathers: x itself, codes -1, loss 0 attached to the graph.

    `levels` is the trailing shape of the codes of quantizers that have several a vector."""
    codes = torch.full((len(rows.x), *levels), -1, dtype=torch.int64, device=rows.x.device)
    loss = (rows.x * 0.0).sum()
    return quantized(x, rows, rows.x, codes, loss, torch.zeros_like(loss))


def per_element(count: Tensor, world: int, code_dim: int) -> Tensor:
    """W / (n D): what turns a worker's sum of squares into a loss whose mean over workers is the global mean over
    vectors and D; 0 where the global count n is 0."""
    return torch.where(count > 0, world / (code_dim * count.clamp(min=1).double()), 0.0)


class VectorBatch(NamedTuple):
    """One batch of vectors offered to seeding."""

    x: Float[Tensor, "... D"]
    mask: Bool[Tensor, "..."] | None = None
    keys: Int64[Tensor, "..."] | None = None


@runtime_checkable
class Quantizer(Protocol):
    """The calls that the training loop makes on any quantizer it finds inside a model."""

    discrete: bool
    """True where look_up(assign(x)) equals the evaluation output bit for bit."""

    @property
    def seeded(self) -> bool: ...

    @property
    def last_counts(self) -> tuple[Tensor, ...]:
        """float64 [K] for each level: global number of vectors per code in the newest update, 0 before the first."""

    def seed(self, batches: Iterable[VectorBatch]) -> str:
        """Set the codebook from data, the same for any number of workers. Returns a sentence saying what was used."""

    accumulates: bool
    """False where the source's order of look-up and update rules `accumulate` out; such a quantizer refuses it, and
    whoever trains it takes one forward a step."""

    def accumulate(self, count: int | None = None) -> AbstractContextManager[None]:
        """Several forwards with the old codebook, then one reduce and one update when the context closes."""

    def revived_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, bool [K] of its rows revived in the newest update): the loop clears their optimiser moments."""


def quantizers_in(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Quantizer]]:
    """Every outermost quantizer of `model` with its dotted module name, in registration order.

    A quantizer built from others (residual levels) answers for them, so the search stops at it.
    """
    if isinstance(model, Quantizer):
        yield prefix, model
        return
    for name, child in model.named_children():
        yield from quantizers_in(child, f"{prefix}.{name}" if prefix else name)
