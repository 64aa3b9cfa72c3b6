"""Backbone atoms of one model as every format gives them, and why a file gives none."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

BACKBONE = ("N", "CA", "C", "O")


class UnreadableStructure(ValueError):
    """Why a file gives no chains, in words that are few over a whole corpus."""


@dataclass(frozen=True)
class Atoms:
    """Backbone atoms of one model, in file order; all arrays have one entry an atom."""

    chain: npt.NDArray[np.str_]
    """As the author named it."""
    number: npt.NDArray[np.int32]
    """Of the residue, as the author numbered it."""
    insertion: npt.NDArray[np.str_]
    """Insertion code, "" where there is none."""
    residue: npt.NDArray[np.str_]
    """Residue name."""
    hetero: npt.NDArray[np.bool_]
    """A HETATM record."""
    free: npt.NDArray[np.bool_]
    """Of a molecule that is no part of the chain whose name it bears."""
    atom: npt.NDArray[np.int8]
    """Place in BACKBONE."""
    altloc: npt.NDArray[np.str_]
    """Alternate location, "" where there is none."""
    occupancy: npt.NDArray[np.float32]
    b_factor: npt.NDArray[np.float32]
    xyz: npt.NDArray[np.float32]
    """[N, 3] in Angstrom; NaN where the file gives none."""

    def __getitem__(self, choice: Any) -> "Atoms":
        return Atoms(**{item.name: getattr(self, item.name)[choice] for item in fields(self)})

    def __len__(self) -> int:
        return len(self.number)


def places_of(names: npt.NDArray[np.str_]) -> npt.NDArray[np.int8]:
    """Names of backbone atoms -> their places in BACKBONE."""
    return np.select([names == name for name in BACKBONE], range(len(BACKBONE))).astype(np.int8)


def no_atoms() -> Atoms:
    text, numbers, flags = np.array([], "U1"), np.array([], np.float32), np.array([], bool)
    whole = np.array([], np.int32)
    xyz = np.empty((0, 3), np.float32)
    return Atoms(text, whole, text, text, flags, flags, whole.astype(np.int8), text, numbers, numbers, xyz)
