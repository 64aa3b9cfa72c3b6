"""Who reads which groups: rows that belong together (streamlines of one bundle of one subject), drawn anew each epoch.

A group is `size` rows of one value of a column. In every epoch the rows of each value are put into a seeded order and
dealt out to groups, so who shares a group changes and how many groups there are does not. The groups are then what a
`Plan` carries in its lanes, so all that holds of rows there holds of groups here.
"""

from collections import OrderedDict
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.errors import Refused
from pipelines.plan import Plan, permutation

KEPT_ROWS = 1 << 24
"""Orders of values that are kept, counted in rows: 128 MiB."""

Int64s = npt.NDArray[np.int64]


class GroupPlan:
    """The rows of every step of every epoch, whole groups at a time. Ordinals count within the split."""

    def __init__(
        self,
        values: npt.NDArray[np.integer],
        size: int,
        batch: int,
        lanes: int,
        seed: int,
        row_order: Literal["shuffled", "sequential"] = "shuffled",
    ) -> None:
        """
        Args:
            values: [rows] of the column, in the order of the split; any integers.
            size: rows of a group.
            batch: groups of a global step.
            lanes: a divisor of batch, from `lanes_for`.
            row_order: `sequential` deals rows out in the order of the split, the same in every epoch.
        """
        if size < 1:
            raise Refused(f"groups of {size} rows were asked for; they have at least 1.")
        self.group_size, self.seed, self.row_order = size, seed, row_order
        self._rows = np.argsort(values, kind="stable")
        _, counts = np.unique(values, return_counts=True)
        self._first_row = np.concatenate([[0], np.cumsum(counts)])
        self._first_group = np.concatenate([[0], np.cumsum(-(-counts // size))])
        self.groups = Plan(int(self._first_group[-1]), batch, lanes, seed, row_order)
        self.steps_per_epoch = self.groups.steps_per_epoch
        self._orders: OrderedDict[tuple[int, int], Int64s] = OrderedDict()
        self._kept = 0

    def at(self, step: int, rank: int = 0, world: int = 1) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """One worker's rows of one step, group after group.

        Returns:
            (ordinals [b x size], mask [b x size]); where mask is False the row is filler, to be masked out: a group
            without a True is there because its lane ran short; any other is filled up with rows of its own value.
        """
        groups, valid = self.groups.at(step, rank, world)
        epoch = step // self.steps_per_epoch
        ordinals = np.empty((len(groups), self.group_size), np.int64)
        mask = np.empty((len(groups), self.group_size), np.bool_)
        value = np.searchsorted(self._first_group, groups, side="right") - 1
        places = np.arange(self.group_size)
        for index, (group, its) in enumerate(zip(groups.tolist(), value.tolist(), strict=True)):
            order = self._order(epoch, its)
            turn = places + (group - int(self._first_group[its])) * self.group_size
            # Beyond the last row it begins again, so that filler is real rows too.
            ordinals[index] = order[turn % len(order)]
            mask[index] = valid[index] & (turn < len(order))
        return ordinals.reshape(-1), mask.reshape(-1)

    def _order(self, epoch: int, value: int) -> Int64s:
        """The ordinals of a value's rows as they are dealt out in an epoch."""
        start, stop = int(self._first_row[value]), int(self._first_row[value + 1])
        rows = self._rows[start:stop]
        if self.row_order == "sequential":
            return rows
        key = epoch, value
        if key not in self._orders:
            while self._orders and self._kept + len(rows) > KEPT_ROWS:
                self._kept -= len(self._orders.popitem(last=False)[1])
            self._orders[key] = rows[permutation(len(rows), self.seed, value, epoch, GROUP_STREAM)]
            self._kept += len(rows)
        self._orders.move_to_end(key)
        return self._orders[key]


GROUP_STREAM = 2**63
"""Far from the purposes for which a Plan draws: orders of blocks and of rows in them."""
