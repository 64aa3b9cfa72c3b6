"""kill -9 at any moment, then the same run again: the bits of a run that was never disturbed."""

import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipelines.checkpoint import Checkpoints
from pipelines.loop import RunSpec
from tests.pipelines import forks
from tests.pipelines.loops import make_shards, spec_of

STEPS, EVERY, QUICK = 24, 3, 6
NAMES = ("plain_vq", "rotation_trick")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"))


def spec_for(name: str, shards: str, out: Path) -> RunSpec:
    return spec_of(name, shards, out, steps=STEPS, checkpoint_every=EVERY)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> dict[str, dict]:
    """Weights of both runs."""
    home = tmp_path_factory.mktemp("whole")
    found = {}
    for name in NAMES:
        log = home / f"{name}.log"
        assert forks.ended(forks.start(forks.train, spec_for(name, shards, home / name), str(log))) == 0
        found[name] = load_file(f"{log}.safetensors")
    return found


def wait_for_step(log: Path, step: int) -> None:
    until = time.monotonic() + 60
    while len(forks.events(log, "progress")) < step:
        assert time.monotonic() < until, f"step {step} was not made"
        time.sleep(0.001)


def moments(seed: int = 6) -> list:
    """Which run, and when it is killed: `time` as a share of its steps, `write` as a place among its file calls."""
    drawn = random.Random(seed)
    found = [(NAMES[n % 2], ("write", "time")[n // 2 % 2], drawn.random()) for n in range(20)]
    return [*found[:QUICK], *(pytest.param(*moment, marks=pytest.mark.slow) for moment in found[QUICK:])]


@pytest.mark.parametrize(("name", "kind", "share"), moments())
def test_killed_at_any_moment_it_ends_with_the_bits_of_an_undisturbed_run(
    shards, tmp_path, undisturbed, name, kind, share
):
    spec, log = spec_for(name, shards, tmp_path / "run"), tmp_path / "log"
    if kind == "time":
        process = forks.start(forks.train, spec, str(log))
        wait_for_step(log, int(share * STEPS))
        process.kill()
    else:
        # Of a checkpoint: two files, each written, synced twice and renamed, and one that is removed. The loop waits
        # for every one: behind it, a busy machine skips some, and the call may never come.
        spec = replace(spec, write_behind=False)
        calls = STEPS // EVERY * 8 - 4
        process = forks.start(forks.train, spec, str(log), (1 + int(share * calls), share * calls % 1 < 0.5))
    assert forks.ended(process) == -signal.SIGKILL
    complete = Checkpoints(spec.out).complete()
    for stage, step in complete:
        assert Checkpoints(spec.out).load(stage, step).step == step
    made = len(forks.events(log, "progress"))

    assert forks.ended(forks.start(forks.train, spec, str(log))) == 0
    again = [event["step"] for event in forks.events(log, "progress")][made:]
    assert again == list(range(1 + (complete[-1][1] if complete else 0), STEPS + 1))
    weights = load_file(f"{log}.safetensors")
    assert weights.keys() == undisturbed[name].keys()
    assert all(tensor.equal(undisturbed[name][key]) for key, tensor in weights.items())
    assert not list((tmp_path / "run").rglob("*.tmp")) or kind == "write"
