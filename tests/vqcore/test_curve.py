"""The curve: projection against dense grids and brute force; doubling against the authors' code and geometry."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vqcore import curve


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def squared_to(x: Tensor, corners: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
    return (x - curve.at(corners, segments, positions)).square().sum(-1)


def all_segments(x: Tensor, corners: Tensor) -> Tensor:
    """Squared distance [N, K - 1] of every row to every segment."""
    start, along = corners[:-1], corners.diff(dim=0)
    offset = x.unsqueeze(1) - start
    positions = ((offset * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
    return (offset - positions.unsqueeze(-1) * along).square().sum(-1)


# Points on the curve


def test_dithered_points_lie_on_their_segments_with_gradients_to_both_corners() -> None:
    corners, positions, g = drawn(0, 6, 3).requires_grad_(), torch.rand(5, dtype=torch.float64), drawn(1, 5, 3)
    points = curve.dithered(corners, positions)
    c, lam = corners.detach().numpy(), positions.numpy()
    for j in range(5):
        np.testing.assert_allclose(points[j].detach().numpy(), (1 - lam[j]) * c[j] + lam[j] * c[j + 1], rtol=1e-14)
    (points * g).sum().backward()
    wanted = torch.zeros(6, 3, dtype=torch.float64)
    wanted[:-1] += (1 - positions).unsqueeze(-1) * g
    wanted[1:] += positions.unsqueeze(-1) * g
    torch.testing.assert_close(corners.grad, wanted)


def test_positions_0_and_1_are_the_corners_bit_for_bit_and_a_negative_segment_is_0() -> None:
    corners = drawn(0, 6, 3, dtype=torch.float32)
    segments = torch.arange(5)
    assert torch.equal(curve.at(corners, segments, torch.zeros(5)), corners[:-1])
    assert torch.equal(curve.at(corners, segments, torch.ones(5)), corners[1:])
    assert not curve.at(corners, torch.tensor([-1, -1]), torch.tensor([0.0, 0.7])).any()


# Projection


@pytest.mark.parametrize("num_codes", [2, 3, 4, 12])
@pytest.mark.parametrize("dim", [1, 2])
def test_the_projection_is_the_best_of_a_dense_grid_on_the_two_segments(dim: int, num_codes: int) -> None:
    corners, x = drawn(0, num_codes, dim), 1.5 * drawn(1, 200, dim)
    segments, positions = curve.project(x, corners)
    assert ((positions >= 0) & (positions <= 1)).all()
    assert ((segments >= 0) & (segments < num_codes - 1)).all()
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for row, segment, position in zip(x, segments, positions, strict=True):
        nearest = int((row - corners).square().sum(-1).argmin())
        middle = min(max(nearest, 1), max(num_codes - 2, 1))
        candidates = sorted({middle - 1, min(middle, num_codes - 2)})
        points = torch.stack([(1 - grid[:, None]) * corners[j] + grid[:, None] * corners[j + 1] for j in candidates])
        squared = (row - points).square().sum(-1)
        found = squared_to(row[None], corners, segment[None], position[None]).item()
        assert int(segment) in candidates
        assert found <= squared.min() + 1e-12
        assert found >= squared.min() - 1e-5


@pytest.mark.parametrize(("num_codes", "dim"), [(2, 3), (3, 3), (64, 2), (64, 32)])
def test_the_projection_is_never_worse_than_the_nearest_corner_nor_better_than_all_segments(
    num_codes: int, dim: int
) -> None:
    corners, x = drawn(0, num_codes, dim), drawn(1, 2000, dim)
    squared = squared_to(x, corners, *curve.project(x, corners))
    assert (squared <= torch.cdist(x, corners).amin(1).square() + 1e-12).all()
    assert (squared >= all_segments(x, corners).amin(1) - 1e-12).all()


def test_a_point_of_its_segment_stays() -> None:
    corners, x = drawn(0, 20, 3), drawn(1, 500, 3)
    segments, positions = curve.project(x, corners)
    on = curve.at(corners, segments, positions)
    again = squared_to(on, corners, *curve.project(on, corners))
    same = curve.project(on, corners)[0] == segments
    assert same.double().mean() > 0.9, "elsewhere another corner is nearest to the projection"
    assert again[same].sqrt().max() < 1e-6


def test_ties_take_the_left_segment() -> None:
    corners = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
    segments, positions = curve.project(torch.tensor([[0.0, 3.0], [0.1, 3.0], [0.0, 1.0]]), corners)
    assert segments.tolist() == [0, 0, 0]
    assert positions.tolist() == [1.0, 1.0, 1.0]
    odd = drawn(2, 5, 7, dtype=torch.float32)
    segments, positions = curve.project(odd[1:-1], odd)
    assert segments.tolist() == [0, 1, 2]
    assert positions.tolist() == [1.0, 1.0, 1.0]


def test_a_segment_of_length_0_is_its_corner() -> None:
    """By one projection formula it is 0 / 0: the diveq package gives NaN (tests/peers)."""
    corners, x = drawn(0, 6, 3), drawn(1, 100, 3)
    corners[1] = corners[0]
    segments, positions = curve.project(x, corners)
    without = torch.cat([corners[:1], corners[2:]])
    wanted = squared_to(x, without, *curve.project(x, without))
    torch.testing.assert_close(squared_to(x, corners, segments, positions), wanted)


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_a_row_does_not_depend_on_its_neighbours(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    corners, x = drawn(0, 33, dim, dtype=torch.float32), drawn(1, 700, dim, dtype=torch.float32)
    segments, positions = curve.project(x, corners)
    monkeypatch.setattr(curve, "_TILE_VALUES", 100 * dim)
    parts = [curve.project(part, corners) for part in x.split([0, 1, 299, 400])]
    assert torch.equal(torch.cat([part[0] for part in parts]), segments)
    assert torch.equal(torch.cat([part[1] for part in parts]), positions)


# Doubling


def authors_extension(entries: int, eps: float) -> Tensor:
    """codebook_extension of MHVali/Space-Filling-Vector-Quantizer 8f067a4, utils.py."""
    final = torch.zeros(entries * 2)
    everywhere = torch.arange(0, entries * 2)
    left, right = everywhere[0:entries][::2], everywhere[entries:][::2]
    corner = torch.arange(entries).float()
    final[left], final[left + 1] = corner[: entries // 2], corner[: entries // 2] + eps
    final[right], final[right + 1] = corner[entries // 2 :] - eps, corner[entries // 2 :]
    return final


@pytest.mark.parametrize("num_codes", [2, 3, 4, 5, 8, 64])
def test_doubling_keeps_the_curve(num_codes: int) -> None:
    old = drawn(0, num_codes, 5, dtype=torch.float32)
    new = curve.doubled(old)
    assert new.shape == (2 * num_codes, 5)
    assert new.dtype == torch.float32
    assert torch.equal(new[0], old[0])
    assert torch.equal(new[-1], old[-1])
    assert (old.unsqueeze(1) == new).all(-1).any(1).all(), "every old corner survives, bit for bit"
    assert curve.length(new).item() == pytest.approx(curve.length(old).item(), rel=1e-6)
    assert all_segments(new.double(), old.double()).amin(1).max() < 1e-12, "every new corner lies on the old curve"
    places = curve.doubling(num_codes)
    assert (places.diff() > 0).all()
    gaps = places.diff()[::2]
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.01))


@pytest.mark.parametrize("num_codes", [2, 4, 8, 64])
def test_doubling_is_that_of_the_authors(num_codes: int) -> None:
    torch.testing.assert_close(curve.doubling(num_codes).float(), authors_extension(num_codes, 0.01))


def test_doubling_refuses_what_has_no_segment_and_a_gap_that_crosses_its_neighbour() -> None:
    for num_codes, gap in ((1, 0.01), (4, 0.0), (4, 0.5)):
        with pytest.raises(ValueError, match=f"{num_codes} corners and a gap of {gap}"):
            curve.doubling(num_codes, gap)


# Reading


def test_length_is_the_sum_of_the_segments() -> None:
    assert curve.length(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])).item() == 6.0


def test_a_step_along_a_direction_moves_exactly_as_far() -> None:
    corners, w = drawn(0, 10, 512), drawn(1, 18, 512)
    d = curve.directions(corners)
    assert d.shape == (9, 512)
    torch.testing.assert_close(d.norm(dim=-1), torch.ones(9, dtype=torch.float64))
    along = corners[1:] - corners[:-1]
    torch.testing.assert_close((d * along).sum(-1), along.norm(dim=-1))
    for sigma in (-10.0, 0.5, 3.0):
        moved = (w + sigma * d[4] - w).norm(dim=-1)
        torch.testing.assert_close(moved, torch.full_like(moved, abs(sigma)))
    corners[5] = corners[4]
    assert not curve.directions(corners)[4].any(), "a segment of length 0 has no direction"
