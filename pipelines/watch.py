"""What a run says of itself while it trains: losses, usage from exact global counts, and where the time goes."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipelines.collapse import Alarm
from pipelines.places import Places
from pipelines.recipe import Losses
from vqcore import metrics
from vqcore.quantizers.contract import Quantizer
from vqcore.reduction import resolve


@dataclass
class Totals:
    """Counts over the whole run that belong to the result."""

    skipped_steps: int = 0
    """Steps without an optimiser step, because a gradient was not finite."""
    non_finite_rows: int = 0
    steps: int = 0
    """Made up to the newest checkpoint, over all stages."""
    seconds: float = 0.0
    """Spent in the loop up to the newest checkpoint, over all sessions of a run that was resumed."""
    latest: dict[str, float | None] = field(default_factory=dict)
    """The newest training metrics, times left out; None where one was not finite (JSON has no NaN)."""


class Watch:
    """What is logged: means since the newest flush, usage from exact global counts, and where the time went."""

    def __init__(
        self, quantizers: list[tuple[str, Quantizer]], places: Places | None = None, alarm: Alarm | None = None
    ):
        self.quantizers = quantizers
        self.places = places or Places()
        self.alarm = alarm
        self.step = 0
        """The step being made, for what is said of places."""
        self._restart()

    def _restart(self) -> None:
        self.began = time.perf_counter()
        self.steps = 0
        self.rows = 0.0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, list[Tensor]] = {}
        self.spent = {"data": 0.0, "reduce": 0.0, "compute": 0.0}

    def part(self, name: str, doing: str) -> "Part":
        """A stretch of a step whose time counts as `name`; meanwhile this worker is known to be `doing` that."""
        self.places.here = f"{doing} of step {self.step:,}"
        return Part(self.spent, name)

    def add(self, losses: Losses) -> None:
        for name, value in (*((f"loss/{g}", loss.detach()) for g, loss in losses.groups.items()), *losses.logs.items()):
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.double()

    def count_codes(self, rows: float) -> None:
        self.steps += 1
        self.rows += rows
        for name, quantizer in self.quantizers:
            before = self.counts.get(name)
            newest = quantizer.last_counts
            self.counts[name] = (
                [a + b for a, b in zip(before, newest, strict=True)] if before else [c.clone() for c in newest]
            )

    def flush(self, totals: Totals) -> dict[str, float]:
        """Metrics since the newest flush. One small all-reduce; every worker must call it at the same step."""
        reduce = resolve(None)
        out: dict[str, float] = {}
        if self.steps:
            packed = torch.stack(list(self.sums.values())).double()
            reduce(packed)
            means = (packed / (reduce.world * self.steps)).tolist()
            out = {f"train/{name}": value for name, value in zip(self.sums, means, strict=True)}
        for name, counts in self.counts.items():
            label = f"train/{name}/" if len(self.quantizers) > 1 else "train/"
            out[f"{label}usage"] = sum(float(metrics.usage(level)) for level in counts) / len(counts)
            out[f"{label}perplexity"] = sum(float(metrics.perplexity(level)) for level in counts) / len(counts)
            out[f"{label}dead_codes"] = float(sum(int((level == 0).sum()) for level in counts))
        if self.alarm is not None:
            self.alarm.add(self.steps, self.counts)
        seconds = time.perf_counter() - self.began
        out["speed/steps_per_second"] = self.steps / seconds
        out["speed/rows_per_second"] = self.rows / seconds
        out["speed/data_share"] = self.spent["data"] / seconds
        out["speed/reduce_share"] = self.spent["reduce"] / seconds
        out["train/skipped_steps"] = float(totals.skipped_steps)
        out["train/non_finite_rows"] = float(totals.non_finite_rows)
        self._restart()
        return out


class Part:
    """A stretch of time that is added to a sum."""

    def __init__(self, spent: dict[str, float], name: str):
        self.spent, self.name = spent, name

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.spent[self.name] += time.perf_counter() - self.began

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
