"""Distances of lines and bundles: laws, NumPy's interpolation, and DIPY's own functions."""

import numpy as np
import pytest
import torch

from vqcore import polylines


def lines(count: int, points: int = 30, seed: int = 0) -> torch.Tensor:
    """Walks that bend, each starting near the others."""
    drawn = np.random.default_rng(seed)
    return torch.from_numpy(0.02 * drawn.normal(size=(count, points, 3)).cumsum(1)).float()


def test_resampled_points_lie_where_interpolation_over_arc_length_puts_them():
    some = lines(5).double()
    some[0, 7:9] = some[0, 6]
    found = polylines.resampled(some, 12)
    for line, points in zip(some.numpy(), found.numpy(), strict=True):
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
        places = np.linspace(0, along[-1], 12)
        np.testing.assert_allclose(points, np.stack([np.interp(places, along, axis) for axis in line.T], 1), atol=1e-9)
    torch.testing.assert_close(found[:, [0, -1]], some[:, [0, -1]])
    standing = torch.ones(1, 4, 3)
    assert torch.equal(polylines.resampled(standing, 3), torch.ones(1, 3, 3))


def test_mdf_is_symmetric_nought_for_the_same_line_and_does_not_see_directions():
    one, other = lines(6), lines(6, seed=1)
    found = polylines.mdf(one, other)
    torch.testing.assert_close(found, polylines.mdf(other, one))
    torch.testing.assert_close(polylines.mdf(one.flip(1), other), found)
    torch.testing.assert_close(polylines.mdf(one, one.flip(1)), torch.zeros(6))
    assert (found > 0).all()
    table = polylines.mdf_matrix(one, other)
    torch.testing.assert_close(table.diagonal(), found)
    assert table.shape == (6, 6)


def test_a_large_table_of_distances_is_that_of_its_parts(monkeypatch):
    one, other = lines(7), lines(5, seed=1)
    whole = polylines.mdf_matrix(one, other)
    monkeypatch.setattr(polylines, "AT_ONCE", 2 * other.numel())
    assert torch.equal(polylines.mdf_matrix(one, other), whole)


def test_lengths_and_bending_of_what_can_be_worked_out_by_hand():
    straight = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]])
    corner = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 2, 0]])
    both = torch.stack([straight, corner])
    assert polylines.lengths(both).tolist() == [3, 3]
    torch.testing.assert_close(polylines.bending(both), torch.tensor([0.0, 2**0.5 / 2]))


def test_adjacency_does_not_see_order_or_direction_and_grows_with_the_threshold():
    one, other = lines(16), lines(16) + 0.01 * torch.randn(16, 30, 3, generator=torch.Generator().manual_seed(2))
    assert polylines.bundle_adjacency(one, one, 1e-6) == 1
    thresholds = (0.005, 0.01, 0.015, 0.02, 0.05)
    found = [polylines.bundle_adjacency(one, other, t) for t in thresholds]
    assert found == sorted(found)
    assert 0 < found[2] < 1
    turned = torch.where(torch.arange(16).view(-1, 1, 1) % 2 == 0, other.flip(1), other)[torch.randperm(16)]
    assert [polylines.bundle_adjacency(one, turned, t) for t in thresholds] == found
    assert all(value * 32 == int(value * 32) for value in found)
    assert polylines.bundle_adjacency(one[:0], other, 1.0) == 0


@pytest.mark.parametrize("threshold", [0.01, 0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("counts", [(12, 12), (9, 14)])
def test_adjacency_is_dipys_shape_similarity(threshold, counts):
    from dipy.segment.bundles import bundle_shape_similarity
    from dipy.tracking.streamline import Streamlines

    one, other = lines(counts[0], 64), lines(counts[1], 64)
    other = other + 0.03 * torch.randn(other.shape, generator=torch.Generator().manual_seed(1))
    other[::2] = other[::2].flip(1)
    expected = bundle_shape_similarity(
        *(Streamlines(list(bundle.numpy())) for bundle in (one, other)),
        np.random.RandomState(0),
        clust_thr=[0],
        threshold=threshold,
    )
    assert polylines.bundle_adjacency(one, other, threshold) == pytest.approx(expected)
