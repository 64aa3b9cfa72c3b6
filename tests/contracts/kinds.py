"""A few rows of every corpus kind that a recipe trains on, as a recipe sees them."""

from typing import Any

import torch
from torch import Tensor

from pipelines.recipe import Batch
from tests.vqcore.chains import chain
from vqcore import frames

WIDTH = 8
RESIDUES = 12
SHAPES: dict[str, dict[str, Any]] = {
    "images": {"image": [1, 16, 16]},
    "activations": {"layer_1": [WIDTH], "layer_2": [WIDTH]},
    "proteins": dict.fromkeys(("backbone", "atom_mask", "residue_mask", "residues", "numbers")),
    "streamlines": {"points": [8, 16, 3], "real": [8]},
}
SMALL: dict[str, dict[str, Any]] = {
    "images": {}, "activations": {"sequence": 4}, "proteins": {}, "streamlines": {"chunk": 4},
}  # fmt: skip
"""Settings beside `batch_size` that keep a kind's recipes small."""


def columns(kind: str, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Column -> [rows, ...] as stored."""
    drawn = torch.Generator().manual_seed(seed)
    if kind == "images":
        pixels = torch.randint(0, 256, (rows, *SHAPES[kind]["image"]), generator=drawn, dtype=torch.uint8)
        return {"image": pixels, "label": torch.zeros(rows, dtype=torch.int32)}
    if kind == "proteins":
        return _proteins(rows, seed)
    if kind == "streamlines":
        steps = torch.randn(rows, *SHAPES[kind]["points"], generator=drawn)
        return {"points": steps.cumsum(2), "real": torch.ones(rows, *SHAPES[kind]["real"], dtype=torch.bool)}
    vectors = {name: torch.randn(rows, *shape, generator=drawn).half() for name, shape in SHAPES[kind].items()}
    return {**vectors, "position": torch.arange(rows, dtype=torch.int32)}


def _proteins(rows: int, seed: int) -> dict[str, Tensor]:
    backbone = torch.stack([chain(RESIDUES, 1000 * seed + row) for row in range(rows)])
    real = torch.ones(rows, RESIDUES, dtype=torch.bool)
    return {
        "backbone": frames.with_oxygen(backbone).float(),
        "atom_mask": real.unsqueeze(-1).expand(-1, -1, 4).clone(),
        "residue_mask": real,
        "residues": torch.randint(0, 20, real.shape, generator=torch.Generator().manual_seed(seed)),
        "numbers": torch.arange(1, RESIDUES + 1, dtype=torch.int32).expand(rows, -1).clone(),
        "b_factors": torch.ones(rows, RESIDUES),
    }


def batch(kind: str, rows: int, masked: int | None = None, garbage: bool = False) -> Batch:
    """`rows` rows, of which row `masked` is masked; with `garbage` it holds other values than without."""
    found, mask = columns(kind, rows), torch.ones(rows, dtype=torch.bool)
    if masked is not None:
        mask[masked] = False
    if garbage:
        other = columns(kind, rows, seed=1)
        for name, column in found.items():
            column[masked] = other[name][masked]
    return Batch(found, mask, torch.arange(rows))
