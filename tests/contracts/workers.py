"""What each process of test_workers runs. One start of a process runs every case, because starting costs seconds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.contracts.steps import drawn, train_step
from tests.vqcore.quantizers.cases import D, K, all_cases
from vqcore.quantizers import VectorBatch, VectorQuantizer
from vqcore.reduction import OverGroup
from vqcore.seeding import kmeans_plus_plus, random_rows

BATCH, STEPS, DATA = 48, 4, 480

CASES = all_cases()
# The first case of each module: the one that also runs what takes long.
FIRST = list({name.split("-")[0]: name for name in reversed(CASES)}.values())[::-1]

# Rows of a batch that each worker serves: uneven everywhere, one worker of four has none.
PARTS = {
    1: [(0, BATCH)],
    2: [(0, 11), (11, BATCH)],
    4: [(0, 5), (5, 5), (5, 30), (30, BATCH)],
}
# Rows that are masked: all of the first worker's, and some others.
MASKED = [*range(11), 20, 33, 47]

LOOPS = {"float32": (torch.float32, 20, list(CASES)), "float64": (torch.float64, 400, FIRST)}


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


def law(name: str, q: Any, mine: Tensor, calls: Calls) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Training steps with revivals, then an evaluation."""
    tensors: dict[str, Tensor] = {}
    counts: list[list[int]] = []
    mask = torch.ones(BATCH, dtype=torch.bool).index_fill(0, torch.tensor(MASKED), False)
    for step in range(STEPS):
        x = (1.5 + drawn(step, BATCH, D))[mine]
        with calls.counting():
            found = train_step(q, x, mask[mine], mine + BATCH * step, count=int(mask.sum()), reduce=OverGroup())
        tensors |= {
            f"law/{name}/{step}/codes": found.out.codes,
            f"law/{name}/{step}/loss": found.out.loss,
            f"law/{name}/{step}/squared_error": found.out.squared_error,
            f"law/{name}/{step}/gradient": found.x_gradient,
        }
        tensors |= {f"law/{name}/{step}/of {key}": value for key, value in found.parameter_gradients.items()}
        counts.append([calls.count - len(list(q.parameters())), int(found.revived)])
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


class Autoencoder(nn.Module):
    """Encoder, quantizer, decoder."""

    def __init__(self, q: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, D))
        self.q = q
        self.decoder = nn.Linear(D, 6)

    def forward(self, x: Tensor, mask: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the quantizer's loss, summed squared error of the valid rows, codes)."""
        out = self.q(self.encoder(x), mask, keys)
        squared = (self.decoder(out.vectors) - x).square().mean(-1)
        return out.loss, squared[mask].sum(), out.codes


def rows_of_step(step: int) -> tuple[Tensor, Tensor, int]:
    """The rows of a batch, which of them are not masked, and how many those are."""
    rows = (torch.arange(BATCH) + BATCH * step) % DATA
    mask = rows % 5 != 0
    return rows, mask, int(mask.sum())


def loop(name: str, dtype: torch.dtype, steps: int, mine: Tensor) -> dict[str, Tensor]:
    """SGD with averaged gradients over DATA rows."""
    model = Autoencoder(CASES[name](seed=3)).to(dtype)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    parameters = list(model.parameters())
    world = dist.get_world_size()
    data, codes = drawn(40, DATA, 6).to(dtype), []
    for step in range(steps):
        rows, mask, n = rows_of_step(step)
        optimiser.zero_grad()
        with model.q.accumulate(count=n) if model.q.accumulates else nullcontext():
            loss, squared, found = model(data[rows[mine]], mask[mine], rows[mine])
            (loss + world * squared / n).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, gradient in zip(parameters, (flat / world).split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        optimiser.step()
        codes.append(found)
    return {f"state/{key}": value for key, value in model.state_dict().items()} | {"codes": torch.stack(codes)}


def wrapped(name: str, mine: Tensor) -> dict[str, Tensor]:
    """The same inside torch's DistributedDataParallel with its defaults, which broadcast buffers."""
    model = nn.parallel.DistributedDataParallel(Autoencoder(CASES[name](seed=3)))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    data = drawn(40, DATA, 6)
    for step in range(5):
        rows, mask, n = rows_of_step(step)
        optimiser.zero_grad()
        loss, squared, _ = model(data[rows[mine]], mask[mine], rows[mine])
        (loss + dist.get_world_size() * squared / n).backward()
        optimiser.step()
    return dict(model.module.state_dict())


def run(rank: int, world: int, folder: Path) -> None:
    """Every case but the long loops of four workers; results as `<world>-<rank>.safetensors` and `.json`."""
    # Built before the group exists: vector-quantize-pytorch 1.32 then never synchronises (R1).
    quantizers = {name: make(seed=1) for name, make in CASES.items()}
    with _group(rank, world, folder) as mine:
        calls = Calls()
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for name, q in quantizers.items():
            found, said = law(name, q, mine, calls)
            tensors |= found
            facts |= said
        tensors |= seeded(rank, world) | loops("float32", mine)
        if world <= 2:
            tensors |= loops("float64", mine)
        for name in FIRST:
            tensors |= {f"wrapped/{name}/{key}": value for key, value in wrapped(name, mine).items()}
    _save(tensors, facts, folder, rank, world)


def run_long(rank: int, world: int, folder: Path) -> None:
    """The long loops alone."""
    with _group(rank, world, folder) as mine:
        tensors = loops("float64", mine)
    _save(tensors, {}, folder, rank, world)


def loops(kind: str, mine: Tensor) -> dict[str, Tensor]:
    dtype, steps, names = LOOPS[kind]
    return {f"{kind}/{name}/{key}": value for name in names for key, value in loop(name, dtype, steps, mine).items()}


@contextmanager
def _group(rank: int, world: int, folder: Path) -> Iterator[Tensor]:
    """A gloo group; the rows of a batch that this worker serves."""
    store = f"file://{folder / f'store-{world}'}"
    patience = timedelta(seconds=120)  # a collective that one worker skips must fail, not hang
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    low, high = PARTS[world][rank]
    yield torch.arange(low, high)
    dist.destroy_process_group()


def _save(tensors: dict[str, Tensor], facts: dict[str, Any], folder: Path, rank: int, world: int) -> None:
    save_file(
        {key: value.detach().contiguous().clone() for key, value in tensors.items()},
        folder / f"{world}-{rank}.safetensors",
    )
    (folder / f"{world}-{rank}.json").write_text(json.dumps(facts))
