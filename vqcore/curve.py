"""A curve through K corners: an open line of K - 1 straight segments, as plain functions of the corners [K, D].

Segment j joins corners j and j + 1; nothing joins the last corner to the first. A place on the curve is a segment and a
position in [0, 1] along it. Vali and Backstrom, "Interpretable Latent Space Using Space-Filling Curves for Phonetic
Analysis in Voice Conversion" (Interspeech 2023) is the paper cited below.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vqcore import assign
from vqcore.codebook import only, unit

CORNER_GAP = 0.01
"""How far along its segment `doubled` puts the twin of a corner (the authors' codebook_extension_eps)."""

_TILE_VALUES = 2**20  # numbers in a tile of vectors that look for their place: 4 MiB for each of its temporaries


def dithered(corners: Float[Tensor, "K D"], positions: Float[Tensor, " K-1"]) -> Float[Tensor, "K-1 D"]:
    """One point on every segment, (1 - position) c_j + position c_{j+1} (equation 2), differentiable in the corners."""
    along = positions.to(corners).unsqueeze(-1)
    return (1 - along) * corners[:-1] + along * corners[1:]


def at(
    corners: Float[Tensor, "K D"], segments: Int64[Tensor, " N"], positions: Float[Tensor, " N"]
) -> Float[Tensor, "N D"]:
    """The points at `positions` of `segments`; 0 where a segment is negative. Unchecked, differentiable in the corners.

    Positions of exactly 0 and 1 give the corner's bits.
    """
    return only(segments >= 0, _at(corners, segments.clamp(min=0), positions))


def _at(corners: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
    along = positions.to(corners).unsqueeze(-1)
    return (1 - along) * corners.index_select(0, segments) + along * corners.index_select(0, segments + 1)


@torch.no_grad()
def project(x: Float[Tensor, "N D"], corners: Float[Tensor, "K D"]) -> tuple[Int64[Tensor, " N"], Float[Tensor, " N"]]:
    """(segments, positions) of the rows of `x`: the nearer of the two segments at the nearest corner (equation 5).

    Each segment is searched exactly, its position cut to [0, 1]; an end corner counts as its neighbour, so that it too
    has two segments; ties take the left one. A segment of length 0 is its first corner.

    A local search: another segment may pass nearer, halfway between two of its corners. In two dimensions a curve that
    folds densely loses by it (32 corners on a Gaussian: about a tenth of the vectors, 6 % of the error); in many it
    does not (the authors' released 64 corners in 512 dimensions: none of 2,000 noisy points on the curve). Right
    after `doubled` it loses too, since one of the two segments at every corner is short: train before you evaluate.
    """
    num_codes, dim = corners.shape
    middle = assign.nearest(x, corners).clamp(1, max(1, num_codes - 2))
    segments, positions = torch.empty_like(middle), torch.empty(len(x), dtype=corners.dtype, device=x.device)
    tile = max(1, _TILE_VALUES // dim)
    for start in range(0, len(x), tile):
        part = slice(start, start + tile)
        right = middle[part].clamp(max=num_codes - 2)  # two corners have one segment
        left = middle[part] - 1
        on_left, error_left = _on_segment(x[part], corners, left)
        on_right, error_right = _on_segment(x[part], corners, right)
        to_the_right = error_right < error_left
        segments[part] = torch.where(to_the_right, right, left)
        positions[part] = torch.where(to_the_right, on_right, on_left)
    return segments, positions


def _on_segment(x: Tensor, corners: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Position of the nearest point of the given segment, and the squared distance to it."""
    start = corners.index_select(0, segments)
    along = corners.index_select(0, segments + 1) - start
    ratio = ((x - start) * along).sum(-1) / along.square().sum(-1)
    positions = ratio.nan_to_num(nan=0.0).clamp(0.0, 1.0)  # 0 / 0 on a segment of length 0
    # From the point itself: where both segments end at one corner their errors are then equal to the bit, and tie.
    return positions, (x - _at(corners, segments, positions)).square().sum(-1)


def doubling(num_codes: int, gap: float = CORNER_GAP) -> Float64[Tensor, " 2*num_codes"]:
    """Where on the old curve `doubled` puts the new corners: strictly increasing numbers segment + position.

    Corner i of the first half gets a twin at i + gap, of the second half at i - gap: inwards, so both ends stay.
    Raises ValueError for fewer than two corners or a gap outside (0, 0.5).
    """
    if num_codes < 2 or not 0.0 < gap < 0.5:
        raise ValueError(f"{num_codes} corners and a gap of {gap}; doubling needs two or more, and a gap in (0, 0.5)")
    corner = torch.arange(num_codes, dtype=torch.float64)
    first_half = corner < num_codes // 2
    twins = [torch.where(first_half, corner, corner - gap), torch.where(first_half, corner + gap, corner)]
    return torch.stack(twins, dim=-1).reshape(-1)


@torch.no_grad()
def doubled(corners: Float[Tensor, "K D"], gap: float = CORNER_GAP) -> Float[Tensor, "2*K D"]:
    """2 K corners on the *same* curve, which a further stage of training can then bend (the authors' code).

    All old corners are among them, bit for bit, and so are both ends. Raises ValueError as `doubling` does.
    """
    places = doubling(len(corners), gap).to(corners.device)
    segments = places.floor().clamp(max=len(corners) - 2)
    return _at(corners.double(), segments.long(), places - segments).to(corners.dtype)


def length(corners: Float[Tensor, "K D"]) -> Float64[Tensor, ""]:
    """Sum of the lengths of all segments."""
    return torch.linalg.vector_norm(corners.double().diff(dim=0), dim=-1).sum()


def directions(corners: Float[Tensor, "K D"]) -> Float[Tensor, "K-1 D"]:
    """(c_{j+1} - c_j) / |c_{j+1} - c_j| of every segment: the edit directions read from a curve; 0 for length 0."""
    return unit(corners.diff(dim=0))
