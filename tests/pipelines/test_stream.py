"""A run on an ingest that is not finished: which rows its steps have, waiting, resuming, deleting."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipelines import feed as feeds
from pipelines import loop, recipe, shards, stream
from pipelines.alongside import delete_used
from pipelines.checkpoint import Checkpoints
from pipelines.errors import Refused
from pipelines.loop import RunSpec
from pipelines.shards import ShardReader
from pipelines.step import Wish
from pipelines.stream import Ended, StreamSource, Walk, feed_of
from tests.pipelines import forks
from tests.pipelines.activation_shards import make_activation_shards
from tests.pipelines.growing import Growing, empty_split, stream_spec
from tests.pipelines.loops import CPU, make_shards

ROWS, PARTS = 150, 5
NAME = "plain_vq"


@pytest.fixture
def home(tmp_path: Path) -> str:
    """Five parts; the third and the last have no row to train on."""
    made = make_shards(tmp_path / "shards", ROWS, PARTS)
    empty_split(made, 2)
    return made


def open_stream(spec: RunSpec, state: dict | None = None) -> StreamSource:
    found = recipe.load(spec.recipe)
    settings = found.Settings(**spec.settings)
    source = feed_of(spec).open(spec, settings, found.stages(settings)[0], CPU, lambda _: None, state or {})
    assert isinstance(source, StreamSource)
    return source


def nothing() -> Wish:
    return Wish.NOTHING


@pytest.mark.parametrize("seed", range(20))
def test_places_are_those_of_a_loop_over_epochs_parts_and_steps(seed: int) -> None:
    drawn = random.Random(seed)
    steps = [drawn.choice([0, 0, 1, 2, 7]) for _ in range(drawn.randrange(1, 8))]
    if not any(steps):
        steps[-1] = 3
    expected = [(p, e * n + s) for e in range(3) for p, n in enumerate(steps) for s in range(n)]
    walk = Walk([])
    for step in range(sum(steps)):
        while walk.place(step) is None:
            walk.add(steps[len(walk.steps)])
        assert walk.place(step) == expected[step]
    while len(walk.steps) < len(steps):
        assert walk.place(sum(steps)) is None
        walk.add(steps[len(walk.steps)])
    walk.complete = True
    assert [walk.place(step) for step in range(len(expected))] == expected
    once = Walk(list(steps), once=True)
    once.complete = True
    assert once.place(sum(steps) - 1) == expected[sum(steps) - 1]
    with pytest.raises(Ended, match=rf"the stream gave {sum(steps)} steps.*at most --steps {sum(steps)}"):
        once.place(sum(steps))


class Worker:
    """Stands for the group of workers, as one of them."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __call__(self, tensor: Any) -> None:
        return None


@pytest.mark.parametrize("name", ["plain_vq", "clvq_vae"])
def test_an_epoch_has_every_train_row_once_and_part_after_part_for_any_number_of_workers(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second recipe groups its rows."""
    if name == "plain_vq":
        made = make_shards(tmp_path / "shards", ROWS, PARTS)
        empty_split(made, 2)
    else:
        made = make_activation_shards(tmp_path / "shards", parts=PARTS)
    spec = stream_spec(name, made, tmp_path / "run")
    growing = Growing(made, PARTS)
    expected = [sorted(growing.train_rows(part)) for part in range(PARTS)]
    for part in range(PARTS):
        growing.show(part)
    growing.finish()
    source = open_stream(spec)
    assert source.wait(10**6, nothing) == Wish.NOTHING
    steps = source.state()["parts"]
    assert sum(map(len, expected)) == ShardReader(made).rows("train")
    batches: dict[int, list[list[int]]] = {}
    for world in (1, 2, 3):
        batches[world] = []
        for step in range(2 * sum(steps)):
            ids: list[int] = []
            for rank in range(world):
                monkeypatch.setattr(feeds, "resolve", lambda _, rank=rank, world=world: Worker(rank, world))
                batch, lost = source.at(step)
                assert lost == 0
                ids += batch.keys[batch.mask].tolist()
            batches[world].append(sorted(ids))
    assert batches[1] == batches[2] == batches[3]
    for epoch in range(2):
        first = epoch * sum(steps)
        for part, count in enumerate(steps):
            made_of = [row for ids in batches[1][first : first + count] for row in ids]
            assert sorted(made_of) == expected[part]
            first += count
    if steps[0] > 1:
        assert batches[1][: steps[0]] != batches[1][sum(steps) : sum(steps) + steps[0]], "an epoch is shuffled anew"


class Showing:
    """Hears a run, and finishes each part when it is waited for; the events are kept."""

    def __init__(self, growing: Growing, pause: float = 0.0) -> None:
        self.growing, self.pause = growing, pause
        self.events: list[loop.Event] = []

    def __call__(self, event: loop.Event) -> None:
        self.events.append(event)
        if event["kind"] == "waiting":
            part = int(event["text"].split()[3])
            time.sleep(self.pause)
            self.growing.show(part) if part < self.growing.parts else self.growing.finish()


def trained(spec: RunSpec, tell: Callable[[loop.Event], None] = lambda _: None, **how: Any) -> dict:
    return loop.train(spec, feed_of(spec), CPU, tell, **how)[0].state_dict()


def assert_same(made: dict, expected: dict) -> None:
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        assert tensor.equal(expected[name]), name


@pytest.mark.parametrize("name", ["plain_vq", "rotation_trick"])
def test_waiting_changes_nothing(home: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than the stream has: two epochs and a bit."""
    monkeypatch.setattr(stream, "POLL", 0.01)
    spec = stream_spec(name, home, tmp_path / "finished", steps=40)
    finished = trained(spec)
    growing = Growing(home, PARTS)
    showing = Showing(growing, pause=0.1)
    waiting = trained(replace(spec, out=str(tmp_path / "waiting")), showing)
    assert_same(waiting, finished)
    waits = [event["text"] for event in showing.events if event["kind"] == "waiting"]
    # After the last part it waits to see whether there is another.
    assert waits == [f"waiting for part {part} of the ingest" for part in range(PARTS + 1)]
    shares = [event["metrics"]["speed/data_share"] for event in showing.events if event["kind"] == "metrics"]
    assert max(shares) > 0.5
    steps = Checkpoints(spec.out).state(0, 40)["parts"]
    assert steps[2] == 0
    assert sum(steps) * 2 < 40


@pytest.mark.parametrize("at", [4, 8])
def test_killed_and_resumed_it_ends_with_the_bits_of_an_undisturbed_run(home: str, tmp_path: Path, at: int) -> None:
    """Killed within the second part, or while it waits for the third."""
    steps, log = 24, tmp_path / "log"
    spec = stream_spec(NAME, home, tmp_path / "run", steps=steps, checkpoint_every=3, write_behind=False)
    undisturbed = trained(replace(spec, out=str(tmp_path / "whole")))
    growing = Growing(home, PARTS)
    growing.show(0)
    growing.show(1)
    process = forks.start(forks.train, spec, str(log))
    until = time.monotonic() + 60
    while len(forks.events(log, "progress")) < at:
        assert time.monotonic() < until
        time.sleep(0.001)
    process.kill()
    assert forks.ended(process) == -signal.SIGKILL
    made = len(forks.events(log, "progress"))
    newest = Checkpoints(spec.out).complete()[-1][1]
    for part in range(2, PARTS):
        growing.show(part)
    growing.finish()
    assert forks.ended(forks.start(forks.train, spec, str(log))) == 0
    assert [event["step"] for event in forks.events(log, "progress")][made:] == list(range(newest + 1, steps + 1))
    assert_same(load_file(f"{log}.safetensors"), undisturbed)


def test_a_stop_while_it_waits_keeps_the_steps_made(home: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stream, "POLL", 0.01)
    spec = stream_spec(NAME, home, tmp_path / "run", steps=24, checkpoint_every=100)
    undisturbed = trained(replace(spec, out=str(tmp_path / "whole")))
    growing, events = Growing(home, PARTS), []

    def wish() -> Wish:
        return Wish.STOP if any(event["kind"] == "waiting" for event in events) else Wish.NOTHING

    with pytest.raises(loop.Stopped, match="stopped as asked before stage 'codebook' had rows"):
        trained(spec, events.append, wish=wish)
    assert Checkpoints(spec.out).complete() == []
    growing.show(0)
    events.clear()
    with pytest.raises(loop.Stopped, match=r"stopped as asked after step (\d+), whose checkpoint is written"):
        trained(spec, events.append, wish=wish)
    steps = max(event["step"] for event in events if event["kind"] == "progress")
    assert Checkpoints(spec.out).complete() == [(0, steps)]
    assert_same(trained(spec, Showing(growing)), undisturbed)


def test_a_wish_is_not_lost_when_it_comes_with_the_part(home: str, tmp_path: Path) -> None:
    source = open_stream(stream_spec(NAME, home, tmp_path / "run"))
    wishes = iter([Wish.SAVE])
    assert source.wait(0, lambda: next(wishes)) == Wish.SAVE
    assert source.wait(0, nothing) == Wish.NOTHING
    assert source.at(0)[0].mask.any()


def needed(spec: RunSpec, source: StreamSource, step: int) -> set[int]:
    """Parts of the steps from `step` on, one step after another."""
    places = (source.walk.place(one) for one in range(step, source.walk.known))
    return {place.part for place in places if place}


def test_a_part_is_deleted_when_the_older_checkpoint_lies_past_it_and_not_before(home: str, tmp_path: Path) -> None:
    spec = stream_spec(NAME, home, tmp_path / "run", once=True, steps=1000, checkpoint_every=2, write_behind=False)
    source = open_stream(spec)
    with pytest.raises(Ended):
        source.wait(10**6, nothing)
    files = Counter(int(path.name.split("-")[1]) for path in Path(home).glob("shard-*.arrow"))
    deleted: list[int] = []

    def tell(event: loop.Event) -> None:
        if event["kind"] != "checkpoint":
            return
        deleted.append(delete_used(home, spec.out))
        kept = [step for _, step in Checkpoints(spec.out).complete()][-2:]
        there = {int(path.name.split("-")[1]) for path in Path(home).glob("shard-*.arrow")}
        if len(kept) < 2:
            assert there == set(files)
        else:
            assert needed(spec, source, kept[0]) <= there
            # All others with rows before the part it goes on in are gone, and nothing behind it.
            goes_on_in = min(needed(spec, source, kept[0]), default=PARTS - 1)
            assert there - {2} == {part for part in files if part >= goes_on_in} - {2}

    with pytest.raises(Ended, match=rf"the stream gave {source.walk.known} steps.*The checkpoint of step"):
        trained(spec, tell)
    assert deleted == sorted(deleted)
    assert deleted[-1] >= 2
    with pytest.raises(
        Refused, match=rf"shard-00000-000\.arrow of {home} was deleted after use by the streamed run in"
    ):
        ShardReader(home)
    shards._checked.clear()


def test_with_the_newest_checkpoint_damaged_the_older_one_still_has_its_parts(home: str, tmp_path: Path) -> None:
    spec = stream_spec(NAME, home, tmp_path / "run", once=True, steps=12, checkpoint_every=2, write_behind=False)
    undisturbed = trained(replace(spec, out=str(tmp_path / "whole")))

    def tell(event: loop.Event) -> None:
        if event["kind"] == "checkpoint":
            delete_used(home, spec.out)
            if event["step"] == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(spec, tell)
    newest = Checkpoints(spec.out)
    stage, step = newest.complete()[-1]
    weights = Path(newest.uri) / f"{stage:03d}-{step:012d}" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    said: list[loop.Event] = []
    assert_same(trained(spec, said.append), undisturbed)
    assert any("after step 6" in event.get("text", "") for event in said)


def test_a_stream_without_a_row_to_train_on_says_so(tmp_path: Path) -> None:
    made = make_shards(tmp_path / "shards", 20, 2)
    for part in range(2):
        empty_split(made, part)
    with pytest.raises(Ended, match="no part of the stream has rows in its train split"):
        trained(stream_spec(NAME, made, tmp_path / "run"))
