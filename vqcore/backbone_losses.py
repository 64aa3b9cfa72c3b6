"""How far a predicted backbone is from the true one, without laying one over the other: distances and directions of
all pairs. The reconstruction terms of ESM3's structure tokenizer (Hayes et al. 2025) in the form of StructTokenBench.

Backbones are [B, L, 3, 3] (N, CA, C) in Angstrom, masks [B, L]. Everything returned is a sum over valid pairs, oneself
included; whoever calls divides by the global count. What masked residues hold does not matter.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from vqcore import frames

DISTANCE_BINS, DIRECTION_BINS, DIRECTION_PAIRS = 64, 16, 6
EDGES = tuple(2.3125 + 0.3075 * edge for edge in range(DISTANCE_BINS - 1))
"""Between the bins of distances, in Angstrom."""
DIRECTION_WIDTH = 2.0 / DIRECTION_BINS
BOND = 2.0
"""Angstrom; the longest peptide bond, C to the next N."""
SOFTENED = 0.01
"""Angstrom."""
MOST_DISTANCE, MOST_DIRECTION = 25.0, 20.0
"""Where squared errors of distances and of products of directions are cut off."""


def distance_error(
    predicted: Float[Tensor, "B L 3 3"],
    true: Float[Tensor, "B L 3 3"],
    mask: Bool[Tensor, "B L"],
    atoms: Bool[Tensor, "B 3L"] | None = None,
) -> Float[Tensor, ""]:
    """Sum over pairs of atoms, 9 a pair of residues, of min((d - d')^2, 25); of `atoms` (default all of `mask`).

    d = sqrt(|x - y|^2 + 0.01^2): of residues that a decoder puts in one place, as it does with a chain of one code,
    |x - y| has a gradient of full size in a direction that is rounding.
    """
    found, wanted = (
        (_distances(_still(x, mask).flatten(1, 2)).square() + SOFTENED**2).sqrt() for x in (predicted, true)
    )
    valid = mask.repeat_interleave(3, 1) if atoms is None else atoms
    return _pair_sum((found - wanted).square().clamp(max=MOST_DISTANCE), valid)


def direction_error(
    predicted: Float[Tensor, "B L 3 3"], true: Float[Tensor, "B L 3 3"], mask: Bool[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """Sum over pairs of `direction_mask` of min((v_i . v_j - v'_i . v'_j)^2, 20)."""
    found, wanted = (directions(_still(x, mask)).flatten(1, 2) for x in (predicted, true))
    valid = direction_mask(true, mask).flatten(1)
    products = found @ found.transpose(1, 2) - wanted @ wanted.transpose(1, 2)
    return _pair_sum(products.square().clamp(max=MOST_DIRECTION), valid)


def directions(backbone: Float[Tensor, "B L 3 3"]) -> Float[Tensor, "B L 6 3"]:
    """N -> CA, CA -> C, C -> next N, and the normals at CA, N and C, none of unit length."""
    n, ca, c = backbone.unbind(2)
    out, along = ca - n, c - ca
    onwards = torch.cat([n[:, 1:], n[:, -1:]], 1) - c
    before = torch.cat([onwards[:, :1], onwards[:, :-1]], 1)
    cross = torch.linalg.cross
    return torch.stack([out, along, onwards, -cross(out, along), cross(before, out), cross(along, onwards)], 2)


def direction_mask(true: Float[Tensor, "B L 3 3"], mask: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L 6"]:
    """Which of the six there are: those over a peptide bond need one to the next residue, or from the one before."""
    reach = (true[:, 1:, frames.NITROGEN] - true[:, :-1, frames.CARBON]).norm(dim=-1)
    bonded = mask[:, 1:] & mask[:, :-1] & (reach < BOND)
    none = torch.zeros_like(mask[:, :1])
    after, before = torch.cat([bonded, none], 1), torch.cat([none, bonded], 1)
    return torch.stack([mask, mask, after, mask, before, after], 2)


def distance_entropy(
    logits: Float[Tensor, "B L L 64"],
    true: Float[Tensor, "B L 3 3"],
    mask: Bool[Tensor, "B L"],
    edges: Sequence[float] = EDGES,
) -> Float[Tensor, ""]:
    """Sum over pairs of the cross-entropy of the bin of their CB distance."""
    between = torch.tensor(edges, dtype=true.dtype, device=true.device)
    bins = torch.bucketize(_distances(frames.beta_carbon(_still(true, mask))), between, right=True)
    return _entropy(logits, bins, mask)


def direction_entropy(
    logits: Float[Tensor, "B L L 96"], true: Float[Tensor, "B L 3 3"], mask: Bool[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """Sum over pairs and six products of the cross-entropy of the product's bin.

    The products of unit vectors a = CA -> C, b = CA -> N and n = a x b of i with those of j: aa, bb, nn, ab, an, bn.
    """
    n, ca, c = _still(true, mask).unbind(2)
    a, b = normalize(c - ca, dim=-1), normalize(n - ca, dim=-1)
    normal = normalize(torch.linalg.cross(a, b), dim=-1)
    pairs = ((a, a), (b, b), (normal, normal), (a, b), (a, normal), (b, normal))
    products = torch.stack([x @ y.transpose(1, 2) for x, y in pairs], -1)
    # A residue's own right angles lie on an edge: what is beyond rounding must not choose their bin.
    bins = (((products + 1.0) / DIRECTION_WIDTH * 1e5).round() / 1e5).long().clamp(0, DIRECTION_BINS - 1)
    return _entropy(logits.unflatten(-1, (DIRECTION_PAIRS, DIRECTION_BINS)), bins, mask)


def residue_entropy(
    logits: Float[Tensor, "B L R"], residues: Int64[Tensor, "B L"], known: Bool[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """Sum of the cross-entropy of the residue types that are known."""
    each = cross_entropy(logits.flatten(0, 1), residues.where(known, 0).flatten(), reduction="none")
    return torch.where(known.flatten(), each, 0.0).double().sum()


def pair_counts(true: Float[Tensor, "B L 3 3"], mask: Bool[Tensor, "B L"]) -> dict[str, int]:
    """What the sums run over: `pairs` of residues and `directions`, pairs of vectors."""
    vectors = direction_mask(true, mask).sum((1, 2))
    return {"pairs": int(mask.sum(1).square().sum()), "directions": int(vectors.square().sum())}


def _still(backbone: Tensor, mask: Bool[Tensor, "B L"]) -> Tensor:
    return torch.where(mask[..., None, None], backbone, 0.0)


def _distances(points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N N"]:
    # Through products, near points would lose their distance to rounding.
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def _pair_sum(each: Float[Tensor, "B N N"], valid: Bool[Tensor, "B N"]) -> Float[Tensor, ""]:
    return torch.where(valid.unsqueeze(1) & valid.unsqueeze(2), each, 0.0).sum((1, 2)).double().sum()


def _entropy(logits: Tensor, bins: Int64[Tensor, "B L L ..."], mask: Bool[Tensor, "B L"]) -> Float[Tensor, ""]:
    each = cross_entropy(logits.flatten(0, -2), bins.flatten(), reduction="none").view(bins.shape)
    return _pair_sum(each.flatten(3).sum(-1) if each.dim() > 3 else each, mask)
