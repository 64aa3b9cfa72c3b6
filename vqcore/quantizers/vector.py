"""Vector quantization: one codebook, nearest code, moving averages or gradients."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from vqcore import assign, losses
from vqcore.codebook import Codebook, only, pick, unit
from vqcore.estimators import straight_through, straight_through_in_place
from vqcore.quantizers import from_data
from vqcore.quantizers.arguments import check_estimator, check_rule, check_seeding, check_sizes, check_weights
from vqcore.quantizers.contract import Quantized, VectorBatch, per_element, quantized
from vqcore.quantizers.rows import Rows, full_precision, keys_of, rows_of
from vqcore.quantizers.updates import Updates
from vqcore.reduction import Reduction, resolve
from vqcore.seeding import Metric, Offer, Seeding
from vqcore.update import Rule

Estimator = Callable[[Tensor, Tensor], Tensor]


class VectorQuantizer(nn.Module):
    """Each vector becomes its nearest code (van den Oord et al. 2017, section 3; appendix A.1 for the moving average).

    Shapes: x [..., D] of any leading dimensions, mask and keys [...]; a [16, 32, 32, 64] map is 16,384 vectors of
    D = 64. Channels come last.

    A training forward assigns with the old codebook, looks up, then updates at once: counts and sums of all workers in
    one float64 reduce, EMA, read-out of the codes that got a vector, revival of dead codes (one more reduce, only on
    steps that find any). Inside `accumulate` the update waits for the end of the block.

    Arguments:
        num_codes, code_dim: K and D.
        metric: "euclidean", or "cosine" (x and codes on the unit sphere, also in the losses and the output).
        decay: of the moving average, in [0, 1); None: the codebook is a parameter, moved by the codebook loss
            (weight 1.0) and the caller's optimiser. Its counts still decay by 0.99 to tell dead codes.
        estimator: (x, code vectors) -> output with the gradient wanted; see vqcore.estimators.
        commitment_weight: of |x - sg(code)|^2 (beta of equation 3; 0.25 there).
        seeding: a function of vqcore.seeding (kmeans_plus_plus, random_rows, scaled_spherical); None draws the codebook
            from N(0, 1) by `seed`, at once.
        revive_below: a code whose moving count is below this is replaced by a vector of the batch; 0 never.
        reduce: sums a float64 tensor over workers in place; None: torch.distributed's default group if there is one at
            the call, else nothing. Never called in eval mode.
        seed: of every draw this quantizer makes.
        eps: smoothing of the counts in the read-out.

    Raises ValueError for arguments outside these.
    """

    discrete = True
    accumulates = True

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        metric: Metric = "euclidean",
        decay: float | None = 0.99,
        estimator: Estimator = straight_through,
        commitment_weight: float = 0.25,
        seeding: Seeding | None = None,
        revive_below: float = 0.0,
        reduce: Reduction | None = None,
        seed: int = 0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        rule = Rule(decay=decay, revive_below=revive_below, eps=eps, seed=seed)
        check_rule(rule)
        check_sizes(num_codes=num_codes, code_dim=code_dim)
        check_estimator(estimator)
        check_seeding(seeding)
        check_weights(commitment_weight=commitment_weight)
        if metric not in get_args(Metric):
            raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(get_args(Metric))}")
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.metric = metric
        self.commitment_weight = commitment_weight
        self.estimator = estimator
        self.seeding = seeding
        self.codebook = Codebook(num_codes, code_dim, unit_norm=metric == "cosine", learned=decay is None)
        self._updates = Updates([self.codebook], [rule], reduce, needed=num_codes, seed=self._seed_from)
        if seeding is None:
            self.codebook.set_vectors(from_data.normal_vectors(num_codes, code_dim, seed))

    def extra_repr(self) -> str:
        name = getattr(self.estimator, "__name__", repr(self.estimator))
        rule = self._updates.rules[0]
        return f"metric={self.metric}, decay={rule.decay}, estimator={name}, revive_below={rule.revive_below}"

    @property
    def seeded(self) -> bool:
        """Whether the codebook holds something; forwards of an unseeded one gather in training and raise in eval."""
        return self.codebook.is_seeded

    @property
    def last_counts(self) -> tuple[Tensor, ...]:
        """One float64 [K]: global number of vectors per code in the newest update; zeros before the first."""
        return (self.codebook.last_counts,)

    def revived_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The codebook and its rows revived in the newest update, where it is a parameter and there are any."""
        if isinstance(self.codebook.vectors, nn.Parameter) and self.codebook.revived is not None:
            return [(self.codebook.vectors, self.codebook.revived)]
        return []

    def forward(
        self,
        x: Float[Tensor, "*shape D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        keys: Int64[Tensor, "*shape"] | None = None,
    ) -> Quantized:
        """Quantize `x`. Output vectors have the codebook's type (float32) also under autocast.

        In training all workers must call it equally often, also with empty or fully masked parts. The loss is W x this
        worker's sum / n, with n the global number of valid vectors (of the block inside `accumulate`); in eval mode
        this call's own mean. Raises ValueError on wrong shapes or types, RuntimeError in eval mode while unseeded.
        """
        with full_precision(x.device):
            given = rows_of(x, mask, self.code_dim, self.codebook.vectors.dtype)
            if self.training and not self.seeded:
                return from_data.gather(given, x, keys, self.codebook, self._updates)
            self.codebook.require_seeded()
            rows = self._on_sphere(given)
            readable = self.codebook.readable()
            codes = self._assign(rows, readable)
            chosen = readable.index_select(0, codes) if rows.whole else pick(readable, codes)
            if self.training:
                passed, squared = losses.passing_squared_error(rows.x, chosen)
                output = self._estimate(passed, chosen)
                output = output if rows.whole else only(rows.valid, output)
            else:
                output, squared = chosen, losses.squared_error(rows.x, chosen)
            objective = self._objective(rows, codes, squared)
            if self.training:
                count, world = self._learn(rows, codes, x, keys)
            else:
                count, world = rows.valid.sum(), 1
            loss = (objective * per_element(count, world, self.code_dim)).to(rows.x.dtype)
        return quantized(x, rows, output, codes, loss, squared)

    @torch.no_grad()
    def assign(
        self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Int64[Tensor, "*shape"]:
        """Codes of `x`; -1 where masked or non-finite. Raises RuntimeError while unseeded."""
        self.codebook.require_seeded()
        with full_precision(x.device):
            rows = self._on_sphere(rows_of(x, mask, self.code_dim, self.codebook.vectors.dtype))
            return self._assign(rows, self.codebook.readable()).reshape(x.shape[:-1])

    def look_up(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Vectors of `codes`; -1 gives 0, others outside [0, K) raise ValueError."""
        return self.codebook.look_up(codes)

    def accumulate(self, count: int | None = None) -> AbstractContextManager[None]:
        """Forwards inside use the old codebook; on exit one reduce and one update for all of them.

        `count` is the global number of valid vectors of the whole block: each forward's loss is W x sum / count, so
        the losses of the block *add up* to the global mean. Without it, each forward's loss is the mean over its own
        global batch, which costs one reduce of one number a forward and needs all workers to make equally many.
        An exception leaves the state as it was. Entered in eval mode it does nothing. It does not nest.
        """
        return self._updates.accumulate(count, self.training)

    def seed(self, batches: Iterable[VectorBatch]) -> str:
        """Set the codebook from this worker's `batches`, all workers together; returns a sentence on what was used.

        Workers may have different numbers of batches, also none. Counts start at max(1, 2 revive_below), as after a
        revival. Raises ValueError, on all workers alike, where all have fewer usable vectors than codes; RuntimeError
        where seeding is None, since that codebook does not come from data.
        """
        return self._seed_from(from_data.offers_of(batches, self.codebook, self._updates.reduce))

    def _seed_from(self, offers: Iterable[Offer]) -> str:
        return from_data.seed_from(offers, self.codebook, self._updates, self.seeding)

    def _on_sphere(self, rows: Rows) -> Rows:
        return rows._replace(x=unit(rows.x)) if self.metric == "cosine" else rows

    def _assign(self, rows: Rows, vectors: Tensor) -> Tensor:
        codes = assign.nearest(rows.x.detach(), vectors, metric=self.metric)
        return codes if rows.whole else codes.masked_fill(~rows.valid, -1)

    def _estimate(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The estimator's output. Nobody reads `chosen` afterwards, so straight-through needs no copy of it."""
        return (straight_through_in_place if self.estimator is straight_through else self.estimator)(x, chosen)

    def _objective(self, rows: Rows, codes: Tensor, squared: Tensor) -> Tensor:
        """Commitment, and where the codebook is learned |sg(x) - code|^2 (equation 3), summed over vectors and D."""
        if not self.codebook.learned:
            return self.commitment_weight * squared
        # Gathered, then normalised: so the graph keeps no tensor that a revival or an optimiser writes to.
        chosen = pick(self.codebook.vectors, codes)
        chosen = unit(chosen) if self.metric == "cosine" else chosen
        return self.commitment_weight * squared + losses.squared_error(rows.x.detach(), chosen)

    def _learn(self, rows: Rows, codes: Tensor, x: Tensor, keys: Tensor | None) -> tuple[Tensor, int]:
        """Add to the statistics and, outside `accumulate`, update. Returns what the loss divides by, and W."""
        statistics = self._updates.begin()
        named = None
        if statistics[0].rule.revive_below > 0:
            named = keys_of(keys, x, resolve(self._updates.reduce).rank, statistics[0].seen)
        statistics[0].add(rows.x, codes, named)
        return self._updates.end(statistics, rows.valid)
