"""Two or more sides of a comparison, timed in turns on one thread each.

Seconds are those of the processor, not of the clock: on a quiet machine the two agree for work on one thread, and on a
busy one the wait for a core belongs to no side. Ratios are taken within a round before the median over rounds, so
that a slow spell slows all sides.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import faiss
import torch

ROUNDS = 9


def paired(*functions: Callable[[], object], rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of each function in each round; a round runs them one after another, after one round unmeasured."""
    seconds: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for times, function in zip(seconds, functions, strict=True):
            start = time.process_time()
            function()
            if round_:
                times.append(time.process_time() - start)
    return seconds


def ratio(times: list[float], reference: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def milliseconds(times: list[float]) -> float:
    return 1e3 * statistics.median(times)


def against(value: float, bar: float) -> str:
    """`value` and whether it keeps below `bar`, in 14 columns."""
    return f"{value:>8.2f} {'<=' if value <= bar else '> '}{bar:<4g}"


def above(value: float, bar: float) -> str:
    """`value` and whether it reaches `bar`, in 14 columns."""
    return f"{value:>8.1f} {'>=' if value >= bar else '< '}{bar:<4g}"


@contextmanager
def one_thread() -> Iterator[None]:
    """torch and faiss on one thread each, and as they were afterwards."""
    torch_threads, faiss_threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        faiss.omp_set_num_threads(faiss_threads)
