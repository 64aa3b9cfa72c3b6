"""Checks of constructor arguments that quantizers share, so that they refuse alike."""

import math

from vqcore.update import Rule


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


def check_rule(rule: Rule) -> None:
    """Raise ValueError for a decay outside [0, 1) or a negative threshold or smoothing."""
    if rule.decay is not None and not 0.0 <= rule.decay < 1.0:
        raise ValueError(f"decay is {rule.decay}; it must lie in [0, 1), or be None to learn the codebook by gradient")
    check_weights(revive_below=rule.revive_below, eps=rule.eps)
