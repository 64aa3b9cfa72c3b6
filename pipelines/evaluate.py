"""Metrics of a bundle over a whole split: every shard adds its sums, and metrics are taken once at the end."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines import registry, storage, tracking, trained
from pipelines.claims import claim
from pipelines.encode import REQUEST, ROWS_AT_ONCE, opened_for, seen_batches, shard_parts
from pipelines.errors import Refused
from pipelines.feed import grouped_batches, read_columns, to_batch
from pipelines.parts import run_parts
from pipelines.pictures import usage_plot
from pipelines.recipe import Batch, Recipe
from pipelines.shards import ShardReader
from pipelines.trained import Trained
from vqcore import metrics

PICTURED = 8
SHARED = ("rows", "num_codes", "usage", "perplexity", "dead_codes", "gini", "bits_per_row")
"""Metrics that every recipe has."""


@dataclass(frozen=True)
class Evaluation:
    out: str
    digest: str
    """Of the evaluated bundle."""
    rows: int
    metrics: dict[str, float]
    pictures: list[str]
    skipped: bool


def evaluate(bundle: str, shards: str, out: str, split: str = "test") -> Evaluation:
    """Measure a bundle on one split (or `all`) of a manifest; write metrics.json and pictures to `out`.

    Raises:
        Refused: the shards were prepared otherwise than the bundle's training data, the split is empty, or `out`
            holds the evaluation of something else.
    """
    out, directory = storage.normalise(out), registry.local_bundle(bundle)
    model, reader = opened_for(directory, shards, split)
    request = {"bundle": model.digest, "shards": reader.manifest.digest, "split": split}
    claim(out, REQUEST, request, "an evaluation")
    home = storage.join(out, "metrics.json")
    if storage.exists(home):
        record = storage.read_json(home)
        pictures = [storage.join(out, name) for name in record["pictures"]]
        return Evaluation(out, model.digest, int(record["metrics"]["rows"]), record["metrics"], pictures, True)
    sums = _sums_over(directory, reader, split, out)
    found = _metrics(model, sums)
    names = _draw(model, reader, split, sums.get("counts"), out)
    _track(model, request, found, [storage.join(out, name) for name in names])
    storage.write_json_atomic(home, {"metrics": found, "pictures": names})
    return Evaluation(
        out, model.digest, int(found["rows"]), found, [storage.join(out, name) for name in names], skipped=False
    )


def measure(model: Trained, reader: ShardReader, split: str) -> dict[str, float]:
    """The same metrics of an opened model, in this process: no Ray, no pictures, nothing written.

    Raises:
        Refused: the split has no rows.
    """
    if reader.rows(split) == 0:
        raise Refused(f"{reader.uri} has no rows in its {split} split; ingest more files, or with a larger --holdout.")
    shards = range(len(reader.manifest.shards))
    return _metrics(model, _summed(_measure_shard(reader.uri, split, shard, None, model) for shard in shards))


def metric_names(found: Recipe) -> set[str] | None:
    """Names that a recipe's metrics can have, asked of it with sums of 1; None where it needs sums of another shape."""
    try:
        own = found.summarise(_Ones())
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    return {*SHARED, *own}


class _Ones(dict[str, Tensor]):
    """Has every sum."""

    def __missing__(self, name: str) -> Tensor:
        return torch.ones((), dtype=torch.float64)

    def __contains__(self, name: object) -> bool:
        return True

    def get(self, name: str, default: Any = None) -> Tensor:
        return self[name]


def _metrics(model: Trained, sums: dict[str, Tensor]) -> dict[str, float]:
    found = {**_shared_metrics(model, sums), **model.recipe.summarise(sums)}
    if model.recipe.geometry is None or "counts" not in sums:
        return found
    with torch.inference_mode():
        return {**found, **model.recipe.geometry(model.model, sums["counts"])}


def _sums_over(directory: Path, reader: ShardReader, split: str, out: str) -> dict[str, Tensor]:
    work = partial(_measure_shard, reader.uri, split)
    setup = partial(trained.open_trained, directory)
    return _summed(run_parts(shard_parts(reader, split), work, out, label="evaluate", unit="rows", setup=setup))


def _summed(records: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for record in records:
        for name, value in record.items():
            added = torch.tensor(value, dtype=torch.float64)
            totals[name] = totals[name] + added if name in totals else added
    return totals


def _measure_shard(shards: str, split: str, shard: int, payload: None, model: Trained) -> dict[str, Any]:
    """One shard's sums, as JSON values; nothing where it holds no row of the split."""
    reader = ShardReader(shards)
    sizes = [size for size, _ in model.recipe.codebooks(model.settings)]
    totals: dict[str, Tensor] = {}
    for batch in _batches(model, reader, shard, split):
        with torch.inference_mode():
            measured = model.recipe.measure(model.model, batch)
        found = {**measured.sums, "rows": batch.mask.sum()}
        if sizes:
            per_level = measured.codes.flatten(1, -2).unbind(-1) if len(sizes) > 1 else [measured.codes]
            counts = [metrics.counts_of(codes, k) for codes, k in zip(per_level, sizes, strict=True)]
            found["counts"] = torch.stack([torch.nn.functional.pad(c, (0, max(sizes) - len(c))) for c in counts])
        for name, value in found.items():
            totals[name] = totals[name] + value.double() if name in totals else value.double()
    return {name: value.tolist() for name, value in totals.items()}


def _batches(model: Trained, reader: ShardReader, shard: int, split: str) -> Iterator[Batch]:
    """One shard's rows of a split, in groups where the last stage trains on groups."""
    *_, stage = model.recipe.stages(model.settings)
    if stage.grouping is None:
        yield from (batch for batch, _, _ in seen_batches(reader, shard, split))
    else:
        yield from grouped_batches(reader, shard, split, stage.grouping, ROWS_AT_ONCE)


def _shared_metrics(model: Trained, sums: dict[str, Tensor]) -> dict[str, float]:
    """What every recipe is measured by; of several levels, the mean over levels. A baseline may have no codebook."""
    sizes = [size for size, _ in model.recipe.codebooks(model.settings)]
    if not sizes:
        return {"rows": float(sums["rows"])}
    counts = [row[:size] for row, size in zip(sums["counts"], sizes, strict=True)]
    rows = float(sums["rows"])
    codes_per_row = float(sums["counts"].sum()) / len(sizes) / rows if rows else 0.0
    return {
        "rows": rows,
        "num_codes": float(sum(sizes)),
        "usage": sum(float(metrics.usage(c)) for c in counts) / len(counts),
        "perplexity": sum(float(metrics.perplexity(c)) for c in counts) / len(counts),
        "dead_codes": sum(float(metrics.dead_codes(c)) for c in counts),
        "gini": sum(float(metrics.gini(c)) for c in counts) / len(counts),
        "bits_per_row": codes_per_row * sum(math.log2(size) for size in sizes),
    }


def _track(model: Trained, request: dict[str, str], found: dict[str, float], pictures: list[str]) -> None:
    """The same as an MLflow run, tied by digests to the bundle's training run and to the shards."""
    tags = {"kind": "evaluate", "bundle_digest": request["bundle"], "shards_digest": request["shards"]}
    split = request["split"]
    run = tracking.start_run(model.recipe.name, f"evaluate {request['bundle'][:12]} on {split}", request, tags)
    run.log_metrics([(0, {f"{split}/{name}": value for name, value in found.items()})])
    for picture in pictures:
        if storage.is_local(picture):
            run.log_picture(picture)
    run.finish("FINISHED")


def _draw(model: Trained, reader: ShardReader, split: str, counts: Tensor | None, out: str) -> list[str]:
    """The recipe's pictures of rows spread over the split, and the usage plot where there are codes."""
    figures = {} if counts is None else {"usage": usage_plot(counts, f"{model.recipe.name}: codes on {split}")}
    if model.recipe.pictures is not None:
        rows = reader.rows(split)
        ordinals = np.unique(np.linspace(0, rows - 1, min(PICTURED, rows)).astype(np.int64))
        columns, row_ids = read_columns(reader, split, ordinals)
        batch, _ = to_batch(columns, row_ids, np.ones(len(ordinals), dtype=bool))
        with torch.inference_mode():
            figures = {**model.recipe.pictures(model.model, batch), **figures}
    for name, figure in figures.items():
        with storage.writing(storage.join(out, f"{name}.png")) as staged:
            figure.savefig(staged, format="png")
    return [f"{name}.png" for name in figures]
