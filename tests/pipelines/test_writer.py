"""Checkpoints behind the loop's back: what happens when the store fails for a while, or for good."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from pipelines import loop, retries, writer
from pipelines.checkpoint import Checkpoint, Checkpoints
from pipelines.errors import Failed
from pipelines.feed import Feed
from pipelines.shards import ShardReader
from pipelines.step import Wish
from pipelines.writer import Writer
from tests.pipelines.loops import make_shards, spec_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retries, "SHORTEST", 0.01)
    monkeypatch.setattr(retries, "LONGEST", 0.05)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"))


def snapshot(step: int) -> tuple[Checkpoint, dict]:
    return Checkpoint(0, step, {"x": torch.full((3,), float(step))}, {}), {"kind": "checkpoint", "run_step": step}


class Store:
    """Keeps what it is given; `failures` times it does not, and it waits while it is `held`."""

    def __init__(self, failures: float = 0) -> None:
        self.failures, self.saved, self.tried = failures, [], 0
        self.free = threading.Event()
        self.free.set()

    def save(self, checkpoint: Checkpoint) -> None:
        self.tried += 1
        assert self.free.wait(10)
        if self.tried <= self.failures:
            raise Failed("could not write x: no space left on device.")
        self.saved.append(checkpoint.step)


def test_a_slow_store_holds_nobody_up_and_gets_the_newest_state_next():
    store, said = Store(), []
    store.free.clear()
    with Writer(store, said.append) as writing:
        for step in (1, 2, 3, 4):
            writing.submit(*snapshot(step))
            while step == 1 and not store.tried:
                time.sleep(0.001)
        assert said == []
        store.free.set()
        writing.finish()
    assert store.saved == [1, 4]
    assert [event["run_step"] for event in said] == [1, 4]


def test_a_store_that_fails_for_a_while_is_said_once_and_tried_until_it_works():
    store, said = Store(failures=4), []
    with Writer(store, said.append) as writing:
        writing.submit(*snapshot(7))
        writing.finish()
    assert store.saved == [7]
    texts = [event.get("text", event["kind"]) for event in said]
    assert len(texts) == 3
    assert "step 7 could not be written: could not write x: no space left on device. Training goes on" in texts[0]
    assert texts[1:] == ["checkpoints are written again; the newest is of step 7", "checkpoint"]


@pytest.mark.parametrize("behind", [True, False])
def test_when_patience_ends_so_does_the_run_with_the_reason(behind):
    store, said = Store(failures=float("inf")), []
    with Writer(store, said.append, behind=behind, patience=0.1) as writing:

        def until_it_ends() -> None:
            for step in range(10_000):
                writing.submit(*snapshot(step))
                time.sleep(0.005)

        with pytest.raises(Failed, match=r"for 0\.1 s \(none was written.*no space left.*Make room or mend the store"):
            until_it_ends()


def test_what_is_no_fault_of_the_store_ends_the_run_at_once():
    class Broken(Store):
        def save(self, checkpoint: Checkpoint) -> None:
            raise ZeroDivisionError

    def write(writing: Writer) -> None:
        writing.submit(*snapshot(1))
        writing.finish()

    with Writer(Broken(), lambda _: None) as writing, pytest.raises(ZeroDivisionError):
        write(writing)


def test_leaving_writes_what_waits_once_and_without_patience():
    store = Store()
    store.free.clear()
    with Writer(store, lambda _: None) as writing:
        writing.submit(*snapshot(1))
        store.free.set()
    assert store.saved == [1]
    failing = Store(failures=float("inf"))
    with Writer(failing, lambda _: None, patience=1e9) as writing:
        writing.submit(*snapshot(1))
    assert failing.saved == []


def test_a_snapshot_is_a_copy_which_later_steps_do_not_change(shards, tmp_path, monkeypatch):
    """The store takes a snapshot only when the run has gone on by eleven steps; it is that of its own step."""
    spec = spec_of("rotation_trick", shards, tmp_path / "late", steps=12, checkpoint_every=12)
    held = threading.Event()
    plain = Checkpoints.save
    kept = {}

    def late(store: Checkpoints, checkpoint: Checkpoint) -> None:
        assert held.wait(30)
        kept[checkpoint.step] = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
        plain(store, checkpoint)

    monkeypatch.setattr(Checkpoints, "save", late)

    def tell(event: loop.Event) -> None:
        if event["kind"] == "progress" and event["step"] == 12:
            held.set()

    wishes = iter([Wish.SAVE, *[Wish.NOTHING] * 11])
    loop.train(spec, Feed(ShardReader(shards)), CPU, tell, lambda: next(wishes))
    monkeypatch.undo()
    short = spec_of("rotation_trick", shards, tmp_path / "short", steps=12, checkpoint_every=1)
    stop = iter([Wish.STOP])
    with pytest.raises(loop.Stopped):
        loop.train(short, Feed(ShardReader(shards)), CPU, lambda _: None, lambda: next(stop))
    right = Checkpoints(short.out).load(0, 1).tensors
    assert kept[1].keys() == right.keys()
    assert all(torch.equal(kept[1][name], tensor) for name, tensor in right.items())


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_from_it(shards, tmp_path, monkeypatch):
    spec = spec_of("plain_vq", shards, tmp_path / "run", steps=12, checkpoint_every=4, patience=0.2)
    whole, _ = loop.train(spec_of("plain_vq", shards, tmp_path / "whole", steps=12), _feed(shards), CPU, lambda _: None)
    plain = os.fsync
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")
        plain(handle)

    monkeypatch.setattr(os, "fsync", full)
    said: list[loop.Event] = []
    with pytest.raises(Failed, match=r"newest is of step 4.*No space left on device"):
        loop.train(spec, _feed(shards), CPU, said.append)
    assert any("Training goes on" in event.get("text", "") for event in said)
    assert Checkpoints(spec.out).complete() == [(0, 4)]
    assert not list(Path(spec.out).rglob(".*"))
    monkeypatch.undo()
    again, _ = loop.train(spec, _feed(shards), CPU, said.append)
    assert "after step 4" in said[-1].get("text", "") or any("after step 4" in e.get("text", "") for e in said)
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in again.state_dict().items())


def test_asked_to_stop_it_ends_after_that_step_and_goes_on_to_the_same_bits(shards, tmp_path):
    whole, _ = loop.train(
        spec_of("rotation_trick", shards, tmp_path / "whole", steps=12), _feed(shards), CPU, lambda _: None
    )
    spec = spec_of("rotation_trick", shards, tmp_path / "run", steps=12, checkpoint_every=100)
    wishes = iter([Wish.NOTHING, Wish.NOTHING, Wish.SAVE, Wish.NOTHING, Wish.STOP])
    with pytest.raises(loop.Stopped, match="stopped as asked after step 5, whose checkpoint is written; run the same"):
        loop.train(spec, _feed(shards), CPU, lambda _: None, lambda: next(wishes))
    assert Checkpoints(spec.out).complete()[-1] == (0, 5)
    again, _ = loop.train(spec, _feed(shards), CPU, lambda _: None)
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in again.state_dict().items())


def _feed(shards: str) -> Feed:
    return Feed(ShardReader(shards))


def test_pauses_grow_to_a_bound(monkeypatch):
    monkeypatch.undo()
    waits = writer.pauses()
    found = [next(waits) for _ in range(12)]
    assert 0.25 <= found[0] <= 0.5
    assert all(7.5 <= wait <= 15 for wait in found[6:])
