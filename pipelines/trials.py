"""What is kept of every trial of a search: one JSON file a trial, written when it has ended."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipelines import storage

RECORD = "trial.json"
COSTS = ("seconds", "steps", "parameters")
"""What a trial costs beside bits; objectives as its metrics are."""
_NAME = re.compile(r"\d{5,}/trial\.json")


@dataclass(frozen=True)
class Trial:
    """One trial that has ended."""

    number: int
    """Its place in the order of proposals; the name of its directory."""
    settings: dict[str, Any]
    """The searched settings and those that follow from them."""
    repeat: int
    seed: int
    state: Literal["finished", "failed", "pruned"]
    """pruned: stopped early; its metrics are those of the step it was stopped at."""
    metrics: dict[str, float]
    """On the valid split."""
    bits_per_row: float | None
    parameters: int | None
    seconds: float
    steps: int
    """Training steps that were made."""
    out: str
    """The run's directory, with the bundle of a finished trial."""
    bundle_digest: str | None
    error: str | None
    """The traceback of a failed trial."""
    grown_from: int | None = None
    """Number of the trial whose codebook this one grew from."""
    prefix_of: int | None = None
    """Number of the deeper trial whose first levels this one is; it was not trained."""

    def values(self) -> dict[str, float]:
        """What may be an objective: the metrics on valid, and what the trial cost."""
        costs = {name: getattr(self, name) for name in COSTS}
        return {**self.metrics, **{name: float(value) for name, value in costs.items() if value is not None}}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Trial":
        return cls(**values)


def write(home: str, trial: Trial) -> None:
    """Write the record of the trial whose directory is `home`; from then on the trial has ended."""
    storage.write_json_atomic(storage.join(home, RECORD), trial.to_json())


def read_trials(out: str) -> list[Trial]:
    """Every trial of a search that has ended, by number."""
    home = storage.join(out, "trials")
    if not storage.exists(home):
        return []
    names = [entry.name for entry in storage.list_files(home) if _NAME.fullmatch(entry.name)]
    found = [Trial.from_json(storage.read_json(storage.join(home, name))) for name in names]
    return sorted(found, key=lambda trial: trial.number)
