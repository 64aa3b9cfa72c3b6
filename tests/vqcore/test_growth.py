"""Growing codebooks: laws of what is kept, where new codes go, and how many a code gets."""

import pytest
import torch

from vqcore.growth import grow, shares


def book(size: int = 12, dim: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))


def distortion(x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x.double(), vectors.double()).square().amin(1)


def test_growing_to_the_same_size_is_the_identity():
    vectors = book()
    assert grow(vectors, torch.ones(12), 12).equal(vectors)


@pytest.mark.parametrize("size", [13, 24, 40])
def test_no_vector_is_farther_from_its_nearest_code_than_before(size):
    vectors, x = book(), torch.randn(500, 5, generator=torch.Generator().manual_seed(1))
    codes = torch.cdist(x, vectors).argmin(1)
    lost = torch.zeros(12, dtype=torch.float64).index_add_(0, codes, distortion(x, vectors))
    grown = grow(vectors, lost, size)
    assert grown.shape == (size, 5)
    assert grown[:12].equal(vectors), "the old codes keep their bits and their numbers"
    assert len(torch.unique(grown, dim=0)) == size
    before, after = distortion(x, vectors), distortion(x, grown)
    assert (after <= before).all()
    assert after.sum() < before.sum()


def test_new_codes_lie_a_quarter_of_the_way_to_the_nearest_codes_in_turn():
    vectors = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 8.0], [-20.0, 0.0]])
    grown = grow(vectors, torch.tensor([9.0, 0.0, 0.0, 0.0]), 8)
    assert grown[4:].tolist() == [[1.0, 0.0], [0.0, 2.0], [-5.0, 0.0], [0.5, 0.0]]


def test_new_codes_are_shared_out_to_what_loses_the_most():
    """Against a slow count: seat after seat to the largest quotient."""
    weights = torch.tensor([5.0, 1.0, 0.0, 3.0, 3.0])
    given = [0] * 5
    for _ in range(9):
        quotients = [float(w) / (n + 1) for w, n in zip(weights, given, strict=True)]
        given[quotients.index(max(quotients))] += 1
    assert shares(weights, 9).tolist() == given
    assert given[2] == 0
    assert shares(torch.tensor([8.0, 3.0]), 3).tolist() == [2, 1]
    assert shares(torch.zeros(3), 4).tolist() == [2, 1, 1]


def test_growing_follows_scale_and_place_of_the_codebook():
    vectors, weights = book().double(), torch.arange(12.0)
    moved = grow(3 * vectors + 7, weights, 30)
    assert torch.allclose(moved, 3 * grow(vectors, weights, 30) + 7, atol=1e-12)


def test_the_bits_do_not_depend_on_how_codes_are_cut_into_tiles(monkeypatch):
    vectors, weights = book(200, 7), torch.arange(200.0)
    whole = grow(vectors, weights, 400)
    monkeypatch.setattr("vqcore.growth.ROWS", 30)
    assert grow(vectors, weights, 400).equal(whole)


def test_equal_codes_and_a_single_code_still_give_new_places():
    alone = grow(torch.zeros(1, 3), torch.ones(1), 4)
    assert len(torch.unique(alone, dim=0)) == 4
    twins = grow(torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0]]), torch.tensor([5.0, 0.0, 0.0]), 4)
    assert twins[3].tolist() == [1.5, 2.0]


@pytest.mark.parametrize(
    ("weights", "size", "said"),
    [
        (torch.ones(12), 11, "12 codes cannot grow to 11"),
        (torch.ones(11), 20, "12 finite numbers"),
        (torch.full((12,), -1.0), 20, "12 finite numbers"),
        (torch.full((12,), float("nan")), 20, "12 finite numbers"),
    ],
)
def test_what_cannot_grow_is_refused(weights, size, said):
    with pytest.raises(ValueError, match=said):
        grow(book(), weights, size)
