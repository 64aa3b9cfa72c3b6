"""Who reads which rows at which step: pure arithmetic, so that resuming is a number and workers change nothing.

The split's rows are cut into lanes, contiguous and as equal as can be. Each lane walks its own rows in blocks of 1,024,
blocks and the rows inside them in an order drawn anew each epoch. A step takes batch / lanes rows from every lane, and
worker r of W serves lanes r, r + W, ...: the global batches are the same for every W. (MosaicML streaming's canonical
nodes are the model.)
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from pipelines.errors import Refused

BLOCK = 1024


def lanes_for(batch: int, max_workers: int) -> int:
    """The smallest divisor of `batch` that is at least max(gcd(batch, 64), max_workers).

    Raises:
        Refused: there is none; the message names the nearest batch size that has one.
    """
    least = max(math.gcd(batch, 64), max_workers)
    for lanes in range(least, batch + 1):
        if batch % lanes == 0:
            return lanes
    raise Refused(
        f"a batch of {batch} rows cannot be shared by {max_workers} workers, each of which needs a row a step;"
        f" use batch_size={max_workers} or more, or fewer workers."
    )


@dataclass(frozen=True)
class RowPlan:
    """The row order of one stage over one split. Rows are named by their ordinal in the split."""

    rows: int
    batch: int
    lanes: int
    seed: int
    row_order: Literal["shuffled", "sequential"] = "shuffled"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.batch < 1 or self.lanes < 1 or self.batch % self.lanes:
            raise ValueError(
                f"rows={self.rows}, batch={self.batch}, lanes={self.lanes}: all must be at least 1 and lanes a"
                " divisor of batch"
            )

    @property
    def per_lane(self) -> int:
        """Rows that one step takes from each lane."""
        return self.batch // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        longest = -(-self.rows // self.lanes)
        return -(-longest // self.per_lane)

    def at(self, step: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """(ordinals int64 [b], mask bool [b]) of worker `rank` of `world`; masked places hold ordinal 0.

        Raises:
            ValueError: more workers than lanes, since some would have nothing to read.
        """
        if not 0 <= rank < world <= self.lanes:
            raise ValueError(
                f"rank {rank} of {world} workers: ranks begin at 0, and {self.lanes} lanes serve that many"
            )
        epoch, within = divmod(step, self.steps_per_epoch)
        low = within * self.per_lane
        taken = [self._lane(lane, epoch, low) for lane in range(rank, self.lanes, world)]
        ordinals = np.full(len(taken) * self.per_lane, -1, dtype=np.int64)
        for place, rows in enumerate(taken):
            ordinals[place * self.per_lane : place * self.per_lane + len(rows)] = rows
        mask = ordinals >= 0
        return np.where(mask, ordinals, 0), mask

    def _lane(self, lane: int, epoch: int, low: int) -> np.ndarray:
        """The lane's rows at places [low, low + per_lane) of its walk; fewer at its end."""
        first = lane * self.rows // self.lanes
        count = (lane + 1) * self.rows // self.lanes - first
        stop = min(low + self.per_lane, count)
        if low >= stop:
            return np.empty(0, dtype=np.int64)
        if self.row_order == "sequential":
            return np.arange(first + low, first + stop, dtype=np.int64)
        pieces = [self._walk(lane, epoch, count, place) for place in range(low // BLOCK, (stop - 1) // BLOCK + 1)]
        offset = low % BLOCK
        walked: np.ndarray = np.concatenate(pieces)[offset : offset + stop - low]
        return first + walked

    def _walk(self, lane: int, epoch: int, count: int, place: int) -> np.ndarray:
        """The block at `place` of a lane's walk. The short last block stays last, so that places are arithmetic."""
        whole = count // BLOCK
        block = place if place >= whole else int(_order(self.seed, epoch, lane, -1, whole)[place])
        shuffled: np.ndarray = block * BLOCK + _order(self.seed, epoch, lane, block, min(BLOCK, count - block * BLOCK))
        return shuffled


@lru_cache(maxsize=8192)
def _order(seed: int, epoch: int, lane: int, block: int, count: int) -> np.ndarray:
    """A permutation of range(count) that (seed, epoch, lane, block) alone decide."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, lane, block + 1])))
    return generator.permutation(count)
