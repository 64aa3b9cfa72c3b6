"""Superposition, lDDT and dihedrals against biotite's, which was written by others."""

import biotite.structure as reference
import numpy as np
import pytest
import torch

from vqcore.superposition import dihedrals, lddt, rmsd, superpose


def structures(count: int = 5, atoms: int = 40, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random walks with steps of 3.8 Angstrom, and noisy copies that were turned and moved."""
    drawn = torch.Generator().manual_seed(0)
    steps = torch.nn.functional.normalize(torch.randn(count, atoms, 3, generator=drawn, dtype=torch.float64), dim=-1)
    fixed = 3.8 * steps.cumsum(1)
    turn = torch.linalg.qr(torch.randn(count, 3, 3, generator=drawn, dtype=torch.float64))[0]
    turn *= torch.linalg.det(turn)[:, None, None]
    mobile = (fixed + noise * torch.randn(fixed.shape, generator=drawn, dtype=torch.float64)) @ turn + 17.0
    return mobile, fixed


def test_rmsd_is_biotites():
    mobile, fixed = structures()
    expected = [
        reference.rmsd(y.numpy(), reference.superimpose(y.numpy(), x.numpy())[0])
        for x, y in zip(mobile, fixed, strict=True)
    ]
    np.testing.assert_allclose(rmsd(mobile, fixed).numpy(), expected, rtol=1e-5)


def test_a_moved_structure_is_the_same_and_its_mirror_image_is_not():
    mobile, fixed = structures(noise=0.0)
    assert float(rmsd(mobile, fixed).max()) < 1e-9
    motion = superpose(mobile, fixed)
    assert torch.allclose(torch.linalg.det(motion.rotation), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(motion.move(mobile), fixed)
    assert float(rmsd(mobile * torch.tensor([1.0, 1.0, -1.0]), fixed).min()) > 1.0


def test_what_is_masked_does_not_matter():
    mobile, fixed = structures()
    mask = torch.arange(50).expand(5, 50) < 40
    filled = [torch.cat([x, torch.full((5, 10, 3), value)], 1) for x, value in ((mobile, torch.nan), (fixed, 1e6))]
    for measure in (rmsd, lddt):
        assert torch.allclose(measure(*filled, mask), measure(mobile, fixed), rtol=1e-12)


def test_lddt_of_many_atoms_is_that_of_all_pairs_at_once(monkeypatch):
    drawn = torch.Generator().manual_seed(0)
    fixed = 6 * torch.randn(2, 23, 3, generator=drawn)
    mobile, mask = fixed + torch.randn(2, 23, 3, generator=drawn), torch.rand(2, 23, generator=drawn) > 0.2
    whole = lddt(mobile, fixed, mask)
    monkeypatch.setattr("vqcore.superposition.LDDT_ROWS", 5)
    torch.testing.assert_close(lddt(mobile, fixed, mask), whole)
    assert ((whole > 0) & (whole < 1)).all()


def test_lddt_is_biotites():
    mobile, fixed = structures()
    expected = []
    for x, y in zip(mobile, fixed, strict=True):
        atoms = reference.AtomArray(len(y))
        atoms.coord, atoms.res_id = y.numpy(), np.arange(len(y))
        expected.append(reference.lddt(atoms, x.numpy().astype(np.float32)))
    np.testing.assert_allclose(lddt(mobile, fixed).numpy(), expected, atol=2e-3)
    assert lddt(fixed, fixed).tolist() == [1.0] * 5


def test_dihedrals_are_biotites_and_end_at_a_gap():
    drawn = np.random.default_rng(0)
    chain = reference.AtomArray(30)
    chain.coord = (0.85 * drawn.normal(size=(30, 3)).cumsum(0)).astype(np.float32)
    chain.coord[15:] += 5.0
    chain.atom_name = np.tile(["N", "CA", "C"], 10)
    chain.res_id, chain.res_name[:] = np.repeat(np.arange(10), 3), "ALA"
    backbone = torch.from_numpy(chain.coord.copy()).view(1, 10, 3, 3)
    found, there = dihedrals(backbone)
    expected = np.stack(reference.dihedral_backbone(chain), 1)
    bonded = (backbone[0, :-1, 2] - backbone[0, 1:, 0]).norm(dim=-1) < 2.5
    assert there[0, 1:, 0].tolist() == there[0, :-1, 1].tolist() == there[0, :-1, 2].tolist() == bonded.tolist()
    assert int(bonded.sum()) == 8
    both = there[0].numpy() & np.isfinite(expected)
    assert both.sum() == int(there.sum())
    np.testing.assert_allclose(found[0].numpy()[both], expected[both], atol=1e-4)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be one \\[B, N, 3\\]"):
        rmsd(torch.zeros(1, 4, 3), torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match="it must be bool"):
        lddt(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), torch.ones(1, 4))
    with pytest.raises(ValueError, match="3 or more atoms"):
        dihedrals(torch.zeros(1, 4, 2, 3))
