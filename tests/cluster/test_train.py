"""Training through Ray: the plain loop's bits, whatever is killed on the way."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines import group, train
from pipelines.checkpoint import Checkpoints
from pipelines.errors import Failed, Refused
from pipelines.request import Request, prepare
from tests.cluster import recorded
from tests.pipelines.loops import TINY, make_shards, run_workers, spec_of, state_of
from vqcore.bundle import read_bundle

STEPS, LONG = 120, 1000
NAME = "rotation_trick"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> dict:
    """The weights of two plain gloo workers that nobody disturbed."""
    home = tmp_path_factory.mktemp("plain")
    run_workers(2, home, {"plain": spec_of(NAME, shards, home / "run", steps=STEPS, checkpoint_every=40)})
    return state_of(home, "plain", 0, 2)


def request_for(shards: str, out: Path, **changes) -> Request:
    overrides = {**TINY[NAME], "steps": STEPS, **changes.pop("overrides", {})}
    return Request(NAME, shards, str(out), preset="small", overrides=overrides, checkpoint_every=40, **changes)


def assert_same_weights(out: Path, weights: dict) -> None:
    made = read_bundle(out / "bundle").tensors
    assert made.keys() == weights.keys()
    for name, tensor in made.items():
        assert tensor.equal(weights[name]), name


def wait_until(what: Callable[[], object], otherwise: str, seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, otherwise
        time.sleep(0.02)


def wait_for_checkpoint(out: Path) -> None:
    wait_until(lambda: Checkpoints(str(out)).complete(), "no checkpoint was written")


def end(processes: list[psutil.Process]) -> None:
    """Ray's own agents outlive a killed driver for a while."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.usefixtures("ray_instance")
def test_a_killed_worker_is_replaced_and_the_run_ends_with_the_bits_of_an_undisturbed_one(
    shards, tmp_path, undisturbed, monkeypatch
):
    out = tmp_path / "run"
    monkeypatch.setattr(group, "_worker", recorded.worker)
    at, killed = random.Random(1).randrange(41, STEPS - 10), []

    def kill_one() -> None:
        wait_until(lambda: recorded.newest_step(out) >= at, f"step {at} was not made")
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
        os.kill(workers[-1].pid, signal.SIGKILL)
        killed.append(workers[-1].pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = train.train(request_for(shards, out, workers=2))
    killer.join()
    assert killed
    assert_same_weights(out, undisturbed)
    assert outcome.metrics["train/usage"] > 0
    spec = prepare(request_for(shards, out, workers=2)).spec
    recorded.check_rows(spec, STEPS)
    # What was made since the newest checkpoint was made twice, and no more.
    twice = [step for step, times in recorded.rows_of_steps(out).items() if len(times) == 2]
    assert twice == list(range(at // 40 * 40, at // 40 * 40 + len(twice)))

    again = train.train(request_for(shards, out, workers=1))
    assert again.skipped
    assert again.digest == outcome.digest
    with pytest.raises(Refused, match=r"settings\.num_codes: 12 -> 13"):
        train.train(request_for(shards, out, overrides={"num_codes": 13}))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_worker_that_hangs_is_named_and_replaced(shards, tmp_path, undisturbed, monkeypatch, capfd):
    out = tmp_path / "run"
    monkeypatch.setattr(group, "_worker", recorded.hanging_worker)
    train.train(request_for(shards, out, workers=2, hang_after=6.0))
    said = capfd.readouterr().err
    # A stopped process told its place a second ago at most.
    heard = r"rank 1 was last heard of \d+ s ago, in [a-z ]+ of step (4\d|5[01])"
    assert re.search(rf"rank 0 waited in vain in the sum of counts of step 51: {heard}\.", said)
    assert "The workers start again from the newest checkpoint." in said
    assert_same_weights(out, undisturbed)
    recorded.check_rows(prepare(request_for(shards, out, workers=2)).spec, STEPS)


def command_for(shards: str, out: Path) -> list[str]:
    settings = [f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in TINY[NAME].items()]
    return [
        sys.executable, "-m", "jobs.cli", "train", "--recipe", NAME, "--shards", shards, "--out", str(out),
        "--preset", "small", "--workers", "2", "--steps", str(LONG), "--checkpoint-every", "40", "--set", *settings,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_driver_and_then_sigterm_and_the_same_command_goes_on_to_the_same_bits(shards, tmp_path):
    out = tmp_path / "run"
    command = command_for(shards, out)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'vqray.db'}"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_for_checkpoint(out)
        time.sleep(random.Random(2).random())
    finally:
        family = psutil.Process(first.pid).children(recursive=True)
        names = {process.pid: " ".join(process.cmdline()) for process in family}
        first.kill()
        first.wait()
    workers = [process for process in family if "RayTrainWorker" in names[process.pid]]
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    end(family)
    assert not (out / "bundle").exists()
    before = Checkpoints(str(out)).complete()[-1]

    second = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: Checkpoints(str(out)).complete()[-1] > before, "no further checkpoint was written")
        second.terminate()
        stdout, stderr = second.communicate(timeout=60)
    finally:
        second.kill()
    assert second.returncode == 1
    assert f"after step {before[1]:,}\n" in stderr
    said = re.search(r"stopped as asked after step ([\d,]+), whose checkpoint is written", stderr)
    step = int(said[1].replace(",", ""))
    assert Checkpoints(str(out)).complete()[-1] == (0, step)
    assert stdout == ""

    third = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr
    assert f"after step {step:,}\n" in third.stderr
    assert json.loads(third.stdout.splitlines()[-1])["digest"]
    run_workers(2, tmp_path, {"whole": spec_of(NAME, shards, tmp_path / "whole", steps=LONG, checkpoint_every=LONG)})
    assert_same_weights(out, state_of(tmp_path, "whole", 0, 2))


@pytest.mark.usefixtures("ray_instance")
def test_what_a_restart_cannot_mend_ends_the_run_at_once_with_its_own_words(shards, tmp_path):
    with pytest.raises(Failed, match="4096"):
        train.train(request_for(shards, tmp_path / "run", overrides={"num_codes": 4096}))


@pytest.mark.usefixtures("ray_instance")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": 64, "overrides": {"batch_size": 64}}, r"--workers 64 needs as many CPUs; this cluster has 4"),
        ({"workers": 16}, r"batch of 8 rows cannot be shared by 16 workers"),
        ({"seed": -1}, r"--seed -1 and .* a seed is 0 or more"),
        ({"gpus_per_worker": 1.0}, r"needs 1 GPUs; this cluster has 0"),
        ({"overrides": {"num_cods": 3}}, r"no setting 'num_cods'; did you mean 'num_codes'"),
        ({"overrides": {"num_codes": 1}}, r"num_codes=1: .*greater than or equal to 2"),
        ({"overrides": {"patch": 3}}, r"images of 8 pixels cannot be reduced 3 times"),
        ({"overrides": {"image_size": 64}}, r"image_size follows from the shards \(8\)"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(shards, tmp_path, changes, said):
    began = time.monotonic()
    with pytest.raises(Refused, match=said):
        train.train(request_for(shards, tmp_path / "run", **changes))
    assert time.monotonic() - began < 10
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_unknown_recipe_preset_and_shards_are_refused_by_name(shards, tmp_path):
    with pytest.raises(Refused, match=r"no recipe 'rotation'; did you mean 'rotation_trick'"):
        train.train(Request("rotation", shards, str(tmp_path / "run")))
    with pytest.raises(Refused, match=r"no preset 'smal'; allowed: paper, small"):
        train.train(Request(NAME, shards, str(tmp_path / "run"), preset="smal"))
    with pytest.raises(Refused, match=r"not a finished vqray directory"):
        train.train(Request(NAME, str(tmp_path), str(tmp_path / "run")))
