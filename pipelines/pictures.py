"""The pictures that runs and evaluations leave behind. Figures are made without a display and without pyplot."""

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor


def grid_over(
    above: UInt8[Tensor, "B C H W"], below: UInt8[Tensor, "B C H W"], above_name: str, below_name: str, most: int = 8
) -> Figure:
    """Pairs of pictures, one row over the other: what went in above what came out."""
    count = min(most, len(above))
    figure = Figure(figsize=(1.5 * count + 0.5, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        for row, images in enumerate((above, below)):
            axis = axes[row][column]
            axis.imshow(_as_picture(images[column]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0][0].set_ylabel(above_name)
    axes[1][0].set_ylabel(below_name)
    return figure


def usage_plot(counts: Tensor, title: str) -> Figure:
    """How often each code was chosen, most used first, beside the line that equal use would draw.

    Args:
        counts: [K] or [L, K] counts over a whole split; one curve per level.
    """
    levels = counts.double().reshape(-1, counts.shape[-1]).cpu()
    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axis = figure.subplots()
    for level, row in enumerate(levels):
        ordered = torch.sort(row, descending=True).values.numpy()
        used = int((row > 0).sum())
        share = ordered / max(1.0, float(row.sum()))
        label = f"{used} of {len(row)} codes used" + (f", level {level}" if len(levels) > 1 else "")
        axis.fill_between(np.arange(len(row)), share, step="mid", alpha=0.25)
        axis.step(np.arange(len(row)), share, where="mid", label=label)
    axis.axhline(1 / counts.shape[-1], color="0.5", linewidth=0.8, linestyle="--", label="equal use")
    axis.set(title=title, xlabel="codes, most used first", ylabel="share of vectors", xlim=(0, counts.shape[-1] - 1))
    axis.set_ylim(0, max(2 / counts.shape[-1], axis.get_ylim()[1]))
    axis.legend(frameon=False)
    return figure


def _as_picture(image: UInt8[Tensor, "C H W"]) -> np.ndarray:
    pixels = image.cpu().numpy()
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
