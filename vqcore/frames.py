"""Rigid frames of protein residues: where a residue is, which way it looks, and its neighbours in space.

Backbones are [..., L, A, 3] in Angstrom with N, CA and C first (A >= 3).
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

NITROGEN, ALPHA, CARBON = range(3)
IDEAL = ((-0.525, 1.363, 0.0), (0.0, 0.0, 0.0), (1.526, 0.0, 0.0))
"""N, CA and C of a residue in its own frame, in Angstrom (mean bond lengths and angle)."""
SHORTEST = 1e-2
"""Of a bond, and of what of N - CA is at right angles to C - CA, in Angstrom; below it there is no frame."""
LONGEST = 3.0
"""Angstrom from CA to N or C; atoms farther apart are placeholders (9999.000) or broken, and no residue."""
QUERIES = 256
"""Residues whose neighbours are looked for at a time: memory stays linear in the length."""


def frames_of(
    backbone: Float[Tensor, "*L A 3"],
) -> tuple[Float[Tensor, "*L 3 3"], Float[Tensor, "*L 3"], Bool[Tensor, "*L"]]:
    """(rotation R, origin t, whether there is one): x = R local + t; t is CA, the first axis points to C, N has y > 0.

    Where atoms coincide, lie on a line or are no residue's, there is no frame: R is the identity there, t still CA.
    """
    nitrogen, alpha, carbon = (backbone[..., atom, :] for atom in (NITROGEN, ALPHA, CARBON))
    rotation, there = _axes(carbon - alpha, nitrogen - alpha, SHORTEST)
    for atom in (nitrogen, carbon):
        there = there & ((atom - alpha).square().sum(-1) < LONGEST**2)
    return torch.where(there[..., None, None], rotation, torch.eye(3).to(rotation)), alpha, there


def rotation_of(six: Float[Tensor, "*L 6"]) -> Float[Tensor, "*L 3 3"]:
    """Six numbers -> rotation by Gram-Schmidt (Zhou et al. 2019, "On the continuity of rotation representations")."""
    rotation, _ = _axes(six[..., :3], six[..., 3:], 0.0)
    return rotation


def _axes(
    x: Float[Tensor, "*L 3"], near_y: Float[Tensor, "*L 3"], shortest: float
) -> tuple[Float[Tensor, "*L 3 3"], Bool[Tensor, "*L"]]:
    first, one = _unit(x)
    second, two = _unit(near_y - (near_y * first).sum(-1, keepdim=True) * first)
    third = torch.linalg.cross(first, second)
    return torch.stack([first, second, third], -1), (one > shortest) & (two > shortest)


def _unit(x: Float[Tensor, "*L 3"]) -> tuple[Float[Tensor, "*L 3"], Float[Tensor, "*L"]]:
    # The square root of a sum that is exactly 0 has no gradient.
    length = (x.square().sum(-1, keepdim=True) + torch.finfo(x.dtype).tiny).sqrt()
    return x / length.clamp(min=1e-6), length.squeeze(-1)


def placed(rotation: Float[Tensor, "*L 3 3"], origin: Float[Tensor, "*L 3"]) -> Float[Tensor, "*L 3 3"]:
    """Ideal N, CA and C in each frame, [..., atom, xyz]."""
    ideal = torch.tensor(IDEAL, dtype=rotation.dtype, device=rotation.device)
    return origin.unsqueeze(-2) + torch.einsum("...xy,ay->...ax", rotation, ideal)


def with_oxygen(backbone: Float[Tensor, "*B L 3 3"]) -> Float[Tensor, "*B L 4 3"]:
    """N, CA, C and a carbonyl O, 1.23 A from C on the far side of CA and the next N; opposite N in the last residue."""
    alpha, carbon = backbone[..., ALPHA, :], backbone[..., CARBON, :]
    after = torch.cat([backbone[..., 1:, NITROGEN, :], backbone[..., -1:, NITROGEN, :]], -2)
    away, _ = _unit(carbon - alpha)
    beyond, _ = _unit(carbon - after)
    direction, _ = _unit(away + beyond)
    return torch.cat([backbone, (carbon + 1.23 * direction).unsqueeze(-2)], -2)


def beta_carbon(backbone: Float[Tensor, "*L A 3"]) -> Float[Tensor, "*L 3"]:
    """Where CB is, or would be in glycine, from N, CA and C (ideal tetrahedron)."""
    alpha = backbone[..., ALPHA, :]
    b, c = alpha - backbone[..., NITROGEN, :], backbone[..., CARBON, :] - alpha
    a = torch.linalg.cross(b, c)
    return alpha - 0.58273431 * a + 0.56802827 * b - 0.54067466 * c


def neighbours(
    alpha: Float[Tensor, "B L 3"], mask: Bool[Tensor, "B L"], count: int
) -> tuple[Int64[Tensor, "B L N"], Bool[Tensor, "B L N"]]:
    """(places of the `count` residues nearest by CA, nearest first and oneself at the head; which of them are real).

    Only residues of `mask` are anyone's neighbours. A chain of fewer has places that are not real, and hold 0.
    """
    length = alpha.shape[1]
    kept = min(count, length)
    found, real = [], []
    for start in range(0, length, QUERIES):
        some = alpha[:, start : start + QUERIES]
        distance = torch.cdist(some, alpha, compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance.masked_fill(~mask.unsqueeze(1), torch.inf)
        own = torch.arange(start, start + some.shape[1], device=alpha.device).view(1, -1, 1)
        distance.scatter_(2, own.expand(len(alpha), -1, 1), -1.0)
        near = distance.topk(kept, largest=False, sorted=True)
        found.append(near.indices)
        real.append(near.values.isfinite())
    places, there = torch.cat(found, 1), torch.cat(real, 1) & mask.unsqueeze(-1)
    wider = (0, count - kept)
    return torch.nn.functional.pad(places, wider), torch.nn.functional.pad(there, wider)
