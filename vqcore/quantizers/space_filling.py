"""Space-filling vector quantization: codes joined by straight segments, and vectors quantized onto that line."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from vqcore import assign, curve, losses, noise
from vqcore.codebook import Codebook, checked, only, pick
from vqcore.estimators import straight_through, substitute_noise
from vqcore.quantizers import from_data
from vqcore.quantizers.arguments import check_seeding, check_sizes
from vqcore.quantizers.contract import Quantized, VectorBatch, per_element, quantized
from vqcore.quantizers.rows import Rows, full_precision, keys_of, rows_of
from vqcore.quantizers.updates import Updates
from vqcore.reduction import Reduction, resolve
from vqcore.seeding import Offer, Seeding
from vqcore.update import Rule

_NOISE_VALUES = 2**20  # numbers of one tile of noise, whose hashes take some 40 bytes each


class Projection(NamedTuple):
    """Where vectors lie on the curve: what has to be stored to lose nothing but their distance from it."""

    codes: Int64[Tensor, "..."]
    """Segments in [0, K - 1); -1 where masked or non-finite."""
    positions: Float[Tensor, "..."]
    """In [0, 1] along the segment, from corner `code` to corner `code + 1`; 0 where the code is -1."""


class SpaceFillingQuantizer(nn.Module):
    """Each vector becomes a point of an open line through K corners, so that near codes mean near things (SFVQ: Vali
    and Backstrom, Interspeech 2023, equations 2 to 5; the same authors' TMLR 2025 paper on GANs).

    The corners are a parameter, [K, D]: `codebook.vectors`. An optimiser moves them; there is no moving average and no
    revival, since a corner put elsewhere would tear the line. **A code is a segment**, in [0, K - 1), in training and
    evaluation alike.

    A training forward draws one lambda for each segment from (seed, step), equal on all workers and within an
    `accumulate` block, and takes the nearest of the K - 1 points p_j = (1 - lambda_j) c_j + lambda_j c_{j+1} (equation
    2). Then, with x_hat that point,

    - `joint=False`: the line is fitted to x as it comes. loss = |sg(x) - x_hat|^2, averaged (equation 3); its gradient
      reaches the two corners of the segment as (1 - lambda) to lambda. The output is x_hat, and its gradient goes to x
      alone, straight through.
    - `joint=True`: the modules around it are trained with it, by their own loss alone. The output is
      x + |x - x_hat| v / |v| with v normal, drawn from (seed, step, key) (equation 4, `estimators.substitute_noise`);
      its gradient reaches x and both corners. This quantizer's loss is 0: the paper adds none.

    In eval mode x is projected on the nearer of the two segments at its nearest corner (equation 5, `curve.project`).
    `squared_error` is that of x_hat: the dithered point in training, the projection in evaluation.

    What a stored code loses: it names a segment, not the place on it. `look_up` returns the segment's middle, which
    is off the projection by at most half the segment. `project` and `point` keep the place as well: one more number.

    The authors start with 4 corners (seeding `norm_blocks`), train, go on with `doubled()`, and so on.

    Shapes: x [..., D] of any leading dimensions, mask and keys [...].

    Arguments:
        num_codes, code_dim: K, the number of corners, at least 2; and D.
        joint: see above.
        seeding: a function of vqcore.seeding, called with metric="euclidean"; None draws the corners from N(0, 1) by
            `seed`, at once and in no order.
        reduce: sums a float64 tensor over workers in place (here the counts); None: torch.distributed's default group
            if there is one at the call, else nothing. Never called in eval mode.
        seed: of every draw this quantizer makes.

    Raises ValueError for arguments outside these.
    """

    discrete = False
    accumulates = True

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        joint: bool = False,
        seeding: Seeding | None = None,
        reduce: Reduction | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(num_codes=num_codes, code_dim=code_dim)
        check_seeding(seeding)
        if num_codes < 2:
            raise ValueError(f"num_codes is {num_codes}; a line needs at least 2 corners")
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.joint = joint
        self.seeding = seeding
        self.codebook = Codebook(num_codes, code_dim, learned=True)
        rule = Rule(decay=None, revive_below=0.0, eps=0.0, seed=seed)
        self._updates = Updates([self.codebook], [rule], reduce, needed=num_codes, seed=self._seed_from)
        if seeding is None:
            self.codebook.set_vectors(from_data.normal_vectors(num_codes, code_dim, seed))

    def extra_repr(self) -> str:
        return f"joint={self.joint}"

    @property
    def seeded(self) -> bool:
        """Whether there are corners; forwards of an unseeded quantizer gather in training and raise in eval."""
        return self.codebook.is_seeded

    @property
    def last_counts(self) -> tuple[Tensor, ...]:
        """One float64 [K - 1]: global number of vectors per *segment* in the newest update; zeros before the first."""
        return (self.codebook.last_counts[:-1],)

    def revived_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Nothing, always."""
        return []

    def forward(
        self,
        x: Float[Tensor, "*shape D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        keys: Int64[Tensor, "*shape"] | None = None,
    ) -> Quantized:
        """Quantize `x`. Output vectors have the codebook's type (float32) also under autocast.

        In training all workers must call it equally often, also with empty or fully masked parts. `keys` matter only
        where `joint`. The loss is W x this worker's sum / n, with n the global number of valid vectors (of the block
        inside `accumulate`); in eval mode this call's own mean. Raises ValueError on wrong shapes or types,
        RuntimeError in eval mode while unseeded.
        """
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.codebook.vectors.dtype)
            if self.training and not self.seeded:
                return from_data.gather(rows, x, keys, self.codebook, self._updates)
            self.codebook.require_seeded()
            if self.training:
                return self._train(rows, x, keys)
            codes, positions = self._project(rows)
            point = curve.at(self.codebook.vectors, codes, positions)
            squared = losses.squared_error(rows.x.detach(), point)
            loss = self._loss(squared, point, rows.valid.sum(), 1)
        return quantized(x, rows, point.detach(), codes, loss, squared)

    def _train(self, rows: Rows, x: Tensor, keys: Tensor | None) -> Quantized:
        statistics = self._updates.begin()
        seed, step = statistics[0].rule.seed, self.codebook.step
        lambdas = noise.shared_uniform(seed, step, self.num_codes - 1)
        points = curve.dithered(self.codebook.vectors, lambdas)
        codes = assign.nearest(rows.x.detach(), points.detach()).masked_fill(~rows.valid, -1)
        chosen = pick(points, codes)
        if self.joint:
            named = keys_of(keys, x, resolve(self._updates.reduce).rank, statistics[0].seen)
            output = substitute_noise(rows.x, chosen, _normal(seed, step, named, rows.x))
        else:
            output = straight_through(rows.x, chosen)
        squared = losses.squared_error(rows.x.detach(), chosen)
        statistics[0].add(rows.x, codes, None)
        count, world = self._updates.end(statistics, rows.valid)
        loss = self._loss(squared, output, count, world)
        return quantized(x, rows, only(rows.valid, output), codes, loss, squared)

    def _loss(self, squared: Tensor, output: Tensor, count: Tensor, world: int) -> Tensor:
        """Equation 3, or 0 where `joint`; attached to all that the output depends on."""
        attached = (output * 0.0).sum()
        if self.joint:
            return attached
        return (squared * per_element(count, world, self.code_dim)).to(output.dtype) + attached

    @torch.no_grad()
    def project(self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None) -> Projection:
        """Segments and positions of `x` as in eval mode. `point` of them equals the evaluation output bit for bit.

        Raises RuntimeError while unseeded."""
        self.codebook.require_seeded()
        with full_precision(x.device):
            codes, positions = self._project(rows_of(x, mask, self.code_dim, self.codebook.vectors.dtype))
        return Projection(codes.reshape(x.shape[:-1]), positions.reshape(x.shape[:-1]))

    def _project(self, rows: Rows) -> tuple[Tensor, Tensor]:
        codes, positions = curve.project(rows.x.detach(), self.codebook.readable())
        return codes.masked_fill(~rows.valid, -1), positions.masked_fill(~rows.valid, 0.0)

    def assign(
        self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Int64[Tensor, "*shape"]:
        """Segments of `x` as in eval mode; -1 where masked or non-finite. Raises RuntimeError while unseeded."""
        return self.project(x, mask).codes

    def look_up(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """The middle of each segment, (c_j + c_{j+1}) / 2; -1 gives 0, others outside [0, K - 1) raise ValueError.

        Corners themselves are `codebook.look_up(corners)`.
        """
        return self.point(codes, torch.full(codes.shape, 0.5, device=codes.device))

    @torch.no_grad()
    def point(self, codes: Int[Tensor, "*shape"], positions: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """The points at `positions` of the segments `codes`; a code of -1 gives 0.

        Raises ValueError for codes outside [0, K - 1), positions outside [0, 1] or of another shape, RuntimeError
        while unseeded.
        """
        self.codebook.require_seeded()
        corners = self.codebook.readable()
        if positions.shape != codes.shape or not positions.is_floating_point():
            raise ValueError(
                f"positions are {positions.dtype} of shape {tuple(positions.shape)}; "
                f"codes of shape {tuple(codes.shape)} need one floating point number each"
            )
        segments = checked(codes, self.num_codes - 1, corners.device)
        places = positions.reshape(-1).to(corners)
        if not bool(((places >= 0) & (places <= 1)).all()):
            raise ValueError("positions hold a number outside [0, 1]; they say how far along its segment a point lies")
        with full_precision(corners.device):
            return curve.at(corners, segments, places).reshape(*codes.shape, self.code_dim)

    def doubled(self) -> "SpaceFillingQuantizer":
        """A quantizer of 2 K corners on the *same* line (`curve.doubled`), of the same settings, type and device.

        Its draws go on at this one's step and its counts start at 1. The corners are a new parameter: give it a new
        optimiser, whose moments then start at 0, as the authors do. Raises RuntimeError while unseeded.
        """
        self.codebook.require_seeded()
        corners = self.codebook.readable()
        made = SpaceFillingQuantizer(
            2 * self.num_codes,
            self.code_dim,
            joint=self.joint,
            seeding=self.seeding,
            reduce=self._updates.reduce,
            seed=self._updates.rules[0].seed,
        ).to(corners.device, corners.dtype)
        made.codebook.set_vectors(curve.doubled(corners))
        made.codebook.step.copy_(self.codebook.step)
        return made.train(self.training)

    def accumulate(self, count: int | None = None) -> AbstractContextManager[None]:
        """Forwards inside share their lambdas; on exit one reduce of the counts, and the next step.

        `count` is the global number of valid vectors of the whole block: each forward's loss is W x sum / count, so
        the losses of the block *add up* to the global mean. Without it, each forward's loss is the mean over its own
        global batch, which costs one reduce of one number a forward and needs all workers to make equally many.
        An exception leaves the state as it was. Entered in eval mode it does nothing. It does not nest.
        """
        return self._updates.accumulate(count, self.training)

    def seed(self, batches: Iterable[VectorBatch]) -> str:
        """Set the corners from this worker's `batches`, all workers together; returns a sentence on what was used.

        Workers may have different numbers of batches, also none. Raises ValueError, on all workers alike, where all
        have fewer usable vectors than corners; RuntimeError where seeding is None.
        """
        return self._seed_from(from_data.offers_of(batches, self.codebook, self._updates.reduce))

    def _seed_from(self, offers: Iterable[Offer]) -> str:
        return from_data.seed_from(offers, self.codebook, self._updates, self.seeding)


def _normal(seed: int, step: noise.Step, keys: Int64[Tensor, " N"], like: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """noise.normal in the type of `like`, a tile at a time."""
    drawn = torch.empty_like(like, requires_grad=False)
    tile = max(1, _NOISE_VALUES // like.shape[1])
    for part, named in zip(drawn.split(tile), keys.split(tile), strict=True):
        part.copy_(noise.normal(seed, step, named, draws=like.shape[1]))
    return drawn
