"""A search as it was asked for, checked: its space, its sampler, its objectives, and what all its trials share."""

import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pipelines import evaluate, front, recipe, registry, sampling, storage, trial_run, trials, warm
from pipelines.errors import Refused, nearest_names
from pipelines.feasibility import SIZE, Feasibility, without_what_follows
from pipelines.feed import columns_of
from pipelines.options import validated
from pipelines.recipe import Recipe
from pipelines.request import prepare
from pipelines.shards import ShardReader
from pipelines.space import Point, Space, parse_space
from pipelines.trial_run import Common, Proposal

SEARCH = "vqray-search"
VERSION = 1
TRIALS = 20
"""Proposals of a sampler that has no end of its own."""
LARGEST_GRID = 100
"""A space of more points is not searched point by point unless --sampler grid says so."""
REDUCTION = 3
"""ASHA: of the trials that reach a rung, the best third goes on; rungs are this factor apart."""
RUNGS = 3


@dataclass(frozen=True)
class Search:
    """What the user asked for. `trials`, `pick`, `register`, `concurrent`, `workers`, GPUs and restarts may differ on a
    rerun."""

    recipe: str
    shards: str
    out: str
    preset: str | None = None
    words: Sequence[str] = ()
    """`--set` words: searched settings, or fixed ones."""
    capacity: int | None = None
    bits: float | None = None
    sampler: str | None = None
    """None: a grid where the space is a small one, else adaptive."""
    trials: int | None = None
    """Points that are tried; each is `repeats` trials."""
    repeats: int = 1
    seed: int = 0
    objectives: Sequence[str] | None = None
    """`min:NAME` or `max:NAME`; None: min:distortion min:bits_per_row, with `asha` only the first."""
    asha: bool = False
    concurrent: int | None = None
    workers: int = 1
    """Of each trial."""
    gpus_per_worker: float = 0.0
    checkpoint_every: int = 500
    restarts: int = 3
    """How often a trial whose process died is tried again."""
    retry_failed: bool = False
    pick: str | None = None
    """How the champion is picked; None: the knee, or the best of the one objective."""
    register: str | None = None
    """The name under which the champion is published."""
    grow: float | None = None
    """Start trials of a grid from the bundle of the next smaller num_codes, and give them this share of the steps."""


class Plan:
    """A request, checked: the space, the sampler, and what every trial has in common."""

    def __init__(self, request: Search):
        self.request = request
        self.out = storage.normalise(request.out)
        self.found: Recipe = recipe.load(request.recipe)
        self.reader = ShardReader(storage.normalise(request.shards))
        what = f"recipe {request.recipe!r}"
        self.preset = request.preset or ("paper" if torch.cuda.is_available() else "small")
        if self.preset not in self.found.presets:
            raise Refused(f"{what} has no preset {self.preset!r}; allowed: {', '.join(self.found.presets)}.")
        if request.preset is None:
            print(
                f"preset {self.preset!r} ({'CUDA found' if self.preset == 'paper' else 'no CUDA here'})",
                file=sys.stderr,
            )
        self.space: Space = parse_space(request.words, self.found.Settings, self.found.space, what)
        base = {**self.found.presets[self.preset], **self.space.fixed}
        self.space = without_what_follows(self.found, self.space, base, columns_of(self.reader.manifest))
        self.feasibility = Feasibility(
            self.found, self.space, base, self.reader, request.capacity, request.bits, request.workers
        )
        self.sampler = self._sampler()
        self.objectives = [_objective(word) for word in self._words_of_objectives()]
        self.rule = self._rule()

    def check(self) -> None:
        """Refuse what cannot end well, before anything is written or started."""
        request = self.request
        if self.reader.manifest.kind not in self.found.corpus:
            kinds = " or ".join(self.found.corpus)
            raise Refused(
                f"recipe {request.recipe!r} trains on {kinds}; {self.reader.uri} holds {self.reader.manifest.kind}."
            )
        for split in ("train", trial_run.SPLIT):
            if self.reader.rows(split) == 0:
                raise Refused(
                    f"{self.reader.uri} has no rows in its {split} split ({self.reader.manifest.rows()} in all), and a"
                    " search trains on train and scores on valid: ingest more files or a larger --holdout."
                )
        for name in ("repeats", "workers", "trials", "concurrent"):
            if (given := getattr(request, name)) is not None and given < 1:
                raise Refused(f"--{name} {given} was given; it takes 1 or more.")
        self._check_early_stopping()
        self._check_growth()
        first = self.points[0] if self.sampler == "grid" else self.new_sampler().propose(0)
        if first is None:
            if self.feasibility.drawn().size() is not None:
                sampling.grid_points(self.feasibility)
            raise Refused(
                f"none of {sampling.TRIES} points drawn from the search space can be trained:"
                " loosen --capacity or --bits, or widen the space."
            )
        prepare(trial_run.request_of(self.common, Proposal(0, 0, first, 0, request.seed), self.out))
        for point, reason in self.left_out:
            given = " ".join(f"{key}={value}" for key, value in point.items())
            print(f"left out: {given} ({reason})", file=sys.stderr)

    @cached_property
    def _grid(self) -> tuple[list[Point], list[tuple[Point, str]]]:
        if self.sampler != "grid":
            return [], []
        points, left_out = sampling.grid_points(self.feasibility)
        if self.request.asha:
            # In the grid's own order each trial may be better than all before it, and then none is stopped.
            random.Random(self.request.seed).shuffle(points)
        return points, left_out

    @property
    def points(self) -> list[Point]:
        return self._grid[0]

    @property
    def left_out(self) -> list[tuple[Point, str]]:
        """Points of the grid that cannot be trained, and why."""
        return self._grid[1]

    @property
    def total(self) -> int:
        """Trials that there are to be."""
        points = len(self.points) if self.sampler == "grid" else (self.request.trials or TRIALS)
        return points * self.request.repeats

    def new_sampler(self) -> sampling.Sampler:
        directions = [direction for _, direction in self.objectives]
        return sampling.make(self.sampler, self.feasibility, self.request.seed, directions, self.points)

    @cached_property
    def smaller(self) -> dict[int, int]:
        """With `grow`: index of a point -> that of the next smaller num_codes with otherwise equal settings."""
        if self.request.grow is None:
            return {}
        return {large: small for group in self._rows_of(SIZE) for small, large in itertools.pairwise(group)}

    @cached_property
    def deeper(self) -> dict[int, int]:
        """Index of a point -> that of the deepest with otherwise equal settings, whose run serves both. There are none
        where the steps that a trial made itself count."""
        depth = self.found.prefix.setting if self.found.prefix else None
        uses = {name for name, _ in self.objectives} | set(self.rule.names())
        if (
            depth is None
            or depth not in self.space.domains
            or self.request.asha
            or self.request.grow
            or uses & {"seconds", "steps"}
        ):
            return {}
        return {index: group[-1] for group in self._rows_of(depth) for index in group[:-1]}

    def _rows_of(self, key: str) -> list[list[int]]:
        """Points of the grid that differ in one setting only, by that setting."""
        groups: dict[str, list[int]] = {}
        for index, point in enumerate(self.points):
            others = json.dumps({name: value for name, value in point.items() if name != key}, sort_keys=True)
            groups.setdefault(others, []).append(index)
        return [sorted(group, key=lambda index: self.points[index][key]) for group in groups.values()]

    @cached_property
    def steps(self) -> tuple[int, int]:
        """(steps of a trial, those of them before its last stage)."""
        base = {**self.found.presets[self.preset], **self.space.fixed}
        settings = validated(self.found.Settings, base, self.request.recipe)
        lengths = [stage.steps for stage in self.found.stages(settings)]
        return sum(lengths), sum(lengths[:-1])

    @cached_property
    def rungs(self) -> list[int]:
        """Steps at which trials are compared: multiples of the first, so that each is a checkpoint."""
        total, before = self.steps
        first = max(1, total // REDUCTION**RUNGS)
        steps = [first * REDUCTION**n for n in range(RUNGS + 1)]
        return [step for step in steps if before < step < total] if self.request.asha else []

    @cached_property
    def common(self) -> Common:
        request = self.request
        return Common(
            recipe=request.recipe,
            preset=self.preset,
            fixed=dict(self.space.fixed),
            shards=self.reader.uri,
            workers=request.workers,
            gpus_per_worker=request.gpus_per_worker,
            checkpoint_every=self.rungs[0] if self.rungs else request.checkpoint_every,
            restarts=request.restarts,
            rungs=self.rungs,
            grown_steps=max(1, round(self.request.grow * self.steps[0])) if self.request.grow else None,
        )

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the trials depend on, and what reruns must repeat."""
        learned = self.sampler == "adaptive" or self.request.asha
        return {
            "format": SEARCH,
            "version": VERSION,
            "recipe": self.request.recipe,
            "preset": self.preset,
            "space": self.space.given,
            "fixed": self.space.fixed,
            "capacity": self.request.capacity,
            "bits": self.request.bits,
            "sampler": self.sampler,
            "repeats": self.request.repeats,
            "seed": self.request.seed,
            "asha": self.request.asha,
            "grow": self.request.grow,
            "objectives": [f"{direction}:{name}" for name, direction in self.objectives] if learned else None,
            "parents": {"shards": self.reader.manifest.digest},
        }

    def _sampler(self) -> str:
        request, size = self.request, self.feasibility.drawn().size()
        if request.sampler is None:
            small = size is not None and size <= LARGEST_GRID and size <= (request.trials or size)
            return "grid" if small else "adaptive"
        sampling.check_name(request.sampler)
        if request.sampler == "grid" and size is not None and request.trials is not None and request.trials < size:
            raise Refused(
                f"the grid has {size} points and --trials {request.trials} was given: leave --trials out, name fewer"
                " values, or use --sampler random or adaptive."
            )
        return request.sampler

    def _words_of_objectives(self) -> Sequence[str]:
        if self.request.objectives:
            return self.request.objectives
        return ("min:distortion",) if self.request.asha else ("min:distortion", "min:bits_per_row")

    def _rule(self) -> front.Rule:
        """How the champion is picked. Names of metrics are checked here, before there are any."""
        if self.request.register is not None:
            registry.check_name(self.request.register)
        known = evaluate.metric_names(self.found)
        if known is not None:
            known |= {"distortion", *trials.COSTS}
            for name, direction in self.objectives:
                if name not in known:
                    raise Refused(
                        f"--objective {direction}:{name}: trials have no metric {name!r}; {nearest_names(name, known)}."
                    )
        if self.request.pick is not None:
            return front.parse_rule(self.request.pick, known)
        return front.Rule(self.objectives[0] if len(self.objectives) == 1 else None)

    def _check_growth(self) -> None:
        share = self.request.grow
        if share is None:
            return
        if not 0 < share <= 1:
            raise Refused(f"--grow {share:g} was given; it takes the share of steps of a grown trial, in (0, 1].")
        if self.sampler != "grid" or self.request.asha:
            raise Refused(f"--grow needs all sizes at all steps: --sampler grid without --asha, not {self.sampler}.")
        if SIZE not in self.space.domains or self.feasibility.limited:
            raise Refused(f"--grow goes from a smaller {SIZE} to a larger with all else equal: search {SIZE} freely.")
        if "steps" in self.space.domains or "steps" not in self.found.Settings.model_fields:
            raise Refused("--grow sets the steps of grown trials; fix `steps`, and not in the search.")
        if not self.smaller:
            raise Refused(f"--grow: no two points of the grid differ in {SIZE} alone; give it several values.")
        large, small = next(iter(self.smaller.items()))
        warm.check(self.found, *(self.feasibility.resolved(self.points[index]) for index in (small, large)))

    def _check_early_stopping(self) -> None:
        request = self.request
        if not request.asha:
            return
        if len(self.objectives) > 1:
            named = " ".join(f"{direction}:{name}" for name, direction in self.objectives)
            raise Refused(
                f"--asha stops the trials that are behind on one objective, and {len(self.objectives)} were given"
                f" ({named}): trials stopped on one would be missing from the front of all. Give one --objective, or"
                " leave --asha out."
            )
        if request.workers > 1:
            raise Refused(
                f"--asha with --workers {request.workers}: a trial of several workers is a Ray Train job of its own,"
                " which Ray Tune cannot stop between two of its steps. Use --workers 1, or leave --asha out."
            )
        if request.repeats > 1:
            raise Refused("--asha with --repeats: repeats stopped at different steps have no spread; leave one out.")
        if "steps" in self.space.domains:
            raise Refused("--asha compares trials at equal steps, and `steps` is searched; fix it with --set steps=N.")
        if not self.rungs:
            raise Refused(
                f"--asha needs trials of at least {REDUCTION} steps in their last stage; these have {self.steps[0]}."
            )


def _objective(word: str) -> tuple[str, str]:
    direction, colon, name = word.partition(":")
    if direction not in ("min", "max") or not colon or not name:
        raise Refused(f"--objective {word} says no direction; write min:NAME or max:NAME, e.g. min:distortion.")
    return name, direction
