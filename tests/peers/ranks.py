"""What each of two gloo processes runs for the contracts of vector-quantize-pytorch that need workers."""

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.lookup_free_quantization import maybe_distributed_mean

from vqcore.quantizers import VectorQuantizer
from vqcore.reduction import OverGroup

WORLD, K, D, ROWS = 2, 16, 4, 32
HALF = ROWS // 2


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def peer(vectors: Tensor, **options: Any) -> VectorQuantize:
    made = VectorQuantize(dim=D, codebook_size=K, decay=0.5, eps=0.0, rotation_trick=False, **options)
    book = made._codebook
    book.embed.data.copy_(vectors)
    book.embed_avg.data.copy_(vectors)
    return made


def run(rank: int, folder: Path) -> None:
    """Writes what it found to `<rank>.json`."""
    torch.set_num_threads(1)
    ours = VectorQuantizer(K, D, decay=0.5, eps=0.0, revive_below=0.9)
    start = ours.codebook.vectors.clone()
    built_before = peer(start)
    patience = timedelta(seconds=5)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD, timeout=patience
    )
    mine = slice(rank * HALF, (rank + 1) * HALF)
    x, keys = drawn(1, ROWS, D), torch.arange(ROWS)
    found: dict[str, Any] = {}

    built_before(x[None, mine])
    built_after = peer(start, sync_codebook=True)
    built_after(x[None, mine])
    early = VectorQuantizer(K, D, decay=0.5, eps=0.0)
    early(x[mine])
    found["R1"] = {
        "peer built before": built_before.codebook.tolist(),
        "peer told to synchronise": built_after.codebook.tolist(),
        "ours": early.codebook.vectors.tolist(),
    }

    local = torch.tensor([0.2, 0.8] if rank == 0 else [0.8, 0.2], dtype=torch.float64)
    mean = local.clone()
    OverGroup()(mean)
    found["R2"] = {"peer": maybe_distributed_mean(local.clone()).tolist(), "ours": (mean / WORLD).tolist()}

    masked = torch.full((HALF,), rank == 1)  # the first worker has no vector
    for step in range(2):
        ours(x[mine], masked, keys[mine] + ROWS * step)
    found["R3"] = {"ours": ours.codebook.vectors.tolist(), "ours revived": ours.codebook.revived is not None}
    stuck = peer(start, sync_codebook=True, threshold_ema_dead_code=2)
    try:
        for _ in range(2):
            stuck(x[None, mine], mask=masked[None])
            dist.barrier()
    except RuntimeError as error:
        found["R3"]["peer"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    # The group is broken now, with a receive still pending on a thread of gloo. When the interpreter takes that down at
    # its exit, it sometimes ends with SIGABRT (a thread destroyed while it runs): hence no such exit.
    os._exit(0)
