"""Streamlines as curves: their length, and points at equal distances along them; many at once, for NumPy's sake."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64

from pipelines.corpora._streamline_files import Points

MOST_MM = 1e6
"""A coordinate beyond a kilometre is no place in a head."""
FEW_POINTS = "fewer than two points: two or more are needed; mend it or leave it out of the file"
NO_LENGTH = "a length of zero: all its points are one place, two are needed; mend it or leave it out of the file"
NOT_FINITE = "coordinates that are not finite: mm are needed; mend it or leave it out of the file"
TOO_FAR = "coordinates beyond a kilometre: mm of a head are needed; look for a wrong affine or damage"

Way = Float64[np.ndarray, " P"]


def why_none(lines: Sequence[Points]) -> list[str | None]:
    """Why each of these is no streamline, in words that are few over a whole corpus."""
    found: list[str | None] = [FEW_POINTS] * len(lines)
    places = [place for place, points in enumerate(lines) if len(points) >= 2]
    if not places:
        return found
    flat, starts = _joined([lines[place] for place in places])
    # A NaN anywhere makes the maximum one.
    farthest = np.maximum.reduceat(np.abs(flat), starts).max(1)
    for place, most in zip(places, farthest.tolist(), strict=True):
        found[place] = None
        if not np.isfinite(most):
            found[place] = NOT_FINITE
        elif most > MOST_MM:
            found[place] = TOO_FAR
    return found


def along(lines: Sequence[Points]) -> list[Way]:
    """The way in mm from the first point of each line to each of its points."""
    if not lines:
        return []
    flat, starts = _joined(lines)
    exact = flat.astype(np.float64)
    step = exact[1:] - exact[:-1]
    step *= step
    # Summed by hand: a reduction over the last axis may add in another order on another machine.
    steps = np.sqrt(step[:, 0] + step[:, 1] + step[:, 2])
    way = np.zeros(len(flat))
    ways = []
    for first, points in zip(starts.tolist(), lines, strict=True):
        stop = first + len(points)
        np.add.accumulate(steps[first : stop - 1], out=way[first + 1 : stop])
        ways.append(way[first:stop])
    return ways


def resampled(lines: Sequence[Points], ways: Sequence[Way], n: int) -> Float32[np.ndarray, "S n 3"]:
    """`n` points at equal distances along each curve, which is straight between points; its ends are kept exactly."""
    if not lines:
        return np.empty((0, n, 3), np.float32)
    curves, straight = [points.astype(np.float64) for points in lines], list(ways)
    for number, way in enumerate(ways):
        forward = way[1:] > way[:-1]
        if not forward.all():
            # A point that is given twice has no way between, and nothing lies there.
            distinct = np.concatenate([np.ones(1, np.bool_), forward])
            straight[number], curves[number] = way[distinct], curves[number][distinct]
    curve, starts = _joined(curves)
    way = np.concatenate(straight)
    places = np.arange(n) * (np.array([way[-1] for way in straight])[:, None] / (n - 1))
    left = np.empty((len(lines), n), np.int64)
    for number, (first, one) in enumerate(zip(starts.tolist(), straight, strict=True)):
        left[number] = one[1:-1].searchsorted(places[number], side="right")
        left[number] += first
    before = way[left]
    share = (places - before) / (way[left + 1] - before)
    begin = curve[left]
    found = (begin + (curve[left + 1] - begin) * share[:, :, None]).astype(np.float32)
    found[:, 0], found[:, -1] = [points[0] for points in lines], [points[-1] for points in lines]
    return found


def _joined(lines: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All points one after another, and where each line begins."""
    starts = np.zeros(len(lines), np.int64)
    np.cumsum([len(points) for points in lines[:-1]], out=starts[1:])
    return np.concatenate(lines), starts
