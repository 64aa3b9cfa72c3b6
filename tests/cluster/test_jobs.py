"""Jobs on a head that asks for a token, as a user has them: log, exit codes, stopping, and being turned away."""

import io
import json
import os
import secrets
import signal
import subprocess
import sys

import numpy as np
import pytest

from pipelines import storage
from pipelines.checkpoint import Checkpoints
from tests.cluster import heads
from tests.pipelines.loops import make_shards

pytestmark = pytest.mark.slow
AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")


@pytest.fixture(scope="module")
def cluster():
    with heads.cluster(cpus=2) as made:
        yield made


class Command:
    """`vqray ...` as a process, against the cluster."""

    def __init__(self, cluster: heads.Cluster, *words: str, **environment: str | None):
        ours = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(cluster.token_file), "RAY_API_SERVER_ADDRESS": cluster.address}
        ours.update({name: value for name, value in environment.items() if value is not None})
        for name in [name for name, value in environment.items() if value is None]:
            ours.pop(name, None)
        self.errors = cluster.home / f"{secrets.token_hex(4)}.err"
        with open(self.errors, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *words], env=ours, stdout=subprocess.PIPE, stderr=log
            )

    @property
    def said(self) -> str:
        with open(self.errors, encoding="utf-8", newline="") as log:
            return log.read()

    def end(self) -> tuple[int, dict]:
        out, _ = self.process.communicate(timeout=240)
        lines = out.decode().splitlines()
        return self.process.returncode, json.loads(lines[-1]) if lines else {}


def test_exit_codes_and_logs_are_the_commands_own(cluster, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"no picture")
    recipes = Command(cluster, "submit", "--", "recipes")
    failing = Command(
        cluster, "submit", "--", "ingest", "--corpus", "images",
        "--source", str(tmp_path / "bad"), "--out", str(tmp_path / "shards"),
    )  # fmt: skip
    missing = Command(
        cluster, "submit", "--", "train", "--recipe", "plain_vq",
        "--shards", str(tmp_path / "none"), "--out", str(tmp_path / "run"),
    )  # fmt: skip

    code, result = recipes.end()
    assert (code, result["exit_code"], result["status"]) == (0, 0, "SUCCEEDED"), recipes.said
    assert "plain_vq" in result["recipes"]
    assert "no data" in recipes.said
    assert "Plain VQ: vectors in, codes out" in recipes.said
    assert "Running entrypoint" not in recipes.said

    code, result = failing.end()
    assert (code, result["exit_code"], result["status"]) == (1, 1, "FAILED"), failing.said
    assert "1 quarantined" in failing.said or "could not be read" in failing.said

    code, result = missing.end()
    assert (code, result["exit_code"], result["status"]) == (2, 2, "FAILED"), missing.said
    assert f"no manifest.json in {tmp_path / 'none'}" in missing.said


def test_named_variables_reach_workers_and_no_log(cluster, bucket):
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(0).normal(size=(300, 4)).astype("float32"))
    storage.write_atomic(f"{bucket}/raw/x.npy", buffer.getvalue())
    key = secrets.token_hex(20)
    words = ["ingest", "--corpus", "vectors", "--source", f"{bucket}/raw", "--out", f"{bucket}/shards"]
    # Without them this fails: the head was started without any AWS_ variable.
    command = Command(cluster, "submit", "--env", *AWS, "--", *words, AWS_SECRET_ACCESS_KEY=key)
    code, result = command.end()
    assert code == 0, command.said
    assert result["rows"] == 300
    assert storage.read_json(f"{bucket}/shards/manifest.json")
    assert f"go with it: {', '.join(AWS)} (sealed under the token)" in command.said
    assert "\r" in command.said  # the bar, as it was drawn

    assert key not in command.said
    holders = [path for path in cluster.logs() if key.encode() in path.read_bytes()]
    assert not holders
    assert [path for path in cluster.logs() if result["job"].encode() in path.read_bytes()]


def test_ctrl_c_leaves_the_job_alone_and_stop_ends_it(cluster, tmp_path):
    shards, run = make_shards(tmp_path / "shards"), str(tmp_path / "run")
    store = f"sqlite:///{tmp_path / 'vqray.db'}"
    command = Command(
        cluster, "submit", "--env", "MLFLOW_TRACKING_URI", "--", "train", "--recipe", "plain_vq", "--shards", shards,
        "--out", run, "--steps", "1000000", "--set", "num_codes=12", "patch=2", "batch_size=8",
        "--checkpoint-every", "1000000",
        MLFLOW_TRACKING_URI=store,
    )  # fmt: skip
    heads.wait_for(lambda: "step/s" in command.said or command.process.poll() is not None, "no bar")
    command.process.send_signal(signal.SIGINT)
    code, result = command.end()
    job = result["job"]
    assert (code, result["status"]) == (1, "RUNNING"), command.said
    assert f"vqray jobs logs --address {cluster.address} {job} --follow" in command.said
    assert f"vqray jobs stop --address {cluster.address} {job}" in command.said

    follower = Command(cluster, "jobs", "logs", job, "--follow")
    stopped = Command(cluster, "jobs", "stop", job)
    code, result = stopped.end()
    assert (code, result["job"], result["status"], result["skipped"]) == (0, job, "STOPPED", False), stopped.said
    # The only one, since none is due: it was written because the job was stopped.
    assert len(Checkpoints(run).complete()) == 1
    code, result = follower.end()
    assert (code, result["status"]) == (1, "STOPPED"), follower.said
    assert f"job {job} was stopped" in follower.said
    assert "step/s" in follower.said

    again = Command(cluster, "jobs", "stop", job)
    code, result = again.end()
    assert (code, result["skipped"]) == (0, True)
    listed = Command(cluster, "jobs")
    code, result = listed.end()
    assert {"job": job, "status": "STOPPED", "exit_code": None} in [
        {name: one[name] for name in ("job", "status", "exit_code")} for one in result["jobs"]
    ]
    unknown = Command(cluster, "jobs", "logs", job[:-1])
    assert unknown.end()[0] == 2
    assert f"did you mean '{job}'" in unknown.said


def test_without_or_with_a_wrong_token_nothing_is_shown_or_taken(cluster, tmp_path):
    (tmp_path / "wrong").write_text("fedcba9876543210" * 4)
    for words in (["submit", "--", "recipes"], ["jobs"], ["jobs", "stop", "recipes-0"]):
        without = Command(cluster, *words, RAY_AUTH_TOKEN_PATH=None, HOME=str(tmp_path))
        wrong = Command(cluster, *words, RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
        assert without.end() == (2, {}), without.said
        assert "there is no token" in without.said
        assert wrong.end() == (2, {}), wrong.said
        assert f"does not take the token from the file at RAY_AUTH_TOKEN_PATH={tmp_path / 'wrong'}" in wrong.said
