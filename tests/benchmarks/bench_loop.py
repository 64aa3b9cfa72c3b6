"""The training loop against the same network and quantizer in a bare torch loop over the same shards.

Both sides do the same steps on the same rows with one thread, taking turns; the ratio of each pair is taken, and of
the ratios the median. Expected: the loop adds bookkeeping (a plan, a count, a gradient average, a log) of well under a
millisecond to steps of tens of milliseconds.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from pipelines import loop, recipe
from pipelines.columns import to_tensor
from pipelines.feed import Feed, columns_of
from pipelines.loop import RunSpec
from pipelines.recipe import Share
from pipelines.shards import ShardReader
from tests.pipelines.loops import make_shards

ROUNDS, STEPS, BATCH = 9, 40, 64


def run(quick: bool = False) -> None:
    """Print samples/s of both sides, first to last step, and the ratio."""
    torch.set_num_threads(1)
    rounds, steps = (3, 8) if quick else (ROUNDS, STEPS)
    with tempfile.TemporaryDirectory() as scratch:
        shards = make_shards(Path(scratch) / "shards", rows=1152, side=64)
        reader = ShardReader(shards)
        found = recipe.load("rotation_trick")
        chosen = {**found.presets["small"], "batch_size": BATCH, "steps": steps, "seeding": "kaiming"}
        settings = found.resolve(found.Settings.model_validate(chosen), columns_of(reader.manifest))
        ratios, ours, bare = [], [], []
        for number in range(rounds):
            out = f"{scratch}/run-{number}"
            spec = RunSpec(
                "rotation_trick", settings.model_dump(mode="json"), shards, 0, 64, out, checkpoint_every=10**6
            )
            pair = [_ours(spec), _bare(found, settings, reader)]
            ours.append(BATCH * (steps - 1) / pair[0])
            bare.append(BATCH * (steps - 1) / pair[1])
            ratios.append(pair[1] / pair[0])
    print(
        f"loop: {statistics.median(ours):.0f} samples/s, bare torch: {statistics.median(bare):.0f} samples/s,"
        f" ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f} in {rounds} rounds;"
        " the bar is 0.9)"
    )


def _ours(spec: RunSpec) -> float:
    """Seconds from the end of the first step to the end of the last, the last checkpoint left out."""
    times: list[float] = []

    def tell(event: loop.Event) -> None:
        if event["kind"] == "progress":
            times.append(time.perf_counter())

    loop.train(spec, Feed(ShardReader(spec.shards)), torch.device("cpu"), tell)
    return times[-1] - times[0]


def _bare(found: recipe.Recipe, settings: recipe.Settings, reader: ShardReader) -> float:
    """The same steps as anybody would write them: gather rows, forward, backward, clip, step."""
    (stage,) = found.stages(settings)
    model = stage.build(settings, None).train()
    optimiser = stage.optimiser(settings, "model", list(model.parameters()))
    images = torch.cat([to_tensor(reader.shard(n).column("image")) for n in range(len(reader.manifest.shards))])
    order = torch.randperm(len(images))
    times = []
    for step in range(stage.steps):
        rows = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        batch = recipe.Batch({"image": images[rows]}, torch.ones(BATCH, dtype=torch.bool), rows)
        counts = stage.counts(model, batch)
        loss = stage.losses(model, batch, Share(1, counts)).groups["model"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip or 1.0)
        optimiser.step()
        times.append(time.perf_counter())
    return times[-1] - times[0]
