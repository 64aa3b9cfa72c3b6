"""The training loop: plain torch and torch.distributed, any recipe, any number of workers.

Every step reads this worker's rows of the global batch and trains on them (`pipelines.step`). Checkpoints are written
behind the loop's back from copies (`pipelines.writer`); the state after any step follows from the newest of them.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from pipelines import checkpoint, recipe, warm
from pipelines.checkpoint import Checkpoint, Checkpoints
from pipelines.collapse import Alarm
from pipelines.errors import Refused
from pipelines.feed import Feed, Source
from pipelines.places import Places
from pipelines.recipe import Batch, Settings, Stage
from pipelines.step import How, Stopped, Trainee, Wish, autocast, one_step
from pipelines.stream import Ended, StreamFeed, StreamSource
from pipelines.watch import Totals, Watch
from pipelines.writer import Writer
from vqcore import noise
from vqcore.quantizers.contract import Quantizer
from vqcore.reduction import resolve

Event = dict[str, Any]
"""What the loop says while it runs, as JSON values: `kind` is one of log, progress, metrics, checkpoint, and of a
stream part (the one it now reads or waits for) and waiting."""


PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class RunSpec:
    """Everything a run's result depends on, and where its checkpoints go. JSON values only: it travels to workers."""

    recipe: str
    settings: dict[str, Any]
    """Resolved settings of the recipe."""
    shards: str
    seed: int
    lanes: int
    out: str
    checkpoint_every: int = 500
    log_every: int = 20
    micro_batches: int = 1
    """Forwards a step of each of `most_workers` workers. Fewer workers make as many more of the same size."""
    most_workers: int = 1
    precision: str = "float32"
    """float32, or bf16: networks under bfloat16 autocast, codebooks and weights in float32."""
    patience: float = 600.0
    """Seconds without one written checkpoint after which the run ends."""
    write_behind: bool = True
    """False: the loop waits for every checkpoint, for callers that read it at once."""
    warm_from: str | None = None
    """A bundle of the same network with fewer codes that the run starts from; None: it starts cold."""
    stream: dict[str, Any] | None = None
    """The rows come from an ingest that goes on meanwhile: its corpus `kind` and `settings`, and whether the parts are
    gone through `once`. None: `shards` are finished."""
    double: bool = False
    """Everything in float64: the test mode in which workers agree to 1e-9 over hundreds of steps."""


@dataclass
class Session:
    """What the stages share in one call of `train`."""

    spec: RunSpec
    settings: Settings
    feed: Feed | StreamFeed
    device: torch.device
    totals: Totals
    writer: Writer
    places: Places
    say: Callable[[Event], None]
    wish: Callable[[], Wish]

    def asked(self) -> Wish:
        """What is wished while a worker waits; what has become of checkpoints is said meanwhile too."""
        self.writer.poll()
        return self.wish()


def train(
    spec: RunSpec,
    feed: Feed | StreamFeed,
    device: torch.device,
    tell: Callable[[Event], None],
    wish: Callable[[], Wish] = lambda: Wish.NOTHING,
) -> tuple[nn.Module, Totals]:
    """Run every stage of the run's recipe from its newest checkpoint, or from the start.

    Returns the last stage's model and the run's totals, equal on all workers.

    Args:
        tell: gets events, on rank 0 only.
        wish: asked at every step, on every worker; what one of them wishes, all do after that step.

    Raises:
        Stopped: it was wished, and a checkpoint of that step is written.
        Failed: no checkpoint could be written for `spec.patience` seconds.
        Hung: another worker did not come to a collective; the message names it.
    """
    found = recipe.load(spec.recipe)
    settings = found.Settings(**spec.settings)
    say = tell if resolve(None).rank == 0 else _silent
    store = Checkpoints(spec.out)
    with Places() as places, Writer(store, say, behind=spec.write_behind, patience=spec.patience) as writer:
        try:
            saved = _newest(store, device, say)
            totals = Totals(**saved.state["totals"]) if saved else Totals()
            session = Session(spec, settings, feed, device, totals, writer, places, say, wish)
            return _run_stages(session, found.stages(settings), saved), totals
        except RuntimeError as error:
            explained = places.explained(error)
            if explained is error:
                raise
            raise explained from error


def _run_stages(session: Session, stages: tuple[Stage, ...], saved: Checkpoint | None) -> nn.Module:
    spec, settings = session.spec, session.settings
    if saved:
        name = stages[saved.stage].name
        session.say({"kind": "log", "text": f"resuming stage {name!r} after step {saved.step:,}"})
    model: nn.Module | None = None
    for number, stage in enumerate(stages):
        torch.manual_seed(_seed_of(spec.seed, number, 0, 0))
        model = stage.build(settings, model).to(session.device)
        if spec.double:
            model = model.double()
        if saved and number < saved.stage:
            continue
        here = saved if saved and number == saved.stage else None
        before = sum(earlier.steps for earlier in stages[:number])
        _run_stage(number, before, Trainee.of(stage, settings, model), session, here)
    if model is None:
        raise ValueError(f"recipe {spec.recipe!r} has no stages")
    session.writer.finish()
    return model


def _run_stage(number: int, before: int, trainee: Trainee, session: Session, saved: Checkpoint | None) -> None:
    """`before` is the number of steps of earlier stages: one curve of metrics runs through all of them."""
    spec, stage, totals, say = session.spec, trainee.stage, session.totals, session.say
    saves = _Saves(number, before, trainee, session)
    how = How(_forwards(trainee.quantizers, spec), spec.precision, spec.seed)
    source = session.feed.open(spec, session.settings, stage, session.device, say, saved.state if saved else {})
    trainee.model.train()
    first = _begin(trainee, session, source, saved)
    alarm = Alarm(stage.steps, session.settings, lambda text: say({"kind": "log", "text": text}))
    watch = Watch(trainee.quantizers, session.places, alarm)
    for step in range(first, stage.steps):
        watch.step = step + 1
        torch.manual_seed(_seed_of(spec.seed, number, step, 1 + resolve(None).rank))
        with watch.part("data", "the reading of rows"):
            _wait(step, source, saves)
            batch, non_finite = source.at(step)
        wish = one_step(trainee, batch, non_finite, step, how, totals, watch, session.wish())
        done = step + 1
        place = {"stage": stage.name, "step": done, "run_step": before + done}
        saving = done % spec.checkpoint_every == 0 or done == stage.steps or wish != Wish.NOTHING
        if done % spec.log_every == 0 or saving:
            seen = watch.flush(totals)
            kept = {name: value for name, value in seen.items() if not name.startswith("speed/")}
            totals.latest = {name: value if math.isfinite(value) else None for name, value in kept.items()}
            say({"kind": "metrics", **place, "metrics": seen})
        say({"kind": "progress", **place, "steps": stage.steps})
        if saving:
            saves.write(done, source.state())
        session.writer.poll()
        if wish == Wish.STOP:
            saves.stop(done)


@dataclass
class _Saves:
    """The checkpoints of one stage."""

    number: int
    before: int
    trainee: Trainee
    session: Session

    def __post_init__(self) -> None:
        self.began = time.perf_counter()

    def write(self, done: int, state: dict[str, Any]) -> None:
        """Have the state after `done` steps written, behind the loop's back; `state` is that of its rows."""
        totals, trainee, now = self.session.totals, self.trainee, time.perf_counter()
        totals.steps = self.before + done
        totals.seconds, self.began = totals.seconds + now - self.began, now
        if resolve(None).rank == 0:
            tensors, plain = checkpoint.pack(trainee.model, trainee.optimisers)
            snapshot = Checkpoint(self.number, done, tensors, {**plain, "totals": dict(vars(totals)), **state})
            place = {"stage": trainee.stage.name, "step": done, "run_step": self.before + done}
            self.session.writer.submit(snapshot, {"kind": "checkpoint", **place})

    def stop(self, done: int) -> NoReturn:
        """End when the newest checkpoint is written."""
        self.session.writer.finish()
        raise Stopped(
            f"stopped as asked after step {self.before + done:,}, whose checkpoint is written; "
            "run the same command again to go on from there."
        )


def _wait(step: int, source: Source | StreamSource, saves: _Saves) -> None:
    """Until the rows of a step are there. What is asked for meanwhile is done with the state of the steps before it."""
    try:
        while (wish := source.wait(step, saves.session.asked)) != Wish.NOTHING:
            saves.write(step, source.state())
            if wish == Wish.STOP:
                saves.stop(step)
    except Ended as end:
        saves.write(step, source.state())
        saves.session.writer.finish()
        raise Ended(f"{end} The checkpoint of step {saves.before + step:,} is written.") from None


def _begin(trainee: Trainee, session: Session, source: Source | StreamSource, saved: Checkpoint | None) -> int:
    """Put a stage into the state it goes on from, and return how many of its steps are done."""
    spec, stage = session.spec, trainee.stage
    if saved:
        checkpoint.unpack(saved, trainee.model, trainee.optimisers)
        return saved.step
    if spec.warm_from is not None:
        session.say({"kind": "log", "text": warm.start(trainee.model, spec.warm_from)})
    elif stage.seed is not None:
        session.places.here = f"the reading of rows to seed stage {stage.name!r}"
        while (wish := source.wait(0, session.asked)) != Wish.NOTHING:
            # Nothing is learned yet, so there is nothing to save.
            if wish == Wish.STOP:
                raise Stopped(
                    f"stopped as asked before stage {stage.name!r} had rows to begin with; run the same command again."
                )
        with torch.no_grad(), autocast(spec.precision, session.device):
            sentence = stage.seed(trainee.model, _for_seeding(source.epoch(), stage.name, session.places))
        session.say({"kind": "log", "text": sentence})
    return 0


def _for_seeding(batches: Iterable[Batch], stage: str, places: Places) -> Iterator[Batch]:
    places.here = f"the reading of rows to seed stage {stage!r}"
    for batch in batches:
        places.here = f"the seeding of stage {stage!r}"
        yield batch
        places.here = f"the reading of rows to seed stage {stage!r}"
    places.here = f"the seeding of stage {stage!r}"


def _forwards(quantizers: list[tuple[str, Quantizer]], spec: RunSpec) -> int:
    """Micro-batches a step of this worker. Raises Refused where one update a step cannot be had."""
    for name, quantizer in quantizers:
        if not quantizer.accumulates and spec.micro_batches > 1:
            raise Refused(
                f"{spec.micro_batches} micro-batches were asked for, and the quantizer {name!r} updates at every "
                "forward; use one micro-batch a step, or a quantizer that looks up before it updates."
            )
        if not quantizer.accumulates:
            return 1
    return spec.micro_batches * -(-spec.most_workers // resolve(None).world)


def _newest(store: Checkpoints, device: torch.device, say: Callable[[Event], None]) -> Checkpoint | None:
    """Rank 0 looks, all follow: a checkpoint finished between two workers' looks must not split them."""
    reduce = resolve(None)
    packed = torch.zeros(3, dtype=torch.float64, device=device)
    if reduce.rank == 0 and (newest := store.newest(lambda text: say({"kind": "log", "text": text}))):
        packed += torch.tensor([1, *newest], dtype=torch.float64, device=device)
    reduce(packed)
    found, stage, step = packed.tolist()
    return store.load(int(stage), int(step)) if found else None


def _seed_of(seed: int, stage: int, step: int, stream: int) -> int:
    """Seeds torch's generator anew at every step, so that dropout needs no generator state in a checkpoint."""
    return int(noise.shared_uniform(seed, step, 1, stream=1_000_003 * (stage + 1) + stream).item() * 2**53)


def _silent(event: Event) -> None:
    return None
