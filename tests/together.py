"""Several workers in one process: threads that meet at a barrier, for the `reduce` argument of quantizers."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Seat:
    """One worker's reduction; counts its calls and the numbers they carried."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, table: list[Tensor | None]) -> None:
        self.rank = rank
        self.world = world
        self.carried: list[int] = []
        self._barrier = barrier
        self._table = table

    @property
    def calls(self) -> int:
        return len(self.carried)

    def __call__(self, tensor: Tensor) -> None:
        assert tensor.dtype == torch.float64, f"statistics travel in float64, not {tensor.dtype}"
        self.carried.append(tensor.numel())
        self._table[self.rank] = tensor.clone()
        self._barrier.wait(timeout=30)
        shapes = {tuple(part.shape) for part in self._table if part is not None}
        assert len(shapes) == 1, f"workers reduce different shapes: {shapes}"
        total = torch.zeros_like(tensor)
        for part in self._table:
            assert part is not None
            total += part
        self._barrier.wait(timeout=30)
        tensor.copy_(total)


def together(world: int, work: Callable[[Seat], T]) -> list[T]:
    """What `work` returns on each of `world` workers, which all run at once. An error on one ends all."""
    barrier = threading.Barrier(world)
    table: list[Tensor | None] = [None] * world

    def run(rank: int) -> T:
        try:
            return work(Seat(rank, world, barrier, table))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(run, rank) for rank in range(world)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if causes or errors:
        raise (causes or errors)[0]
    return [future.result() for future in futures]
