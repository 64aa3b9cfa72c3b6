"""What each process of test_workers runs. One start of a process runs every case, because starting costs seconds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from vqcore.estimators import rotate, straight_through
from vqcore.quantizers import VectorBatch, VectorQuantizer
from vqcore.seeding import kmeans_plus_plus, random_rows

K, D, BATCH = 16, 4, 48

KINDS: dict[str, dict[str, Any]] = {
    f"{metric}-{decay}-{estimator.__name__}": {"metric": metric, "decay": decay, "estimator": estimator}
    for metric, decay, estimator in product(("euclidean", "cosine"), (0.9, None), (straight_through, rotate))
}

# Rows of a batch that each worker serves: uneven everywhere, one worker of four has none.
PARTS = {
    1: [(0, BATCH)],
    2: [(0, 11), (11, BATCH)],
    4: [(0, 5), (5, 5), (5, 30), (30, BATCH)],
}
# Rows that are masked: all of the first worker's, and some others.
MASKED = [*range(11), 20, 33, 47]

LOOPS = {"float64": (torch.float64, 400), "float32": (torch.float32, 20)}


class Calls:
    """Counts the all-reduces of this process while `counting`."""

    def __init__(self) -> None:
        self.count = 0
        self._plain = dist.all_reduce

    @contextmanager
    def counting(self) -> Iterator[None]:
        def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
            self.count += 1
            return self._plain(tensor, *args, **options)

        self.count = 0
        dist.all_reduce = counted
        try:
            yield
        finally:
            dist.all_reduce = self._plain


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_of(q: VectorQuantizer, mine: Tensor, step: int, calls: Calls) -> tuple[dict[str, Tensor], int]:
    """One training step on this worker's rows; for a learned codebook with averaged gradients."""
    x = (1.5 + drawn(step, BATCH, D))[mine].requires_grad_()
    mask = torch.ones(BATCH, dtype=torch.bool).index_fill(0, torch.tensor(MASKED), False)[mine]
    q.zero_grad()
    with calls.counting():
        out = q(x, mask, mine + BATCH * step)
    (out.loss + 0.01 * out.vectors.square().sum()).backward()
    assert x.grad is not None
    for parameter in q.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        with torch.no_grad():
            parameter -= 0.5 * parameter.grad / dist.get_world_size()
    found = {"codes": out.codes, "loss": out.loss.detach(), "gradient": x.grad, "squared_error": out.squared_error}
    return found, calls.count


def law(name: str, q: VectorQuantizer, mine: Tensor, calls: Calls) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Four training steps with revivals, then an evaluation."""
    tensors: dict[str, Tensor] = {}
    counts: list[list[int]] = []
    for step in range(4):
        found, count = step_of(q, mine, step, calls)
        tensors |= {f"law/{name}/{step}/{key}": value for key, value in found.items()}
        counts.append([count, int(q.codebook.revived is not None)])
    with calls.counting():
        q.eval()(drawn(9, 5, D))
    tensors |= {f"law/{name}/state/{key}": value for key, value in q.state_dict().items()}
    return tensors, {f"law/{name}": {"calls": counts, "eval": calls.count}}


def seeded(rank: int, world: int) -> dict[str, Tensor]:
    """By `seed`, with a different number of batches per worker, and by gathering training forwards."""
    x, keys = drawn(30, 400, D), torch.arange(400)
    tensors = {}
    for metric, seeding in product(("euclidean", "cosine"), (random_rows, kmeans_plus_plus)):
        q = VectorQuantizer(K, D, metric=metric, seeding=seeding)
        mine = torch.arange(400)[rank * 37 : (rank + 1) * 37 if rank + 1 < world else 400]
        q.seed(VectorBatch(x[part], None, keys[part]) for part in mine.split(50))
        name = f"{metric}-{seeding.__name__}"
        tensors |= {f"seed/{name}/{key}": value for key, value in q.state_dict().items()}
        q = VectorQuantizer(K, D, metric=metric, seeding=seeding)
        for step in range(3):
            low, high = PARTS[world][rank]
            rows = torch.arange(12 * step, 12 * step + 12)[low * 12 // BATCH : high * 12 // BATCH]
            q(x[rows], None, keys[rows])
        tensors |= {f"gather/{name}/{key}": value for key, value in q.state_dict().items()}
    return tensors


def loop(name: str, mine: Tensor) -> dict[str, Tensor]:
    """Encoder, quantizer, decoder and SGD with averaged gradients, for LOOPS[name] steps over 480 rows."""
    dtype, steps = LOOPS[name]
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, D))
    q, decoder = VectorQuantizer(K, D, decay=0.95, estimator=rotate, seeding=None), nn.Linear(D, 6)
    model = nn.ModuleList([encoder, q, decoder]).to(dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    world = dist.get_world_size()
    data, codes = drawn(40, 480, 6).to(dtype), []
    for step in range(steps):
        rows = (mine + BATCH * step) % 480
        mask = rows % 5 != 0
        n = int(((torch.arange(BATCH) + BATCH * step) % 480 % 5 != 0).sum())
        x = data[rows]
        optimiser.zero_grad()
        with q.accumulate(count=n):
            out = q(encoder(x), mask, rows)
            squared = (decoder(out.vectors) - x).square().mean(-1)
            (out.loss + world * squared[mask].sum() / n).backward()
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters() if parameter.grad is not None])
        dist.all_reduce(flat)
        sizes = [parameter.numel() for parameter in model.parameters()]
        for parameter, gradient in zip(model.parameters(), (flat / world).split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        optimiser.step()
        codes.append(out.codes)
    tensors = {f"loop/{name}/state/{key}": value for key, value in model.state_dict().items()}
    return tensors | {f"loop/{name}/codes": torch.stack(codes)}


def run(rank: int, world: int, folder: Path) -> None:
    """Every case, results as `<world>-<rank>.safetensors` and `.json` in `folder`."""
    # Built before the group exists: vector-quantize-pytorch 1.32 then never synchronises.
    quantizers = {name: VectorQuantizer(K, D, revive_below=1.0, seed=1, **kind) for name, kind in KINDS.items()}
    store = f"file://{folder / f'store-{world}'}"
    patience = timedelta(seconds=120)  # a collective that one worker skips must fail, not hang
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    low, high = PARTS[world][rank]
    mine, calls = torch.arange(low, high), Calls()
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, q in quantizers.items():
        found, said = law(name, q, mine, calls)
        tensors |= found
        facts |= said
    tensors |= seeded(rank, world)
    for name in LOOPS:
        tensors |= loop(name, mine)
    save_file(
        {key: value.detach().contiguous().clone() for key, value in tensors.items()},
        folder / f"{world}-{rank}.safetensors",
    )
    (folder / f"{world}-{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()
