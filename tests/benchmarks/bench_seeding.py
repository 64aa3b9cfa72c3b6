"""k-means against faiss.Kmeans on the same rows, one thread each. Prints ratios and bars, asserts no time.

Lloyd from the same start with as many moves, all rows used: at most 1.5x its time, and an objective within 1 %. Ours
reads the rows once more than faiss, which does not measure what it returns. Then the whole of k-means++ (draw, 25
moves) by objective against the best of five of faiss's random starts, within 1 %; its time beside one such start.
Rows lie around 2 K centres, so that there is something to find.
"""

import faiss
import torch
from torch import Tensor

from tests.benchmarks.timing import against, milliseconds, one_thread, paired, ratio
from vqcore.lloyd import lloyd
from vqcore.seeding import kmeans_plus_plus

SHAPES = [(65536, 64, 256), (65536, 64, 1024), (65536, 256, 1024), (65536, 32, 1024), (131072, 8, 256)]
MOVES, REDONE = 10, 25


def run(quick: bool = False) -> None:
    head = ("faiss ms", "x faiss", "objective", "++ ms", "++ x one of 5", "++ objective")
    print(f"{'N':>6} {'D':>4} {'K':>5}" + "".join(f"{title:>15}" for title in head))
    for n, dim, num_codes in [(16384, 16, 64)] if quick else SHAPES:
        with one_thread():
            print(_row(n, dim, num_codes), flush=True)


def _row(n: int, dim: int, num_codes: int) -> str:
    generator = torch.Generator().manual_seed(0)
    around = 2 * torch.randn(2 * num_codes, dim, generator=generator)
    rows = around[torch.randint(2 * num_codes, (n,), generator=generator)] + torch.randn(n, dim, generator=generator)
    start = rows[:num_codes].clone()

    def ours() -> Tensor:
        return lloyd(lambda: rows.split(16384), start, iterations=MOVES).vectors

    def theirs() -> Tensor:
        return _faiss(rows, num_codes, MOVES, start)

    def spread() -> Tensor:
        return kmeans_plus_plus(rows, num_codes, metric="euclidean", seed=0, iterations=REDONE)

    mine, peers = paired(ours, theirs, rounds=3)
    whole, once = paired(spread, lambda: _faiss(rows, num_codes, REDONE), rounds=1)
    best = _faiss(rows, num_codes, REDONE, redo=5)
    return (
        f"{n:>6} {dim:>4} {num_codes:>5}{milliseconds(peers):>15.1f} {against(ratio(mine, peers), 1.5)}"
        f" {against(_objective(rows, ours()) / _objective(rows, theirs()), 1.01)}"
        f"{milliseconds(whole):>15.1f}{ratio(whole, once):>15.2f}"
        f" {against(_objective(rows, spread()) / _objective(rows, best), 1.01)}"
    )


def _faiss(rows: Tensor, num_codes: int, moves: int, start: Tensor | None = None, redo: int = 1) -> Tensor:
    peer = faiss.Kmeans(rows.shape[1], num_codes, niter=moves, nredo=redo, max_points_per_centroid=len(rows))
    peer.train(rows.numpy(), init_centroids=None if start is None else start.numpy())
    return torch.from_numpy(peer.centroids)


def _objective(rows: Tensor, vectors: Tensor) -> float:
    return lloyd(lambda: [rows], vectors, iterations=0).objective
