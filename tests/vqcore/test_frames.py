"""Frames: their laws under motion, scipy's trees for neighbours, and three residues of ubiquitin (1UBQ)."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from tests.vqcore.chains import batch_of, chain, motion, moved
from vqcore import frames

# N, CA, C, O, CB of residues 1 to 3.
UBIQUITIN = torch.tensor(
    [
        [[27.340, 24.430, 2.614], [26.266, 25.413, 2.842], [26.913, 26.639, 3.531], [27.886, 26.463, 4.263],
         [25.112, 24.880, 3.649]],
        [[26.335, 27.770, 3.258], [26.850, 29.021, 3.898], [26.100, 29.253, 5.202], [24.865, 29.024, 5.330],
         [26.733, 30.148, 2.905]],
        [[26.849, 29.656, 6.217], [26.235, 30.058, 7.497], [26.882, 31.428, 7.862], [27.906, 31.711, 7.264],
         [26.344, 29.050, 8.645]],
    ]
)  # fmt: skip


def test_a_frame_turns_and_moves_with_its_residue():
    backbone, by = chain(20), motion(1)
    rotation, origin, there = frames.frames_of(backbone)
    turned, shifted, _ = frames.frames_of(moved(backbone, by))
    assert there.all()
    torch.testing.assert_close(turned, by[0] @ rotation)
    torch.testing.assert_close(shifted, moved(origin, by))
    torch.testing.assert_close(rotation.transpose(1, 2) @ rotation, torch.eye(3).double().expand(20, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(20).double())


def test_a_residue_put_at_its_own_frame_is_where_it_was():
    ideal = frames.placed(torch.eye(3).double(), torch.zeros(3).double())
    atoms = moved(ideal, motion(3))
    rotation, origin, _ = frames.frames_of(atoms)
    torch.testing.assert_close(frames.placed(rotation, origin), atoms)
    real = frames.placed(*frames.frames_of(UBIQUITIN)[:2])
    assert (real - UBIQUITIN[:, :3]).norm(dim=-1).max() < 0.2


def test_atoms_that_coincide_lie_on_a_line_or_are_placeholders_have_no_frame():
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    placeholder = UBIQUITIN[0, :3].clone()
    placeholder[1] = 9999.0
    rotation, _, there = frames.frames_of(torch.stack([torch.zeros(3, 3), line, placeholder, UBIQUITIN[0, :3]]))
    assert there.tolist() == [False, False, False, True]
    assert torch.equal(rotation[:3], torch.eye(3).expand(3, 3, 3))


def test_six_numbers_are_a_rotation_and_its_own_columns_give_it_back():
    six = torch.randn(9, 6, dtype=torch.float64)
    rotation = frames.rotation_of(six)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), torch.eye(3).double().expand(9, 3, 3))
    torch.testing.assert_close(frames.rotation_of(rotation[..., :2].transpose(1, 2).flatten(1)), rotation)


def test_oxygen_and_beta_carbon_are_where_a_crystal_has_them():
    four = frames.with_oxygen(UBIQUITIN[:, :3])
    assert torch.equal(four[:, :3], UBIQUITIN[:, :3])
    assert (four[:2, 3] - UBIQUITIN[:2, 3]).norm(dim=-1).max() < 0.2
    assert (frames.beta_carbon(UBIQUITIN) - UBIQUITIN[:, 4]).norm(dim=-1).max() < 0.2


@pytest.mark.parametrize("count", [1, 5, 16])
def test_neighbours_are_those_of_a_tree(count, monkeypatch):
    monkeypatch.setattr(frames, "QUERIES", 7)
    backbone, mask = batch_of(chain(30, 1), chain(4, 2), chain(19, 3))
    mask[0, 10] = False
    alpha = backbone[:, :, 1]
    places, real = frames.neighbours(alpha, mask, count)
    for row in range(3):
        left = np.flatnonzero(mask[row].numpy())
        tree = cKDTree(alpha[row, left].numpy())
        for place in range(mask.shape[1]):
            found = places[row, place][real[row, place]].tolist()
            if place not in left:
                assert found == []
                continue
            _, near = tree.query(alpha[row, place].numpy(), min(count, len(left)))
            assert found[0] == place
            assert sorted(found) == sorted(left[np.atleast_1d(near)].tolist())
