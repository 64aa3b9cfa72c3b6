"""What a search shows and keeps: MLflow runs read back through its own client, the table as it is drawn."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipelines import tracking, trial_run, trials
from pipelines.errors import Failed
from pipelines.search_log import SearchLog
from pipelines.trial_run import Proposal
from pipelines.trials import Trial


def proposal(number: int) -> Proposal:
    return Proposal(number, number, {"num_codes": 4 + number}, 0, 0)


def ended(out: Path, number: int, state: str = "finished", error: str | None = None) -> Trial:
    metrics = {} if state == "failed" else {"distortion": 0.25 / (1 + number), "usage": 0.5}
    run = str(out / "run")
    return Trial(number, {"num_codes": 4 + number}, 0, 0, state, metrics, None, 9, 1.5, 12, run, "ab" * 32, error)


@pytest.fixture
def parent() -> str:
    return tracking.start_run("searched", "parent", {}, {"kind": "tune"}).id


def log_of(out: Path, parent: str, events: list) -> SearchLog:
    def take():
        taken, events[:] = list(events), []
        return taken

    return SearchLog(str(out), "searched", parent, {}, take, 3, ["distortion"], every=0.05)


def run_of(out: Path, number: int):
    record = trial_run.storage.read_json(f"{trial_run.home_of(str(out), number)}/tracking.json")
    return tracking.client().get_run(record["run_id"])


def test_each_trial_is_a_child_run_with_its_curve_its_scores_and_its_end(tmp_path, parent, capsys):
    for number in range(3):
        trial_run.propose(str(tmp_path), proposal(number))
    events = [
        {"kind": "begin", "trial": 0},
        {"kind": "metrics", "trial": 0, "run_step": 4, "metrics": {"train/usage": 0.75}},
        {"kind": "progress", "trial": 0, "run_step": 4, "stage": "s", "step": 4, "steps": 12},
        {"kind": "begin", "trial": 1},
    ]
    with log_of(tmp_path, parent, events) as log:
        log.end(ended(tmp_path, 0))
        log.end(ended(tmp_path, 1, "failed", "Traceback ...\nValueError: not on my watch"))
        log.end(ended(tmp_path, 2, "pruned"))
    first, second, third = (run_of(tmp_path, number) for number in range(3))
    assert {run.data.tags["mlflow.parentRunId"] for run in (first, second, third)} == {parent}
    assert [run.info.status for run in (first, second, third)] == ["FINISHED", "FAILED", "KILLED"]
    assert first.data.params["num_codes"] == "4"
    assert first.data.metrics == {"train/usage": 0.75, "valid/distortion": 0.25, "valid/usage": 0.5, "seconds": 1.5}
    assert "not on my watch" in second.data.tags["error"]
    said = capsys.readouterr().err
    assert "trial 1 failed (num_codes=5) : ValueError: not on my watch" in said
    assert "3 of 3 trials have ended, 1 failed, 1 stopped early" in said


def test_a_trial_that_ended_before_a_kill_is_logged_once_by_the_next_session(tmp_path, parent):
    trial_run.propose(str(tmp_path), proposal(0))
    with log_of(tmp_path, parent, [{"kind": "begin", "trial": 0}]):
        pass
    begun = run_of(tmp_path, 0)
    assert begun.info.status == "RUNNING"
    log = log_of(tmp_path, parent, [])
    log.keep(ended(tmp_path, 0))
    log.keep(ended(tmp_path, 0))
    kept = run_of(tmp_path, 0)
    assert (kept.info.run_id, kept.info.status) == (begun.info.run_id, "FINISHED")
    assert len(tracking.client().get_metric_history(kept.info.run_id, "valid/distortion")) == 1


def test_a_store_that_fails_ends_the_search_with_its_reason(tmp_path, parent):
    def broken():
        raise Failed("the store is gone")

    log = SearchLog(str(tmp_path), "searched", parent, {}, broken, 1, [], every=0.01)
    with pytest.raises(Failed, match="the search's log stopped: the store is gone"), log:
        log.thread.join(5)


def test_the_table_shows_settings_states_and_objectives(tmp_path, parent):
    log = log_of(tmp_path, parent, [])
    for number in range(2):
        trial_run.propose(str(tmp_path), proposal(number))
        log._hear({"kind": "begin", "trial": number})
    log._hear({"kind": "progress", "trial": 1, "run_step": 1200})
    log._close(ended(tmp_path, 0))
    log._hear({"kind": "metrics", "trial": 0, "run_step": 12, "metrics": {"late": 1.0}})
    assert run_of(tmp_path, 0).info.status == "FINISHED"
    drawn = io.StringIO()
    Console(file=drawn, width=100).print(log.table())
    lines = drawn.getvalue().splitlines()
    assert lines[0].strip().startswith("1 of 3 trials have ended, about 0:00:")
    assert lines[1].split() == ["trial", "num_codes", "state", "step", "distortion", "seconds"]
    assert lines[2].split() == ["0", "4", "finished", "12", "0.25", "2"]
    assert lines[3].split()[:5] == ["1", "5", "running", "1,200", "-"]


def test_a_record_on_disk_is_what_was_written(tmp_path):
    trial = ended(tmp_path, 3, "failed", "why")
    trials.write(trial_run.home_of(str(tmp_path), 3), trial)
    assert trials.read_trials(str(tmp_path)) == [trial]
