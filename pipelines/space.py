"""The search space: `key=choice:a,b`, `a..b:log2`, `a..b:log`, `a..b`, or one value; checked against typed settings."""

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipelines.errors import Refused, nearest_names
from pipelines.options import parse_pairs

Point = dict[str, Any]
"""Searched setting -> its value, as JSON has it."""

EXPRESSION = re.compile(r"(?P<low>[^:]+?)\.\.(?P<high>[^:]+)(?::(?P<scale>.*))?")
GRAMMAR = "allowed: choice:a,b,c | a..b:log2 | a..b:log | a..b | one value"


@dataclass(frozen=True)
class Choice:
    """A list of values, in the order given."""

    values: tuple[Any, ...]

    def grid(self) -> tuple[Any, ...] | None:
        return self.values

    def draw(self, drawn: random.Random) -> Any:
        return drawn.choice(self.values)

    @property
    def ordered(self) -> bool:
        """Numbers that ascend: what is learned of one says something of its neighbours."""
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)
        return numbers and list(self.values) == sorted(self.values)

    def __contains__(self, value: Any) -> bool:
        return value in self.values


@dataclass(frozen=True)
class Interval:
    """All numbers from low to high; whole ones where the setting is an integer."""

    low: float
    high: float
    whole: bool
    log: bool

    def grid(self) -> tuple[Any, ...] | None:
        """None where there are too many to list: fractions, or integers on a log scale."""
        return tuple(range(int(self.low), int(self.high) + 1)) if self.whole and not self.log else None

    def draw(self, drawn: random.Random) -> Any:
        if not self.log:
            return drawn.randint(int(self.low), int(self.high)) if self.whole else drawn.uniform(self.low, self.high)
        value = math.exp(drawn.uniform(math.log(self.low), math.log(self.high)))
        return round(value) if self.whole else value

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)


Domain = Choice | Interval


@dataclass(frozen=True)
class Space:
    """What is searched and what is fixed."""

    domains: dict[str, Domain]
    fixed: dict[str, Any]
    """Settings given one value, as text for the recipe to check."""
    given: dict[str, str]
    """Searched setting -> the expression that says what is searched."""
    chosen: frozenset[str]
    """The searched settings that the user named; others are the recipe's own proposal."""

    def size(self) -> int | None:
        """Points of the grid; None where a domain cannot be listed."""
        grids = [domain.grid() for domain in self.domains.values()]
        return None if None in grids else math.prod(len(grid) for grid in grids if grid is not None)

    def grid(self) -> Iterator[Point]:
        """Every point, the last setting varying fastest.

        Raises:
            Refused: a domain that cannot be listed.
        """
        grids = {}
        for key, domain in self.domains.items():
            listed = domain.grid()
            if listed is None:
                raise Refused(
                    f"a grid needs a list of values, and {key}={self.given[key]} has none: give {key}=choice:... or"
                    f" {key}=a..b:log2, or search with --sampler random or adaptive."
                )
            grids[key] = listed
        for values in itertools.product(*grids.values()):
            yield dict(zip(grids, values, strict=True))

    def draw(self, drawn: random.Random) -> Point:
        return {key: domain.draw(drawn) for key, domain in self.domains.items()}


def parse_space(words: Sequence[str], model: type[BaseModel], default: Mapping[str, str], what: str) -> Space:
    """`--set` words as a space over a recipe's settings.

    Where a word holds a search expression, the space is what the words say; else it is the recipe's own, without the
    settings that the words fix.

    Args:
        model: the recipe's settings.
        default: the recipe's own space.
        what: names the recipe in messages.

    Raises:
        Refused: an unknown setting, an expression that says nothing, or a value the setting cannot take.
    """
    searched: dict[str, str] = {}
    plain = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and (value.startswith("choice:") or EXPRESSION.fullmatch(value)):
            if key in searched:
                raise Refused(f"--set gives {key!r} twice: {searched[key]!r} and {value!r}; give it once.")
            searched[key] = value
        else:
            plain.append(word)
    fixed = parse_pairs(plain)
    for key in [*searched, *fixed]:
        if key not in model.model_fields:
            raise Refused(f"{what} has no setting {key!r}; {nearest_names(key, model.model_fields)}")
    if both := sorted(searched.keys() & fixed.keys()):
        raise Refused(f"--set gives {both[0]!r} twice, as a search and as a value; give it once.")
    given = searched or {key: value for key, value in default.items() if key not in fixed}
    if not given:
        raise Refused(
            f"nothing is searched: every setting has one value. Example: --set num_codes=64..1024:log2 ({GRAMMAR})"
        )
    domains = {key: parse_domain(key, expression, model) for key, expression in given.items()}
    return Space(domains, fixed, dict(given), frozenset(searched))


def parse_domain(key: str, expression: str, model: type[BaseModel]) -> Domain:
    """One search expression for one setting, every value checked against the setting's type and bounds.

    Raises:
        Refused: naming the setting, what was given and what is allowed.
    """
    if expression.startswith("choice:"):
        return Choice(_listed(key, expression, model))
    match = EXPRESSION.fullmatch(expression)
    if match is None:
        raise Refused(f"{key}={expression} is no search expression; {GRAMMAR}.")
    if not _takes(key, model) & {int, float}:
        raise Refused(f"{key}={expression}: {key} is not a number, so it has no range; write {key}=choice:a,b,c.")
    low, high = (_typed(key, match[end], model) for end in ("low", "high"))
    if low > high:
        raise Refused(f"{key}={expression}: {low} is above {high}, so there is nothing in between; swap them.")
    whole, scale = int in _takes(key, model) and float not in _takes(key, model), match["scale"]
    if scale not in (None, "log", "log2"):
        raise Refused(f"{key}={expression}: there is no scale {scale!r}; {GRAMMAR}.")
    if scale is None:
        return Interval(low, high, whole, log=False)
    if low <= 0:
        raise Refused(f"{key}={expression}: a log scale begins above 0, not at {low}.")
    if scale == "log":
        return Interval(low, high, whole, log=True)
    doublings = math.floor(math.log2(high / low) + 1e-9)
    return Choice(tuple(low * 2**n for n in range(doublings + 1)))


def _listed(key: str, expression: str, model: type[BaseModel]) -> tuple[Any, ...]:
    """The values of `choice:`, split at `|` where a value is itself a list."""
    text = expression.removeprefix("choice:")
    words = text.split("|" if "|" in text else ",")
    if not all(words):
        raise Refused(f"{key}={expression}: an empty choice; write {key}=choice:a,b,c.")
    values = tuple(_typed(key, word, model) for word in words)
    if twice := [value for n, value in enumerate(values) if value in values[:n]]:
        raise Refused(f"{key}={expression} has {twice[0]} twice; give each value once.")
    return values


def _typed(key: str, text: str, model: type[BaseModel]) -> Any:
    info = model.model_fields[key]
    kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    checked = TypeAdapter(kind)
    value: Any = None if text.lower() in ("none", "null") else text
    if value is not None and _takes(key, model) & {tuple, list}:
        value = text.split(",")
    try:
        # As JSON has it, since points are kept in files: a tuple is a list.
        return checked.dump_python(checked.validate_python(value), mode="json")
    except ValidationError as error:
        raise Refused(f"{key}={text} cannot be: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None


def _takes(key: str, model: type[BaseModel]) -> set[Any]:
    """The plain types that a setting may hold."""
    annotation = model.model_fields[key].annotation
    origin = getattr(annotation, "__origin__", None)
    if origin is not None:
        return {origin}
    inside = {getattr(kind, "__origin__", kind) for kind in get_args(annotation)}
    return inside or {annotation}
