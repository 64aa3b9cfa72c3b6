"""A larger codebook from a smaller one: the codes that lose the most are split, and all codes stay where they are."""

import torch
from jaxtyping import Float
from torch import Tensor

STEP = 0.25
"""A new code lies this share of the way from the code that is split to a neighbour: in the middle of the half of the
cell that faces it."""
ROWS = 1024
NUDGE = 0.01


@torch.no_grad()
def grow(vectors: Float[Tensor, "K D"], weights: Float[Tensor, " K"], num_codes: int) -> Float[Tensor, "K2 D"]:
    """`vectors` followed by new codes. A pure function: nothing is drawn.

    New codes are shared out one by one: the next goes to the code with the largest weight / (its new codes + 1), of
    equal ones the first. The j-th new code of a code lies a quarter of the way to its j-th nearest other code. All old
    codes are kept, so no vector is farther from its nearest code than it was.

    Args:
        weights: how much each code is worth splitting, at least 0: its distortion or its usage.
        num_codes: K2, at least K.

    Raises:
        ValueError: num_codes below K, weights that are negative, not finite or not K.
    """
    size = len(vectors)
    if num_codes < size:
        raise ValueError(f"a codebook of {size} codes cannot grow to {num_codes}: give num_codes >= {size}")
    if tuple(weights.shape) != (size,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"weights must be {size} finite numbers of at least 0, one for every code")
    children = shares(weights, num_codes - size)
    if num_codes == size:
        return vectors.clone()
    new = [
        _around(vectors, parents, children[parents].tolist())
        for parents in children.nonzero().flatten().split(max(1, ROWS * ROWS // size))
    ]
    return torch.cat([vectors, *new])


def shares(weights: Float[Tensor, " K"], seats: int) -> Tensor:
    """`seats` shared out to the largest weight / (what it has + 1), one by one; int64 [K]. Without weight, evenly."""
    weights = weights.double() if bool(weights.sum() > 0) else torch.ones_like(weights, dtype=torch.float64)
    given = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
    for _ in range(seats):
        given[torch.argmax(weights / (given + 1))] += 1
    return given


def _around(vectors: Float[Tensor, "K D"], parents: Tensor, children: list[int]) -> Float[Tensor, "M D"]:
    exact = vectors.double()
    # Not by the product of matrices, whose rounding would order near neighbours anew with every shape.
    away = torch.cdist(exact[parents], exact, compute_mode="donot_use_mm_for_euclid_dist")
    away = torch.where(away == 0, torch.inf, away)
    most = min(max(children), len(vectors))
    distances, nearest = torch.sort(away, dim=1, stable=True)
    rows = []
    for place, parent in enumerate(parents.tolist()):
        others = nearest[place, :most][distances[place, :most] < torch.inf].tolist()
        rows += [_child(exact, parent, others, child) for child in range(children[place])]
    return torch.stack(rows).to(vectors.dtype)


def _child(exact: Float[Tensor, "K D"], parent: int, others: list[int], child: int) -> Float[Tensor, " D"]:
    if not others:
        # There is no other place in the codebook to move to.
        own = exact[parent]
        return own + NUDGE * (child + 1) * torch.where(own == 0, torch.ones_like(own), own)
    around, again = child % len(others), child // len(others)
    return torch.lerp(exact[parent], exact[others[around]], STEP / (1 + again))
