"""The pictures that runs and evaluations leave behind. Figures are made without a display and without pyplot."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

Place = tuple[float, float]
STATES = {
    "finished": ("#0072b2", "o", "trials finished"),
    "pruned": ("#999999", "x", "stopped early"),
    "failed": ("#000000", "x", "failed"),
}
"""State of a trial -> colour, marker, word. Blue, vermilion and yellow are told apart by all kinds of eyes."""
NAMED = 16
"""Points of a front that are named; more names would cover each other."""


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


@dataclass(frozen=True)
class Panel:
    """Trials of a search on two axes, with its front."""

    names: tuple[str, str]
    """Of the axes, with units."""
    placed: Mapping[str, Sequence[Place]]
    """State -> (x, y) of its trials."""
    best: Sequence[tuple[float, float, str]]
    """(x, y, name) of the points on the front."""
    champion: Place | None
    missing: Mapping[str, int]
    """State -> trials that have no place, counted in the legend."""
    step: Literal["pre", "post"] | None
    """Draw the front as a step line, level behind a point (post: less is better to the right of it) or before."""
    falling: bool = True
    """Less is better upwards too; else more is, and the line rises."""


def front_plot(panels: Sequence[Panel], title: str) -> Figure:
    """Every panel beside the others, under one title."""
    figure = Figure(figsize=(7.2 if len(panels) == 1 else 5.4 * len(panels), 4.6), dpi=120, layout="constrained")
    figure.suptitle(title)
    for panel, axis in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _draw_trials(axis, panel)
        _draw_front(axis, panel)
        every = [pair for pairs in panel.placed.values() for pair in pairs]
        for at, (way, scale) in enumerate(((axis.xaxis, axis.set_xscale), (axis.yaxis, axis.set_yscale))):
            values = [pair[at] for pair in every]
            if values and min(values) > 0 and max(values) >= 10 * min(values):
                scale("log")
                _show_plain_numbers(way, decades=math.log10(max(values) / min(values)))
        axis.set(xlabel=panel.names[0], ylabel=panel.names[1])
        axis.grid(color="0.9", linewidth=0.6, which="both")
        axis.legend(frameon=False, fontsize=8, loc="upper right" if panel.falling else "lower right")
    return figure


def _show_plain_numbers(way: Axis, decades: float) -> None:
    """On a log scale, ticks of 20 and 500 and not of powers of ten."""
    way.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    way.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    way.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}") if decades < 3 else NullFormatter())


def _draw_trials(axis: Axes, panel: Panel) -> None:
    for state, pairs in panel.placed.items():
        colour, marker, word = STATES[state]
        across, up = zip(*pairs, strict=True)
        label = f"{len(pairs)} {word}"
        axis.scatter(across, up, s=22, c=colour, marker=marker, alpha=0.75, linewidths=1, label=label, zorder=2)
    for state, count in panel.missing.items():
        axis.plot([], [], " ", label=f"{count} {STATES[state][2]}: not shown, no metrics")


def _draw_front(axis: Axes, panel: Panel) -> None:
    ordered = sorted(panel.best)
    x, y = [place[0] for place in ordered], [place[1] for place in ordered]
    if panel.step and ordered:
        axis.step(x, y, where=panel.step, color="#d55e00", linewidth=1.4, zorder=3)
    axis.scatter(x, y, s=34, c="#d55e00", label=f"front ({len(x)})", zorder=4)
    for place in ordered[:NAMED]:
        axis.annotate(place[2], place[:2], xytext=(4, 5), textcoords="offset points", fontsize=7, color="0.25")
    if panel.champion is not None:
        axis.scatter(*panel.champion, s=210, marker="*", c="#f0e442", edgecolors="black", label="champion", zorder=5)


def _as_picture(image: UInt8[Tensor, "C H W"]) -> np.ndarray:
    pixels = image.cpu().numpy()
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
