"""Search against the bare product and faiss.IndexFlatL2, one thread each. Prints ratios, asserts no time.

Each round runs all three in turn, and ratios are taken within a round before the median, so that a slow spell of the
machine slows both sides. Demands: at most 1.3x bare at N >= 8,192; 1.25x faiss for D >= 64, 2x at D = 32, 4x at D = 8.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import faiss
import torch
from torch import Tensor

from vqcore.assign import nearest

SHAPES = [(16384, 64, 1024), (16384, 256, 8192), (8192, 32, 65536), (16384, 8, 4096)]
ROUNDS = 9


def run(quick: bool = False) -> None:
    head = ("bare ms", "x bare", "faiss x bare", "x faiss", "same as faiss")
    print(f"{'N':>6} {'D':>4} {'K':>6}" + "".join(f"{title:>14}" for title in head))
    for n, dim, num_codes in [(8192, 16, 512)] if quick else SHAPES:
        with one_thread():
            print(_row(n, dim, num_codes), flush=True)


def _row(n: int, dim: int, num_codes: int) -> str:
    generator = torch.Generator().manual_seed(0)
    x, vectors = torch.randn(n, dim, generator=generator), torch.randn(num_codes, dim, generator=generator)
    out = torch.empty(n, num_codes)
    index = faiss.IndexFlatL2(dim)
    index.add(vectors.numpy())

    def search() -> Tensor:
        return torch.from_numpy(index.search(x.numpy(), 1)[1].reshape(-1))

    same = float((search() == nearest(x, vectors)).double().mean())
    bare, ours, theirs = paired(
        lambda: torch.mm(x, vectors.T, out=out), lambda: nearest(x, vectors), search, rounds=ROUNDS
    )
    return (
        f"{n:>6} {dim:>4} {num_codes:>6}{1e3 * statistics.median(bare):>14.1f}{ratio(ours, bare):>14.2f}"
        f"{ratio(theirs, bare):>14.2f}{ratio(ours, theirs):>14.2f}{same:>14.3%}"
    )


def paired(*functions: Callable[[], object], rounds: int) -> list[list[float]]:
    """Seconds of each function in each round; a round runs them one after another, after one round unmeasured."""
    seconds: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for times, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            if round_:
                times.append(time.perf_counter() - start)
    return seconds


def ratio(times: list[float], reference: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


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
