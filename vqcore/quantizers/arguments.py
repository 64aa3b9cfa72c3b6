"""Checks of constructor arguments that quantizers share, so that they refuse alike."""

import math
from typing import Literal, get_args

from vqcore.update import Rule

Ema = Literal["source", "standard"]
"""How a codebook moves where a system's source has a rule of its own: by that, or as VectorQuantizer's does."""


def check_sizes(**sizes: object) -> None:
    """Raise ValueError unless each is a whole number of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a whole number of at least 1")


def check_weights(**weights: float) -> None:
    """Raise ValueError unless each is a finite number of at least 0."""
    for name, value in weights.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be 0 or a positive number")


def check_positive(**values: float) -> None:
    """Raise ValueError unless each is a finite number above 0."""
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be a positive number")


def check_estimator(estimator: object) -> None:
    """Raise ValueError for what cannot be called, such as the name of an estimator."""
    if not callable(estimator):
        raise ValueError(f"estimator is {estimator!r}; it must be a function, such as vqcore.estimators.rotate")


def check_seeding(seeding: object) -> None:
    """Raise ValueError for what is neither None nor can be called, such as the name of a seeding."""
    if seeding is not None and not callable(seeding):
        raise ValueError(
            f"seeding is {seeding!r}; it must be a function, such as vqcore.seeding.kmeans_plus_plus, or None"
        )


def check_rule(rule: Rule) -> None:
    """Raise ValueError for a decay outside [0, 1) or a negative threshold or smoothing."""
    if rule.decay is not None and not 0.0 <= rule.decay < 1.0:
        raise ValueError(f"decay is {rule.decay}; it must lie in [0, 1), or be None to learn the codebook by gradient")
    check_weights(revive_below=rule.revive_below, eps=rule.eps)


def check_ema(ema: str, decay: float | None) -> None:
    """Raise ValueError for an unknown `ema`, or a decay of None, which means a codebook that is learned by gradient."""
    if ema not in get_args(Ema):
        raise ValueError(f"ema is {ema!r}; it must be one of {', '.join(get_args(Ema))}")
    if decay is None:
        raise ValueError("decay is None; this codebook moves by averages alone: give a decay in [0, 1)")
