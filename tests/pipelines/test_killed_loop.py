"""kill -9 at any moment, then the same run again: the bits of a run that was never disturbed."""

import os
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from pipelines.checkpoint import Checkpoints
from pipelines.loop import RunSpec
from tests.pipelines import forks
from tests.pipelines.loops import make_shards, spec_of

STEPS, EVERY = 60, 5
NAMES = ("plain_vq", "rotation_trick")


class Undisturbed(NamedTuple):
    weights: dict
    seconds: float
    """From its first step to its end."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"))


def spec_for(name: str, shards: str, out: Path) -> RunSpec:
    return spec_of(name, shards, out, steps=STEPS, checkpoint_every=EVERY)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> dict[str, Undisturbed]:
    home = tmp_path_factory.mktemp("whole")
    found = {}
    for name in NAMES:
        log = home / f"{name}.log"
        process = forks.start(forks.train, spec_for(name, shards, home / name), str(log))
        began = first_step(log)
        assert forks.ended(process) == 0
        found[name] = Undisturbed(load_file(f"{log}.safetensors"), time.monotonic() - began)
    return found


def first_step(log: Path) -> float:
    until = time.monotonic() + 60
    while not forks.events(log, "progress"):
        assert time.monotonic() < until, "no step was made"
        time.sleep(0.002)
    return time.monotonic()


def moments(seed: int = 6) -> list[tuple[str, str, float]]:
    """Which run, and when it is killed: `time` as a share of the whole run, `write` as a place among its file calls."""
    drawn = random.Random(seed)
    return [(NAMES[n % 2], ("time", "write")[n // 2 % 2], drawn.random()) for n in range(20)]


@pytest.mark.parametrize(("name", "kind", "share"), moments())
def test_killed_at_any_moment_it_ends_with_the_bits_of_an_undisturbed_run(
    shards, tmp_path, undisturbed, name, kind, share
):
    spec, log = spec_for(name, shards, tmp_path / "run"), tmp_path / "log"
    if kind == "time":
        process = forks.start(forks.train, spec, str(log))
        first_step(log)
        time.sleep(share * undisturbed[name].seconds)
        os.kill(process.pid, signal.SIGKILL)
    else:
        # Of a checkpoint: two files, each written, synced twice and renamed, and one that is removed.
        calls = STEPS // EVERY * 8 - 4
        process = forks.start(forks.train, spec, str(log), (1 + int(share * calls), share * calls % 1 < 0.5))
    assert forks.ended(process) in (-signal.SIGKILL, 0)
    assert kind == "time" or process.exitcode != 0
    complete = Checkpoints(spec.out).complete()
    for stage, step in complete:
        assert Checkpoints(spec.out).load(stage, step).step == step
    made = len(forks.events(log, "progress"))

    assert forks.ended(forks.start(forks.train, spec, str(log))) == 0
    again = [event["step"] for event in forks.events(log, "progress")][made:]
    assert again == list(range(1 + (complete[-1][1] if complete else 0), STEPS + 1))
    weights = load_file(f"{log}.safetensors")
    assert weights.keys() == undisturbed[name].weights.keys()
    assert all(tensor.equal(undisturbed[name].weights[key]) for key, tensor in weights.items())
    assert not list((tmp_path / "run").rglob("*.tmp")) or kind == "write"
