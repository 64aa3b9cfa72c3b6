"""The five terms against loops that write out their definitions, and what must not change them."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.vqcore.chains import batch_of, chain, motion, moved
from vqcore import backbone_losses as terms
from vqcore import frames


@pytest.fixture
def pair():
    """(predicted, true, mask): a chain with a gap in it, and a short one."""
    long, short = chain(9, 1), chain(5, 2)
    true, mask = batch_of(torch.cat([long[:4], long[6:]]), short)
    mask[0, 1] = False
    drawn = torch.Generator().manual_seed(0)
    return true + 2 * torch.randn(true.shape, generator=drawn, dtype=torch.float64), true, mask


def residues(mask):
    return [(b, i) for b, i in np.argwhere(mask.numpy())]


def test_distances_of_all_pairs_of_atoms(pair):
    predicted, true, mask = pair
    total = 0.0
    for (b, i), (c, j) in itertools.product(residues(mask), repeat=2):
        for x, y in itertools.product(range(3), repeat=2) if b == c else ():
            d = [math.hypot(math.dist(p[b, i, x], p[b, j, y]), 0.01) for p in (predicted, true)]
            total += min((d[0] - d[1]) ** 2, 25.0)
    assert terms.distance_error(predicted, true, mask).item() == pytest.approx(total)
    everything = terms.distance_error(predicted, true, mask, torch.zeros_like(mask).repeat(1, 3))
    assert everything.item() == 0.0


def vectors_of(points, b, i):
    n, ca, c = points[b, i].numpy()
    found = {0: ca - n, 1: c - ca, 3: -np.cross(ca - n, c - ca)}
    if i + 1 < points.shape[1]:
        after = points[b, i + 1, 0].numpy()
        found[2], found[5] = after - c, np.cross(c - ca, after - c)
    if i:
        found[4] = np.cross(n - points[b, i - 1, 2].numpy(), ca - n)
    return found


def test_directions_of_all_pairs_of_vectors_over_bonds_that_are_there(pair):
    predicted, true, mask = pair
    there = []
    for b, i in residues(mask):
        after = i + 1 < mask.shape[1] and mask[b, i + 1] and math.dist(true[b, i, 2], true[b, i + 1, 0]) < 2
        before = i and mask[b, i - 1] and math.dist(true[b, i - 1, 2], true[b, i, 0]) < 2
        there += [(b, i, kind) for kind in (0, 1, 3)]
        there += [(b, i, kind) for kind in (2, 5) if after]
        there += [(b, i, 4)] if before else []
    total, pairs = 0.0, 0
    for (b, i, k), (c, j, m) in itertools.product(there, repeat=2):
        if b == c:
            dots = [vectors_of(p, b, i)[k] @ vectors_of(p, b, j)[m] for p in (predicted, true)]
            total += min((dots[0] - dots[1]) ** 2, 20.0)
            pairs += 1
    assert terms.direction_error(predicted, true, mask).item() == pytest.approx(total)
    counted = terms.pair_counts(true, mask)
    assert counted == {"pairs": sum(b == c for (b, _), (c, _) in itertools.product(residues(mask), repeat=2)),
                       "directions": pairs}  # fmt: skip
    # Residues 3 and 4 of the first chain are not bonded: two vectors of one and one of the other are missing.
    assert not terms.direction_mask(true, mask)[0, 3, 2]


def entropy(logits, place):
    return -torch.log_softmax(logits, -1)[place].item()


def test_bins_of_distances_and_of_directions(pair):
    _, true, mask = pair
    length = mask.shape[1]
    near, turned = torch.randn(2, length, length, 64).double(), torch.randn(2, length, length, 96).double()
    beta = frames.beta_carbon(true)
    total, products = 0.0, 0.0
    for (b, i), (c, j) in itertools.product(residues(mask), repeat=2):
        if b != c:
            continue
        place = sum(math.dist(beta[b, i], beta[b, j]) >= 2.3125 + 0.3075 * edge for edge in range(63))
        total += entropy(near[b, i, j], place)
        axes = []
        for at in (i, j):
            n, ca, carbon = true[b, at].numpy()
            a, e = (carbon - ca) / np.linalg.norm(carbon - ca), (n - ca) / np.linalg.norm(n - ca)
            axes.append((a, e, np.cross(a, e) / np.linalg.norm(np.cross(a, e))))
        for kind, (x, y) in enumerate(((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))):
            place = min(int((axes[0][x] @ axes[1][y] + 1) / 0.125), 15)
            products += entropy(turned[b, i, j].view(6, 16)[kind], place)
    assert terms.distance_entropy(near, true, mask).item() == pytest.approx(total)
    assert terms.direction_entropy(turned, true, mask).item() == pytest.approx(products)
    squares = [edge**2 for edge in terms.EDGES]
    assert terms.distance_entropy(near, true, mask, squares).item() != pytest.approx(total)


def test_types_that_are_not_known_are_left_out():
    logits = torch.randn(2, 3, 20).double()
    kinds, known = torch.tensor([[1, 2, 20], [5, 20, 20]]), torch.tensor([[True, True, False], [True, False, False]])
    wanted = entropy(logits[0, 0], 1) + entropy(logits[0, 1], 2) + entropy(logits[1, 0], 5)
    assert terms.residue_entropy(logits, kinds, known).item() == pytest.approx(wanted)


def test_terms_do_not_change_with_the_pose_or_with_what_is_masked(pair):
    predicted, true, mask = pair
    for term in (terms.distance_error, terms.direction_error):
        plain = term(predicted, true, mask).item()
        assert term(moved(predicted, motion(1)), moved(true, motion(2)), mask).item() == pytest.approx(plain)
        other_predicted, other_true = predicted.clone(), true.clone()
        other_predicted[~mask], other_true[~mask] = float("nan"), float("inf")
        assert term(other_predicted, other_true, mask).item() == pytest.approx(plain)
        assert term(true, true, mask).item() == 0.0
        mirrored = true * torch.tensor([1.0, 1.0, -1.0])
        assert (term(mirrored, true, mask).item() > 1e-3) == (term is terms.direction_error)


def test_gradients_are_finite_where_a_prediction_is_right_and_none_comes_from_what_is_masked(pair):
    _, true, mask = pair
    found = true.clone().requires_grad_()
    (terms.distance_error(found, true, mask) + terms.direction_error(found, true, mask)).backward()
    assert found.grad.isfinite().all()
    assert (found.grad[~mask] == 0).all()


def test_residues_in_one_place_have_no_gradient_of_rounding():
    _, true, mask = (None, *batch_of(chain(6, 1)))
    one_place = true[:, :1].expand_as(true).contiguous()
    nudged = (one_place + 1e-12 * torch.randn(one_place.shape, dtype=torch.float64)).requires_grad_()
    still = one_place.clone().requires_grad_()
    for found in (nudged, still):
        terms.distance_error(found, true, mask).backward()
    torch.testing.assert_close(nudged.grad, still.grad, rtol=0, atol=1e-6)
