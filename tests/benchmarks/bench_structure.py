"""Structure tokens: whether they stay under motion and padding, speed and memory of encoding, the quantizer's share.

Of chains made here, with a network as preset `small` has it and codes from its own outputs. With a trained bundle and
real chains: python -m tests.benchmarks.bench_structure --bundle DIR --shards URI [--split test]
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipelines import recipe, trained
from pipelines.encode import seen_batches
from pipelines.options import validated
from pipelines.recipe import Batch, Share
from pipelines.recipes import aminoaseed
from pipelines.recipes.aminoaseed import StructureTokenizer
from pipelines.shards import ShardReader
from tests.benchmarks.timing import paired
from tests.vqcore.chains import chain
from vqcore.quantizers import VectorBatch

PADDING = 37
"""Residues that are put behind each chain."""
LENGTHS = (1250, 5000)
CHILD = """
import torch
from tests.benchmarks import bench_structure as bench
torch.set_num_threads(1)
model = bench.fresh()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far is forgotten
peak = bench.peak_mib()
with torch.inference_mode():
    bench.aminoaseed.encode(model, bench.made([{length}]))
print(bench.peak_mib() - peak)
"""


def run(quick: bool = False, bundle: str | None = None, shards: str | None = None, split: str = "test") -> None:
    """Print shares of tokens that stay, seconds, MiB and the quantizer's share of a training step."""
    torch.set_num_threads(1)
    if bundle is not None and shards is not None:
        model = trained.open_trained(Path(bundle)).model
        batches = list(_stored(shards, split))
    else:
        model, batches = fresh(), [made([60, 110, 45], seed) for seed in range(2 if quick else 8)]
    _stay(model, batches)
    begun = time.process_time()
    with torch.inference_mode():
        codes = [aminoaseed.encode(model, batch) for batch in batches]
    seconds, chains = time.process_time() - begun, sum(len(batch.mask) for batch in batches)
    residues = sum(int((found >= 0).sum()) for found in codes)
    print(f"encode: {chains / seconds:.1f} chains/s, {residues / seconds:.0f} residues/s a core")
    _quantizer_share(3 if quick else 9)
    for length in LENGTHS[:1] if quick else LENGTHS:
        words = [sys.executable, "-c", CHILD.format(length=length)]
        peak = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
        print(f"encoding a chain of {length:,} residues: {float(peak.stdout):.0f} MiB above the network")


def fresh() -> StructureTokenizer:
    """The network of preset `small` with codes from its own outputs."""
    found = recipe.load("aminoaseed")
    settings = found.resolve(validated(found.Settings, found.presets["small"], found.name), {})
    torch.manual_seed(0)
    model = StructureTokenizer(settings)
    with torch.no_grad():
        model.quantizer.seed([VectorBatch(*model.latents(made([500, 500], 9)))])
    return model.eval()


def made(lengths: list[int], seed: int = 0) -> Batch:
    """Chains as a batch, filled up to the longest."""
    most = max(lengths)
    backbone = torch.zeros(len(lengths), most, 4, 3)
    for row, length in enumerate(lengths):
        backbone[row, :length, :3] = chain(length, 1000 * seed + row).float()
    real = torch.arange(most) < torch.tensor(lengths).unsqueeze(1)
    numbers = torch.arange(1, most + 1, dtype=torch.int32).expand(len(lengths), -1)
    columns = {
        "backbone": backbone, "atom_mask": real.unsqueeze(-1).expand(-1, -1, 4), "residue_mask": real,
        "residues": torch.zeros(len(lengths), most, dtype=torch.int64), "numbers": numbers,
    }  # fmt: skip
    return Batch(columns, torch.ones(len(lengths), dtype=torch.bool), torch.arange(len(lengths)))


def _stored(shards: str, split: str) -> Iterator[Batch]:
    reader = ShardReader(shards)
    for shard in range(len(reader.manifest.shards)):
        yield from (batch for batch, _, _ in seen_batches(reader, shard, split))


def _stay(model: StructureTokenizer, batches: list[Batch]) -> None:
    """Tokens under a rotation and a shift of 100 Angstrom, under padding, and of the mirror image."""
    drawn = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=drawn, dtype=torch.float64))[0]
    turn = turn * torch.linalg.det(turn)
    same: dict[str, list[Tensor]] = {name: [] for name in ("moved, float64", "moved, float32", "padded", "mirrored")}
    for batch in batches:
        backbone = batch.columns["backbone"].double()
        forms = {"moved": backbone @ turn.T + 100, "mirrored": backbone * torch.tensor([1.0, 1.0, -1.0])}
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)
            with torch.inference_mode():
                plain = aminoaseed.encode(model, _with(batch, backbone))
                kept = plain >= 0
                moved = aminoaseed.encode(model, _with(batch, forms["moved"]))
                same[f"moved, {str(dtype).removeprefix('torch.')}"].append((moved == plain)[kept])
                if dtype == torch.float64:
                    mirrored = aminoaseed.encode(model, _with(batch, forms["mirrored"]))
                    same["mirrored"].append((mirrored == plain)[kept])
                else:
                    padded = aminoaseed.encode(model, _padded(batch))[:, : plain.shape[1]]
                    same["padded"].append((padded == plain)[kept])
    for name, parts in same.items():
        every = torch.cat(parts)
        print(f"{name}: {float(every.double().mean()):.2%} of the tokens of {len(every):,} residues are the same")


def _with(batch: Batch, backbone: Tensor) -> Batch:
    return Batch({**batch.columns, "backbone": backbone}, batch.mask, batch.keys)


def _padded(batch: Batch) -> Batch:
    length = batch.columns["residue_mask"].shape[1]
    columns = {
        name: torch.cat([column, column.new_zeros(len(column), PADDING, *column.shape[2:])], 1)
        if column.dim() > 1 and column.shape[1] == length
        else column
        for name, column in batch.columns.items()
    }
    return Batch(columns, batch.mask, batch.keys)


def _quantizer_share(rounds: int) -> None:
    model, batch = fresh().train(), made([96] * 8)
    share = Share(1, aminoaseed.counts(model, batch))
    with torch.no_grad():
        z, mask, keys = model.latents(batch)
    z = z.requires_grad_()

    def step() -> None:
        aminoaseed.train_losses(model, batch, share).groups["model"].backward()

    def quantizer() -> None:
        out = model.quantizer(z, mask, keys)
        (out.vectors.sum() + out.loss).backward()

    whole, part = paired(step, quantizer, rounds=rounds)
    ratios = sorted(b / a for a, b in zip(whole, part, strict=True))
    print(
        f"the quantizer takes {ratios[len(ratios) // 2]:.1%} of a training step ({ratios[0]:.1%} to {ratios[-1]:.1%})"
    )


def peak_mib() -> float:
    """Resident peak of this process so far."""
    with open("/proc/self/status") as status:
        [line] = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", help="directory of a trained bundle")
    parser.add_argument("--shards", help="shards of proteins")
    parser.add_argument("--split", default="test")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    run(given.quick, given.bundle, given.shards, given.split)
