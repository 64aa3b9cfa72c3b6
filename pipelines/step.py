"""One step of training: forward, gradients, optimisers and codebooks, the same for any number of workers.

In this order: sum the valid counts over workers; one forward per micro-batch, each parameter group's loss giving
gradients to its own parameters; average the gradients; step the optimisers; and when the quantizers' `accumulate`
contexts close, one reduce and one update of every codebook. The optimisers step before the codebooks move, so a code
revived in this step keeps the vector it was given.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.errors import Failed
from pipelines.recipe import Batch, Losses, Settings, Share, Stage
from pipelines.watch import Totals, Watch
from vqcore.quantizers.contract import Quantizer, quantizers_in
from vqcore.reduction import resolve


class Wish(IntEnum):
    """What is asked of a running loop from outside."""

    NOTHING = 0
    SAVE = 1
    """A checkpoint now: this machine may be about to go."""
    STOP = 2
    """A checkpoint now, and an end."""


class Stopped(Failed):
    """The loop was asked to stop; its state is in a checkpoint."""


@dataclass
class Trainee:
    """One stage being trained."""

    stage: Stage
    model: nn.Module
    groups: dict[str, list[nn.Parameter]]
    optimisers: dict[str, Optimizer]
    quantizers: list[tuple[str, Quantizer]]
    settings: Settings
    rates: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, stage: Stage, settings: Settings, model: nn.Module) -> "Trainee":
        groups = {name: params for name, params in stage.groups(model).items() if params}
        optimisers = {name: stage.optimiser(settings, name, params) for name, params in groups.items()}
        rates = {name: [g["lr"] for g in optimiser.param_groups] for name, optimiser in optimisers.items()}
        return cls(stage, model, groups, optimisers, list(quantizers_in(model)), settings, rates)


@dataclass(frozen=True)
class How:
    """What of a run's specification a step needs."""

    micro_batches: int
    """Forwards a step of this worker."""
    precision: str
    seed: int = 0


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bfloat16 where the precision is bf16. Quantizers leave it: codes and statistics are of float32 or better."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def one_step(
    trainee: Trainee, batch: Batch, non_finite: int, step: int, how: How, totals: Totals, watch: Watch, wish: Wish
) -> Wish:
    """Train on this worker's share of a global batch. Returns the strongest wish of any worker, the same on all."""
    stage, model = trainee.stage, trainee.model
    share, lost, wish = _sum_counts(stage.counts(model, batch), non_finite, wish, batch.mask.device, watch)
    share = replace(share, step=step, seed=how.seed)
    totals.non_finite_rows += lost
    if share.totals["rows"] == 0:
        return wish
    with ExitStack() as updates:
        for _, quantizer in trainee.quantizers:
            if not quantizer.accumulates:
                continue
            updates.enter_context(quantizer.accumulate(count=int(share.totals.get("vectors", share.totals["rows"]))))
        for group in trainee.groups.values():
            for parameter in group:
                parameter.grad = None
        with watch.part("compute", "forward and backward"):
            for micro in _micro_batches(batch, how.micro_batches, stage.grouping.size if stage.grouping else 1):
                with autocast(how.precision, batch.mask.device):
                    losses = stage.losses(model, micro, share)
                _backward(losses, trainee.groups)
                watch.add(losses)
        with watch.part("reduce", "the sum of gradients"):
            _average_gradients(trainee.groups)
        if _all_finite(trainee.groups):
            _optimise(trainee, step)
        else:
            totals.skipped_steps += 1
        updating = watch.part("reduce", "the sum of codebook statistics")
        updating.start()
    updating.stop()
    _clear_moments(trainee)
    watch.count_codes(share.totals["rows"])
    return wish


def _sum_counts(
    counts: dict[str, int], non_finite: int, wish: Wish, device: torch.device, watch: Watch
) -> tuple[Share, int, Wish]:
    """Global counts: what losses divide by must be known before the forward. Wishes travel with them."""
    reduce = resolve(None)
    extra = [non_finite, wish == Wish.SAVE, wish == Wish.STOP]
    packed = torch.tensor([*counts.values(), *extra], dtype=torch.float64, device=device)
    with watch.part("reduce", "the sum of counts"):
        reduce(packed)
    *summed, lost, saves, stops = packed.tolist()
    wish = Wish.STOP if stops else Wish.SAVE if saves else Wish.NOTHING
    return Share(reduce.world, dict(zip(counts, summed, strict=True))), int(lost), wish


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


def _optimise(trainee: Trainee, step: int) -> None:
    settings = trainee.settings
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
