"""Tiny shards and what each process of the loop's tests runs. Importable, because processes are started anew."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from pipelines import corpora, loop, recipe
from pipelines.columns import batch_of
from pipelines.feed import Feed, columns_of
from pipelines.loop import Event, RunSpec
from pipelines.manifest import Manifest, Units, describe, save_manifest
from pipelines.shards import ShardReader, ShardWriter
from pipelines.stream import feed_of
from vqcore import reduction

CPU = torch.device("cpu")
SIDE = 8
TINY = {
    "rotation_trick": {
        "num_codes": 12, "code_dim": 4, "channels": 4, "multipliers": [1], "patch": 2, "batch_size": 8,
        "learning_rate": 2e-3, "warm_up": 3, "revive_below": 0.05,
    },
    "plain_vq": {"num_codes": 12, "patch": 2, "batch_size": 8, "decay": 0.9},
    "clvq_vae": {
        "num_codes": 12, "sequence": 4, "batch_size": 8, "decoder_layers": 1, "heads": 2, "feedforward": 16,
        "learning_rate": 2e-3, "decay": 0.9, "dropout": 0.0, "relative": True,
    },
    "aminoaseed": {
        "num_codes": 12, "code_dim": 6, "start": "data", "max_length": 64, "crop": 24, "neighbours": 6,
        "encoder_width": 8, "encoder_heads": 2, "encoder_inner": 12, "decoder_width": 16, "decoder_blocks": 1,
        "decoder_heads": 2, "decoder_inner": 24, "pair_inner": 8, "batch_size": 8, "learning_rate": 2e-3,
    },
    "streamline_dvqvae": {
        "num_codes": 12, "code_dim": 6, "chunk": 4, "width": 8, "residual_width": 4, "residual_layers": 1,
        "batch_size": 8, "learning_rate": 2e-3,
    },
    "sparse_autoencoder": {"num_codes": 24, "batch_size": 32, "learning_rate": 1e-2},
}  # fmt: skip


def make_shards(home: Path, rows: int = 45, parts: int = 2, side: int = SIDE) -> str:
    """Grey images of soft random gradients as finished shards; the last ninth is test, the one before valid."""
    corpus = corpora.load("images")
    settings = corpus.Settings(size=side, colour="grey")
    drawn = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    records = []
    for part in range(parts):
        with ShardWriter(str(home), part, corpus.schema(settings)) as writer:
            low, high = part * rows // parts, (part + 1) * rows // parts
            values = []
            for row in range(low, high):
                a, b, c = drawn.uniform(-1, 1, 3)
                picture = 127 + 120 * np.sin(3 * (a * x + b * y) + 3 * c)
                values.append({"image": picture[None].astype(np.uint8), "label": row % 3, "name": f"{row}.png"})
            splits = np.array([min(2, max(0, row * 9 // rows - 6)) for row in range(low, high)], dtype=np.int8)
            writer.write(batch_of(values, corpus.schema(settings)), splits)
        records += writer.records
    save_manifest(
        Manifest(
            kind="images",
            settings=settings.model_dump(mode="json"),
            selection={"limit": None, "holdout": 0.1},
            columns=describe(corpus.schema(settings)),
            shards=tuple(records),
            units=Units(rows, rows, 0, {}),
            sources="",
        ),
        str(home),
    )
    return str(home)


def spec_of(name: str, shards: str, out: str | Path, **changes: Any) -> RunSpec:
    """A run of a tiny model. Keyword arguments are fields of RunSpec, or else settings of the recipe."""
    fields = {key: changes.pop(key) for key in list(changes) if key in RunSpec.__dataclass_fields__}
    found = recipe.load(name)
    settings = found.Settings.model_validate({**TINY[name], **changes})
    resolved = found.resolve(settings, columns_of(ShardReader(shards).manifest))
    spec = RunSpec(name, resolved.model_dump(mode="json"), shards, 0, 8, str(out), checkpoint_every=4, log_every=4)
    return replace(spec, **fields)


class Counted:
    """Counts the sums over workers of the real group, and what each worker read."""

    def __init__(self) -> None:
        self.calls = 0
        self.plain = reduction.OverGroup.__call__

    def __enter__(self) -> "Counted":
        counter = self

        def counting(group: reduction.OverGroup, tensor: torch.Tensor) -> None:
            counter.calls += 1
            counter.plain(group, tensor)

        reduction.OverGroup.__call__ = counting  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        reduction.OverGroup.__call__ = self.plain  # type: ignore[method-assign]


def _process(rank: int, world: int, home: str, cases: dict[str, RunSpec]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/group-{world}", rank=rank, world_size=world)
    for name, spec in cases.items():
        events: list[Event] = []
        with Counted() as counted:
            model, totals = loop.train(spec, feed_of(spec), torch.device("cpu"), events.append)
        stem = Path(home) / f"{name}-{rank}-of-{world}"
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, f"{stem}.safetensors")
        stem.with_suffix(".json").write_text(
            json.dumps({"calls": counted.calls, "events": events, "latest": totals.latest})
        )
    dist.destroy_process_group()


def run_workers(world: int, home: Path, cases: dict[str, RunSpec]) -> None:
    """Train every case with `world` gloo workers, one start of the processes for all of them."""
    mp.spawn(_process, (world, str(home), cases), nprocs=world)


def state_of(home: Path, name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    return load_file(home / f"{name}-{rank}-of-{world}.safetensors")


def about(home: Path, name: str, rank: int, world: int) -> dict[str, Any]:
    return json.loads((home / f"{name}-{rank}-of-{world}.json").read_text())


def rows_seen(spec: RunSpec, world: int, steps: int) -> list[list[int]]:
    """Row ids of each global step, as `world` workers read them."""
    found = recipe.load(spec.recipe)
    settings = found.Settings(**spec.settings)
    source = Feed(ShardReader(spec.shards)).open(spec, settings, found.stages(settings)[0], torch.device("cpu"))
    seen = []
    for step in range(steps):
        ids: list[int] = []
        for rank in range(world):
            ordinals, mask = source.rows.at(step, rank, world)
            ids += pa.array(ordinals[mask]).to_pylist()
        seen.append(sorted(ids))
    return seen
