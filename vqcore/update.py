"""One synchronised update of one or several codebooks: local statistics, one reduce, EMA, revival."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vqcore import noise
from vqcore.codebook import Codebook
from vqcore.derived import DerivedCodebook
from vqcore.reduction import Reduction

Book = Codebook | DerivedCodebook

COUNT_DECAY = 0.99
"""Decay of the counts of a codebook that is learned by gradient: there they only tell which codes are dead."""

REVIVAL = 0
"""The `stream` of noise.race that draws replacements for dead codes."""

# Numbers widened to float64 at a time: a tile stays near the caches, where the whole batch would cost 8 N D bytes. With
# smaller tiles the table of sums is walked over more often.
_TILE = 2**17


@dataclass(frozen=True)
class Rule:
    """How a codebook is updated."""

    decay: float | None
    """EMA decay of counts and sums; None where an optimiser moves the vectors."""
    revive_below: float
    """A code whose EMA count is below this is dead; 0 never revives."""
    eps: float
    """Additive smoothing of the counts in the read-out."""
    seed: int
    """Seed of the races that draw replacements."""
    level: int = 0
    """Which level of a residual quantizer this is, the first of them where several share it: every level races on its
    own, so that a row offers each level's residual with another key."""
    shared_by: int = 1
    """How many levels share the codebook. Their counts travel apart, their sums together; one moving average."""
    draws: int = 1
    """How many codes a vector has: each of m counts 1/m and gets x/m."""
    move: Callable[[Any, Tensor, Tensor | None, float, float], None] | None = None
    """(book, global counts, global sums, decay, eps) -> moves the book; None: `book.ema_update`. A module-level
    function, for the systems whose source updates by another rule."""

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number")

    @property
    def revived_count(self) -> float:
        """EMA count a revived or freshly seeded code starts from: some steps of grace before it can be dead again."""
        return max(1.0, 2.0 * self.revive_below)


class Statistics:
    """This worker's counts and sums for one codebook over the forwards of one update, and candidates for revival."""

    def __init__(self, book: Book, rule: Rule) -> None:
        self.book = book
        self.rule = rule
        length = book.num_codes * (rule.shared_by + (0 if rule.decay is None else book.code_dim))
        self.packed = torch.zeros(length, dtype=torch.float64, device=book.counts.device)
        """Counts [levels x K], then sums [K x D] where there is a decay: what the one reduce of the update carries."""
        self.seen = 0
        """Vectors offered so far, valid or not: where the default keys of the next forward begin."""
        self._recent: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._best: tuple[Tensor, Tensor] | None = None
        self._limit_and_step: tuple[int, int] | None = None

    def level_counts(self) -> Float64[Tensor, "levels K"]:
        """Counts of each level that shares the book (one row where none does), a view of `packed`."""
        return self.packed[: self.rule.shared_by * self.book.num_codes].view(self.rule.shared_by, -1)

    def sums(self) -> Float64[Tensor, "K D"] | None:
        """Sums over all levels that share the book, a view of `packed`; None where the rule has no decay."""
        first = self.rule.shared_by * self.book.num_codes
        return None if self.rule.decay is None else self.packed[first:].view(-1, self.book.code_dim)

    def split(self) -> tuple[Float64[Tensor, " K"], Float64[Tensor, "K D"] | None]:
        """Counts and sums as the moving average takes them: over all levels that share the book."""
        by_level = self.level_counts()
        return by_level[0] if len(by_level) == 1 else by_level.sum(0), self.sums()

    def total(self) -> Float64[Tensor, ""]:
        """Number of vectors of all workers, once updated. Shares of 1/m only add up to it by rounding; of levels that
        share the book, the first counts every vector."""
        return self.level_counts()[0].sum().round()

    @torch.no_grad()
    def add(
        self, x: Float[Tensor, "N D"], codes: Int64[Tensor, "N ..."], keys: Int64[Tensor, " N"] | None, level: int = 0
    ) -> None:
        """Count `codes` [N], or [N, m] where the rule has m draws, and sum `x` per code. A vector of code -1 takes no
        part, and its x must be 0.

        `keys` may be None where the rule never revives. Draws count as whole numbers, which add up the same in any
        order; `update` divides them. `level` counts from 0 among those that share the book.
        """
        counts, sums = self.level_counts()[level], self.sums()
        drawn = codes.view(-1, self.rule.draws)
        valid = drawn[:, 0] >= 0
        index = drawn.clamp(min=0)
        weight = valid.double()
        for column in index.unbind(1):
            counts.index_add_(0, column, weight)
        if sums is not None:
            tile = max(1, _TILE // x.shape[1] if x.device.type == "cpu" else len(x))
            wide = sums.new_empty(min(tile, len(x)), x.shape[1])
            for rows, where in zip(x.detach().split(tile), index.split(tile), strict=True):
                wide[: len(rows)] = rows
                for column in where.unbind(1):
                    sums.index_add_(0, column, wide[: len(rows)])
        if level == 0:
            self.seen += len(codes)
        if self.rule.revive_below > 0:
            if keys is None:
                raise ValueError("keys are needed where revive_below > 0: they draw the replacements of dead codes")
            if level in self._recent:
                self._settle(*self._bound())
            self._recent[level] = (x, valid, keys)

    def hold(self) -> None:
        """Keep what the caller may overwrite before the update, which waits for the end of a block: raw data in a
        buffer that is filled again. What a graph made is left to autograd, which notices."""
        self._recent = {
            level: (x.detach() if x.requires_grad else x.clone(), valid, keys.clone())
            for level, (x, valid, keys) in self._recent.items()
        }

    def _bound(self) -> tuple[int, int]:
        """How many codes can be dead after this update (new vectors only add to a count), and the step it is."""
        if self._limit_and_step is None:
            decay = COUNT_DECAY if self.rule.decay is None else self.rule.decay
            slack = 1.0 + 1e-9  # the update may round the other way
            may_die = (self.book.counts * decay < self.rule.revive_below * slack).sum()
            if self.rule.move is not None:  # such a rule may shrink counts further
                may_die = torch.full_like(may_die, self.book.num_codes)
            limit, step = torch.stack([may_die, self.book.step]).tolist()
            self._limit_and_step = (limit, step)
        return self._limit_and_step

    def _settle(self, limit: int, step: int) -> None:
        """Let the newest forward's vectors race, each level on its own, and keep the `limit` smallest of all so far."""
        recent, self._recent = self._recent, {}
        if limit == 0:
            return
        for level, (x, valid, keys) in recent.items():
            # A zero vector has no direction to offer.
            usable = valid & (x != 0).any(-1) if self.book.unit_norm else valid
            race = noise.race(self.rule.seed, step, keys[usable], level=self.rule.level + level, stream=REVIVAL)
            rows = x.detach()[usable]
            if self._best is not None:
                race, rows = torch.cat([self._best[0], race]), torch.cat([self._best[1], rows])
            order = torch.argsort(race, stable=True)[:limit]
            self._best = (race[order], rows[order])

    def candidates(self, limit: int, step: int) -> tuple[Float64[Tensor, " M"], Float[Tensor, "M D"]]:
        """The at most `limit` vectors with the smallest race keys of `step`, smallest first, and those keys."""
        self._settle(limit, step)
        if self._best is None:
            return self.packed.new_zeros(0), self.book.vectors.detach()[:0]
        return self._best[0][:limit], self._best[1][:limit]


@torch.no_grad()
def update(statistics: Sequence[Statistics], reduce: Reduction) -> None:
    """Reduce the statistics of all codebooks together, once, and update each codebook from the sums.

    Afterwards each `statistics[i].split()` holds the global counts and sums. A second reduce happens only where some
    reduced count shows a dead code, which all workers see alike.
    """
    packed = statistics[0].packed if len(statistics) == 1 else torch.cat([one.packed for one in statistics])
    reduce(packed)
    if len(statistics) > 1:
        for one, part in zip(statistics, packed.split([len(one.packed) for one in statistics]), strict=True):
            one.packed.copy_(part)
    for one in statistics:
        if one.rule.draws > 1:
            one.packed /= one.rule.draws
        counts, sums = one.split()
        decay = COUNT_DECAY if one.rule.decay is None else one.rule.decay
        if one.rule.move is None:
            one.book.ema_update(counts, sums, decay, one.rule.eps)
        else:
            one.rule.move(one.book, counts, sums, decay, one.rule.eps)
    _revive([one for one in statistics if one.rule.revive_below > 0], reduce)


def _revive(statistics: Sequence[Statistics], reduce: Reduction) -> None:
    """Dead codes, in index order, take the vectors with the smallest race keys of the global update; the rest wait.

    Every worker puts its best candidates in its own slots of a tensor of zeros, so that a sum is a gather. A race key
    is positive, hence a key of 0 is an empty slot.
    """
    if not statistics:
        return
    dead = [one.book.counts < one.rule.revive_below for one in statistics]
    flags = [torch.stack([d.sum(), one.total().long(), one.book.step]) for d, one in zip(dead, statistics, strict=True)]
    found = torch.stack(flags).tolist()  # the one host synchronisation of a step
    slots = [min(codes, vectors) for codes, vectors, _ in found]
    widths = [count * (1 + one.book.code_dim) for count, one in zip(slots, statistics, strict=True)]
    if not any(slots):
        return
    table = statistics[0].packed.new_zeros(reduce.world, sum(widths))
    for one, count, own, (_, _, step) in zip(statistics, slots, table[reduce.rank].split(widths), found, strict=True):
        race, rows = one.candidates(count, step - 1)  # the step this update began with
        own[: len(race)] = race
        own[count:].view(count, one.book.code_dim)[: len(rows)] = rows.double()
    reduce(table)
    for one, count, is_dead, part in zip(statistics, slots, dead, table.split(widths, dim=1), strict=True):
        race = part[:, :count].reshape(-1)
        rows = part[:, count:].reshape(-1, one.book.code_dim)
        order = torch.argsort(race.masked_fill(race == 0, torch.inf), stable=True)
        order = order[: min(count, int((race > 0).sum()))]
        if len(order):
            one.book.revive(is_dead.nonzero().squeeze(-1)[: len(order)], rows[order], one.rule.revived_count)
