"""Streamlines as curves: their length, and points at equal distances along them."""

import numpy as np
from jaxtyping import Float32, Float64

from pipelines.corpora._streamline_files import Points

MOST_MM = 1e6
"""A coordinate beyond a kilometre is no place in a head."""


def why_none(points: Points) -> str | None:
    """Why these points are no streamline, in words that are few over a whole corpus."""
    if len(points) < 2:
        return "fewer than two points"
    farthest = np.abs(points).max()
    if not np.isfinite(farthest):
        return "coordinates that are not finite"
    return "coordinates beyond a kilometre" if farthest > MOST_MM else None


def along(points: Points) -> Float64[np.ndarray, " P"]:
    """The way in mm from the first point to each."""
    exact = points.astype(np.float64)
    step = exact[1:] - exact[:-1]
    step *= step
    # Summed by hand: a reduction over the last axis may add in another order on another machine.
    way = np.zeros(len(points))
    np.cumsum(np.sqrt(step[:, 0] + step[:, 1] + step[:, 2]), out=way[1:])
    return way


def resampled(points: Points, way: Float64[np.ndarray, " P"], n: int) -> Float32[np.ndarray, "n 3"]:
    """`n` points at equal distances along the curve, which is straight between points; its ends are kept exactly."""
    curve = points.astype(np.float64)
    forward = way[1:] > way[:-1]
    if not forward.all():
        # A point that is given twice has no way between, and nothing lies there.
        distinct = np.concatenate([np.ones(1, np.bool_), forward])
        way, curve = way[distinct], curve[distinct]
    places = np.arange(n) * (way[-1] / (n - 1))
    left = np.searchsorted(way[1:-1], places, side="right")
    share = (places - way[left]) / (way[left + 1] - way[left])
    found = (curve[left] + (curve[left + 1] - curve[left]) * share[:, None]).astype(np.float32)
    found[0], found[-1] = points[0], points[-1]
    return found
