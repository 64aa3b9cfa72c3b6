"""Search against the bare product and faiss.IndexFlatL2, one thread each. Prints ratios and bars, asserts no time.

Bars (printed as "ratio <= bar" where met, "ratio > bar" where not): 1.3x bare; 1.25x faiss for D >= 64, 2x at D = 32,
4x at D = 8. The bare product writes N x K scores into one buffer; where that would pass 2 GiB it is taken in slices of
codes into the same buffer. First the four shapes of the contract, then a grid.
"""

from collections.abc import Callable

import faiss
import torch
from torch import Tensor

from tests.benchmarks.timing import ROUNDS, against, milliseconds, one_thread, paired, ratio
from vqcore.assign import nearest

SHAPES = [(16384, 64, 1024), (16384, 256, 8192), (8192, 32, 65536), (16384, 8, 4096)]
GRID = [(8192, dim, num_codes) for num_codes in (256, 1024, 4096, 16384, 65536) for dim in (8, 32, 64, 256, 512)]
MILLION = [(8192, 8, 2**20), (8192, 64, 2**20)]
MOST_SCORES = 2**29
LONG = 10**11
"""Products and sums of a round's three sides above which three rounds must do: a round takes half a minute or more."""


def bar_of_faiss(dim: int) -> float:
    return 1.25 if dim >= 64 else 2.0 if dim >= 32 else 4.0


def run(quick: bool = False) -> None:
    head = ("bare ms", "x bare", "faiss x bare", "x faiss", "same as faiss", "rounds")
    print(f"{'N':>6} {'D':>4} {'K':>8}" + "".join(f"{title:>14}" for title in head))
    for n, dim, num_codes in [(8192, 16, 512)] if quick else [*SHAPES, *GRID, *MILLION]:
        with one_thread():
            print(_row(n, dim, num_codes), flush=True)


def _row(n: int, dim: int, num_codes: int) -> str:
    generator = torch.Generator().manual_seed(0)
    x, vectors = torch.randn(n, dim, generator=generator), torch.randn(num_codes, dim, generator=generator)
    index = faiss.IndexFlatL2(dim)
    index.add(vectors.numpy())

    def search() -> Tensor:
        return torch.from_numpy(index.search(x.numpy(), 1)[1].reshape(-1))

    rounds = ROUNDS if n * dim * num_codes < LONG else 3
    same = float((search() == nearest(x, vectors)).double().mean())
    bare, ours, theirs = paired(bare_product(x, vectors), lambda: nearest(x, vectors), search, rounds=rounds)
    return (
        f"{n:>6} {dim:>4} {num_codes:>8}{milliseconds(bare):>14.1f}{against(ratio(ours, bare), 1.3)}"
        f"{ratio(theirs, bare):>14.2f}{against(ratio(ours, theirs), bar_of_faiss(dim))}{same:>14.3%}{rounds:>14}"
    )


def bare_product(x: Tensor, vectors: Tensor) -> Callable[[], None]:
    """torch.mm(x, vectors.T, out=...) into a buffer made once, in slices of codes where all scores would not fit."""
    slices = vectors.split(min(len(vectors), MOST_SCORES // len(x)))
    out = torch.empty(len(x), len(slices[0]))

    def product() -> None:
        for codes in slices:
            torch.mm(x, codes.T, out=out)

    return product
