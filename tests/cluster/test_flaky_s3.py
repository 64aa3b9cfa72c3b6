"""Shards and checkpoints on an S3-protocol server that fails one answer in ten, or all of them for a while."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
import torch

from pipelines import loop, patience, retries, storage
from pipelines.checkpoint import Checkpoints
from pipelines.errors import Failed
from pipelines.feed import Feed
from pipelines.shards import ShardReader
from tests.cluster.flaky import Flaky
from tests.pipelines.loops import TINY, make_shards, spec_of

CPU = torch.device("cpu")


@pytest.fixture
def flaky(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Flaky]:
    """The proxy; what this process asks of S3 goes through it, and no answer is remembered from before."""
    with Flaky(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("VQRAY_CACHE", str(tmp_path / "cache"))
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


def put(home: str, uri: str) -> str:
    for entry in storage.list_files(home):
        storage.upload(entry.uri, storage.join(uri, entry.name))
    return uri


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"))


def test_one_bad_answer_in_ten_changes_nothing(local, bucket, flaky, tmp_path):
    whole, _ = loop.train(
        spec_of("plain_vq", local, tmp_path / "local", steps=16), Feed(ShardReader(local)), CPU, lambda _: None
    )
    shards = put(local, f"{bucket}/shards")
    spec = spec_of("plain_vq", shards, f"{bucket}/run", steps=16, checkpoint_every=1, write_behind=False)
    said: list[loop.Event] = []
    model, _ = loop.train(spec, Feed(ShardReader(shards)), CPU, said.append)
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in model.state_dict().items())
    assert [event["step"] for event in said if event["kind"] == "checkpoint"] == list(range(1, 17))
    assert Checkpoints(spec.out).complete() == [(0, 15), (0, 16)]
    assert sum(flaky.answers[kind] for kind in ("500", "503", "slow", "cut")) >= 10
    assert {"500", "503", "slow"} <= flaky.answers.keys()


def test_training_goes_on_while_the_store_is_down_and_saves_when_it_is_back(
    local, bucket, flaky, tmp_path, monkeypatch
):
    monkeypatch.setattr(retries, "LONGEST", 0.5)
    monkeypatch.setenv("VQRAY_STORAGE_PATIENCE", "0.2")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    flaky.share = 0.0
    spec = spec_of("plain_vq", local, f"{bucket}/run", steps=40, checkpoint_every=4, patience=60.0)
    said: list[loop.Event] = []

    def tell(event: loop.Event) -> None:
        said.append(event)
        if event["kind"] == "checkpoint" and event["step"] == 4:
            flaky.down.set()
            threading.Timer(1.5, flaky.down.clear).start()
        if event["kind"] == "progress":
            time.sleep(0.05)

    loop.train(spec, Feed(ShardReader(local)), CPU, tell)
    texts = [event["text"] for event in said if event["kind"] == "log"]
    assert any("could not be written" in text and "Training goes on" in text for text in texts)
    assert any("checkpoints are written again" in text for text in texts)
    assert Checkpoints(spec.out).complete()[-1] == (0, 40)


def test_a_store_that_never_answered_is_called_wrong_at_once(monkeypatch, flaky):
    flaky.down.set()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(patience, "_answered", False)
    with pytest.raises(Failed, match=r"could not read s3://nobody/x"):
        storage.read_bytes("s3://nobody/x")
    asked = flaky.answers.total()
    assert asked < 12


@pytest.mark.slow
def test_the_command_itself_completes_through_ray(local, bucket, flaky, tmp_path):
    shards = put(local, f"{bucket}/shards")
    settings = [f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in TINY["plain_vq"].items()]
    command = [
        sys.executable, "-m", "jobs.cli", "train", "--recipe", "plain_vq", "--shards", shards, "--out",
        f"{bucket}/run", "--preset", "small", "--workers", "2", "--steps", "40", "--checkpoint-every", "4",
        "--set", *settings,
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'vqray.db'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert storage.exists(f"{bucket}/run/bundle/card.json")
    assert json.loads(done.stdout.splitlines()[-1])["out"] == f"{bucket}/run"
    assert flaky.answers.total() - flaky.answers["good"] >= 3
