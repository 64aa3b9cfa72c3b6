"""A streamed run through Ray: its ingest is an ordinary one, and its workers the plain loop's."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines import alongside, corpora, ingest, train
from pipelines.checkpoint import Checkpoints
from pipelines.claims import claim
from pipelines.errors import Failed, Refused
from pipelines.ingest_request import REQUEST, ask
from pipelines.loop import RunSpec, Stopped
from pipelines.manifest import is_finished, load_manifest
from pipelines.request import Request, prepare
from pipelines.shards import ShardReader
from pipelines.stream_request import Streamed
from tests.pipelines.loops import run_workers, state_of
from vqcore.bundle import read_bundle

FILES, ROWS = 7, 60
NAME = "plain_vq"

pytestmark = pytest.mark.usefixtures("ray_instance")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Seven parts, of one file each. Each is made when it is read or waited for, and not before."""
    monkeypatch.setattr(ingest, "LEAST_PART_BYTES", 1)
    monkeypatch.setattr(ingest, "MOST_PART_SLICES", 1)
    drawn = np.random.default_rng(0)
    for file in range(FILES):
        (tmp_path / "source").mkdir(exist_ok=True)
        np.save(tmp_path / "source" / f"{file}.npy", drawn.normal(size=(ROWS, 4)).astype(np.float32))
    return str(tmp_path / "source")


def request_for(source: str, home: Path, **changes) -> Request:
    stream = Streamed((source,), "vectors", delete_used=True)
    overrides = {"num_codes": 8, "batch_size": 8, "decay": 0.9, **changes.pop("overrides", {})}
    return Request(
        NAME, str(home / "shards"), str(home / "run"), "small", overrides, checkpoint_every=4, stream=stream, **changes
    )


@pytest.mark.slow
def test_two_workers_beside_their_ingest_end_with_the_bits_of_plain_ones_over_finished_shards(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    ordinary = ingest.ingest("vectors", [source], str(tmp_path / "ordinary"), settings=settings())
    monkeypatch.setattr(alongside, "AHEAD", 0)
    monkeypatch.setattr(alongside, "MORE_AHEAD", 0)
    steps = 40
    request = request_for(source, tmp_path, workers=2, overrides={"steps": steps})
    outcome = train.train(request)
    assert "waiting for part" in capfd.readouterr().err
    bundle = read_bundle(tmp_path / "run" / "bundle")
    manifest = load_manifest(request.shards)
    assert manifest.digest == ordinary.digest == bundle.card["parents"]["shards"]
    assert bundle.card["fitted_on"] == {"split": "train", "rows": manifest.rows("train")}
    spec: RunSpec = replace(
        prepare(request).spec, shards=str(tmp_path / "ordinary"), out=str(tmp_path / "plain"), checkpoint_every=4
    )
    run_workers(2, tmp_path, {"plain": spec})
    expected = state_of(tmp_path, "plain", 0, 2)
    assert all(tensor.equal(expected[name]) for name, tensor in bundle.tensors.items())
    # What was begun is deleted; the manifest still says what it was.
    ends = np.cumsum(Checkpoints(str(request.out)).state(0, steps)["parts"])
    begun = int(np.searchsorted(ends, steps)) + 1
    left = {int(path.name.split("-")[1]) for path in Path(request.shards).glob("shard-*.arrow")}
    assert left == set(range(begun, FILES))
    with pytest.raises(Refused, match="was deleted after use by the streamed run in"):
        ShardReader(request.shards)

    again = train.train(request)
    assert again.skipped
    assert again.digest == outcome.digest


@pytest.mark.slow
def test_stopped_while_it_waits_and_then_with_an_ingest_that_fails_it_ends_with_the_same_bits(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = request_for(source, tmp_path / "whole", overrides={"steps": 30})
    train.train(whole)
    request = request_for(source, tmp_path, overrides={"steps": 30})
    said: list[str] = []
    hear, check = alongside.Alongside.hear, ingest._StopIfHopeless.__call__

    def heard(self: alongside.Alongside, event: dict) -> None:
        said.append(event["kind"])
        hear(self, event)

    def stop() -> None:
        until = time.monotonic() + 60
        while "waiting" not in said and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    def failing(self: object, record: dict) -> None:
        check(self, record)
        if len(self.records) == 3:
            raise Failed("three parts are enough")

    with monkeypatch.context() as patch:
        patch.setattr(alongside.Alongside, "hear", heard)
        # There is room for no part at all.
        patch.setattr(alongside, "AHEAD", -9)
        stopper = threading.Thread(target=stop)
        stopper.start()
        began = time.monotonic()
        with pytest.raises(Stopped, match="stopped as asked before stage 'codebook' had rows"):
            train.train(request)
        stopper.join()
        assert time.monotonic() - began < 60
    with monkeypatch.context() as patch:
        patch.setattr(alongside, "AHEAD", 0)
        patch.setattr(alongside, "MORE_AHEAD", 0)
        patch.setattr(ingest._StopIfHopeless, "__call__", failing)
        with pytest.raises(Failed, match=r"the ingest failed: three parts are enough.*checkpoints so far are in"):
            train.train(request)
    assert not is_finished(request.shards)
    train.train(request)
    made, expected = (read_bundle(Path(str(one.out)) / "bundle") for one in (request, whole))
    assert made.digest == expected.digest
    assert all(tensor.equal(expected.tensors[name]) for name, tensor in made.tensors.items())


def test_workers_that_leave_no_cpu_are_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"--workers 4 leaves no CPU to the ingest beside it; this cluster has 4 CPUs"):
        train.train(request_for(source, tmp_path, workers=4))
    assert not (tmp_path / "shards").exists()


def test_shards_of_another_request_are_refused(source: str, tmp_path: Path) -> None:
    asked = ask("vectors", [source], str(tmp_path / "shards"), settings(), 30, 0.05, 0.1)
    claim(asked.out, REQUEST, asked.request, "an ingest")
    with pytest.raises(Refused, match=r"limit: 30 -> None. Give another --shards, or repeat what it was begun with"):
        train.train(request_for(source, tmp_path))
    assert not (tmp_path / "run").exists()


def settings():
    return corpora.load("vectors").Settings()
