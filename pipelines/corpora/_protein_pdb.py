"""PDB files through biotite; what strict parsers stumble over is mended first, and counted."""

import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pipelines.corpora._protein_atoms import BACKBONE, Atoms, UnreadableStructure, no_atoms, places_of

ATOM_NAMES = {name.encode(): name for name in BACKBONE}
WATER = frozenset((b"HOH", b"WAT", b"DOD", b"H2O", b"SOL", b"TIP"))
ELEMENT_AND_CHARGE = re.compile(rb"(?:[ A-Z][A-Za-z]|[A-Z] ?|  )?(?:\d[+-]|[+-]\d)?")
"""What columns 77 to 80 may hold, without blanks at their end."""
SHIFTED = re.compile(rb"[A-Za-z]ATOM  [ \d]{5} ")


def pdb_models(data: bytes, all_models: bool, mended: Counter[str]) -> Iterator[Atoms]:
    """Backbone atoms of every model, or of the first; MODEL, ENDMDL and END part them."""
    model, found = _Model(), False
    for line in data.splitlines():
        kind = line[:6]
        if SHIFTED.match(line):
            line, kind = line[1:], b"ATOM  "
            mended["a stray letter before ATOM"] += 1
        if kind in (b"ATOM  ", b"HETATM"):
            model.add(line, mended)
        elif kind[:3] == b"TER":
            model.closed.add(model.chain)
        elif (kind[:5] == b"MODEL" or kind[:3] == b"END") and model.records:
            yield model.atoms()
            if not all_models:
                return
            model, found = _Model(), True
    if model.records:
        yield model.atoms()
    elif not found:
        raise UnreadableStructure("no ATOM or HETATM record: not a structure")


@dataclass
class _Model:
    """Records of one model that are worth parsing, and what the parser cannot know about them."""

    records: int = 0
    """Of atoms of any kind."""
    chain: bytes = b" "
    """Of the last one."""
    lines: list[str] = field(default_factory=list)
    free: list[bool] = field(default_factory=list)
    closed: set[bytes] = field(default_factory=set)
    """Chains that had a TER: a HETATM after it is a molecule of its own, unless more of the chain follows."""
    waiting: dict[bytes, list[int]] = field(default_factory=dict)
    """Chain -> places of such HETATM records."""

    def add(self, line: bytes, mended: Counter[str]) -> None:
        self.records += 1
        line, chain = _in_columns(line, mended), line[21:22]
        self.chain = chain
        if chain in self.closed and line[:4] == b"ATOM":
            self.closed.discard(chain)
            for place in self.waiting.pop(chain, ()):
                self.free[place] = False
        if line[12:16].strip() not in ATOM_NAMES or line[17:20] in WATER:
            return
        if chain in self.closed:
            self.waiting.setdefault(chain, []).append(len(self.lines))
        self.lines.append(_mended(line, mended))
        self.free.append(chain in self.closed)

    def atoms(self) -> Atoms:
        from biotite.structure.io.pdb import PDBFile

        if not self.lines:
            return no_atoms()
        file = PDBFile.read(io.StringIO("\n".join(self.lines)))
        found = file.get_structure(model=1, altloc="all", extra_fields=["occupancy", "b_factor"])
        return Atoms(
            chain=found.chain_id,
            number=found.res_id.astype(np.int32),
            insertion=found.ins_code,
            residue=found.res_name,
            hetero=found.hetero,
            free=np.array(self.free, bool),
            atom=places_of(found.atom_name),
            altloc=np.where(found.altloc_id == " ", "", found.altloc_id),
            occupancy=found.occupancy.astype(np.float32),
            b_factor=found.b_factor.astype(np.float32),
            xyz=found.coord.astype(np.float32),
        )


def _in_columns(line: bytes, mended: Counter[str]) -> bytes:
    """The line with coordinates that float() takes."""
    if line[34:35] == line[42:43] == line[50:51] == b".":
        return line
    places = [line[30:38], line[38:46], line[46:54]]
    if any(b"*" in place for place in places):
        # What Fortran writes for a number that is too wide.
        mended["coordinates that are no numbers"] += 1
        return line[:30] + b"     nan" * 3 + line[54:]
    try:
        for place in places:
            float(place)
        # Coordinates may read well in a line that lost a blank; its residue name is then no longer at the right.
        shifted = line[19:20] in b" "
    except ValueError:
        shifted = True
    if shifted:
        raise UnreadableStructure("an ATOM record that is not in the columns of the PDB format")
    return line


def _mended(line: bytes, mended: Counter[str]) -> str:
    """A record of a backbone atom as biotite takes it: occupancy, B-factor, element and charge are what they may be."""
    if not ELEMENT_AND_CHARGE.fullmatch(line[76:80].rstrip()):
        # Running line numbers of the format of 1992, for one. The atom's name says the element of a backbone atom.
        mended["columns 77-80 hold no element and charge"] += 1
    name = ATOM_NAMES[line[12:16].strip()]
    occupancy = _number(line[54:60], 1.0, "occupancies", mended)
    b_factor = _number(line[60:66], 0.0, "B-factors", mended)
    return f"{line[:54].decode('latin-1')}{occupancy}{b_factor}{'':10}{name[0]:>2}  "


def _number(text: bytes, default: float, what: str, mended: Counter[str]) -> str:
    try:
        if math.isfinite(float(text)):
            return text.decode("latin-1").rjust(6)
    except ValueError:
        pass
    mended[f"{what} that are no numbers"] += 1
    return f"{default:6.2f}"
