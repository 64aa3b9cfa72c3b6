"""How long to wait before trying again."""

import random
from collections.abc import Iterator

SHORTEST, LONGEST = 0.5, 15.0


def pauses() -> Iterator[float]:
    """Seconds: twice as long each time up to LONGEST, each shortened by chance, so that many workers do not come back
    at once."""
    length = SHORTEST
    while True:
        yield length * random.uniform(0.5, 1.0)
        length = min(LONGEST, 2 * length)
