"""Streamlines as lines of points: length, bending, distance, and how alike two bundles of them are.

MDF: Garyfallidis et al., "QuickBundles, a method for tractography simplification", Frontiers in Neuroscience 2012.
Bundle adjacency and BUAN's shape similarity: Garyfallidis et al. 2018; Chandio et al., "Bundle analytics", Scientific
Reports 2020. DIPY's functions are the reference that tests compare with.
"""

import torch
from jaxtyping import Float
from torch import Tensor

BUAN_POINTS = 20
"""To which DIPY resamples before it compares."""
AT_ONCE = 1 << 22
"""Numbers of a difference that are held together."""


def lengths(lines: Float[Tensor, "*N n 3"]) -> Float[Tensor, "*N"]:
    return lines.diff(dim=-2).norm(dim=-1).sum(-1)


def bending(lines: Float[Tensor, "*N n 3"]) -> Float[Tensor, "*N"]:
    """Mean length of the second difference along a line: how far it is from even and straight."""
    return lines.diff(n=2, dim=-2).norm(dim=-1).mean(-1)


def resampled(lines: Float[Tensor, "*N n 3"], count: int) -> Float[Tensor, "*N count 3"]:
    """`count` points at equal distances along each line. One without length keeps its place."""
    flat = lines.reshape(-1, *lines.shape[-2:])
    steps = flat.diff(dim=1).norm(dim=-1)
    along = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    wanted = torch.linspace(0, 1, count, dtype=flat.dtype, device=flat.device) * along[:, -1:]
    before = (torch.searchsorted(along, wanted.contiguous(), right=True) - 1).clamp(0, flat.shape[1] - 2)
    step = steps.gather(1, before)
    share = torch.where(step > 0, (wanted - along.gather(1, before)) / step.where(step > 0, 1), 0).clamp(0, 1)
    index = before.unsqueeze(-1).expand(-1, -1, flat.shape[2])
    start, end = flat.gather(1, index), flat.gather(1, index + 1)
    return (start + share.unsqueeze(-1) * (end - start)).reshape(*lines.shape[:-2], count, lines.shape[-1])


def mdf(one: Float[Tensor, "*N n 3"], other: Float[Tensor, "*N n 3"]) -> Float[Tensor, "*N"]:
    """Mean distance of the points of two lines, in the better of both directions."""
    direct = (one - other).norm(dim=-1).mean(-1)
    return torch.minimum(direct, (one - other.flip(-2)).norm(dim=-1).mean(-1))


def mdf_matrix(one: Float[Tensor, "A n 3"], other: Float[Tensor, "B n 3"]) -> Float[Tensor, "A B"]:
    """`mdf` of every pair."""
    size = max(1, AT_ONCE // max(1, other.numel()))
    parts = [mdf(part.unsqueeze(1), other.unsqueeze(0)) for part in one.split(size)]
    return torch.cat(parts) if parts else one.new_zeros(0, len(other))


def bundle_adjacency(one: Float[Tensor, "A n 3"], other: Float[Tensor, "B n 3"], threshold: float) -> float:
    """The mean of two shares: lines of each bundle with one of the other nearer than `threshold` (by MDF).

    BUAN's shape similarity where every line is a cluster of its own (DIPY: `bundle_shape_similarity`, clust_thr=[0]).
    0 where a bundle is empty.
    """
    if not len(one) or not len(other):
        return 0.0
    # Twice, as DIPY does: once for the clusters and once for the comparison. The second moves points of bent lines.
    one, other = (resampled(resampled(lines, BUAN_POINTS), BUAN_POINTS) for lines in (one, other))
    near = mdf_matrix(one, other) < threshold
    return float(near.any(1).double().mean() + near.any(0).double().mean()) / 2
