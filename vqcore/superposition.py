"""How alike two structures of the same atoms are: RMSD after superposition, lDDT, and backbone dihedrals.

Coordinates are in Angstrom; everything is computed in float64, a structure at a time along the first dimension. Atoms
that a mask leaves out may hold any number, also NaN.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

LDDT_RADIUS = 15.0
"""Pairs this near in the reference count (Mariani et al. 2013)."""
LDDT_BINS = (0.5, 1.0, 2.0, 4.0)
LDDT_ROWS = 256
"""Atoms whose distances to all others are held together."""
_LONGEST_BOND = 2.5
"""A C and the next N farther apart than this are not bonded: the chain has a gap."""


class Motion(NamedTuple):
    """x -> x @ rotation.T + shift."""

    rotation: Float64[Tensor, "B 3 3"]
    shift: Float64[Tensor, "B 3"]

    def move(self, x: Float[Tensor, "B N 3"]) -> Float64[Tensor, "B N 3"]:
        return x.double() @ self.rotation.transpose(1, 2) + self.shift.unsqueeze(1)


def superpose(
    mobile: Float[Tensor, "B N 3"], fixed: Float[Tensor, "B N 3"], mask: Bool[Tensor, "B N"] | None = None
) -> Motion:
    """The proper rotation and shift of `mobile` that bring it nearest to `fixed` in the least squares (Kabsch 1976).

    A structure without atoms does not move.
    """
    x, y, weight = _checked(mobile, fixed, mask)
    count = weight.sum(1, keepdim=True).clamp(min=1)
    centre_x, centre_y = (x * weight).sum(1, keepdim=True) / count, (y * weight).sum(1, keepdim=True) / count
    covariance = ((x - centre_x) * weight).transpose(1, 2) @ (y - centre_y)
    left, _, right = torch.linalg.svd(covariance)
    # A mirror image fits some structures better; proteins have a hand.
    flip = torch.ones_like(centre_x.squeeze(1))
    flip[:, 2] = torch.sign(torch.linalg.det(left @ right))
    rotation = (right.transpose(1, 2) * flip.unsqueeze(1)) @ left.transpose(1, 2)
    shift = centre_y - centre_x @ rotation.transpose(1, 2)
    return Motion(rotation, shift.squeeze(1))


def rmsd(
    mobile: Float[Tensor, "B N 3"], fixed: Float[Tensor, "B N 3"], mask: Bool[Tensor, "B N"] | None = None
) -> Float64[Tensor, " B"]:
    """Root mean square distance of the atoms after superposition; 0 where there are none."""
    x, y, weight = _checked(mobile, fixed, mask)
    apart = (superpose(x, y, mask).move(x) - y).square().sum(-1) * weight.squeeze(-1)
    return (apart.sum(1) / weight.sum((1, 2)).clamp(min=1)).sqrt()


def lddt(
    model: Float[Tensor, "B N 3"], reference: Float[Tensor, "B N 3"], mask: Bool[Tensor, "B N"] | None = None
) -> Float64[Tensor, " B"]:
    """Local distance difference test in [0, 1], over all pairs of atoms within 15 Angstrom in the reference.

    A pair scores the share of the tolerances 0.5, 1, 2 and 4 Angstrom that its distance keeps; the score is the mean
    over pairs, 1 where there are none. Of CA atoms alone it is the CA-lDDT. Memory is linear in N.
    """
    x, y, weight = _checked(model, reference, mask)
    there = weight.squeeze(-1).bool()
    places = torch.arange(x.shape[1], device=x.device)
    kept, count = x.new_zeros(len(x)), x.new_zeros(len(x))
    for rows in places.split(LDDT_ROWS):
        # Not by the product of matrices: it is not exact to what the tolerances ask.
        true = torch.cdist(y[:, rows], y, compute_mode="donot_use_mm_for_euclid_dist")
        off = (torch.cdist(x[:, rows], x, compute_mode="donot_use_mm_for_euclid_dist") - true).abs()
        pairs = (true <= LDDT_RADIUS) & there[:, rows, None] & there[:, None] & (rows[:, None] != places)
        for bound in LDDT_BINS:
            kept += ((off <= bound) & pairs).sum((1, 2))
        count += pairs.sum((1, 2))
    return torch.where(count > 0, kept / (len(LDDT_BINS) * count.clamp(min=1)), 1.0)


def dihedrals(
    backbone: Float[Tensor, "B L A 3"], mask: Bool[Tensor, "B L"] | None = None
) -> tuple[Float64[Tensor, "B L 3"], Bool[Tensor, "B L 3"]]:
    """phi, psi and omega of every residue in radians, in (-pi, pi], and where they exist.

    `backbone` holds N, CA and C first. phi turns about N-CA, psi about CA-C and omega about the bond to the next
    residue; the first residue of a stretch has no phi, the last neither psi nor omega. A stretch ends where C and the
    next N are more than 2.5 Angstrom apart. Angles that do not exist are 0.
    """
    if backbone.dim() != 4 or backbone.shape[2] < 3 or backbone.shape[3] != 3:
        raise ValueError(f"backbone has shape {tuple(backbone.shape)}; it must be [B, L, 3 or more atoms, 3]")
    here = torch.ones(backbone.shape[:2], dtype=torch.bool, device=backbone.device) if mask is None else mask
    xyz = torch.where(here[..., None, None], backbone.double(), 0.0)
    nitrogen, alpha, carbon = xyz[:, :, 0], xyz[:, :, 1], xyz[:, :, 2]
    bonded = here[:, :-1] & here[:, 1:]
    bonded &= (carbon[:, :-1] - nitrogen[:, 1:]).square().sum(-1) < _LONGEST_BOND**2
    angles = xyz.new_zeros(*here.shape, 3)
    there = torch.zeros(*here.shape, 3, dtype=torch.bool, device=xyz.device)
    angles[:, 1:, 0] = _angle(carbon[:, :-1], nitrogen[:, 1:], alpha[:, 1:], carbon[:, 1:])
    angles[:, :-1, 1] = _angle(nitrogen[:, :-1], alpha[:, :-1], carbon[:, :-1], nitrogen[:, 1:])
    angles[:, :-1, 2] = _angle(alpha[:, :-1], carbon[:, :-1], nitrogen[:, 1:], alpha[:, 1:])
    there[:, 1:, 0] = bonded
    there[:, :-1, 1:] = bonded.unsqueeze(-1)
    return torch.where(there, angles, 0.0), there


def _angle(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The dihedral of four points by atan2, exact also near 0 and pi."""
    first, axis, last = b - a, c - b, d - c
    one, other = torch.linalg.cross(first, axis), torch.linalg.cross(axis, last)
    length = torch.linalg.vector_norm(axis, dim=-1)
    return torch.atan2(length * (first * other).sum(-1), (one * other).sum(-1))


def _checked(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both in float64 with zeros where masked, and the mask as weights [B, N, 1]."""
    if x.dim() != 3 or x.shape[-1] != 3 or x.shape != y.shape:
        raise ValueError(f"structures have shapes {tuple(x.shape)} and {tuple(y.shape)}; both must be one [B, N, 3]")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool {tuple(x.shape[:2])}")
    keep = (torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask).unsqueeze(-1)
    return torch.where(keep, x.double(), 0.0), torch.where(keep, y.double(), 0.0), keep.double()
