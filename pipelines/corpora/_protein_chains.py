"""Backbone atoms of a model to chains: residues in order, one conformer each, what is missing marked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipelines.corpora._protein_atoms import BACKBONE, Atoms
from pipelines.corpora._protein_residues import UNHEARD, UNKNOWN, residue_type

PLACEHOLDER = 9999.0
"""Angstrom from the origin along an axis; what programs write for atoms they could not place lies there."""


@dataclass(frozen=True)
class Chain:
    """L residues in the order of the file."""

    name: str
    copy: int
    """How many chains of this name came before it in its model."""
    backbone: npt.NDArray[np.float32]
    """[L, 4, 3] in Angstrom, N, CA, C, O; zero where an atom is missing."""
    atoms: npt.NDArray[np.uint8]
    """[L, 4]: 1 where an atom is there."""
    residues: npt.NDArray[np.int8]
    """[L]: places in RESIDUES."""
    numbers: npt.NDArray[np.int32]
    insertions: npt.NDArray[np.uint8]
    """[L]: insertion codes in ASCII, 0 where there is none."""
    b_factors: npt.NDArray[np.float32]
    """[L]: of the CA atoms, 0 where there is none."""
    repeats: int
    """Atoms that were given twice; the first counts."""
    nowhere: int
    """Backbone atoms in the file that are missing all the same: no number, 9999, or a residue all at (0, 0, 0)."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, choice: npt.NDArray[np.bool_]) -> "Chain":
        names = ("backbone", "atoms", "residues", "numbers", "insertions", "b_factors")
        return replace(self, **{name: getattr(self, name)[choice] for name in names})

    @property
    def whole(self) -> npt.NDArray[np.bool_]:
        """[L]: N, CA and C are there."""
        return np.asarray(self.atoms[:, :3].all(1))


def chains_of(atoms: Atoms) -> Iterator[Chain]:
    """The protein chains of a model as they begin in it; water, ions, ligands, nucleotides and caps are left out."""
    names, which = np.unique(np.char.add(atoms.residue, np.where(atoms.hetero, "*", "")), return_inverse=True)
    kinds = [residue_type(name.removesuffix("*"), name.endswith("*")) for name in names.tolist()]
    kind = np.array([-1 if one is None else one for one in kinds], np.int8)[which]
    belong = (kind >= 0) & ~atoms.free
    atoms, kind = atoms[belong], kind[belong]
    found, first, member = np.unique(atoms.chain, return_index=True, return_inverse=True)
    for place in np.argsort(first):
        here = np.flatnonzero(member == place)
        yield from _chain(str(found[place]), atoms[here], kind[here], here)


def _chain(name: str, atoms: Atoms, kind: npt.NDArray[np.int8], lines: npt.NDArray[np.intp]) -> Iterator[Chain]:
    code = _codes(atoms.insertion)
    turn = (np.diff(atoms.number) != 0) | (np.diff(code) != 0)
    residue = np.concatenate([[0], np.cumsum(turn)])
    starts = np.concatenate([[0], np.flatnonzero(turn) + 1])
    keys = atoms.number[starts].astype(np.int64) << 8 | code[starts]
    slots = residue * len(BACKBONE) + atoms.atom
    plain = not (atoms.altloc != "").any() and len(np.unique(keys)) == len(keys) and len(np.unique(slots)) == len(slots)
    copies = [(np.arange(len(atoms)), residue, 0)] if plain else _untangled(atoms, code, lines)
    for copy, (chosen, of, repeats) in enumerate(copies):
        chain = _built(name, copy, atoms[chosen], kind[chosen], code[chosen], of, repeats)
        if len(chain):
            yield chain


def _built(
    name: str,
    copy: int,
    atoms: Atoms,
    kind: npt.NDArray[np.int8],
    code: npt.NDArray[np.uint8],
    residue: npt.NDArray[np.intp],
    repeats: int,
) -> Chain:
    """One atom a slot, residues numbered from 0 in rising order."""
    length = int(residue[-1]) + 1
    # Not below, so that NaN is none either.
    there = (np.abs(atoms.xyz) < PLACEHOLDER).all(1)
    backbone = np.zeros((length, len(BACKBONE), 3), np.float32)
    present = np.zeros((length, len(BACKBONE)), np.uint8)
    b_factors = np.zeros(length, np.float32)
    backbone[residue[there], atoms.atom[there]] = atoms.xyz[there]
    present[residue[there], atoms.atom[there]] = 1
    at_nought = present[:, :3].all(1) & (backbone[:, :3] == 0).all((1, 2))
    present[at_nought], backbone[at_nought] = 0, 0
    nowhere = len(np.unique(residue * len(BACKBONE) + atoms.atom)) - int(present.sum())
    alpha = there & (atoms.atom == BACKBONE.index("CA"))
    b_factors[residue[alpha]] = atoms.b_factor[alpha]
    _, first = np.unique(residue, return_index=True)
    kinds = kind[first]
    types = np.where(kinds == UNHEARD, UNKNOWN, kinds).astype(np.int8)
    chain = Chain(name, copy, backbone, present, types, atoms.number[first], code[first], b_factors, repeats, nowhere)
    # Lipids and sugars of a simulation have names that no dictionary knows either, but not N, CA and C.
    return chain[present.any(1) & ((kinds != UNHEARD) | chain.whole)]


@dataclass
class _Residue:
    name: str
    atoms: list[int]
    taken: set[tuple[int, str, str]]


def _untangled(
    atoms: Atoms, code: npt.NDArray[np.uint8], lines: npt.NDArray[np.intp]
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], int]]:
    """(atoms chosen, residue of each, atoms given twice) of each copy of a chain in which numbers or atoms repeat.

    Alternate locations may follow each other atom by atom, or residue by residue. A number that comes back after others
    or after another chain, with atoms that are there already, begins a copy (files without chain names); at once, but
    under another name, it is a residue of its own; at once and under the same name it is an atom given twice.
    """
    residues: list[_Residue] = []
    known: dict[tuple[int, int], _Residue] = {}
    repeats = 0
    rows = zip(
        atoms.number.tolist(), code.tolist(), atoms.residue.tolist(), atoms.atom.tolist(), atoms.altloc.tolist(),
        strict=True,
    )  # fmt: skip
    for place, (number, insertion, name, atom, altloc) in enumerate(rows):
        key, mark = (number, insertion), (atom, altloc, name if altloc else "")
        residue = known.get(key)
        if residue is not None and mark in residue.taken:
            if residue is not residues[-1] or lines[place] != lines[place - 1] + 1:
                yield _chosen(atoms, residues, repeats)
                residues, known, repeats = [], {}, 0
            elif residue.name == name:
                repeats += 1
                continue
            residue = None
        if residue is None:
            residue = known[key] = _Residue(name, [], set())
            residues.append(residue)
        residue.taken.add(mark)
        residue.atoms.append(place)
    yield _chosen(atoms, residues, repeats)


def _chosen(
    atoms: Atoms, residues: list[_Residue], repeats: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], int]:
    kept = [_conformer(atoms, residue.atoms) for residue in residues]
    of = np.repeat(np.arange(len(kept)), [len(one) for one in kept])
    return np.array([place for one in kept for place in one], np.intp), of, repeats


def _conformer(atoms: Atoms, places: list[int]) -> list[int]:
    """The atoms of the alternate location with the highest occupancy (summed over them; of equals, the first), and
    those that are the same in all."""
    weights: dict[tuple[str, str], float] = {}
    for place in places:
        if altloc := str(atoms.altloc[place]):
            key = altloc, str(atoms.residue[place])
            weights[key] = weights.get(key, 0.0) + float(atoms.occupancy[place])
    if not weights:
        return places
    best = max(weights, key=lambda key: round(weights[key], 4))
    return [place for place in places if not atoms.altloc[place] or (atoms.altloc[place], atoms.residue[place]) == best]


def _codes(insertion: npt.NDArray[np.str_]) -> npt.NDArray[np.uint8]:
    """First character in ASCII, 0 for "". What is no ASCII counts as `?`."""
    points = np.ascontiguousarray(insertion.astype("U1")).view(np.uint32)
    return np.where(points < 128, points, ord("?")).astype(np.uint8)
