"""Sums over workers, as a callable: the only thing vqcore knows about the cluster."""

from inspect import getattr_static
from typing import Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor


@runtime_checkable
class Reduction(Protocol):
    """Sums a float64 tensor in place over `world` workers, of which this one is `rank`."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def __call__(self, tensor: Tensor) -> None: ...


class Alone:
    """One worker: the sum is what is already there."""

    rank = 0
    world = 1

    def __call__(self, tensor: Tensor) -> None:
        return None


class OverGroup:
    """torch.distributed's default group, looked up at every call."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world(self) -> int:
        return dist.get_world_size()

    def __call__(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)


def check_reduction(reduce: object) -> None:
    """Raise ValueError for what is neither None nor a `Reduction`. Nothing is called or read: a group may not exist
    yet."""
    absent = object()
    lacks = [name for name in ("__call__", "rank", "world") if getattr_static(reduce, name, absent) is absent]
    if reduce is not None and lacks:
        raise ValueError(
            f"reduce is {reduce!r}, which lacks {', '.join(lacks)}; it must sum a float64 tensor in place over "
            "workers and say its `rank` and `world`, as vqcore.reduction.OverGroup does. None is torch.distributed"
        )


def resolve(reduce: Reduction | None) -> Reduction:
    """`reduce`, or the default group if one is initialised *now* (not when the quantizer was built), or `Alone`.

    Deciding at the call is what keeps a module that was built before `init_process_group` synchronised.
    """
    if reduce is not None:
        return reduce
    return OverGroup() if dist.is_available() and dist.is_initialized() else Alone()
