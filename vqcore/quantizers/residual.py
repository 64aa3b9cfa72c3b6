"""Residual quantization: every level quantizes what the levels before it have left over."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from vqcore import assign, losses, noise
from vqcore.codebook import Codebook, only, pick
from vqcore.estimators import straight_through
from vqcore.quantizers import from_data
from vqcore.quantizers.arguments import check_estimator, check_rule, check_seeding, check_sizes, check_weights
from vqcore.quantizers.contract import Quantized, VectorBatch, per_element, quantized
from vqcore.quantizers.rows import Rows, full_precision, keys_of, rows_of
from vqcore.quantizers.updates import Updates
from vqcore.quantizers.vector import Estimator
from vqcore.reduction import Reduction, resolve
from vqcore.seeding import Offer, Seeding, draw_sample, level_by_level
from vqcore.update import Rule, Statistics

DROPOUT = 1
"""The `stream` of noise.shared_uniform that draws how many levels a step keeps."""


class _Level(NamedTuple):
    """One level of N vectors."""

    number: int
    residual: Float[Tensor, "N D"]
    """r_l, with the gradient of x."""
    codes: Int64[Tensor, " N"]
    """-1 where the vector is not valid."""
    left: Float[Tensor, "N D"]
    """r_{l+1} = r_l - sg(e_l)."""
    output: Float[Tensor, "N D"]
    """e_1 + ... + e_l, a constant."""


class ResidualQuantizer(nn.Module):
    """A vector becomes one code a level, its quantized vector the sum of their codewords (RQ-VAE: Lee et al. 2022,
    section 3.1; semantic IDs: Rajput et al. 2023, Singh et al. 2024, section 3; SoundStream: Zeghidour et al. 2021).

        r_1 = x    c_l = argmin_k |r_l - e^l_k|^2    r_{l+1} = r_l - sg(e^l_{c_l})    output = (e^1 + e^2) + e^3 + ...

    added in level order, so that r_{L+1} = x - output up to rounding and look_up(assign(x)) is the evaluation output
    bit for bit. Shapes: x [..., D], mask and keys [...], codes [..., L].

    **Gradients.** With beta = commitment_weight, n valid vectors and sg = stop-gradient,

        loss = 1 / (n D) sum over vectors and levels of  beta |r_l - sg(e_l)|^2  +  |sg(r_l) - e_l|^2

    the second term only where the codebooks are learned (decay=None). So it is a mean over D, a *sum* over levels, a
    mean over vectors. The first equals |x - sg(e_1 + ... + e_l)|^2, the commitment of RQ-VAE (which averages it over
    levels). A residual is x less constants, therefore:

    - every level's commitment reaches x with its own gradient, 2 beta / (n D) r_{l+1}, whole;
    - beta multiplies that term alone, the one that moves the encoder;
    - a codeword moves by the residuals of its own level that chose it, never by a later level's error, and codewords
      that nothing chose get a gradient of 0 (a shared book adds up what its levels send);
    - one estimator takes the gradient of the output to x: estimator(x, sum of codewords), not one per level.

    (Where each level returns r + sg(e - r) and hands r less that to the next, as much public code does, later
    residuals carry no gradient and only level 1's commitment trains the encoder.)

    A training forward finds all levels' codes with the old codebooks, then updates them all from one reduce; dead
    codes of any level cost one more. Inside `accumulate` the update waits for the end of the block. The codes of the
    first l levels, and their sums, are those of a quantizer that has only these l books.

    Arguments:
        num_codes: K of every level, or one number a level.
        code_dim: D.
        levels: L; may be left out where num_codes lists the levels.
        shared: one codebook for all levels, with one moving average of all they send (or one parameter). Counts in
            `last_counts` stay one a level.
        decay: of the moving averages, in [0, 1); None: codebooks are parameters, moved by the codebook loss.
        estimator: (x, output) -> output with the gradient wanted; see vqcore.estimators.
        commitment_weight: beta (0.25 in the papers).
        seeding: a function of vqcore.seeding; None draws every codebook from N(0, 1) by `seed`, at once.
        revive_below: a code whose moving count is below this is replaced by a residual of its own level (of any level
            where shared); 0 never.
        dropout: probability that a training step keeps fewer levels, their number drawn evenly from keep_levels to
            L - 1, alike on all workers and in all forwards of an `accumulate` block (SoundStream's quantizer dropout;
            drawn per step, not per vector). Dropped levels give code -1, add 0, and change nothing: no decay, and
            a gradient of 0. Costs a host synchronisation a step on CUDA.
        keep_levels: the fewest that dropout keeps; L switches it off.
        reduce, seed, eps: as in VectorQuantizer.

    Raises ValueError for arguments outside these.
    """

    _level_counts: Tensor

    discrete = True
    accumulates = True

    def __init__(
        self,
        num_codes: int | Sequence[int],
        code_dim: int,
        *,
        levels: int | None = None,
        shared: bool = False,
        decay: float | None = 0.99,
        estimator: Estimator = straight_through,
        commitment_weight: float = 0.25,
        seeding: Seeding | None = None,
        revive_below: float = 0.0,
        dropout: float = 0.0,
        keep_levels: int = 1,
        reduce: Reduction | None = None,
        seed: int = 0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        rule = Rule(decay=decay, revive_below=revive_below, eps=eps, seed=seed)
        check_rule(rule)
        sizes = _sizes(num_codes, levels, shared)
        check_sizes(code_dim=code_dim, keep_levels=keep_levels)
        check_estimator(estimator)
        check_seeding(seeding)
        check_weights(commitment_weight=commitment_weight)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}; it is a probability, so it must lie in [0, 1]")
        if keep_levels > len(sizes):
            raise ValueError(f"keep_levels is {keep_levels}; there are {len(sizes)} levels, so it can be at most that")
        self.num_codes = sizes
        self.code_dim = code_dim
        self.levels = len(sizes)
        self.shared = shared
        self.estimator = estimator
        self.commitment_weight = commitment_weight
        self.seeding = seeding
        self.dropout = dropout
        self.keep_levels = keep_levels
        books = [Codebook(size, code_dim, learned=decay is None) for size in (sizes[:1] if shared else sizes)]
        rules = [replace(rule, level=level, shared_by=self.levels // len(books)) for level in range(len(books))]
        self.codebooks = nn.ModuleList(books)
        """One a level; a single one where it is shared."""
        self._updates = Updates(
            books, rules, reduce, needed=max(sizes), seed=self._seed_from, updated=self._remember_counts
        )
        # Integers, because `.to(dtype)` leaves them alone.
        self.register_buffer("_level_counts", torch.zeros(sum(sizes), dtype=torch.int64), persistent=False)
        if seeding is None:
            generator = torch.Generator().manual_seed(seed)
            for book in books:
                drawn = torch.randn(book.num_codes, code_dim, generator=generator, dtype=torch.float32, device="cpu")
                book.set_vectors(drawn)

    def extra_repr(self) -> str:
        name = getattr(self.estimator, "__name__", repr(self.estimator))
        rule = self._updates.rules[0]
        return (
            f"levels={self.levels}, shared={self.shared}, decay={rule.decay}, estimator={name}, "
            f"revive_below={rule.revive_below}, dropout={self.dropout}"
        )

    def book_of(self, level: int) -> Codebook:
        """The codebook of a level, counted from 0."""
        return cast(Codebook, self.codebooks[0 if self.shared else level])

    @property
    def seeded(self) -> bool:
        """Whether all codebooks hold something; forwards of an unseeded one gather in training and raise in eval."""
        return all(book.is_seeded for book in self._books())

    @property
    def last_counts(self) -> tuple[Tensor, ...]:
        """float64 [K] for each level: global number of vectors per code in the newest update; zeros before the first,
        and for levels that it dropped."""
        return self._level_counts.double().split(self.num_codes)

    def revived_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The codebooks that are parameters and had codes revived in the newest update, and which codes."""
        return [
            (book.vectors, book.revived)
            for book in self._books()
            if isinstance(book.vectors, nn.Parameter) and book.revived is not None
        ]

    def forward(
        self,
        x: Float[Tensor, "*shape D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        keys: Int64[Tensor, "*shape"] | None = None,
    ) -> Quantized:
        """Quantize `x` to vectors [..., D] and codes [..., L]. Calls, loss scale and errors as in VectorQuantizer."""
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.book_of(0).dtype)
            if self.training and not self.seeded:
                return from_data.gather(rows, x, keys, self.book_of(0), self._updates, (self.levels,))
            self._require_seeded()
            statistics, named = self._begin(x, keys) if self.training else ([], None)
            codes: list[Tensor] = []
            objective = torch.zeros((), dtype=torch.float64, device=x.device)
            for level in self._walk(rows, self._kept() if self.training else self.levels):
                codes.append(level.codes)
                squared = level.left.square().sum(dtype=torch.float64)  # |r_l - sg(e_l)|^2
                objective = objective + self.commitment_weight * squared
                objective = objective + self._codebook_term(level.number, level.residual, level.codes)
                if self.training:
                    self._add(statistics, level, named)
            for number in range(len(codes), self.levels):  # no vectors: a gradient of 0, which DDP would miss
                objective = objective + self._codebook_term(number, rows.x[:0], codes[0][:0])
            if self.training:
                count, world = self._updates.end(statistics, rows.valid)
                output = only(rows.valid, self.estimator(rows.x, level.output))
            else:
                count, world, output = rows.valid.sum(), 1, level.output
            loss = (objective * per_element(count, world, self.code_dim)).to(rows.x.dtype)
            stacked = nn.functional.pad(torch.stack(codes, -1), (0, self.levels - len(codes)), value=-1)
        return quantized(x, rows, output, stacked, loss, squared)

    @torch.no_grad()
    def assign(
        self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Int64[Tensor, "*shape L"]:
        """Codes of `x`, all levels; -1 where masked or non-finite. Raises RuntimeError while unseeded."""
        self._require_seeded()
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.book_of(0).dtype)
            codes = [level.codes for level in self._walk(rows, self.levels)]
        return torch.stack(codes, -1).reshape(*x.shape[:-1], self.levels)

    def look_up(self, codes: Int[Tensor, "*shape L"]) -> Float[Tensor, "*shape D"]:
        """Sum of the codewords in level order. A level of -1 adds 0, so that codes whose tail is -1 decode coarsely.

        Raises ValueError for another number of levels, or for codes outside [0, K) of their level and not -1.
        """
        if codes.ndim == 0 or codes.shape[-1] != self.levels:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; this quantizer takes [..., {self.levels}], one code a level "
                "(-1 for levels to leave out)"
            )
        output = self.book_of(0).look_up(codes[..., 0])
        for level in range(1, self.levels):
            output = output + self.book_of(level).look_up(codes[..., level])
        return output

    def accumulate(self, count: int | None = None) -> AbstractContextManager[None]:
        """As VectorQuantizer.accumulate. All forwards of a block keep the same levels."""
        return self._updates.accumulate(count, self.training)

    def seed(self, batches: Iterable[VectorBatch]) -> str:
        """Set all codebooks from this worker's `batches`, all workers together; returns a sentence on what was used.

        One sample of all workers' vectors is drawn, of the size that the largest codebook asks for. Level 1 is seeded
        from it, level 2 from its residuals, and so on, each level in a new random order: a seeding that takes the first
        rows would else meet the residuals of the very rows it took before, which are 0. A shared codebook gets K / L
        codes from each level's residuals, which are what the codes so far leave. Counts and errors as in
        VectorQuantizer.seed; no codebook is set where a level fails.
        """
        return self._seed_from(from_data.offers_of(batches, self.book_of(0), self._updates.reduce))

    def _books(self) -> list[Codebook]:
        return [cast(Codebook, book) for book in self.codebooks]

    def _require_seeded(self) -> None:
        for book in self._books():
            book.require_seeded()

    def _walk(self, rows: Rows, levels: int) -> Iterator[_Level]:
        """The first `levels` levels with the codebooks as they are. Codewords are constants here: no gradient of a
        later level reaches them."""
        residual, output = rows.x, None
        for number in range(levels):
            vectors = self.book_of(number).readable()
            codes = assign.nearest(residual.detach(), vectors).masked_fill(~rows.valid, -1)
            chosen = pick(vectors, codes)
            output = chosen if output is None else output + chosen
            left = residual - chosen
            yield _Level(number, residual, codes, left, output)
            residual = left

    def _codebook_term(self, number: int, residual: Tensor, codes: Tensor) -> Tensor | float:
        """|sg(r_l) - e_l|^2 where the codebook is learned, summed over vectors and D."""
        book = self.book_of(number)
        return losses.squared_error(residual.detach(), pick(book.vectors, codes)) if book.learned else 0.0

    def _kept(self) -> int:
        """How many levels this training step keeps: a function of (seed, number of updates so far)."""
        if self.dropout == 0.0 or self.keep_levels == self.levels:
            return self.levels
        # The first level is never dropped, so that its book counts every update.
        seed, step = self._updates.rules[0].seed, int(self.book_of(0).step)
        whether, how_many = noise.shared_uniform(seed, step, 2, stream=DROPOUT).tolist()
        if whether >= self.dropout:
            return self.levels
        return self.keep_levels + int(how_many * (self.levels - self.keep_levels))

    def _begin(self, x: Tensor, keys: Tensor | None) -> tuple[list[Statistics], Tensor | None]:
        statistics = self._updates.begin()
        if statistics[0].rule.revive_below == 0:
            return statistics, None
        return statistics, keys_of(keys, x, resolve(self._updates.reduce).rank, statistics[0].seen)

    def _add(self, statistics: list[Statistics], level: _Level, keys: Tensor | None) -> None:
        if self.shared:
            statistics[0].add(level.residual, level.codes, keys, level.number)
        else:
            statistics[level.number].add(level.residual, level.codes, keys)

    def _remember_counts(self, statistics: Sequence[Statistics]) -> None:
        """Keep every level's counts of an update; one without any vector changes nothing."""
        counts = torch.cat([one.level_counts().reshape(-1) for one in statistics])
        self._level_counts.copy_(torch.where(statistics[0].total() > 0, counts.long(), self._level_counts))

    def _seed_from(self, offers: Iterable[Offer]) -> str:
        if self.seeding is None:
            raise RuntimeError(
                "this quantizer drew its codebooks from N(0, 1) (seeding=None); build it with "
                "seeding=vqcore.seeding.kmeans_plus_plus to seed it from data, or call set_vectors(v) of each codebook"
            )
        reduce, rule = resolve(self._updates.reduce), self._updates.rules[0]
        largest = max(self._books(), key=lambda book: book.num_codes).vectors.detach()
        sample = draw_sample(offers, largest, seed=rule.seed, reduce=reduce)
        sizes = _evenly(self.num_codes[0], self.levels) if self.shared else self.num_codes
        with full_precision(largest.device):
            made = level_by_level(sample.rows, sizes, self.seeding, shared=self.shared, seed=rule.seed, reduce=reduce)
        for book, vectors in zip(self._books(), [torch.cat(made)] if self.shared else made, strict=True):
            book.set_vectors(vectors, rule.revived_count)
        self._updates.forget()
        name = getattr(self.seeding, "__name__", repr(self.seeding))
        where = " for one shared codebook" if self.shared else ""
        left_out = f"; {sample.non_finite} more were not finite" if sample.non_finite else ""
        return (
            f"{' + '.join(map(str, sizes))} codes by {name}{where}, level by level, from {len(sample.rows)} of "
            f"{sample.seen} vectors and their residuals{left_out}"
        )


def _sizes(num_codes: int | Sequence[int], levels: int | None, shared: bool) -> tuple[int, ...]:
    """K of every level from what the caller gave. Raises ValueError where it does not fit together."""
    if levels is not None:
        check_sizes(levels=levels)
    if not isinstance(num_codes, Sequence):
        check_sizes(num_codes=num_codes)
        if levels is None:
            raise ValueError(f"num_codes is {num_codes} and levels is not given; give levels, or one num_codes a level")
        return (num_codes,) * levels
    sizes = tuple(num_codes)
    if not sizes or levels not in (None, len(sizes)):
        raise ValueError(f"num_codes is {num_codes!r} and levels is {levels}; num_codes needs one number a level")
    for level, size in enumerate(sizes):
        check_sizes(**{f"num_codes[{level}]": size})
    if shared and len(set(sizes)) > 1:
        raise ValueError(f"num_codes is {num_codes!r}; a shared codebook has one size, so all levels must agree")
    return sizes


def _evenly(num_codes: int, levels: int) -> list[int]:
    """`num_codes` over `levels` as evenly as they go, the first levels first; levels that get none are left out."""
    return [size for level in range(levels) if (size := num_codes // levels + (level < num_codes % levels))]
