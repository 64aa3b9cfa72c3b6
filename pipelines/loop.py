"""The training loop: plain torch and torch.distributed, any recipe, any number of workers.

A step, in this order: read this worker's rows of the global batch; sum the valid counts over workers; one forward per
micro-batch, each parameter group's loss giving gradients to its own parameters; average the gradients; step the
optimisers; and when the quantizers' `accumulate` contexts close, one reduce and one update of every codebook. The
optimisers step before the codebooks move, so a code revived in this step keeps the vector it was given.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines import checkpoint, recipe, warm
from pipelines.checkpoint import Checkpoint, Checkpoints
from pipelines.errors import Refused
from pipelines.feed import Feed
from pipelines.recipe import Batch, Losses, Settings, Share, Stage
from pipelines.watch import Totals, Watch
from vqcore import noise
from vqcore.quantizers.contract import Quantizer, quantizers_in
from vqcore.reduction import resolve

Event = dict[str, Any]
"""What the loop says while it runs, as JSON values: `kind` is one of log, progress, metrics, checkpoint."""


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
    warm_from: str | None = None
    """A bundle of the same network with fewer codes that the run starts from; None: it starts cold."""
    double: bool = False
    """Everything in float64: the test mode in which workers agree to 1e-9 over hundreds of steps."""


@dataclass
class Trainee:
    """One stage being trained."""

    stage: Stage
    model: nn.Module
    groups: dict[str, list[nn.Parameter]]
    optimisers: dict[str, Optimizer]
    quantizers: list[tuple[str, Quantizer]]
    rates: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, stage: Stage, settings: Settings, model: nn.Module) -> "Trainee":
        groups = {name: params for name, params in stage.groups(model).items() if params}
        optimisers = {name: stage.optimiser(settings, name, params) for name, params in groups.items()}
        rates = {name: [g["lr"] for g in optimiser.param_groups] for name, optimiser in optimisers.items()}
        return cls(stage, model, groups, optimisers, list(quantizers_in(model)), rates)


def train(spec: RunSpec, feed: Feed, device: torch.device, tell: Callable[[Event], None]) -> tuple[nn.Module, Totals]:
    """Run every stage of the run's recipe from its newest checkpoint, or from the start.

    Returns the last stage's model and the run's totals, equal on all workers. `tell` gets events on rank 0 only.
    """
    found = recipe.load(spec.recipe)
    settings = found.Settings(**spec.settings)
    say = tell if resolve(None).rank == 0 else _silent
    store = Checkpoints(spec.out)
    start = _agree_on_newest(store, say)
    saved = store.load(*start) if start else None
    if saved:
        stage_name = found.stages(settings)[saved.stage].name
        say({"kind": "log", "text": f"resuming stage {stage_name!r} after step {saved.step:,}"})
    totals = Totals(**saved.state["totals"]) if saved else Totals()
    model: nn.Module | None = None
    for number, stage in enumerate(found.stages(settings)):
        torch.manual_seed(_seed_of(spec.seed, number, 0, 0))
        model = stage.build(settings, model).to(device)
        if spec.double:
            model = model.double()
        if saved and number < saved.stage:
            continue
        here = saved if saved and number == saved.stage else None
        _run_stage(number, Trainee.of(stage, settings, model), spec, settings, feed, device, here, totals, store, say)
    if model is None:
        raise ValueError(f"recipe {spec.recipe!r} has no stages")
    return model, totals


def _run_stage(
    number: int,
    trainee: Trainee,
    spec: RunSpec,
    settings: Settings,
    feed: Feed,
    device: torch.device,
    saved: Checkpoint | None,
    totals: Totals,
    store: Checkpoints,
    say: Callable[[Event], None],
) -> None:
    stage, began = trainee.stage, time.perf_counter()
    _check_accumulation(trainee.quantizers, spec.micro_batches)
    source = feed.open(spec, settings, stage, device)
    trainee.model.train()
    first = 0
    if saved:
        checkpoint.unpack(saved, trainee.model, trainee.optimisers)
        first = saved.step
    elif spec.warm_from is not None:
        say({"kind": "log", "text": warm.start(trainee.model, spec.warm_from)})
    elif stage.seed is not None:
        with torch.no_grad():
            sentence = stage.seed(trainee.model, source.epoch())
        say({"kind": "log", "text": sentence})
    watch = Watch(trainee.quantizers)
    before = sum(earlier.steps for earlier in recipe.load(spec.recipe).stages(settings)[:number])
    for step in range(first, stage.steps):
        torch.manual_seed(_seed_of(spec.seed, number, step, 1 + resolve(None).rank))
        with watch.part("data"):
            batch, non_finite = source.at(step)
        _one_step(trainee, batch, non_finite, step, spec, settings, totals, watch)
        done = step + 1
        saving = done % spec.checkpoint_every == 0 or done == stage.steps
        if done % spec.log_every == 0 or saving:
            seen = watch.flush(totals)
            kept = {name: value for name, value in seen.items() if not name.startswith("speed/")}
            totals.latest = {name: value if math.isfinite(value) else None for name, value in kept.items()}
            # One curve runs through all stages, so metrics carry the step of the whole run.
            say({"kind": "metrics", "stage": stage.name, "run_step": before + done, "metrics": seen})
        say({"kind": "progress", "stage": stage.name, "step": done, "steps": stage.steps, "run_step": before + done})
        if saving:
            totals.steps = before + done
            totals.seconds, began = totals.seconds + time.perf_counter() - began, time.perf_counter()
        if saving and resolve(None).rank == 0:
            tensors, plain = checkpoint.pack(trainee.model, trainee.optimisers)
            store.save(Checkpoint(number, done, tensors, {**plain, "totals": vars(totals)}))
            say({"kind": "checkpoint", "stage": stage.name, "step": done, "run_step": before + done})


def _check_accumulation(quantizers: list[tuple[str, Quantizer]], micro_batches: int) -> None:
    """Raises Refused where one update a step cannot be had."""
    for name, quantizer in quantizers:
        if micro_batches > 1 and not quantizer.accumulates:
            raise Refused(
                f"{micro_batches} micro-batches were asked for, and the quantizer {name!r} updates at every forward; "
                "use one micro-batch a step, or a quantizer that looks up before it updates."
            )


def _one_step(
    trainee: Trainee,
    batch: Batch,
    non_finite: int,
    step: int,
    spec: RunSpec,
    settings: Settings,
    totals: Totals,
    watch: Watch,
) -> None:
    stage, model = trainee.stage, trainee.model
    share, lost = _sum_counts(stage.counts(model, batch), non_finite, batch.mask.device, watch)
    totals.non_finite_rows += lost
    if share.totals["rows"] == 0:
        return
    with ExitStack() as updates:
        for _, quantizer in trainee.quantizers:
            if not quantizer.accumulates:
                continue
            updates.enter_context(quantizer.accumulate(count=int(share.totals.get("vectors", share.totals["rows"]))))
        for group in trainee.groups.values():
            for parameter in group:
                parameter.grad = None
        for micro in _micro_batches(batch, spec.micro_batches, stage.grouping.size if stage.grouping else 1):
            losses = stage.losses(model, micro, share)
            _backward(losses, trainee.groups)
            watch.add(losses)
        with watch.part("reduce"):
            _average_gradients(trainee.groups)
        if _all_finite(trainee.groups):
            _optimise(trainee, settings, step)
        else:
            totals.skipped_steps += 1
        reducing = time.perf_counter()
    watch.spent["reduce"] += time.perf_counter() - reducing
    _clear_moments(trainee)
    watch.count_codes(share.totals["rows"])


def _sum_counts(counts: dict[str, int], non_finite: int, device: torch.device, watch: Watch) -> tuple[Share, int]:
    """Global counts: what losses divide by must be known before the forward."""
    reduce = resolve(None)
    packed = torch.tensor([*counts.values(), non_finite], dtype=torch.float64, device=device)
    with watch.part("reduce"):
        reduce(packed)
    values = packed.tolist()
    return Share(reduce.world, dict(zip(counts, values[:-1], strict=True))), int(values[-1])


def _micro_batches(batch: Batch, count: int, together: int) -> Iterator[Batch]:
    """At most `count` pieces; rows that are read together stay together."""
    size = -(-(len(batch.mask) // together) // count) * together
    for low in range(0, len(batch.mask), size):
        cut = slice(low, low + size)
        columns = {name: column[cut] for name, column in batch.columns.items()}
        yield Batch(columns, batch.mask[cut], batch.keys[cut])


def _backward(losses: Losses, groups: dict[str, list[nn.Parameter]]) -> None:
    """Each group's loss gives gradients to its own parameters only; all are taken before any optimiser steps."""
    if missing := groups.keys() - losses.groups.keys():
        raise ValueError(
            f"no loss for parameter group {sorted(missing)}; losses were given for {sorted(losses.groups)}"
        )
    for index, (name, parameters) in enumerate(groups.items()):
        last = index == len(groups) - 1
        gradients = torch.autograd.grad(losses.groups[name], parameters, retain_graph=not last, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _average_gradients(groups: dict[str, list[nn.Parameter]]) -> None:
    """One all-reduce of all gradients. A parameter that no local loss reached counts as zero on that worker."""
    parameters = [parameter for group in groups.values() for parameter in group]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    reduce = resolve(None)
    if reduce.world == 1 or not parameters:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    reduce(flat)
    flat /= reduce.world
    at = 0
    for parameter in parameters:
        parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()


def _all_finite(groups: dict[str, list[nn.Parameter]]) -> bool:
    """The same answer on every worker, since the averaged gradients are the same bits."""
    return all(bool(p.grad.isfinite().all()) for group in groups.values() for p in group if p.grad is not None)


def _optimise(trainee: Trainee, settings: Settings, step: int) -> None:
    factor = trainee.stage.schedule(settings, step) if trainee.stage.schedule else 1.0
    for name, optimiser in trainee.optimisers.items():
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(trainee.groups[name], settings.clip)
        for group, rate in zip(optimiser.param_groups, trainee.rates[name], strict=True):
            group["lr"] = rate * factor
        optimiser.step()


def _clear_moments(trainee: Trainee) -> None:
    """A revived code starts anew: the optimiser's memory of the vector it replaced is set to zero."""
    for _, quantizer in trainee.quantizers:
        for parameter, revived in quantizer.revived_parameters():
            for optimiser in trainee.optimisers.values():
                for moment in optimiser.state.get(parameter, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                        moment[revived] = 0


def _agree_on_newest(store: Checkpoints, say: Callable[[Event], None]) -> tuple[int, int] | None:
    """Rank 0 looks, all follow: a checkpoint finished between two workers' looks must not split them."""
    reduce = resolve(None)
    packed = torch.zeros(3, dtype=torch.float64)
    if reduce.rank == 0 and (newest := store.newest(lambda text: say({"kind": "log", "text": text}))):
        packed += torch.tensor([1, *newest], dtype=torch.float64)
    reduce(packed)
    found, stage, step = packed.tolist()
    return (int(stage), int(step)) if found else None


def _seed_of(seed: int, stage: int, step: int, stream: int) -> int:
    """Seeds torch's generator anew at every step, so that dropout needs no generator state in a checkpoint."""
    return int(noise.shared_uniform(seed, step, 1, stream=1_000_003 * (stage + 1) + stream).item() * 2**53)


def _silent(event: Event) -> None:
    return None
