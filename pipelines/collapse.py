"""An early alarm when a codebook collapses, with what the recipe's own settings allow to do about it. Said once."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from torch import Tensor

from pipelines.recipe import Settings

WINDOW = 500
"""Steps over which codes are counted; a tenth of a short stage, but at least LEAST."""
LEAST = 50
COLLAPSED = 0.1
"""Share of codes, used at least once in a window, below which a codebook counts as collapsed."""
ENOUGH = 4
"""Vectors for each code in a window, below which nothing is said: rare codes could simply not have come up."""


def _seeding(value: Any, options: tuple[Any, ...]) -> Any:
    """By k-means++, under whatever name the recipe has it."""
    by_kmeans = [option for option in options if "kmeans" in str(option)]
    return by_kmeans[0] if by_kmeans and value not in by_kmeans else None


REMEDIES: dict[str, Callable[[Any, tuple[Any, ...]], Any]] = {
    "revive_below": lambda value, _: 0.5 if value < 0.5 else None,
    "seeding": _seeding,
    "decay": lambda value, _: round(value - 0.09, 3) if value is not None and value > 0.95 else None,
    "learning_rate": lambda value, _: float(f"{value / 3:.2g}"),
    "metric": lambda value, options: "cosine" if value == "euclidean" and "cosine" in options else None,
    "num_codes": lambda value, _: max(2, value // 4) if isinstance(value, int) else None,
}
"""Setting -> what to try instead of its value, of the values it may take where it is a choice; None where it stands
well already. The likeliest help first."""


def advice(settings: Settings) -> str:
    """At most three things to try: settings that the recipe has, values that it takes."""
    found = []
    for name, remedy in REMEDIES.items():
        field = type(settings).model_fields.get(name)
        if field is None:
            continue
        value = remedy(getattr(settings, name), get_args(field.annotation))
        if value is not None and _takes(settings, name, value):
            found.append(f"{name}={value}")
    return f": try --set {', or '.join(found[:3])}" if found else "; another number of codes may suit the data"


def _takes(settings: Settings, name: str, value: Any) -> bool:
    try:
        type(settings).model_validate({**settings.model_dump(), name: value})
    except ValidationError:
        return False
    return True


class Alarm:
    """Counts codes over windows of a stage's steps."""

    def __init__(self, steps: int, settings: Settings, say: Callable[[str], None]) -> None:
        """`steps` are those of the stage; `settings` the recipe's."""
        self.window = min(WINDOW, max(LEAST, steps // 10))
        self.settings, self.say = settings, say
        self.said = False
        self._begin()

    def _begin(self) -> None:
        self.steps = 0
        self.counts: dict[str, list[Tensor]] = {}

    def add(self, steps: int, counts: Mapping[str, list[Tensor]]) -> None:
        """Global counts of every codebook and level over the newest `steps` steps."""
        if self.said:
            return
        self.steps += steps
        for name, levels in counts.items():
            before = self.counts.get(name)
            self.counts[name] = [a + b for a, b in zip(before, levels, strict=True)] if before else list(levels)
        if self.steps >= self.window:
            self._judge()
            self._begin()

    def _judge(self) -> None:
        for name, levels in self.counts.items():
            for level, counts in enumerate(levels):
                codes, used = len(counts), int((counts > 0).sum())
                if used >= COLLAPSED * codes or float(counts.sum()) < ENOUGH * codes:
                    continue
                of = f", level {level}" if len(levels) > 1 else ""
                self.said = True
                self.say(
                    f"the codebook has collapsed ({name}{of}): {used:,} of {codes:,} codes used for {self.steps:,} "
                    f"steps{advice(self.settings)}."
                )
                return
