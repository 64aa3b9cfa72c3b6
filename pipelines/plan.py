"""Who reads what: pure arithmetic on (rows, batch, lanes, seed, step, rank, world).

The rows of a split are cut into lanes, contiguous ranges of equal length (give or take one). A step takes batch / lanes
rows from every lane, and worker r of W serves lanes r, r + W, ... So global batches are the same for every W, and to
resume is to go on with the next step. After MosaicML streaming's canonical nodes.
"""

from functools import lru_cache
from math import gcd
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.errors import Refused

BLOCK = 1024
"""Rows that lie together in a lane and are shuffled among themselves: reading stays local, batches do not repeat."""


def lanes_for(batch: int, max_workers: int) -> int:
    """The smallest divisor of `batch` that is at least max(gcd(batch, 64), max_workers).

    Raises:
        Refused: there is none, because the batch has fewer rows than there are workers.
    """
    if batch < 1 or max_workers < 1:
        raise Refused(f"a batch of {batch} rows for {max_workers} workers was given; both must be at least 1.")
    least = max(gcd(batch, 64), max_workers)
    if least > batch:
        raise Refused(
            f"a batch of {batch} rows cannot be shared by {max_workers} workers, one row each at least; "
            f"the nearest batch sizes are {max_workers} and {-(-max_workers // 64) * 64}."
        )
    return next(lanes for lanes in range(least, batch + 1) if batch % lanes == 0)


class Plan:
    """The rows of every step of every epoch. Ordinals count within the split."""

    group_size = 1
    """Rows that are read together; see `pipelines.groups`."""

    def __init__(
        self, rows: int, batch: int, lanes: int, seed: int, row_order: Literal["shuffled", "sequential"] = "shuffled"
    ) -> None:
        """
        Args:
            rows: of the split.
            batch: rows of a global step.
            lanes: a divisor of batch, from `lanes_for`; part of what a result depends on.
            row_order: `sequential` walks every lane from its first row to its last.
        """
        if rows < 1:
            raise Refused("the split has no rows to read; ingest more, or name another split.")
        if lanes < 1 or batch % lanes:
            raise Refused(f"{lanes} lanes do not divide a batch of {batch} rows; use lanes_for(batch, workers).")
        if row_order not in ("shuffled", "sequential"):
            raise Refused(f"row_order={row_order!r} was given; allowed: shuffled, sequential.")
        if seed < 0:
            raise Refused(f"seed={seed} was given; it must be at least 0.")
        self.rows, self.batch, self.lanes, self.seed, self.row_order = rows, batch, lanes, seed, row_order
        self.rows_per_lane = batch // lanes
        longest = (rows + lanes - 1) // lanes
        self.steps_per_epoch = (longest + self.rows_per_lane - 1) // self.rows_per_lane
        # Bounded: one order of blocks per lane and epoch, and the blocks the lanes are now in.
        self._walk = lru_cache(maxsize=lanes + 1)(self._walk_blocks)
        self._inside = lru_cache(maxsize=2 * lanes + 2)(self._shuffle_block)

    def at(self, step: int, rank: int = 0, world: int = 1) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """One worker's rows of one step, lane after lane.

        Returns:
            (ordinals [b], mask [b]); where mask is False the lane ran short: that ordinal is filler, to be masked out.
            Workers' b differ by at most one lane where `world` does not divide `lanes`.
        """
        if not 0 <= rank < world <= self.lanes or step < 0:
            raise Refused(
                f"step {step}, worker {rank} of {world} was asked for with {self.lanes} lanes; "
                "allowed: step >= 0 and 0 <= worker < workers <= lanes."
            )
        epoch, within = divmod(step, self.steps_per_epoch)
        serving = range(rank, self.lanes, world)
        ordinals = np.empty((len(serving), self.rows_per_lane), np.int64)
        mask = np.zeros((len(serving), self.rows_per_lane), np.bool_)
        first = within * self.rows_per_lane
        for index, lane in enumerate(serving):
            start, stop = self.span(lane)
            valid = max(0, min(self.rows_per_lane, stop - start - first))
            mask[index, :valid] = True
            ordinals[index, valid:] = min(start, self.rows - 1)
            if self.row_order == "sequential":
                ordinals[index, :valid] = np.arange(start + first, start + first + valid)
            else:
                self._shuffled(epoch, lane, first, ordinals[index, :valid])
        return ordinals.reshape(-1), mask.reshape(-1)

    def span(self, lane: int) -> tuple[int, int]:
        """A lane's own ordinals [start, stop)."""
        return lane * self.rows // self.lanes, (lane + 1) * self.rows // self.lanes

    def _shuffled(self, epoch: int, lane: int, first: int, out: npt.NDArray[np.int64]) -> None:
        """Ordinals at the places first, first + 1, ... of a lane's walk, written to `out`."""
        start, stop = self.span(lane)
        done = 0
        while done < len(out):
            walk, short_turn = self._walk(epoch, lane)
            # Only the last block may be short; every block walked after it begins that much earlier.
            missing = len(walk) * BLOCK - (stop - start)
            place = first + done
            turn = place // BLOCK if place < (short_turn + 1) * BLOCK - missing else (place + missing) // BLOCK
            begin = turn * BLOCK - (missing if turn > short_turn else 0)
            block = int(walk[turn])
            rows = self._inside(epoch, lane, block)[place - begin : first + len(out) - begin]
            np.add(rows, start + block * BLOCK, out=out[done : done + len(rows)])
            done += len(rows)

    def _walk_blocks(self, epoch: int, lane: int) -> tuple[npt.NDArray[np.int64], int]:
        """The order of a lane's blocks, and the turn of the last one."""
        start, stop = self.span(lane)
        walk = permutation((stop - start + BLOCK - 1) // BLOCK, self.seed, lane, epoch, 0)
        return walk, int(np.argmax(walk))

    def _shuffle_block(self, epoch: int, lane: int, block: int) -> npt.NDArray[np.int64]:
        start, stop = self.span(lane)
        return permutation(min(BLOCK, stop - start - block * BLOCK), self.seed, lane, epoch, block + 1)


def permutation(n: int, seed: int, lane: int, epoch: int, purpose: int) -> npt.NDArray[np.int64]:
    """A seeded order of n things, another one for every lane (or what else has a number), epoch and purpose."""
    # Raw Philox output and a stable sort: NumPy promises the stream of bit generators, not that of `permutation`,
    # and a run must resume in the same order under a later NumPy.
    key = np.array([seed % 2**64, lane], np.uint64)
    bits = np.random.Philox(key=key, counter=np.array([0, 0, purpose, epoch], np.uint64))
    return np.argsort(bits.random_raw(n), kind="stable")
