"""The Pareto front of a search, its knee, and the rule by which one point of it is picked.

A point is a setting of the search with all its repeats: its values are means over those that finished. Two points
differ only where their means are further apart than the sum of their standard deviations; with one run of a point its
spread is unknown, and so is every difference.
"""

import json
import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import Failed, Refused, nearest_names
from pipelines.trials import Trial

Objective = tuple[str, str]
"""(metric, `min` or `max`)"""

SHORT = {"bits": "bits_per_row"}
LOG_FROM = 10.0
"""Values that are all positive and span this factor are looked at on a log scale."""
_RULE = re.compile(r"(?P<direction>min|max):(?P<name>[^@<>=]+)(?P<limits>(?:@[^@<>=]+[<>]=[^@<>=]+)*)")
_LIMIT = re.compile(r"@(?P<name>[^@<>=]+)(?P<sign>[<>]=)(?P<bound>[^@<>=]+)")
ALLOWED = "allowed: knee | min:METRIC | max:METRIC, each of the last two with @METRIC<=X or @METRIC>=X behind it"


@dataclass(frozen=True)
class Point:
    """One setting of the search, with the trials of it that finished."""

    trials: tuple[Trial, ...]
    values: Mapping[str, float]
    """Metric on valid, or cost -> mean over the repeats."""
    spreads: Mapping[str, float | None]
    """Sample standard deviation over the repeats; None where there is only one."""

    @property
    def number(self) -> int:
        """Of its first trial that finished: the point's name."""
        return self.trials[0].number

    @property
    def settings(self) -> dict[str, Any]:
        return self.trials[0].settings


@dataclass(frozen=True)
class Limit:
    name: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.bound:g}"

    def excess(self, point: Point) -> float:
        """How far the point is beyond the limit; 0 or less where it is within."""
        beyond = point.values[self.name] - self.bound
        return beyond if self.sign == "<=" else -beyond


@dataclass(frozen=True)
class Rule:
    """How the champion is picked: the knee (no objective), or the best of one metric within limits on others."""

    objective: Objective | None
    limits: tuple[Limit, ...] = ()

    def __str__(self) -> str:
        if self.objective is None:
            return "knee"
        name, direction = self.objective
        return f"{direction}:{name}" + "".join(f"@{limit}" for limit in self.limits)

    def names(self) -> list[str]:
        return [*([self.objective[0]] if self.objective else []), *(limit.name for limit in self.limits)]


def parse_rule(text: str, known: Collection[str] | None) -> Rule:
    """`knee`, `min:distortion`, `max:usage@bits<=12` as a rule.

    Args:
        known: the metrics that trials will have; None where that is not known yet.

    Raises:
        Refused: no rule, or one over an unknown metric; the message names the nearest.
    """
    if text == "knee":
        return Rule(None)
    match = _RULE.fullmatch(text)
    if match is None:
        raise Refused(f"--pick {text} is no rule; {ALLOWED}. Example: --pick 'min:distortion@bits<=12'.")
    limits = []
    for found in _LIMIT.finditer(match["limits"]):
        try:
            bound = float(found["bound"])
        except ValueError:
            raise Refused(f"--pick {text}: {found['bound']!r} is not a number; {ALLOWED}.") from None
        if math.isnan(bound):
            raise Refused(f"--pick {text}: nothing is below or above nan; give a number.")
        limits.append(Limit(SHORT.get(found["name"], found["name"]), found["sign"], bound))
    rule = Rule((SHORT.get(match["name"], match["name"]), match["direction"]), tuple(limits))
    for name in rule.names():
        if known is not None and name not in known:
            raise Refused(f"--pick {text}: trials have no metric {name!r}; {nearest_names(name, known)}.")
    return rule


def points_of(trials: Sequence[Trial]) -> list[Point]:
    """The points of trials that finished, by number; trials stopped early or failed are none."""
    groups: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.state == "finished":
            groups.setdefault(json.dumps(trial.settings, sort_keys=True), []).append(trial)
    return [_point(group) for group in groups.values()]


def pareto(points: Sequence[Point], objectives: Sequence[Objective]) -> list[Point]:
    """The points that no other is better than: in one objective, and no worse in any. Equal points are all kept.

    Sorted by the last objective, the cheapest first.

    Raises:
        Failed: a point has no such metric.
    """
    costs = [_costs(point, objectives) for point in points]
    kept = [
        (mine[::-1], point)
        for point, mine in zip(points, costs, strict=True)
        if not any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in costs)
    ]
    return [point for _, point in sorted(kept, key=lambda pair: pair[0])]


def knee(front: Sequence[Point], objectives: Sequence[Objective]) -> tuple[Point, str]:
    """The point farthest from the chord between the ends of the front, and why in a sentence.

    Every objective is scaled to 0 at its best and 1 at its worst on the front, on a log scale where its values are
    positive and span a factor of ten. The chord is then where the scaled objectives sum to 1, and the farthest point is
    that of the least sum, which also says what the knee is for more than two. Where no point lies below the chord,
    it is the end that is best in the first objective.
    """
    scaled = [_scaled([point.values[name] for point in front], direction) for name, direction in objectives]
    sums = [sum(axis[place] for axis in scaled) for place in range(len(front))]
    best = min(range(len(front)), key=lambda place: (round(sums[place], 12), scaled[0][place]))
    names = " and ".join(
        f"{'log ' if is_log([point.values[name] for point in front]) else ''}{name}" for name, _ in objectives
    )
    if len(objectives) > 1 and sums[best] < 1 - 1e-9:
        return front[best], f"farthest from the chord between the ends of the front, in {names} from 0 to 1 each"
    best = min(range(len(front)), key=lambda place: (scaled[0][place], sums[place]))
    end = f"the best {objectives[0][0]}"
    return front[best], end if len(objectives) == 1 else f"no point lies below the chord, so the end with {end}"


def pick(rule: Rule, points: Sequence[Point], objectives: Sequence[Objective]) -> tuple[Point, str]:
    """The champion by a rule, and why in a sentence.

    Raises:
        Failed: no point keeps within the rule's limits; the message names the one that is closest.
    """
    if rule.objective is None:
        return knee(pareto(points, objectives), objectives)
    name, direction = rule.objective
    for needed in rule.names():
        for point in points:
            value_at(point, needed)
    within = [point for point in points if all(limit.excess(point) <= 0 for limit in rule.limits)]
    if not within:
        raise Failed(f"no point keeps within {_limits(rule)}: {_closest(rule, points)}")
    best = min(within, key=lambda point: (_signed(point, name, direction), point.number))
    among = f" of the {len(within)} points within {_limits(rule)}" if rule.limits else f" of all {len(within)} points"
    return best, f"the {'least' if direction == 'min' else 'largest'} {name}{among}"


def best_repeat(point: Point, objective: Objective) -> Trial:
    """The trial of a point whose bundle stands for it: the best in an objective."""
    name, direction = objective
    sign = 1.0 if direction == "min" else -1.0
    return min(point.trials, key=lambda trial: (sign * trial.values()[name], trial.number))


def differs(a: Point, b: Point, name: str) -> bool | None:
    """Whether the means of two points are further apart than the sum of their spreads; None: a spread is unknown.

    Of two points that are the same, about one pair in thirteen seems to differ at three repeats, and one in five at
    two.
    """
    one, other = a.spreads[name], b.spreads[name]
    if one is None or other is None:
        return None
    return abs(a.values[name] - b.values[name]) > one + other


def within_spread(points: Sequence[Point], front: Sequence[Point], objectives: Sequence[Objective]) -> list[Point]:
    """Points off the front that no point of it beats by more than the spread in any objective."""

    def beats(better: Point, worse: Point) -> bool:
        pairs = list(zip(_costs(better, objectives), _costs(worse, objectives), strict=True))
        return all(a <= b for a, b in pairs) and any(
            a < b and differs(better, worse, name) for (a, b), (name, _) in zip(pairs, objectives, strict=True)
        )

    on_front = {point.number for point in front}
    return [p for p in points if p.number not in on_front and not any(beats(other, p) for other in front)]


def is_log(values: Sequence[float]) -> bool:
    """Whether values are better seen on a log scale."""
    return bool(values) and min(values) > 0 and max(values) >= LOG_FROM * min(values)


def value_at(point: Point, name: str) -> float:
    """A point's mean of a metric.

    Raises:
        Failed: it has no such metric; the message names the nearest.
    """
    if name not in point.values:
        raise Failed(
            f"trial {point.number} has no metric {name!r}; {nearest_names(name, point.values)}."
            " Run the same command with another --pick or --objective."
        )
    return point.values[name]


def _point(group: list[Trial]) -> Point:
    found = [trial.values() for trial in group]
    names = [name for name in found[0] if all(name in values for values in found)]
    means = {name: statistics.fmean(values[name] for values in found) for name in names}
    spreads = {name: statistics.stdev(values[name] for values in found) if len(group) > 1 else None for name in names}
    return Point(tuple(group), means, spreads)


def _signed(point: Point, name: str, direction: str) -> float:
    return value_at(point, name) * (1.0 if direction == "min" else -1.0)


def _costs(point: Point, objectives: Sequence[Objective]) -> list[float]:
    return [_signed(point, name, direction) for name, direction in objectives]


def _scaled(values: Sequence[float], direction: str) -> list[float]:
    """0 at the best and 1 at the worst."""
    seen = [math.log(value) for value in values] if is_log(values) else list(values)
    low, high = min(seen), max(seen)
    if high == low:
        return [0.0] * len(seen)
    return [((value - low) if direction == "min" else (high - value)) / (high - low) for value in seen]


def _limits(rule: Rule) -> str:
    return " and ".join(map(str, rule.limits))


def _closest(rule: Rule, points: Sequence[Point]) -> str:
    def beyond(point: Point) -> float:
        return sum(max(0.0, limit.excess(point)) / max(abs(limit.bound), 1e-12) for limit in rule.limits)

    closest = min(points, key=lambda point: (beyond(point), point.number))
    has = " and ".join(f"{limit.name} {closest.values[limit.name]:.4g}" for limit in rule.limits)
    settings = " ".join(f"{key}={value}" for key, value in closest.settings.items())
    return (
        f"the closest is trial {closest.number} ({settings}) with {has}. The search is finished: run the same command"
        " with a --pick that this one keeps within, or search another space into another --out."
    )
