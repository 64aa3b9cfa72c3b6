"""Lloyd's k-means over data of any size: every pass reads all batches of all workers once and keeps none of them.

The centres are the same, bit for bit, for any number of workers and any split into batches: a row's code does not
depend on the rows around it, and `Totals` adds without rounding, so no order of adding can matter.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vqcore import assign
from vqcore.assign import Metric
from vqcore.codebook import finite_rows, unit
from vqcore.reduction import Reduction, resolve

_TILE = 2**16  # numbers widened to float64 at a time: they stay in cache, and no second N x D array is written
_COARSE, _FINE = 2.0**-16, 2.0**-39  # steps of the two parts of a number, in units of the scale
_TO_WHOLE = 1.5 * 2.0**52  # a float64 that this was added to and taken from is rounded to whole numbers


class Fitted(NamedTuple):
    """What `lloyd` found, the same on all workers."""

    vectors: Float[Tensor, "K D"]
    objective: float
    """Sum over all rows of the squared distance from the nearest of `vectors`."""
    rows: int
    """Vectors of all workers that took part, every one of them in every pass."""
    left_out: int
    """Vectors left out for a NaN or an infinity, and with "cosine" for being 0."""
    passes: int
    """How often the batches were read: once for every move of the centres, and once to find that none moves any more
    or, after `iterations` moves, to measure the objective."""


@torch.no_grad()
def lloyd(
    batches: Callable[[], Iterable[Float[Tensor, "... D"]]],
    start: Float[Tensor, "K D"],
    *,
    metric: Metric = "euclidean",
    iterations: int = 10,
    reduce: Reduction | None = None,
) -> Fitted:
    """Moves every centre to the mean of the rows nearest to it, until none moves or `iterations` times (Lloyd 1982).

    A centre that is nearest to no row stays. With "cosine" rows and centres are directions and the means are normalised
    again (spherical k-means, Dhillon and Modha 2001). To go on from what a quantizer made of its sample, over all data:

        q.seed(VectorBatch(x) for x in batches())
        q.codebook.set_vectors(lloyd(batches, q.codebook.vectors, metric=q.metric).vectors)

    Arguments:
        batches: called once a pass; gives this worker's rows, in batches of any sizes and in any order. Workers may
            have different numbers of batches, also none. Masked rows are not for it: give x[mask].
        start: the first centres, the same on all workers. Its type is that of the search and of the result.
        metric: "euclidean" or "cosine".
        iterations: how often the centres move at most; 0 measures `start`.
        reduce: sums over workers, once a pass; None: torch.distributed's default group if there is one at the call,
            else nothing.

    Memory: one batch and its codes, and 16 K (D + 1) bytes for counts and sums, which is also what a reduce carries.
    The vectors are the same bits on all workers, for any number of them and any batches, within the bounds of
    `Totals`; the objective is the same but for the order of a float64 sum.

    Raises ValueError for arguments outside these; on all workers alike where no row is usable, or where a pass finds
    another number of rows than the first (a generator that is used up cannot be read again).
    """
    _check(start, metric, iterations)
    reduce, scale = resolve(reduce), scale_of(start)
    centres = unit(start) if metric == "cosine" else start
    rows, passes = 0, 0
    while True:
        totals = Totals(len(start), start.shape[1], scale, start.device)
        _read(batches(), centres, metric, totals)
        reduce(totals.packed)
        found, left_out = int(totals.counts.sum()), int(totals.left_out)
        passes += 1
        if passes == 1:
            rows = found
        if found == 0 or found != rows:
            raise ValueError(
                f"pass {passes} found {found} usable vectors ({left_out} more were not), the first pass {rows}; there "
                "must be some, and the same in every pass: `batches` has to build a new iterator at every call"
            )
        means = totals.means().to(centres.dtype)
        moved = torch.where(totals.counts.unsqueeze(-1) > 0, unit(means) if metric == "cosine" else means, centres)
        if passes > iterations or torch.equal(moved, centres):
            return Fitted(centres, float(totals.objective), rows, left_out, passes)
        centres = moved


class Totals:
    """Per code, how many vectors there are and the sum of them, exactly: the same bits in any order of adding.

    Each number is rounded to a multiple of 2^-39 `scale` and added in two parts, a multiple of 2^-16 `scale` and the
    rest, both in float64. Such sums do not round while the |x| of a code add up to less than 2^37 `scale` in every
    dimension and it has less than 2^31 vectors; beyond, they are float64 sums like others.
    (The idea is that of pre-rounding: Demmel and Nguyen 2013, "Fast reproducible floating-point summation".)
    """

    def __init__(self, num_codes: int, dim: int, scale: float, device: torch.device) -> None:
        self.packed = torch.zeros(num_codes * (1 + 2 * dim) + 2, dtype=torch.float64, device=device)
        """All of it, to be summed over workers."""
        sizes = [num_codes, num_codes * dim, num_codes * dim, 1, 1]
        self.counts, coarse, fine, self.objective, self.left_out = self.packed.split(sizes)
        self._coarse, self._fine = coarse.view(num_codes, dim), fine.view(num_codes, dim)
        self._scale = scale

    @torch.no_grad()
    def add(
        self, x: Float[Tensor, "N D"], codes: Int64[Tensor, " N"], centres: Float[Tensor, "K D"] | None = None
    ) -> None:
        """Add every row of `x`, finite, to its code; with `centres`, also its squared distance to the objective."""
        tile = max(1, _TILE // x.shape[1] if x.device.type == "cpu" else len(x))
        for rows, where in zip(x.split(tile), codes.split(tile), strict=True):
            wide = rows.double()
            coarse = _whole_steps(wide, _COARSE * self._scale)
            self._coarse.index_add_(0, where, coarse)
            self._fine.index_add_(0, where, _whole_steps(wide - coarse, _FINE * self._scale))
            if centres is not None:
                apart = (rows - centres.index_select(0, where)).double().view(-1)
                self.objective += torch.dot(apart, apart)
        self.counts += torch.bincount(codes, minlength=len(self.counts))

    def means(self) -> Float64[Tensor, "K D"]:
        """The mean vector of every code; 0 where it has none."""
        return (self._coarse + self._fine) / self.counts.clamp(min=1).unsqueeze(-1)


def scale_of(x: Float[Tensor, "N D"]) -> float:
    """The power of two just above every |number| of `x`; 1 where all are 0."""
    largest = float(x.abs().max())
    return 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0


def _whole_steps(x: Tensor, step: float) -> Tensor:
    """`x` rounded to multiples of `step`, a power of two."""
    return (x + _TO_WHOLE * step).sub_(_TO_WHOLE * step)


def _read(batches: Iterable[Tensor], centres: Tensor, metric: Metric, totals: Totals) -> None:
    """One pass over this worker's batches."""
    for x in batches:
        if x.ndim == 0 or x.shape[-1] != centres.shape[1] or not x.is_floating_point():
            raise ValueError(
                f"a batch is {x.dtype} of shape {tuple(x.shape)}; "
                f"centres of shape {tuple(centres.shape)} take floating point [..., {centres.shape[1]}]"
            )
        rows = x.detach().reshape(-1, centres.shape[1]).to(centres)
        del x  # else it would still be held while the next one is made
        usable = finite_rows(rows)
        if metric == "cosine":
            rows = unit(rows)
            usable &= (rows != 0).any(-1)  # no direction, no code
        if not bool(usable.all()):
            totals.left_out += (~usable).sum()
            rows = rows[usable]
        totals.add(rows, assign.nearest(rows, centres, metric=metric), centres)
        del rows


def _check(start: Tensor, metric: str, iterations: int) -> None:
    if start.ndim != 2 or start.numel() == 0 or not bool(torch.isfinite(start).all()):
        raise ValueError(f"start has shape {tuple(start.shape)}; it must be [K, D], both at least 1, and finite")
    if metric not in get_args(Metric):
        raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(get_args(Metric))}")
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; it must be at least 0")
