"""Workers that write down which rows every step was made of, and one that hangs; imported by name on Ray's workers."""

import json
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from pipelines import group, loop, recipe
from pipelines.feed import Feed
from pipelines.loop import RunSpec
from pipelines.shards import ShardReader
from tests.pipelines.loops import CPU
from vqcore.reduction import resolve

PAUSE = 0.02
"""Seconds added to every step, so that there is time to kill."""
HANGS_AT = 50


def diary(out: str | Path) -> Path:
    return Path(f"{out}-diary")


def worker(config: dict[str, Any]) -> None:
    """`group._worker`, whose steps are written to the diary."""
    _record(config)
    group._worker(config)


def double_worker(config: dict[str, Any]) -> None:
    """The same in float64."""
    config["spec"]["double"] = True
    worker(config)


def hanging_worker(config: dict[str, Any]) -> None:
    """The same, but the first time rank 1 stops for good at step HANGS_AT."""
    plain = loop.one_step

    def stopping(trainee: Any, batch: Any, non_finite: int, step: int, *rest: Any) -> Any:
        mark = diary(config["spec"]["out"]) / "hung"
        if step == HANGS_AT and resolve(None).rank == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(trainee, batch, non_finite, step, *rest)

    loop.one_step = stopping
    worker(config)


def _record(config: dict[str, Any]) -> None:
    home = diary(config["spec"]["out"])
    home.mkdir(exist_ok=True)
    plain = loop.one_step
    reduce = resolve(None)
    # A group's workers share their master's port, and hardly two groups do.
    about = {"group": os.environ["MASTER_PORT"], "rank": reduce.rank, "world": reduce.world}
    page = home / f"{os.getpid()}.jsonl"

    def recording(trainee: Any, batch: Any, non_finite: int, step: int, *rest: Any) -> Any:
        time.sleep(PAUSE)
        found = plain(trainee, batch, non_finite, step, *rest)
        rows = batch.keys[batch.mask].tolist()
        with page.open("a") as lines:
            lines.write(json.dumps({**about, "step": step, "rows": rows, "time": time.time()}) + "\n")
        return found

    loop.one_step = recording


def entries(out: str | Path) -> list[dict[str, Any]]:
    """What all workers wrote; lines that a death cut off are left out."""
    lines = [line for path in diary(out).glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def newest_step(out: str | Path) -> int:
    return max((entry["step"] for entry in entries(out)), default=-1)


def rows_of_steps(out: str | Path) -> dict[int, list[list[int]]]:
    """Step -> its row ids, once for every group whose workers all made it; in the order of time."""
    made: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries(out):
        made[entry["step"], entry["group"]].append(entry)
    steps: dict[int, list[list[int]]] = defaultdict(list)
    for (step, _), parts in sorted(made.items(), key=lambda item: min(part["time"] for part in item[1])):
        if len(parts) == parts[0]["world"]:
            steps[step].append(sorted(row for part in parts for row in part["rows"]))
    return steps


def worlds(out: str | Path) -> list[int]:
    """Numbers of workers of the groups, in the order of time."""
    first: dict[str, tuple[float, int]] = {}
    for entry in entries(out):
        made = (entry["time"], entry["world"])
        first[entry["group"]] = min(first.get(entry["group"], made), made)
    return [world for _, world in sorted(first.values())]


def check_rows(spec: RunSpec, steps: int) -> None:
    """Every step, however often and by however many it was made, had the rows that one worker reads; every epoch had
    every row once."""
    settings = recipe.load(spec.recipe).Settings(**spec.settings)
    (stage, *_) = recipe.load(spec.recipe).stages(settings)
    source = Feed(ShardReader(spec.shards)).open(spec, settings, stage, CPU)
    made = rows_of_steps(spec.out)
    assert sorted(made) == list(range(steps))
    for step, times in made.items():
        batch, _ = source.at(step)
        assert all(rows == sorted(batch.keys[batch.mask].tolist()) for rows in times), step
    epoch = source.rows.steps_per_epoch
    first = sorted(row for step in range(epoch) for row in made[step][-1])
    assert len(set(first)) == len(first) == ShardReader(spec.shards).rows("train")
    for start in range(epoch, steps - epoch + 1, epoch):
        assert sorted(row for step in range(start, start + epoch) for row in made[step][-1]) == first
