"""Searches through Ray Tune: what is killed on the way changes nothing, and nothing waits for ever."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from jobs import cli
from pipelines import tracking, trials
from pipelines.search_plan import Search
from pipelines.tune import search
from tests.pipelines.loops import make_shards
from tests.pipelines.test_search_session import essence, opened, run_all

NAME = "plain_vq"
GRID = ("num_codes=choice:4,5,6,7,8,9", "patch=choice:2,4", "decay=choice:0.8,0.95")
STEPS = 100
RAISES = 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"), rows=90)


def words_of() -> list[str]:
    return [*GRID, "batch_size=8", f"steps={STEPS}"]


class Driver:
    """`vqray tune` in a process of its own, with a Ray of its own."""

    def __init__(self, shards: str, out: Path, *more: str):
        command = [
            sys.executable, "-m", "jobs.cli", "tune", "--recipe", NAME, "--shards", shards, "--out", str(out),
            "--preset", "small", "--checkpoint-every", "20", "--set", *words_of(), *more,
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{out.parent / 'vqray.db'}"}
        self.out = out
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, ended: int) -> None:
        until = time.monotonic() + 400
        while len(list(self.out.glob("trials/*/trial.json"))) < ended:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < until, f"fewer than {ended} trials ended"
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_worker(self) -> None:
        """Kill one process in which a trial runs."""
        until = time.monotonic() + 100
        while time.monotonic() < until:
            for process in self.family():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ray::ImplicitFunc" in " ".join(process.cmdline()):
                        process.kill()
                        return
            time.sleep(0.01)
        raise AssertionError("no trial's process was seen")

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the driver and all that belongs to it, as a lost machine would."""
        if self.process.poll() is not None:
            return
        family = self.family()
        self.process.kill()
        self.process.communicate()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)


@pytest.mark.slow
def test_a_grid_of_24_survives_two_killed_drivers_a_killed_worker_and_a_trial_that_raises(shards, tmp_path):
    """More trials at a time are asked for than there are CPUs, too."""
    request = Search(NAME, shards, str(tmp_path / "calm"), preset="small", words=words_of(), checkpoint_every=20)
    calm = run_all(opened(request))
    assert len(calm) == 24
    out = tmp_path / "search"
    stray = out / f"trials/{RAISES:05d}/run/stray.txt"

    with Driver(shards, out, "--concurrent", "8") as first:
        while not (out / "search.json").exists():
            assert first.process.poll() is None, first.process.communicate()[1]
            time.sleep(0.02)
        stray.parent.mkdir(parents=True)
        stray.write_text("not a run")
        first.wait_for(3)
    with Driver(shards, out, "--concurrent", "8") as second:
        second.wait_for(6)
        second.kill_worker()
        second.wait_for(12)
    assert not (out / "trials/00023/trial.json").exists(), "the second driver was done before it was killed"

    with Driver(shards, out, "--concurrent", "8") as third:
        said, told = third.process.communicate(timeout=400)
        assert third.process.returncode == 0, told
    result = json.loads(said.splitlines()[-1])
    assert result["trials"] == {"finished": 23, "failed": 1}
    ended = {trial.number: trial for trial in trials.read_trials(str(out))}
    assert "holds other files" in ended[RAISES].error
    assert "Traceback" in ended[RAISES].error
    del ended[RAISES], calm[RAISES]
    assert essence(ended) == essence(calm)
    if os.cpu_count() < 8:
        assert f"8 trials at a time were asked for; this cluster of {os.cpu_count()} CPUs holds" in told


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_trials_of_several_workers_are_train_jobs_that_do_not_starve_each_other(shards, tmp_path):
    """Three trials of two workers, all asked for at once, on four CPUs."""
    request = Search(
        NAME, shards, str(tmp_path / "s"), preset="small", words=("num_codes=choice:4,6,8", "patch=2", "batch_size=8",
        "steps=6"), workers=2, concurrent=8, checkpoint_every=4,
    )  # fmt: skip
    searched = search(request)
    assert [trial.state for trial in searched.trials] == ["finished"] * 3, searched.trials[0].error
    assert search(request).skipped


@pytest.mark.usefixtures("ray_instance")
def test_early_stopping_ends_bad_trials_early_and_keeps_the_best(shards, tmp_path, capsys, tracking_store):
    """A decay near 1 does not move the codebook, so these trials are behind at every rung."""
    out = tmp_path / "s"
    words = ("decay=choice:0.9,0.8,0.999,0.9995,0.9999,0.99995", "num_codes=24", "patch=2", "seeding=random_rows")
    arguments = ["tune", "--recipe", NAME, "--shards", shards, "--out", str(out), "--preset", "small", "--asha"]
    arguments += ["--concurrent", "1", "--set", *words, "batch_size=8", "steps=54"]
    assert cli.main(arguments) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    ended = trials.read_trials(str(out))
    states = Counter(trial.state for trial in ended)
    assert made["trials"] == dict(states)
    assert states["pruned"] >= 2
    best = min(ended, key=lambda trial: trial.metrics["distortion"])
    assert (best.state, best.settings["decay"] < 0.95) == ("finished", True)
    for trial in ended:
        assert trial.steps == 54 if trial.state == "finished" else trial.steps < 54
        record = json.loads((out / f"trials/{trial.number:05d}/tracking.json").read_text())
        run = tracking.client().get_run(record["run_id"])
        assert run.info.status == {"finished": "FINISHED", "pruned": "KILLED"}[trial.state]
        assert run.data.tags["mlflow.parentRunId"] == made["run_id"]
        assert run.data.metrics["valid/distortion"] == trial.metrics["distortion"]

    assert cli.main(arguments) == 0
    again = capsys.readouterr()
    assert json.loads(again.out.splitlines()[-1])["skipped"]
    assert "nothing to do" in again.err
    assert cli.main([*arguments, "--seed", "1"]) == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err
