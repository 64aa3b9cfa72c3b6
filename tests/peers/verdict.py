"""How a test says that the peer is wrong and we are right."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., None])


@dataclass(frozen=True)
class Verdict:
    """What the test shows."""

    wrong: str
    """What the peer does, in one line."""
    right: str
    """The right value, which is what ours gives."""


def peer_is_wrong(wrong: str, *, right: str) -> Callable[[F], F]:
    """For a test that asserts both: the wrong value of the peer, so that a corrected peer is noticed, and ours."""

    def mark(test: F) -> F:
        test.verdict = Verdict(wrong, right)  # type: ignore[attr-defined]
        return test

    return mark
