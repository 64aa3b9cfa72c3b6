"""Settings every test needs, made before ray, torch or mlflow are imported, and the servers tests share."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.update(
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    # Ray starts its workers at 15: beside a second test process they would hardly get a turn.
    RAY_worker_niceness="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    MPLBACKEND="Agg",
    AWS_EC2_METADATA_DISABLED="true",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several test processes one takes all that needs Ray, so that there is one Ray; other files stay whole, so that
    their fixtures are made once."""
    from xdist.scheduler import LoadScopeScheduling

    class WholeFiles(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if _needs_ray(config.rootpath / file) else file

    return WholeFiles(config, log)


@cache
def _needs_ray(file: Path) -> bool:
    return "ray_instance" in file.read_text()


@pytest.fixture(scope="session", autouse=True)
def tracking_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Else a test that tracks something would leave a database in the working directory."""
    patch = pytest.MonkeyPatch()
    uri = f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'vqray.db'}"
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    yield uri
    patch.undo()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3-protocol server on loopback (moto: any credentials pass); the AWS_* variables then point to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with open(tmp_path_factory.mktemp("moto") / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{shutil.which('moto_server') or command[0]} did not answer within 30 s")
        endpoint = f"http://127.0.0.1:{port}"
        patch = pytest.MonkeyPatch()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "loopback-only")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("VQRAY_CACHE", str(tmp_path_factory.mktemp("vqray-cache")))
        yield endpoint
        patch.undo()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(10)


@pytest.fixture
def bucket(s3_server: str) -> str:
    """A new, empty bucket: s3://NAME."""
    import boto3

    name = f"vqray-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_instance(s3_server: str) -> Iterator[None]:
    """One local Ray for all tests that need it; its workers know the S3 server."""
    import ray

    # Logical CPUs: more than there are, so that tests which hold one do not starve the others.
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()
