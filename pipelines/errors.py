"""The two ways a command ends badly. Each message says what was given, what is allowed and what to do."""

import difflib
from collections.abc import Iterable


class Refused(ValueError):
    """The request cannot be met and no work was begun (exit code 2)."""


class Failed(RuntimeError):
    """Work began and could not be finished (exit code 1). What was already made is kept."""


def nearest_names(given: str, allowed: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the likeliest right ones, or all of them."""
    names = sorted(allowed)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}? Allowed: {', '.join(names)}"
    return f"allowed: {', '.join(names) or '(none)'}"
