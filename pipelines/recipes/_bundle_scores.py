"""How like its chunks are to what became of them: bundle by bundle, and by what is kept of a mixture."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipelines.recipes._bundle_model import BundleModel, Chunk
from vqcore import polylines

THRESHOLD = 0.05
"""Of BUAN, in scaled coordinates as in the source: not millimetres."""
DRAWS = (1, 4, 16, 64, 256)


def rate(
    found: Sequence[Chunk], apportioned: Callable[[Tensor, Tensor, int], Tensor], model: BundleModel, to_mm: float
) -> list[dict[str, float]]:
    """What is left of a mixture where it is told by 1 to 256 codes a position, and the bits of a streamline that takes.

    A position's codes have no order: there are C(K + m - 1, m) ways to choose m of K.
    """
    rows: list[dict[str, float]] = []
    positions = sum(int(model.stored(one.real.unsqueeze(0)).sum()) for one in found) / sum(
        len(one.lines) for one in found
    )
    for draws in DRAWS:
        pairs = []
        for one in found:
            points, real = one.points.unsqueeze(0), one.real.unsqueeze(0)
            with torch.inference_mode():
                pairs.append((one.lines, model.render(apportioned(points, real, draws), real)[0][one.real]))
        k = model.num_codes
        ways = math.lgamma(k + draws) - math.lgamma(draws + 1) - math.lgamma(k)
        rows.append({"draws": draws, "bits": positions * ways / math.log(2), **of_pairs(pairs, to_mm)})
    return rows


def per_bundle(found: Sequence[Chunk], names: list[str], to_mm: float) -> list[dict[str, Any]]:
    """Means over the chunks of each bundle, and over all: BUAN with its deviation, MDF in mm, root mean square mm."""
    rows = []
    for label, name in [*enumerate(names), (None, "all")]:
        own = [one for one in found if label in (None, one.label)]
        if own:
            scores = of_pairs([(one.lines, one.made[one.real]) for one in own], to_mm)
            coded = [(one.lines, one.of_codes[one.real]) for one in own if one.of_codes is not None]
            if coded:
                scores |= {f"{key}_of_codes": value for key, value in of_pairs(coded, to_mm).items()}
            count = sum(len(one.lines) for one in own)
            rows.append({"bundle": name, "chunks": len(own), "streamlines": count, **scores})
    return rows


def of_pairs(pairs: list[tuple[Tensor, Tensor]], to_mm: float) -> dict[str, float]:
    """Of (true, made) streamlines of chunks."""
    buan = torch.tensor([polylines.bundle_adjacency(true, made, THRESHOLD) for true, made in pairs]).double()
    true, made = (torch.cat(side) for side in zip(*pairs, strict=True))
    return {
        "buan": float(buan.mean()),
        "buan_deviation": float(buan.std(unbiased=False)),
        "mdf_mm": float(polylines.mdf(made, true).double().mean()) * to_mm,
        "rmse_mm": float((made - true).double().square().mean().sqrt()) * to_mm,
    }


def likeness(
    made: Float[Tensor, "C chunk n 3"],
    points: Float[Tensor, "C chunk n 3"],
    real: Bool[Tensor, "C chunk"],
    to_mm: float,
) -> dict[str, Tensor]:
    """Sums over real streamlines (MSE a number, squared mm, MDF in mm) and over chunks (BUAN)."""
    squared = (made - points).square().flatten(2).mean(2)[real].double()
    alike = [
        polylines.bundle_adjacency(points[chunk][kept], made[chunk][kept], THRESHOLD) for chunk, kept in enumerate(real)
    ]
    return {
        "error": squared.sum(),
        "squared_mm": squared.sum() * to_mm**2,
        "mdf": polylines.mdf(made[real], points[real]).double().sum() * to_mm,
        "buan": torch.tensor(alike, dtype=torch.float64).sum(),
    }


def summarise(sums: dict[str, Tensor]) -> dict[str, float]:
    """`mse` in scaled coordinates, `rmse_mm` a coordinate, `mdf_mm` between each streamline and what became of it,
    `buan` of chunks at 0.05 of scaled coordinates, and `bits` of a streamline where what the decoder is given is kept
    (float32 or codes); the same `..._of_codes` where only codes are."""
    lines, chunks = sums["streamlines"], sums["chunks"]
    found = {}
    for suffix in ("", "_of_codes"):
        if f"error{suffix}" in sums:
            found[f"mse{suffix}"] = float(sums[f"error{suffix}"] / lines)
            found[f"rmse_mm{suffix}"] = math.sqrt(float(sums[f"squared_mm{suffix}"] / lines))
            found[f"mdf_mm{suffix}"] = float(sums[f"mdf{suffix}"] / lines)
            found[f"buan{suffix}"] = float(sums[f"buan{suffix}"] / chunks)
            found[f"bits{suffix}"] = float(sums[f"bits{suffix}"] / lines)
    return found
