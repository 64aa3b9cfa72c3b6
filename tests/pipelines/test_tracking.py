"""MLflow runs on a database file: what was logged is read back through MLflow's own client."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import tracking
from pipelines.errors import Failed, Refused


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One working directory for the module: making the database takes seconds."""
    home = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield home


@pytest.fixture
def run(store: Path) -> tracking.Run:
    return tracking.start_run("recipe_x", "run-1", {"lr": 0.1, "sizes": [1, 2], "name": "a"}, {"kind": "train"})


def read(run_id: str) -> Any:
    return tracking.client().get_run(run_id)


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tracking.client().get_metric_history(run_id, name)]


def test_settings_tags_and_name_are_kept(run: tracking.Run) -> None:
    found = read(run.id)
    assert found.data.params == {"lr": "0.1", "sizes": "[1, 2]", "name": "a"}
    assert found.data.tags["kind"] == "train"
    assert found.info.run_name == "run-1"
    assert tracking.client().get_experiment(found.info.experiment_id).name == "recipe_x"


def test_database_and_artifacts_lie_in_the_working_directory(store: Path, run: tracking.Run, tmp_path: Path) -> None:
    (tmp_path / "codes.png").write_bytes(b"picture")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.json").write_text("{}")
    run.log_picture(tmp_path / "codes.png")
    run.log_files(tmp_path / "more", "notes")
    assert (store / "vqray.db").exists()
    home = store / "vqray-artifacts" / "recipe_x" / run.id / "artifacts"
    assert (home / "pictures/codes.png").read_bytes() == b"picture"
    assert (home / "notes/a.json").read_text() == "{}"
    assert run.artifact_uri("notes") == (home / "notes").as_uri()
    assert not (store / "mlruns").exists()
    assert not (store / "mlflow.db").exists()


def test_metrics_keep_their_steps_in_few_calls(run: tracking.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    log_batch = tracking.client().log_batch
    monkeypatch.setattr(tracking.client(), "log_batch", lambda *a, **k: (calls.append(k), log_batch(*a, **k)))
    run.log_metrics([(step, {"train/loss": 1 / (step + 1), "usage": 0.5}) for step in range(1_200)])
    assert [len(call["metrics"]) for call in calls] == [1000, 1000, 400]
    kept = history(run.id, "train/loss")
    assert sorted(kept) == [(step, 1 / (step + 1)) for step in range(1_200)]
    run.log_metrics([])
    assert len(calls) == 3


def test_metrics_that_are_not_finite_do_not_stop_a_run(run: tracking.Run) -> None:
    run.log_metrics([(0, {"loss": float("nan")}), (1, {"loss": float("inf")}), (2, {"loss": 1.0})])
    assert len(history(run.id, "loss")) == 3


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_a_run_that_is_resumed_goes_on(run: tracking.Run, status: Any) -> None:
    run.log_metrics([(0, {"loss": 2.0})])
    run.tags({"bundle_digest": "abc", "lanes": "64"})
    run.finish(status)
    assert read(run.id).info.status == status
    again = tracking.start_run("recipe_x", "other", {"lr": 9}, {}, resume_run_id=run.id)
    assert again.id == run.id
    again.log_metrics([(1, {"loss": 1.0})])
    found = read(run.id)
    assert found.info.status == "RUNNING"
    assert history(run.id, "loss") == [(0, 2.0), (1, 1.0)]
    assert (found.data.params["lr"], found.data.tags["bundle_digest"], found.data.tags["lanes"]) == ("0.1", "abc", "64")


@pytest.mark.parametrize("lost", ["0" * 32, "../etc"])
def test_a_run_of_another_store_is_replaced_by_a_new_one(store: Path, lost: str) -> None:
    assert tracking.find_run(lost) is None
    begun = tracking.start_run("recipe_x", "again", {}, {}, resume_run_id=lost)
    assert begun.id != lost
    assert read(begun.id).info.status == "RUNNING"


def test_a_deleted_run_is_replaced_by_a_new_one(run: tracking.Run) -> None:
    tracking.client().delete_run(run.id)
    assert tracking.start_run("recipe_x", "again", {}, {}, resume_run_id=run.id).id != run.id


def test_a_long_setting_is_shortened_and_says_so(store: Path) -> None:
    begun = tracking.start_run("recipe_x", "long", {"names": ["x" * 10] * 2_000, "short": "y" * 6_000}, {})
    params = read(begun.id).data.params
    assert params["short"] == "y" * 6_000
    assert len(params["names"]) == 6_000
    assert params["names"].startswith('["xxxxxxxxxx"')
    assert params["names"].endswith("... (28,000 characters; the card has all of them)")


def test_many_settings_are_logged(store: Path) -> None:
    begun = tracking.start_run("recipe_x", "many", {f"s{n}": n for n in range(250)}, {})
    assert len(read(begun.id).data.params) == 250


def test_a_deleted_experiment_is_refused_with_the_cure(store: Path) -> None:
    begun = tracking.start_run("gone", "r", {}, {})
    tracking.client().delete_experiment(read(begun.id).info.experiment_id)
    with pytest.raises(Refused, match=r"'gone'.*deleted.*restore"):
        tracking.start_run("gone", "r", {}, {})


def test_an_experiment_made_by_another_process_in_the_same_moment_is_used(
    store: Path, run: tracking.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, looked = tracking.client(), []
    look = client.get_experiment_by_name

    def blind_at_first(name: str) -> Any:
        looked.append(name)
        return None if len(looked) == 1 else look(name)

    monkeypatch.setattr(client, "get_experiment_by_name", blind_at_first)
    begun = tracking.start_run("recipe_x", "second", {}, {})
    assert read(begun.id).info.experiment_id == read(run.id).info.experiment_id


def test_what_the_store_refuses_is_failed_with_its_address(run: tracking.Run) -> None:
    with pytest.raises(Failed, match=r"could not log metrics in MLflow at sqlite:///.*vqray\.db: .*250 characters"):
        run.log_metrics([(0, {"m" * 300: 1.0})])


def test_passwords_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracking.example:5000/x")
    assert tracking.where() == "http://me:***@tracking.example:5000/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert tracking.where() == tracking.uri() == "http://tracking.example:5000"


def test_importing_neither_loads_mlflow_nor_changes_the_environment() -> None:
    script = """
import os, sys
before = dict(os.environ)
import pipelines.tracking
assert dict(os.environ) == before
assert "mlflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_first_use_forbids_pickle_whatever_the_environment_said(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    tracking.find_run("0" * 32)
    from mlflow import environment_variables as variables

    assert variables.MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False
    assert variables.MLFLOW_DISABLE_TELEMETRY.get() is True
    # MLflow would print the address of a run, password and all, to the stream that ends in our JSON.
    assert variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get() is True
