"""Protein backbones grown from bond lengths, bond angles and torsions, without anything of vqcore's."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LENGTHS = (1.458, 1.525, 1.329)
"""Of N-CA, CA-C and C-N, in Angstrom."""
ANGLES = (np.deg2rad(111.0), np.deg2rad(117.2), np.deg2rad(121.7))
"""At CA, C and N."""
SHAPES = ((-57.0, -47.0), (-120.0, 130.0), (-75.0, 150.0))
"""(phi, psi) of a helix, a strand and a coil, in degrees."""


def chain(length: int, seed: int = 0) -> Tensor:
    """[L, 3, 3] float64: N, CA and C in stretches of helix, strand and coil."""
    drawn = np.random.default_rng(seed)
    shape = np.repeat(drawn.integers(0, len(SHAPES), length), drawn.integers(3, 9, length))[:length]
    torsions = np.deg2rad(np.array(SHAPES)[shape] + drawn.normal(0, 8, (length, 2)))
    atoms = [np.zeros(3), np.array([LENGTHS[0], 0.0, 0.0])]
    turn = np.array([-np.cos(ANGLES[0]), np.sin(ANGLES[0]), 0.0])
    atoms.append(atoms[1] + LENGTHS[1] * turn)
    for residue in range(1, length):
        psi, omega, phi = torsions[residue - 1, 1], np.pi, torsions[residue, 0]
        atoms.append(_next(atoms[-3:], LENGTHS[2], ANGLES[1], psi))
        atoms.append(_next(atoms[-3:], LENGTHS[0], ANGLES[2], omega))
        atoms.append(_next(atoms[-3:], LENGTHS[1], ANGLES[0], phi))
    return torch.from_numpy(np.array(atoms).reshape(length, 3, 3))


def _next(last: list[npt.NDArray[np.float64]], length: float, angle: float, torsion: float) -> npt.NDArray[np.float64]:
    a, b, c = last
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    side = np.cross(normal, along)
    flat = -np.cos(angle) * along + np.sin(angle) * (np.cos(torsion) * side + np.sin(torsion) * normal)
    found: npt.NDArray[np.float64] = c + length * flat
    return found


def motion(seed: int, far: float = 100.0) -> tuple[Tensor, Tensor]:
    """(rotation, shift of about `far` Angstrom) in float64."""
    drawn = torch.Generator().manual_seed(seed)
    rotation, upper = torch.linalg.qr(torch.randn(3, 3, generator=drawn, dtype=torch.float64))
    rotation = rotation * upper.diagonal().sign()
    rotation[:, 2] *= torch.linalg.det(rotation).sign()
    return rotation, far * torch.randn(3, generator=drawn, dtype=torch.float64)


def moved(points: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    rotation, shift = by
    return points @ rotation.T + shift


def batch_of(*chains: Tensor) -> tuple[Tensor, Tensor]:
    """([B, L, 3, 3] filled up with zeros, mask [B, L])."""
    backbone = torch.nn.utils.rnn.pad_sequence(list(chains), batch_first=True)
    lengths = torch.tensor([len(one) for one in chains])
    return backbone, torch.arange(backbone.shape[1]) < lengths.unsqueeze(1)
