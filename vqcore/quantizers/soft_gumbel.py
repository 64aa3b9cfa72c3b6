"""Gumbel-softmax mixture: each vector becomes a mean of all codes, and the codes learn by gradient."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from vqcore import assign, losses, mixture
from vqcore.codebook import Codebook, only
from vqcore.quantizers import from_data
from vqcore.quantizers.arguments import check_positive, check_seeding, check_sizes
from vqcore.quantizers.contract import Quantized, VectorBatch, quantized
from vqcore.quantizers.rows import Rows, full_precision, keys_of, rows_of
from vqcore.quantizers.updates import Updates
from vqcore.reduction import Reduction, resolve
from vqcore.seeding import Offer, Seeding
from vqcore.update import Rule


class GumbelQuantizer(nn.Module):
    """The bottleneck of DVQ-VAE (Lizarraga et al. 2023, arXiv 2311.06212; the maths is that of the authors' code).

        d_k = |x - e_k|^2      p = softmax((g - d) / tau), g Gumbel noise      z_q = sum_k p_k e_k

    Shapes: x [..., D] of any leading dimensions, mask and keys [...].

    There is no auxiliary loss (`loss` is exactly 0) and no estimator: the gradient of z_q reaches x and *all* codes
    through p, so no code is ever without one and there is nothing to revive. `squared_error` is |x - z_q|^2.

    The code of a vector is its nearest one, argmax p without noise. It is a label, not the output: look_up(code) is
    that one vector, while evaluation returns the mixture. What the code loses is all of p but its peak; at the
    source's tau of 10 that is most of it wherever distances differ by less than 10, and a decoder trained on mixtures
    has not seen bare codes. `discrete` is therefore False.

    Arguments:
        num_codes, code_dim: K and D (512 and 64 in the source).
        temperature: tau, in units of squared distance; fixed, as in the source (10).
        init_std: standard deviation of the first codes, drawn by `seed` where seeding is None (2 in the source).
        noise_in_eval: draw the noise in eval mode too, as the source does: evaluation then depends on keys and on the
            step. False: g = 0 there.
        seeding: a function of vqcore.seeding to start from data instead.
        reduce, seed: as in VectorQuantizer. Counts are of the codes, argmax p without noise.

    Raises ValueError for arguments outside these.
    """

    discrete = False
    accumulates = True

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        temperature: float = 10.0,
        init_std: float = 2.0,
        noise_in_eval: bool = False,
        seeding: Seeding | None = None,
        reduce: Reduction | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(num_codes=num_codes, code_dim=code_dim)
        check_seeding(seeding)
        check_positive(temperature=temperature, init_std=init_std)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.temperature = temperature
        self.noise_in_eval = noise_in_eval
        self.seeding = seeding
        self.codebook = Codebook(num_codes, code_dim, learned=True)
        rule = Rule(decay=None, revive_below=0.0, eps=0.0, seed=seed)
        self._updates = Updates([self.codebook], [rule], reduce, needed=num_codes, seed=self._seed_from)
        if seeding is None:
            self.codebook.set_vectors(from_data.normal_vectors(num_codes, code_dim, seed, init_std))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, noise_in_eval={self.noise_in_eval}"

    @property
    def seeded(self) -> bool:
        """Whether the codebook holds something; forwards of an unseeded one gather in training and raise in eval."""
        return self.codebook.is_seeded

    @property
    def last_counts(self) -> tuple[Tensor, ...]:
        """One float64 [K]: global number of vectors nearest to each code in the newest update."""
        return (self.codebook.last_counts,)

    def revived_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Always empty."""
        return []

    def forward(
        self,
        x: Float[Tensor, "*shape D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        keys: Int64[Tensor, "*shape"] | None = None,
    ) -> Quantized:
        """Mix the codes for each vector of `x`; 0 where masked or non-finite. Results are float32 or better.

        The noise is a function of (seed, step, key). In training all workers must call it equally often. Raises as
        VectorQuantizer.forward.
        """
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.codebook.dtype)
            if self.training and not self.seeded:
                return from_data.gather(rows, x, keys, self.codebook, self._updates)
            self.codebook.require_seeded()
            codes = self._nearest(rows)
            statistics = self._updates.begin()
            gumbel = None
            if self.training or self.noise_in_eval:
                named = keys_of(keys, x, resolve(self._updates.reduce).rank, statistics[0].seen)
                step = self.codebook.step.clone()  # the backward pass draws again, after the update has counted
                gumbel = mixture.Noise(self._updates.rules[0].seed, step, named)
            mixed = only(rows.valid, mixture.mix(rows.x, self.codebook.vectors, self.temperature, gumbel))
            if self.training:
                statistics[0].add(rows.x, codes, None)
                self._updates.end(statistics, rows.valid)
            squared = losses.squared_error(rows.x.detach(), mixed.detach())
            loss = (mixed * 0.0).sum()
        return quantized(x, rows, mixed, codes, loss, squared)

    @torch.no_grad()
    def assign(
        self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Int64[Tensor, "*shape"]:
        """The nearest code of each vector; -1 where masked or non-finite. Raises RuntimeError while unseeded."""
        self.codebook.require_seeded()
        with full_precision(x.device):
            return self._nearest(rows_of(x, mask, self.code_dim, self.codebook.dtype)).reshape(x.shape[:-1])

    def look_up(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """The one vector of each code, which is not the mixture; -1 gives 0, others outside [0, K) raise ValueError."""
        return self.codebook.look_up(codes)

    def accumulate(self, count: int | None = None) -> AbstractContextManager[None]:
        """Forwards inside share one step, so one draw of noise per key; counts are taken once, on exit.

        See VectorQuantizer.accumulate."""
        return self._updates.accumulate(count, self.training)

    def seed(self, batches: Iterable[VectorBatch]) -> str:
        """Set the codebook from data; see VectorQuantizer.seed."""
        return self._seed_from(from_data.offers_of(batches, self.codebook, self._updates.reduce))

    def _seed_from(self, offers: Iterable[Offer]) -> str:
        return from_data.seed_from(offers, self.codebook, self._updates, self.seeding)

    def _nearest(self, rows: Rows) -> Tensor:
        return assign.nearest(rows.x.detach(), self.codebook.readable()).masked_fill(~rows.valid, -1)
