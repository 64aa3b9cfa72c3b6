"""Rows of a manifest as the batches a recipe sees: the right rows for this worker, checked for non-finite values."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool
from torch import Tensor

from pipelines import corpora
from pipelines.columns import values_of
from pipelines.errors import Refused
from pipelines.groups import GroupPlan
from pipelines.manifest import Manifest
from pipelines.plan import Plan
from pipelines.recipe import Batch, Grouping, Settings, Stage
from pipelines.shards import ShardReader
from pipelines.step import Wish
from vqcore.reduction import resolve


class Preparation(Protocol):
    """What says how rows were prepared, as a manifest does."""

    @property
    def kind(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]: ...


def columns_of(manifest: Preparation) -> dict[str, list[int] | None]:
    """Column -> shape of one row as a recipe sees it; None where rows differ in shape."""
    corpus = corpora.load(manifest.kind)
    return corpus.shapes(corpus.Settings.model_validate(manifest.settings))


def to_batch(
    columns: Mapping[str, Tensor], row_ids: np.ndarray, mask: np.ndarray, group_size: int = 1
) -> tuple[Batch, int]:
    """(batch, number of rows left out because a value was not finite). Left-out and masked rows become zeros.

    A masked row keeps its values where another of its group is not masked: it fills that group up.
    """
    valid = torch.from_numpy(mask)
    finite = finite_rows(columns)
    shown = valid.view(-1, group_size).any(1).repeat_interleave(group_size)
    clean = {name: _zeroed(column, shown & finite) for name, column in columns.items()}
    return Batch(clean, valid & finite, torch.from_numpy(row_ids)), int((valid & ~finite).sum())


def finite_rows(columns: Mapping[str, Tensor]) -> Bool[Tensor, " B"]:
    """Which rows hold no NaN and no infinity in any column."""
    finite = torch.ones(len(next(iter(columns.values()))), dtype=torch.bool)
    for column in columns.values():
        if column.is_floating_point():
            finite &= column.flatten(1).isfinite().all(1) if column.dim() > 1 else column.isfinite()
    return finite


def _zeroed(column: Tensor, keep: Tensor) -> Tensor:
    if bool(keep.all()):
        return column
    return torch.where(keep.view(-1, *[1] * (column.dim() - 1)), column, torch.zeros((), dtype=column.dtype))


@dataclass(frozen=True)
class Source:
    """This worker's share of every global batch of one stage."""

    reader: ShardReader
    rows: Plan | GroupPlan
    double: bool
    device: torch.device

    def wait(self, step: int, wish: Callable[[], Wish]) -> Wish:
        """Of rows that are all there there is nothing to wait for."""
        return Wish.NOTHING

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the step: nothing."""
        return {}

    def at(self, step: int) -> tuple[Batch, int]:
        """(batch of a step, its rows that were not finite). A function of the step, so resuming needs no state."""
        reduce = resolve(None)
        ordinals, mask = self.rows.at(step, reduce.rank, reduce.world)
        columns, row_ids = read_columns(self.reader, "train", ordinals)
        batch, lost = to_batch(columns, row_ids, mask, self.rows.group_size)
        return move(batch, self.device, torch.float64 if self.double else None), lost

    def epoch(self) -> Iterator[Batch]:
        """The batches of the first epoch."""
        for step in range(self.rows.steps_per_epoch):
            yield self.at(step)[0]


def read_columns(reader: ShardReader, split: str, ordinals: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
    """Columns as a recipe sees them, and row ids, of the given rows of a split."""
    return _seen(reader.manifest, reader.values(split, ordinals))


def as_seen(manifest: Manifest, rows: pa.RecordBatch) -> tuple[dict[str, Tensor], np.ndarray]:
    """Stored rows as the columns a recipe sees, and their row ids."""
    return _seen(manifest, values_of(rows))


def _seen(manifest: Manifest, stored: dict[str, Any]) -> tuple[dict[str, Tensor], np.ndarray]:
    corpus = corpora.load(manifest.kind)
    return corpus.tensors(stored, corpus.Settings.model_validate(manifest.settings)), stored["row_id"]


def move(batch: Batch, device: torch.device, floats: torch.dtype | None) -> Batch:
    """The batch on a device; floating columns in `floats` where it is given."""

    def moved(tensor: Tensor) -> Tensor:
        to = floats if floats is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device, to, non_blocking=True)

    columns = {name: moved(column) for name, column in batch.columns.items()}
    return Batch(columns, batch.mask.to(device), batch.keys.to(device))


@dataclass(frozen=True)
class Feed:
    """The train split of a manifest, for whatever stage asks."""

    reader: ShardReader

    def open(
        self,
        spec: Any,
        settings: Settings,
        stage: Stage,
        device: torch.device,
        say: Callable[[dict[str, Any]], None] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> Source:
        """`say` and `state` are for feeds whose rows are not all there."""
        return Source(self.reader, plan_of(self.reader, settings, stage, spec.lanes, spec.seed), spec.double, device)


def plan_of(reader: ShardReader, settings: Settings, stage: Stage, lanes: int, seed: int) -> Plan | GroupPlan:
    """The order in which a stage reads the train rows of `reader`."""
    how = (settings.batch_size, lanes, seed, stage.row_order)
    rows = reader.rows("train")
    if stage.grouping is None:
        return Plan(rows, *how)
    return GroupPlan(_values(reader, "train", np.arange(rows), stage.grouping.column), stage.grouping.size, *how)


def _values(reader: ShardReader, split: str, ordinals: np.ndarray, column: str) -> np.ndarray:
    """A number for each value of a column, in the order of the rows."""
    if column not in reader.schema.names:
        raise Refused(
            f"rows are grouped by the column {column!r}, which {reader.uri} does not have; "
            f"it has {', '.join(reader.schema.names)}."
        )
    found = reader.take(split, ordinals, [column]).column(0)
    return found.dictionary_encode().indices.to_numpy(zero_copy_only=False)


def grouped_batches(reader: ShardReader, shard: int, split: str, grouping: Grouping, rows: int) -> Iterator[Batch]:
    """One shard's rows of a split in groups, about `rows` at a time: each once, dealt out as in a first epoch.

    A group does not reach into the next shard. So a result does not depend on who computes it.
    """
    ordinals = reader.ordinals(shard, split)
    if not len(ordinals):
        return
    values = _values(reader, split, ordinals, grouping.column)
    plan = GroupPlan(values, grouping.size, max(1, rows // grouping.size), lanes=1, seed=0)
    for step in range(plan.steps_per_epoch):
        places, mask = plan.at(step)
        columns, row_ids = read_columns(reader, split, ordinals[places])
        yield to_batch(columns, row_ids, mask, grouping.size)[0]
