"""Top-k tempered sampling: each vector becomes one of its k nearest codes, drawn by distance; moving averages."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor, nn

from vqcore import assign, losses, noise
from vqcore.codebook import Codebook, only, pick, record
from vqcore.estimators import straight_through
from vqcore.quantizers import from_data
from vqcore.quantizers.arguments import (
    Ema,
    check_ema,
    check_positive,
    check_rule,
    check_seeding,
    check_sizes,
    check_weights,
)
from vqcore.quantizers.contract import Quantized, VectorBatch, per_element, quantized
from vqcore.quantizers.rows import Rows, full_precision, keys_of, rows_of
from vqcore.quantizers.updates import Updates
from vqcore.reduction import Reduction, resolve
from vqcore.seeding import Offer, Seeding
from vqcore.update import Rule, Statistics


class TemperedQuantizer(nn.Module):
    """The quantizer of CLVQ-VAE (Garg et al. 2025, arXiv 2506.20040; the maths is that of the authors' code).

    Training draws each vector's code among the S = `top_k` nearest, evaluation takes the nearest:

        D_k = |x - e_k|^2      p_j = exp(-D_j / T) / sum_{l in S} exp(-D_l / T)      c ~ Categorical(p)

    Shapes: x [..., D] of any leading dimensions, mask and keys [...].

    `ema` says how the codebook moves and what a training forward returns:

    - "source": the update comes *before* the look-up, so vectors are assigned with the old codebook and read from the
      new one. The smoothing of the counts is written back, and every code is read again:
      n <- g n + (1 - g) counts, then n <- (n + eps) / (N + K eps) N with N = sum n;
      m <- g m + (1 - g) sums;  e = m / n.
      A code without vectors keeps its place only while m and n shrink together: n is held up near eps / (1 - g)
      (1e-3, reached after about 700 empty steps), from where e = m / n shrinks by g a step. Long-dead codes drift to
      the origin. As the look-up needs the update at once, `accumulate` is refused, and so is `revive_below`: a revived
      code would hand another vector's place to the rows that have just chosen it.
    - "standard": VectorQuantizer's own, look-up first, codes without vectors keep their bits.

    Arguments:
        num_codes, code_dim: K and D.
        top_k: how many nearest codes take part (5 in the source); above K, all do. 1 is VectorQuantizer's assignment.
        temperature: T, in units of squared distance (1 in the source). Gaps grow with |x|^2 (tens at the source's
            |x| of 24), so that an absolute T of 1 may be next to argmin.
        relative: T is `temperature` times each vector's own mean gap, the mean over j = 2 .. top_k of D_j - D_1.
        decay: g, in [0, 1).
        commitment_weight: beta of beta |x - sg(z_q)|^2 (0.1 in the source); there is no codebook loss.
        seeding: a function of vqcore.seeding (scaled_spherical is the source's); None draws N(0, 1) by `seed`.
        revive_below, reduce, seed, eps: as in VectorQuantizer.

    Raises ValueError for arguments outside these.
    """

    discrete = True

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        top_k: int = 5,
        temperature: float = 1.0,
        relative: bool = False,
        ema: Ema = "source",
        decay: float = 0.99,
        commitment_weight: float = 0.1,
        seeding: Seeding | None = None,
        revive_below: float = 0.0,
        reduce: Reduction | None = None,
        seed: int = 0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_sizes(num_codes=num_codes, code_dim=code_dim, top_k=top_k)
        check_seeding(seeding)
        check_positive(temperature=temperature)
        check_weights(commitment_weight=commitment_weight)
        check_ema(ema, decay)
        if ema == "source" and revive_below > 0:
            raise ValueError(
                f"revive_below is {revive_below} with ema='source', which looks vectors up after the update: rows "
                "would read codes that were revived elsewhere. Use ema='standard', or revive_below=0"
            )
        move = ema_written_back if ema == "source" else None
        rule = Rule(decay=decay, revive_below=revive_below, eps=eps, seed=seed, move=move)
        check_rule(rule)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.top_k = top_k
        self.temperature = temperature
        self.relative = relative
        self.ema = ema
        self.accumulates = ema == "standard"
        self.commitment_weight = commitment_weight
        self.seeding = seeding
        self.codebook = Codebook(num_codes, code_dim)
        self._updates = Updates([self.codebook], [rule], reduce, needed=num_codes, seed=self._seed_from)
        if seeding is None:
            self.codebook.set_vectors(from_data.normal_vectors(num_codes, code_dim, seed))

    def extra_repr(self) -> str:
        rule = self._updates.rules[0]
        return (
            f"top_k={self.top_k}, temperature={self.temperature}, relative={self.relative}, ema={self.ema}, "
            f"decay={rule.decay}, revive_below={rule.revive_below}"
        )

    @property
    def seeded(self) -> bool:
        """Whether the codebook holds something; forwards of an unseeded one gather in training and raise in eval."""
        return self.codebook.is_seeded

    @property
    def last_counts(self) -> tuple[Tensor, ...]:
        """One float64 [K]: global number of vectors per drawn code in the newest update."""
        return (self.codebook.last_counts,)

    def revived_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Always empty: the codebook is no parameter."""
        return []

    def forward(
        self,
        x: Float[Tensor, "*shape D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        keys: Int64[Tensor, "*shape"] | None = None,
    ) -> Quantized:
        """Quantize `x`: drawn by (seed, step, key) in training, argmin in evaluation. Straight-through gradient.

        The loss is scaled as VectorQuantizer's, and the errors are its errors.
        """
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.codebook.dtype)
            if self.training and not self.seeded:
                return from_data.gather(rows, x, keys, self.codebook, self._updates)
            self.codebook.require_seeded()
            if not self.training:
                codes = self._nearest(rows)
                chosen = output = self._read(codes)
                count, world = rows.valid.sum(), 1
            else:
                statistics = self._updates.begin()
                named = keys_of(keys, x, resolve(self._updates.reduce).rank, statistics[0].seen)
                codes = self._draw(rows, named)
                chosen, count, world = self._learn(statistics, rows, codes, named)
                output = only(rows.valid, straight_through(rows.x, chosen))
            squared = losses.squared_error(rows.x, chosen)
            scale = per_element(count, world, self.code_dim)
            loss = (self.commitment_weight * squared * scale).to(rows.x.dtype)
        return quantized(x, rows, output, codes, loss, squared)

    @torch.no_grad()
    def assign(
        self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Int64[Tensor, "*shape"]:
        """The nearest code of each vector; -1 where masked or non-finite. Raises RuntimeError while unseeded."""
        self.codebook.require_seeded()
        with full_precision(x.device):
            return self._nearest(rows_of(x, mask, self.code_dim, self.codebook.dtype)).reshape(x.shape[:-1])

    def look_up(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Vectors of `codes`; -1 gives 0, others outside [0, K) raise ValueError."""
        return self.codebook.look_up(codes)

    def accumulate(self, count: int | None = None) -> AbstractContextManager[None]:
        """See VectorQuantizer.accumulate. Raises RuntimeError with ema="source"."""
        if not self.accumulates:
            raise RuntimeError(
                "ema='source' updates the codebook before each look-up, so several forwards cannot share one update; "
                "use ema='standard', or one forward a step"
            )
        return self._updates.accumulate(count, self.training)

    def seed(self, batches: Iterable[VectorBatch]) -> str:
        """Set the codebook from data; see VectorQuantizer.seed."""
        return self._seed_from(from_data.offers_of(batches, self.codebook, self._updates.reduce))

    def _seed_from(self, offers: Iterable[Offer]) -> str:
        return from_data.seed_from(offers, self.codebook, self._updates, self.seeding)

    def _nearest(self, rows: Rows) -> Tensor:
        return assign.nearest(rows.x.detach(), self.codebook.vectors).masked_fill(~rows.valid, -1)

    def _draw(self, rows: Rows, keys: Tensor) -> Tensor:
        u = noise.uniform(self._updates.rules[0].seed, self.codebook.step, keys).squeeze(-1)
        codes = assign.sample_top_k(
            rows.x.detach(), self.codebook.vectors, self.top_k, self.temperature, u, relative=self.relative
        )
        return codes.masked_fill(~rows.valid, -1)

    def _read(self, codes: Tensor) -> Tensor:
        return pick(self.codebook.vectors, codes)

    def _learn(
        self, statistics: list[Statistics], rows: Rows, codes: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Update and look up in the order that `ema` says. Returns code vectors, what the loss divides by, and W."""
        old = None if self.ema == "source" else self._read(codes)
        statistics[0].add(rows.x, codes, keys)
        count, world = self._updates.end(statistics, rows.valid)
        return self._read(codes) if old is None else old, count, world


def ema_written_back(
    book: Any, counts: Float64[Tensor, " K"], sums: Float64[Tensor, "K D"] | None, decay: float, eps: float
) -> None:
    """The source's update, as `Rule.move`: see TemperedQuantizer. Global counts of 0 change nothing."""
    assert sums is not None, "a rule with a decay carries sums"
    some = counts.sum() > 0
    fresh = record(book, counts, decay)
    total = book.counts.sum()
    smoothed = (book.counts + eps) * (total / (total + book.num_codes * eps))
    book.counts.copy_(torch.where(some, smoothed, book.counts))
    book.sums.lerp_(sums, fresh)
    read = (book.sums / book.counts.unsqueeze(-1)).to(book.vectors.dtype)
    book.vectors.copy_(torch.where(some & (book.counts > 0).unsqueeze(-1), read, book.vectors))
    book.revived = None
