"""Bundles drawn from three sides, what went in above what came out, coloured by direction as tractography does."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

SIDES = (("from the left", 1, 2), ("from the front", 0, 2), ("from above", 0, 1))
"""Name, and the axes (x to the right, y forward, z up; RAS mm) that are seen across and up."""
MOST_BUNDLES = 3


@dataclass(frozen=True)
class Drawn:
    """One bundle and what became of it, mm."""

    name: str
    before: Float[Tensor, "N n 3"]
    after: Float[Tensor, "N n 3"]


def views(bundles: Sequence[Drawn], above: str = "original", below: str = "reconstruction") -> Figure:
    """A pair of rows for each bundle, a column for each side; both of a pair have one scale."""
    shown = bundles[:MOST_BUNDLES]
    figure = Figure(figsize=(9.0, 6.2 * len(shown)), dpi=120, layout="constrained")
    axes = figure.subplots(2 * len(shown), 3, squeeze=False)
    for number, bundle in enumerate(shown):
        for row, (what, lines) in enumerate(((above, bundle.before), (below, bundle.after))):
            for column, (side, across, up) in enumerate(SIDES):
                axis = axes[2 * number + row][column]
                _draw(axis, lines.numpy(), bundle.before.numpy(), across, up)
                if row == 0:
                    axis.set_title(side if column else f"{bundle.name}\n{side}", fontsize=8, loc="left")
                if column == 0:
                    axis.set_ylabel(what, fontsize=9)
    return figure


def _draw(axis: Axes, lines: np.ndarray, frame: np.ndarray, across: int, up: int) -> None:
    """Segments in the colours of their directions (red right, green forward, blue up), in the window of `frame`."""
    steps = np.diff(lines, axis=1)
    colours = np.abs(steps) / np.maximum(np.linalg.norm(steps, axis=-1, keepdims=True), 1e-9)
    flat = lines[..., [across, up]]
    segments = np.stack([flat[:, :-1], flat[:, 1:]], 2).reshape(-1, 2, 2)
    axis.add_collection(LineCollection(list(segments), colors=colours.reshape(-1, 3) * 0.85, linewidths=0.6, alpha=0.7))
    low, high = frame.reshape(-1, 3).min(0), frame.reshape(-1, 3).max(0)
    # One scale for all sides of a bundle, so that pictures are squares.
    centre, half = (low + high) / 2, 0.55 * float((high - low).max()) + 1
    axis.set_xlim(centre[across] - half, centre[across] + half)
    axis.set_ylim(centre[up] - half, centre[up] + half)
    axis.set_aspect("equal")
    axis.tick_params(labelsize=6)
