"""Rows of a manifest as the batches a recipe sees: the right rows for this worker, checked for non-finite values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines import corpora
from pipelines.columns import values_of
from pipelines.manifest import Manifest
from pipelines.plan import Plan
from pipelines.recipe import Batch, Settings, Stage
from pipelines.shards import ShardReader
from vqcore.reduction import resolve


def columns_of(manifest: Manifest) -> dict[str, list[int] | None]:
    """Column -> shape of one row as a recipe sees it; None where rows differ in shape."""
    corpus = corpora.load(manifest.kind)
    return corpus.shapes(corpus.Settings.model_validate(manifest.settings))


def to_batch(columns: Mapping[str, Tensor], row_ids: np.ndarray, mask: np.ndarray) -> tuple[Batch, int]:
    """(batch, number of rows left out because a value was not finite). Left-out and masked rows become zeros."""
    valid = torch.from_numpy(mask)
    finite = valid.clone()
    for column in columns.values():
        if column.is_floating_point():
            finite &= column.flatten(1).isfinite().all(1) if column.dim() > 1 else column.isfinite()
    clean = {name: _zeroed(column, finite) for name, column in columns.items()}
    return Batch(clean, finite, torch.from_numpy(row_ids)), int((valid & ~finite).sum())


def _zeroed(column: Tensor, keep: Tensor) -> Tensor:
    if bool(keep.all()):
        return column
    return torch.where(keep.view(-1, *[1] * (column.dim() - 1)), column, torch.zeros((), dtype=column.dtype))


@dataclass(frozen=True)
class Source:
    """This worker's share of every global batch of one stage."""

    reader: ShardReader
    rows: Plan
    double: bool
    device: torch.device

    def at(self, step: int) -> tuple[Batch, int]:
        """(batch of a step, its rows that were not finite). A function of the step, so resuming needs no state."""
        reduce = resolve(None)
        ordinals, mask = self.rows.at(step, reduce.rank, reduce.world)
        columns, row_ids = read_columns(self.reader, "train", ordinals)
        batch, lost = to_batch(columns, row_ids, mask)
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

    def open(self, spec: Any, settings: Settings, stage: Stage, device: torch.device) -> Source:
        rows = Plan(
            rows=self.reader.rows("train"),
            batch=settings.batch_size,
            lanes=spec.lanes,
            seed=spec.seed,
            row_order=stage.row_order,
        )
        return Source(self.reader, rows, spec.double, device)
