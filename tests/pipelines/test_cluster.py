"""Joining Ray: never with an implicit authentication mode, never by waiting in silence."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from pipelines import cluster
from pipelines.errors import Failed, Refused


def test_connecting_twice_is_connecting_once(ray_instance: None) -> None:
    before = ray.get_runtime_context().gcs_address
    cluster.connect()
    assert ray.get_runtime_context().gcs_address == before
    assert cluster.cpus() == 4


def test_a_busy_cluster_is_waited_for_aloud_and_not_for_ever(ray_instance: None, capfd: pytest.CaptureFixture) -> None:
    @ray.remote(num_cpus=4)
    class Hog:
        def ready(self) -> bool:
            return True

    hog = Hog.remote()
    ray.get(hog.ready.remote())
    start = time.monotonic()
    with pytest.raises(Failed, match=r"no CPU became free within 0\.5 s; the cluster has 4"):
        cluster.require_free_cpu(patience=0.5)
    assert time.monotonic() - start < 10
    assert "waiting for a free CPU" in capfd.readouterr().err
    ray.kill(hog)
    cluster.require_free_cpu()


def test_devices_that_are_not_there_are_refused_at_once(ray_instance: None) -> None:
    with pytest.raises(Refused, match="2 CUDA devices a worker were asked for, and this machine has 0"):
        cluster.require_free_cpu(gpus=2)


def test_local_paths_are_refused_where_they_mean_different_files(
    ray_instance: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.require_shared("/somewhere", "s3://b/x")
    nodes = [{"NodeManagerAddress": f"10.0.0.{n}", "Alive": n < 3} for n in range(4)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    cluster.require_shared("s3://b/x")
    with pytest.raises(Refused, match="/somewhere is a path of one machine, and the cluster has 3; use s3://"):
        cluster.require_shared("/somewhere", "s3://b/x")


def test_a_database_file_is_refused_where_work_is_tracked_on_several_machines(
    ray_instance: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": f"10.0.0.{n}", "Alive": True} for n in range(2)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////somewhere/vqray.db")
    cluster.require_shared("s3://b/x")
    with pytest.raises(Refused, match=r"MLflow at sqlite:////somewhere/vqray.db is a file of one machine"):
        cluster.require_shared("s3://b/x", tracked=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1:5000")
    cluster.require_shared("s3://b/x", tracked=True)


def test_a_cluster_that_ray_up_made_counts_what_it_may_start(
    ray_instance: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cluster.most("CPU") == 4
    kinds = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "small": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3},
        "large": {"resources": {"CPU": 32, "GPU": 4}, "max_workers": 1},
    }
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps({"max_workers": 3, "available_node_types": kinds}))
    assert cluster.most("CPU") == 4  # a Ray of this process's own does not grow
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.most("CPU") == 32 + 8 + 8
    assert cluster.most("GPU") == 4 + 1 + 1
    assert cluster.most("TPU") == 0
    with pytest.raises(Refused, match="/somewhere is a path of one machine, and the cluster starts others"):
        cluster.require_shared("/somewhere")


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, "disabled"),
        ({"RAY_AUTH_TOKEN": "t"}, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "~/token"}, "token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "t"}, "disabled"),
    ],
)
def test_a_cluster_that_does_not_answer_is_refused_with_an_explicit_mode(
    given: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**given, "RAY_ADDRESS": "10.9.8.7:1", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "token").write_text("t")

    def no_answer(**_: object) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", no_answer)
    # Refreshing the mode would cut this process off from the Ray of the other tests.
    refreshed: list[str] = []
    monkeypatch.setattr(cluster, "Config", SimpleNamespace(initialize=refreshed.append))
    with pytest.raises(Refused, match=r"could not join Ray at 10\.9\.8\.7:1"):
        cluster.connect()
    assert os.environ["RAY_AUTH_MODE"] == mode
    assert refreshed == ([] if "RAY_AUTH_MODE" in given else [""])


def test_a_local_ray_guards_itself_with_a_token_that_leaves_no_file(tmp_path: Path) -> None:
    script = """
        import os, ray
        from pipelines import cluster
        cluster.connect()
        print(os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]), ray.get(ray.remote(lambda: 7).remote()))
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        env={**kept, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == ["token", "64", "7"], done.stderr
    assert not (tmp_path / ".ray/auth_token").exists()
