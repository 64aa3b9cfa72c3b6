"""One structure laid over another, and how alike two are: RMSD and lDDT. Points in Angstrom, computed in float64."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RADIUS = 15.0
"""Angstrom in the true structure within which lDDT looks at distances."""
TOLERANCES = (0.5, 1.0, 2.0, 4.0)


def motion(
    moving: Float[Tensor, "B N 3"], still: Float[Tensor, "B N 3"], mask: Bool[Tensor, "B N"]
) -> tuple[Float[Tensor, "B 3 3"], Float[Tensor, "B 3"]]:
    """(R, t) for which the sum of |R x + t - y|^2 over valid points is smallest; never a reflection (Kabsch 1976)."""
    weight = mask.double().unsqueeze(-1)
    count = weight.sum(1).clamp(min=1.0)
    x, y = (torch.where(mask.unsqueeze(-1), points, 0.0).double() for points in (moving, still))
    x_mean, y_mean = x.sum(1) / count, y.sum(1) / count
    x, y = (x - x_mean.unsqueeze(1)) * weight, (y - y_mean.unsqueeze(1)) * weight
    u, _, v = torch.linalg.svd(y.transpose(1, 2) @ x)
    turn = torch.ones_like(x_mean)
    turn[:, 2] = torch.linalg.det(u @ v).sign()
    rotation = u * turn.unsqueeze(1) @ v
    return rotation, y_mean - torch.einsum("bxy,by->bx", rotation, x_mean)


def moved(
    points: Float[Tensor, "B N 3"], by: tuple[Float[Tensor, "B 3 3"], Float[Tensor, "B 3"]]
) -> Float[Tensor, "B N 3"]:
    """R x + t in float64."""
    rotation, shift = by
    return torch.einsum("bxy,bny->bnx", rotation, points.double()) + shift.unsqueeze(1)


def rmsd(found: Float[Tensor, "B N 3"], true: Float[Tensor, "B N 3"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Root mean square deviation after the best superposition; 0 of no point."""
    apart = moved(found, motion(found, true, mask)) - true.double()
    squares = torch.where(mask.unsqueeze(-1), apart, 0.0).square().sum((1, 2))
    return (squares / mask.sum(1).clamp(min=1)).sqrt()


def lddt(found: Float[Tensor, "B N 3"], true: Float[Tensor, "B N 3"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Mean over points of the share of distances to others, within 15 A in truth, that are kept to .5, 1, 2 and 4 A
    (Mariani et al. 2013), in [0, 1]; without superposition. Points that have no other near are left out."""
    valid = mask.unsqueeze(1) & mask.unsqueeze(2)
    valid = valid & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    wanted, got = (_distances(torch.where(mask.unsqueeze(-1), points, 0.0)) for points in (true, found))
    near = valid & (wanted < RADIUS)
    error = (wanted - got).abs()
    kept = torch.stack([(error < tolerance) & near for tolerance in TOLERANCES]).double().mean(0).sum(2)
    others = near.sum(2)
    each = kept / others.clamp(min=1)
    return each.sum(1) / (others > 0).sum(1).clamp(min=1)


def _distances(points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N N"]:
    wide = points.double()
    return torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
