"""Training on the parts of an ingest that is still going on: which rows a step has, and waiting for them.

The rows of an epoch are those of the parts, in their order; within a part they are in the order of a plan of its own
(`pipelines.plan`), so a step never reaches from one part into the next. Where a step lies, (part, step of that part),
follows from how many steps the parts have: a function of their rows, the same for every number of workers.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch

from pipelines import storage
from pipelines.errors import Failed
from pipelines.feed import Feed, Source, plan_of
from pipelines.manifest import Manifest, ShardRecord, Units, is_finished, load_manifest, part_of, record_uri
from pipelines.recipe import Batch, Settings, Stage
from pipelines.shards import ShardReader
from pipelines.step import Stopped, Wish
from vqcore.reduction import resolve

POLL = 0.25
"""Seconds between two looks for a part. Meanwhile the workers meet, so that no time-out sees a long wait."""

Event = dict[str, Any]


class Ended(Failed):
    """The stream has no rows for a step: it goes through its parts once, or has no row to train on."""


class Place(NamedTuple):
    """Where a step lies."""

    part: int
    step: int
    """Of the part's own plan: those of its earlier epochs come before it."""


class Walk:
    """Steps of the whole stream -> (part, step of the part), as far as the parts are known."""

    def __init__(self, steps: list[int], once: bool = False) -> None:
        """
        Args:
            steps: of each known part in one epoch, in the order of parts; 0 where it has no rows to train on.
            once: there is one epoch; else, when all parts are known, the next one begins with the first part.
        """
        self.steps, self.once = steps, once
        self.complete = False
        """Whether these are all parts."""
        self._ends = list(accumulate(steps))

    def add(self, steps: int) -> None:
        """The next part is known."""
        self.steps.append(steps)
        self._ends.append(self.known + steps)

    @property
    def known(self) -> int:
        """Steps of the known parts in one epoch."""
        return self._ends[-1] if self._ends else 0

    def place(self, step: int) -> Place | None:
        """Where a step lies; None where it takes a part that is not known yet.

        Raises:
            Ended: it takes one that there is not.
        """
        epoch, within = divmod(step, self.known) if self.complete and self.known else (0, step)
        if within >= self.known and not self.complete:
            return None
        if not self.known:
            raise Ended("no part of the stream has rows in its train split: ingest more files or a smaller holdout.")
        if epoch and self.once:
            raise Ended(
                f"the stream gave {self.known:,} steps, and more were asked for; parts that were used are deleted, so "
                f"there is no second pass. Begin a new --out and --shards with at most --steps {self.known}, with more "
                "to read, or without --delete-used."
            )
        part = bisect_right(self._ends, within)
        begins = self._ends[part] - self.steps[part]
        return Place(part, epoch * self.steps[part] + within - begins)


@dataclass(frozen=True)
class Parts:
    """The parts that an ingest has made so far, at one URI. JSON values only: it travels to workers."""

    uri: str
    kind: str
    settings: dict[str, Any]
    """The corpus's, completed by its survey."""

    def look(self, part: int) -> str:
        """`there`, `not yet`, or `none` where the ingest has ended without such a part."""
        if is_finished(self.uri):
            return "there" if part <= max(self._all, default=-1) else "none"
        return "there" if storage.exists(record_uri(self.uri, part)) else "not yet"

    def reader(self, part: int) -> ShardReader:
        """The rows of one part that is there."""
        if is_finished(self.uri):
            shards = self._all.get(part, ())
        else:
            shards = tuple(ShardRecord(**one) for one in storage.read_json(record_uri(self.uri, part))["shards"])
        return ShardReader(self.uri, self.manifest(shards))

    def manifest(self, shards: tuple[ShardRecord, ...] = ()) -> Manifest:
        """What a finished directory of these shards would say, as far as reading rows takes it."""
        return Manifest(self.kind, self.settings, {}, {}, shards, Units(0, 0, 0, {}), "")

    @cached_property
    def _all(self) -> dict[int, tuple[ShardRecord, ...]]:
        """Part -> its shards, of a finished ingest: a manifest is one file, and there may be thousands of records."""
        shards = load_manifest(self.uri).shards
        return {part: tuple(group) for part, group in groupby(shards, lambda shard: part_of(shard.name))}


@dataclass(frozen=True)
class StreamFeed:
    """The train split of a stream, for whatever stage asks."""

    parts: Parts
    once: bool

    def open(
        self,
        spec: Any,
        settings: Settings,
        stage: Stage,
        device: torch.device,
        say: Callable[[Event], None],
        state: dict[str, Any],
    ) -> "StreamSource":
        """`state` is what a checkpoint kept of `StreamSource.state`: with it parts that are gone are not missed."""
        return StreamSource(self, Walk(list(state.get("parts", [])), self.once), spec, settings, stage, device, say)


class StreamSource:
    """This worker's share of every global batch of one stage."""

    def __init__(
        self,
        feed: StreamFeed,
        walk: Walk,
        spec: Any,
        settings: Settings,
        stage: Stage,
        device: torch.device,
        say: Callable[[Event], None],
    ) -> None:
        self.parts, self.walk, self.say = feed.parts, walk, say
        self._asked = spec, settings, stage, device
        self._open: tuple[int, Source | None] = -1, None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the steps of the known parts, from which (part, step) follows."""
        return {"parts": list(self.walk.steps)}

    def wait(self, step: int, wish: Callable[[], Wish]) -> Wish:
        """Return when the rows of a step are there, or with what a worker wished while it looked for them. All workers
        call it at the same step and return the same.

        Raises:
            Ended: there are no such rows and will not be.
        """
        told = -1
        while self.walk.place(step) is None:
            part = len(self.walk.steps)
            if part != told:
                self.say({"kind": "part", "part": part})
                told = part
            verdict, strongest = self._look(part, wish())
            if verdict == "there":
                source = self._source(part)
                self.walk.add(source.rows.steps_per_epoch if source else 0)
            elif verdict == "none":
                self.walk.complete = True
                if self.walk.known:
                    steps = f"{self.walk.known:,} steps in all; {self._asked[2].steps:,} were asked for"
                    self.say({"kind": "log", "text": f"the stream has {steps}"})
            # Also where the part is there: a wish is told once.
            if strongest != Wish.NOTHING:
                return strongest
            if verdict == "not yet":
                # At every look: a wish from outside comes with the answer to what is said.
                self.say({"kind": "waiting", "text": f"waiting for part {part} of the ingest"})
                time.sleep(POLL)
        return Wish.NOTHING

    def at(self, step: int) -> tuple[Batch, int]:
        """(batch of a step, its rows that were not finite), of a step that was waited for."""
        place = self.walk.place(step)
        source = self._source(place.part) if place else None
        if place is None or source is None:
            raise RuntimeError(f"step {step} was not waited for")
        return source.at(place.step)

    def epoch(self) -> Iterator[Batch]:
        """The batches of the first part that has rows: what seeding sees."""
        first = self.walk.place(0)
        for step in range(self.walk.steps[first.part] if first else 0):
            yield self.at(step)[0]

    def _look(self, part: int, wish: Wish) -> tuple[str, Wish]:
        """(what rank 0 sees of a part, the strongest wish of any worker), the same on all workers: were each to look by
        itself, one could go on with a part that another has not seen, and stop where the other does not."""
        reduce, verdicts = resolve(None), ("not yet", "there", "none")
        seen = verdicts.index(self.parts.look(part)) if reduce.rank == 0 else 0
        packed = torch.tensor([seen, wish == Wish.SAVE, wish == Wish.STOP], dtype=torch.float64, device=self._asked[3])
        reduce(packed)
        found, saves, stops = packed.tolist()
        return verdicts[int(found)], Wish.STOP if stops else Wish.SAVE if saves else Wish.NOTHING

    def _source(self, part: int) -> Source | None:
        """The rows of a part; None where it has none to train on. Only the newest stays open."""
        if self._open[0] != part:
            reader, (spec, settings, stage, device) = self.parts.reader(part), self._asked
            # Each part is shuffled in a way of its own.
            source = None
            if reader.rows("train"):
                plan = plan_of(reader, settings, stage, spec.lanes, spec.seed + part * 2**32)
                source = Source(reader, plan, spec.double, device)
            self._open = part, source
            self.say({"kind": "part", "part": part})
        return self._open[1]


def feed_of(spec: Any) -> Feed | StreamFeed:
    """The feed that a run's specification (`pipelines.loop.RunSpec`) describes."""
    if spec.stream is None:
        return Feed(ShardReader(spec.shards))
    return StreamFeed(Parts(spec.shards, spec.stream["kind"], spec.stream["settings"]), spec.stream["once"])


def completed(
    about: Mapping[str, Any], spec: Any, tell: Callable[[Event], None], wish: Callable[[], Wish]
) -> dict[str, Any]:
    """What a card tells of the rows, when it is known: waits for the manifest, without which there are no shards.

    Raises:
        Stopped: it was wished meanwhile. Training is done all the same.
    """
    tell({"kind": "trained"})
    if not is_finished(spec.shards):
        text = "training is done; the bundle is written when the ingest is done too: its card names the shards' digest"
        tell({"kind": "log", "text": text})
    while not is_finished(spec.shards):
        if wish() == Wish.STOP:
            raise Stopped(
                "stopped as asked: training is done, the ingest is not. Run the same command again to complete it."
            )
        time.sleep(POLL)
        # What was said before must not wait for what is said next, and a wish comes with its answer.
        tell({"kind": "waiting", "text": "waiting for the ingest"})
    manifest = load_manifest(spec.shards)
    parents = {**about["parents"], "shards": manifest.digest}
    return {**about, "fitted_on": {"split": "train", "rows": manifest.rows("train")}, "parents": parents}
