"""Which point is tried next: every one of a grid, at random, or learned from the trials so far (Optuna)."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pipelines.errors import Refused
from pipelines.feasibility import Feasibility
from pipelines.space import Choice, Domain, Point

TRIES = 200
"""Draws for a new, feasible point before a sampler ends: what is left is too rare to be found by chance."""
NEEDS_CHECKPOINTS = ("pbt", "pb2")
NAMES = ("grid", "random", "adaptive")


class Sampler(Protocol):
    """Points by index. Points proposed in an earlier session come back through `restore`, in order."""

    def propose(self, index: int) -> Point | None:
        """A point that was not proposed before, or None where there is no other."""

    def restore(self, index: int, point: Point) -> None: ...

    def tell(self, index: int, values: Sequence[float] | None) -> None:
        """The objectives' values at a point; None where it failed or was stopped early."""


class Grid:
    """Every feasible point, once."""

    def __init__(self, points: Sequence[Point]):
        self.points = points

    def propose(self, index: int) -> Point | None:
        return self.points[index] if index < len(self.points) else None

    def restore(self, index: int, point: Point) -> None:
        return None

    def tell(self, index: int, values: Sequence[float] | None) -> None:
        return None


class Random:
    """Points drawn from (seed, index): the same whether or not the search was interrupted."""

    def __init__(self, feasibility: Feasibility, seed: int):
        self.feasibility, self.seed = feasibility, seed
        self.space = feasibility.drawn()
        self.seen: set[str] = set()

    def propose(self, index: int) -> Point | None:
        drawn = random.Random(f"{self.seed} {index}")
        for _ in range(TRIES):
            if (point := _new(self.feasibility, self.space.draw(drawn), self.seen)) is not None:
                return point
        return None

    def restore(self, index: int, point: Point) -> None:
        self.seen.add(_name(point))

    def tell(self, index: int, values: Sequence[float] | None) -> None:
        return None


class Adaptive:
    """Optuna's TPE over one or several objectives. Its study lives in memory: the trials' own files are its history."""

    def __init__(self, feasibility: Feasibility, seed: int, directions: Sequence[str]):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna, self.feasibility, self.seed = optuna, feasibility, seed
        self.domains = feasibility.drawn().domains
        self.distributions = {key: self._distribution(domain) for key, domain in self.domains.items()}
        words: list[Any] = ["minimize" if direction == "min" else "maximize" for direction in directions]
        self.study = optuna.create_study(directions=words)
        self.numbers: dict[int, int] = {}
        """Our index -> Optuna's number of the trial."""
        self.seen: set[str] = set()

    def propose(self, index: int) -> Point | None:
        # Made anew for each index, so that an interrupted search goes on as if it had not been.
        self.study.sampler = self.optuna.samplers.TPESampler(seed=hash((self.seed, index)) % 2**32, constant_liar=True)
        for attempt in range(TRIES):
            if attempt == TRIES // 10:
                # It insists on what was tried or cannot be: let chance go on.
                self.study.sampler = self.optuna.samplers.RandomSampler(seed=hash((self.seed, index)) % 2**32)
            asked = self.study.ask(self.distributions)
            point = {key: _value(domain, asked.params[key]) for key, domain in self.domains.items()}
            completed = _new(self.feasibility, point, self.seen)
            if completed is not None:
                self.numbers[index] = asked.number
                return completed
            self.study.tell(asked, state=self.optuna.trial.TrialState.FAIL)
        return None

    def restore(self, index: int, point: Point) -> None:
        params = {key: _parameter(domain, point[key]) for key, domain in self.domains.items()}
        running = self.optuna.trial.TrialState.RUNNING
        self.study.add_trial(
            self.optuna.trial.create_trial(state=running, params=params, distributions=self.distributions)
        )
        self.numbers[index] = len(self.study.trials) - 1
        self.seen.add(_name(point))

    def tell(self, index: int, values: Sequence[float] | None) -> None:
        state = self.optuna.trial.TrialState.FAIL if values is None else None
        self.study.tell(self.numbers[index], list(values) if values is not None else None, state=state)

    def _distribution(self, domain: Domain) -> Any:
        """Ordered choices are searched by position: the sampler then knows which values are neighbours."""
        kinds = self.optuna.distributions
        if not isinstance(domain, Choice):
            kind = kinds.IntDistribution if domain.whole else kinds.FloatDistribution
            return kind(domain.low, domain.high, log=domain.log)
        if domain.ordered:
            return kinds.IntDistribution(0, len(domain.values) - 1)
        return kinds.CategoricalDistribution(list(range(len(domain.values))))


def make(name: str, feasibility: Feasibility, seed: int, directions: Sequence[str], points: Sequence[Point]) -> Sampler:
    """The sampler of a name; `points` are those of the grid, where that is asked for."""
    if name == "grid":
        return Grid(points)
    return Random(feasibility, seed) if name == "random" else Adaptive(feasibility, seed, directions)


def check_name(name: str) -> None:
    """Raises Refused: no such sampler, or one that needs what trials do not give."""
    if name in NEEDS_CHECKPOINTS:
        raise Refused(
            f"--sampler {name} copies weights between running trials, which Ray Tune cannot do with trials that keep"
            f" their own checkpoints; allowed: {', '.join(NAMES)}."
        )
    if name not in NAMES:
        raise Refused(f"there is no sampler {name!r}; allowed: {', '.join(NAMES)}.")


def grid_points(feasibility: Feasibility) -> tuple[list[Point], list[tuple[Point, str]]]:
    """(points that can be trained, points that cannot and why).

    Raises:
        Refused: none can; the message says why not.
    """
    points: list[Point] = []
    left_out: list[tuple[Point, str]] = []
    for point in feasibility.drawn().grid():
        try:
            points.append(feasibility.complete(point))
        except Refused as reason:
            left_out.append((point, str(reason).rstrip(".")))
    if not points:
        reasons = list(dict.fromkeys(reason for _, reason in left_out))
        more = f"; and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
        raise Refused(f"no point of the search space can be trained: {'; '.join(reasons[:3])}{more}.")
    return points, left_out


def _new(feasibility: Feasibility, point: Point, seen: set[str]) -> Point | None:
    """The completed point, kept in `seen`; None where it cannot be trained or was seen before."""
    try:
        completed = feasibility.complete(point)
    except Refused:
        return None
    if _name(completed) in seen:
        return None
    seen.add(_name(completed))
    return completed


def _name(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


def _value(domain: Domain, parameter: Any) -> Any:
    return domain.values[parameter] if isinstance(domain, Choice) else parameter


def _parameter(domain: Domain, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, Choice) else value
