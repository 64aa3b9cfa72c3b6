"""Mean of m multinomial draws: each vector becomes the mean of codes drawn by distance; moving averages."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor, nn

from vqcore import losses, mixture, noise
from vqcore.codebook import Codebook, checked, only, pick, record
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
from vqcore.update import Rule


class MultinomialQuantizer(nn.Module):
    """The quantizer of IA-GPL (Li et al. 2025, arXiv 2411.17676; the maths is that of the authors' code).

        D_k = |x - e_k|^2      pi = softmax(-D / T)      c_1 .. c_m ~ pi      z_q = (1 / m) sum_j e_{c_j}

    Shapes: x [..., D] of any leading dimensions, mask and keys [...]; codes [..., m].

    **What is stored.** The codes of a vector are its m draws, and look_up(codes) is their mean: with the codebook of
    the forward it gives the training output bit for bit. Evaluation returns the expectation sum_k pi_k e_k, the limit
    of many draws and the same at every call. No m codes hold that, so `assign` stores the m whose shares of 1/m come
    nearest to pi (largest remainders; m = 1: the nearest code): each share is off by less than 1/m, and look_up of them
    differs from the evaluation output by that much. `discrete` is therefore False. With `sample_in_eval` evaluation
    draws as training does (the source's way), and its codes again hold its output exactly.

    `ema` says how the codebook moves, with s_k a vector's draws of code k; the look-up always comes first:

    - "source": N <- b N + (1 - b) sum s_k / m, then N <- (N + eps) / (n + K eps) n with n = sum N, written back;
      e_k <- b e_k + (1 - b) d_k / N_k with d_k = sum (s_k / m) x. This is no ratio of two averages. An undrawn code is
      multiplied by b and drifts to the origin, where it may be drawn again (the source's only remedy for dead codes);
      as N starts at 1/m, far below a batch's counts, codes at first overshoot the mean of their vectors.
    - "standard": VectorQuantizer's own, of counts s_k / m and sums d_k.

    Arguments:
        num_codes, code_dim: K and D.
        draws: m (5 or 10 in the source).
        temperature: T, in units of squared distance (1 in the source).
        sample_in_eval: draw in eval mode too; the draws depend on keys and on the step.
        decay: b, in [0, 1).
        commitment_weight: lambda of the consistency loss lambda |x - sg(z_q)|^2 (0.01 in the source).
        seeding: a function of vqcore.seeding; None draws the source's Glorot-uniform codes, within
            sqrt(6 / (K + D)) of 0, by `seed`.
        revive_below, reduce, seed, eps: as in VectorQuantizer. Counts are shares of 1/m.

    Raises ValueError for arguments outside these.
    """

    discrete = False
    accumulates = True

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        draws: int = 10,
        temperature: float = 1.0,
        sample_in_eval: bool = False,
        ema: Ema = "source",
        decay: float = 0.9,
        commitment_weight: float = 0.01,
        seeding: Seeding | None = None,
        revive_below: float = 0.0,
        reduce: Reduction | None = None,
        seed: int = 0,
        eps: float = 0.01,
    ) -> None:
        super().__init__()
        check_sizes(num_codes=num_codes, code_dim=code_dim, draws=draws)
        check_seeding(seeding)
        check_positive(temperature=temperature)
        check_weights(commitment_weight=commitment_weight)
        check_ema(ema, decay)
        move = ema_of_means if ema == "source" else None
        rule = Rule(decay=decay, revive_below=revive_below, eps=eps, seed=seed, draws=draws, move=move)
        check_rule(rule)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.draws = draws
        self.temperature = temperature
        self.sample_in_eval = sample_in_eval
        self.ema = ema
        self.commitment_weight = commitment_weight
        self.seeding = seeding
        self.codebook = Codebook(num_codes, code_dim)
        self._updates = Updates([self.codebook], [rule], reduce, needed=num_codes, seed=self._seed_from)
        if seeding is None:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.rand(num_codes, code_dim, generator=generator, dtype=torch.float32, device="cpu")
            bound = math.sqrt(6.0 / (num_codes + code_dim))
            self.codebook.set_vectors((2.0 * drawn - 1.0) * bound, 1.0 / draws if ema == "source" else 1.0)

    def extra_repr(self) -> str:
        rule = self._updates.rules[0]
        return (
            f"draws={self.draws}, temperature={self.temperature}, sample_in_eval={self.sample_in_eval}, "
            f"ema={self.ema}, decay={rule.decay}, revive_below={rule.revive_below}"
        )

    @property
    def seeded(self) -> bool:
        """Whether the codebook holds something; forwards of an unseeded one gather in training and raise in eval."""
        return self.codebook.is_seeded

    @property
    def last_counts(self) -> tuple[Tensor, ...]:
        """One float64 [K]: draws of each code in the newest update over all workers, divided by m."""
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
        """Quantize `x`: the mean of m draws by (seed, step, key, draw) in training, the expectation in evaluation.

        Straight-through gradient. The loss is scaled as VectorQuantizer's, and the errors are its errors.
        """
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.codebook.dtype)
            if self.training and not self.seeded:
                return from_data.gather(rows, x, keys, self.codebook, self._updates, (self.draws,))
            self.codebook.require_seeded()
            if self.training or self.sample_in_eval:
                statistics = self._updates.begin()
                named = keys_of(keys, x, resolve(self._updates.reduce).rank, statistics[0].seen)
                codes = self._draw(rows, named)
                chosen = self._mean(codes)
            else:
                codes = self._apportion(rows)
                chosen = only(rows.valid, mixture.mix(rows.x.detach(), self.codebook.vectors, self.temperature))
            squared = losses.squared_error(rows.x, chosen)
            if self.training:
                statistics[0].add(rows.x, codes, named)
                count, world = self._updates.end(statistics, rows.valid)
                output = only(rows.valid, straight_through(rows.x, chosen))
            else:
                count, world, output = rows.valid.sum(), 1, chosen
            scale = per_element(count, world, self.code_dim)
            loss = (self.commitment_weight * squared * scale).to(rows.x.dtype)
        return quantized(x, rows, output, codes, loss, squared)

    @torch.no_grad()
    def assign(
        self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Int64[Tensor, "*shape m"]:
        """The m codes nearest to pi, in ascending order, without chance; -1 where masked or non-finite.

        Raises RuntimeError while unseeded."""
        self.codebook.require_seeded()
        with full_precision(x.device):
            codes = self._apportion(rows_of(x, mask, self.code_dim, self.codebook.dtype))
            return codes.reshape(*x.shape[:-1], self.draws)

    def look_up(self, codes: Int[Tensor, "*shape m"]) -> Float[Tensor, "*shape D"]:
        """The mean of each vector's m codes, in which -1 adds 0.

        Raises ValueError for other codes outside [0, K) or another last dimension, RuntimeError while unseeded."""
        self.codebook.require_seeded()
        if codes.ndim == 0 or codes.shape[-1] != self.draws:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; this quantizer reads [..., {self.draws}], "
                f"the {self.draws} draws of each vector"
            )
        flat = checked(codes, self.num_codes, self.codebook.vectors.device)
        return self._mean(flat.view(-1, self.draws)).reshape(*codes.shape[:-1], self.code_dim)

    def accumulate(self, count: int | None = None) -> AbstractContextManager[None]:
        """See VectorQuantizer.accumulate."""
        return self._updates.accumulate(count, self.training)

    def seed(self, batches: Iterable[VectorBatch]) -> str:
        """Set the codebook from data; see VectorQuantizer.seed. With ema="source" counts start at 1/m."""
        return self._seed_from(from_data.offers_of(batches, self.codebook, self._updates.reduce))

    def _seed_from(self, offers: Iterable[Offer]) -> str:
        # The source's first N; where codes can be dead, the grace of a revived code, or all would be dead at once.
        mortal = self._updates.rules[0].revive_below > 0
        count = 1.0 / self.draws if self.ema == "source" and not mortal else None
        return from_data.seed_from(offers, self.codebook, self._updates, self.seeding, count)

    def _draw(self, rows: Rows, keys: Tensor) -> Tensor:
        u = noise.uniform(self._updates.rules[0].seed, self.codebook.step, keys, draws=self.draws)
        codes = mixture.draw(rows.x.detach(), self.codebook.vectors, self.temperature, u)
        return codes.masked_fill(~rows.valid.unsqueeze(-1), -1)

    def _apportion(self, rows: Rows) -> Tensor:
        codes = mixture.apportion(rows.x.detach(), self.codebook.vectors, self.temperature, self.draws)
        return codes.masked_fill(~rows.valid.unsqueeze(-1), -1)

    def _mean(self, codes: Int64[Tensor, "N m"]) -> Float[Tensor, "N D"]:
        """Added up in the order of the draws, so that forward and look-up have the same bits."""
        total = pick(self.codebook.vectors, codes[:, 0])
        for column in codes.unbind(1)[1:]:
            total += pick(self.codebook.vectors, column)
        return total / self.draws


def ema_of_means(
    book: Any, counts: Float64[Tensor, " K"], sums: Float64[Tensor, "K D"] | None, decay: float, eps: float
) -> None:
    """The source's update, as `Rule.move`: see MultinomialQuantizer. Global counts of 0 change nothing.

    `book.sums` is no state of this rule; it is kept at count x vector.
    """
    assert sums is not None, "a rule with a decay carries sums"
    some = counts.sum() > 0
    fresh = record(book, counts, decay)
    total = book.counts.sum()
    smoothed = (book.counts + eps) * (total / (total + book.num_codes * eps))
    book.counts.copy_(torch.where(some, smoothed, book.counts))
    means = sums / book.counts.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(-1)
    moved = (1.0 - fresh) * book.vectors.double() + fresh * means
    book.vectors.copy_(torch.where(some, moved.to(book.vectors.dtype), book.vectors))
    book.sums.copy_(torch.where(some, book.vectors.double() * book.counts.unsqueeze(-1), book.sums))
    book.revived = None
