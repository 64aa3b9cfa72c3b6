"""PDB, mmCIF and BinaryCIF to backbone atoms through biotite; what strict parsers stumble over is mended first.

Only records of backbone atoms are parsed: a chain needs no others, and damage elsewhere costs nothing.
"""

import gzip
import io
import math
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

BACKBONE = ("N", "CA", "C", "O")
MOST_FILE_BYTES = 512 << 20
"""Of one file, unpacked. The largest entries of the PDB have about half of it."""
MOST_ATOMS = 16_000_000
WATER = frozenset((b"HOH", b"WAT", b"DOD", b"H2O", b"SOL", b"TIP"))
ATOM_NAMES = {name.encode(): name for name in BACKBONE}
ELEMENT_AND_CHARGE = re.compile(rb"(?:[ A-Z][A-Za-z]|[A-Z] ?|  )?(?:\d[+-]|[+-]\d)?")
"""What columns 77 to 80 may hold, without blanks at their end."""
SHIFTED = re.compile(rb"[A-Za-z]ATOM  [ \d]{5} ")
GZIP_MAGIC = b"\x1f\x8b"
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError, struct.error)
"""What biotite and msgpack raise on damaged files beside errors of their own, seen over the formats below."""


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


def models_of(data: bytes, all_models: bool, mended: Counter[str]) -> list[Atoms]:
    """The models of a file, or the first. What it holds decides how it is read, not its name.

    Args:
        mended: counts what had to be mended, in the words of the row's notes.

    Raises:
        UnreadableStructure: with a short reason.
    """
    from biotite.file import DeserializationError, InvalidFileError
    from msgpack.exceptions import UnpackException

    data = _unpacked(data)
    if not data.strip():
        raise UnreadableStructure("the file is empty")
    form = _form(data)
    try:
        with warnings.catch_warnings():
            # Its notes on optional columns and guessed elements say nothing about a backbone.
            warnings.simplefilter("ignore")
            if form == "PDB":
                return [_pdb_atoms(model) for model in _pdb_models(data, all_models, mended)]
            return _cif_atoms(data, form, all_models)
    except UnreadableStructure:
        raise
    except (*DAMAGE, DeserializationError, InvalidFileError, UnpackException):
        raise UnreadableStructure(f"cut off or damaged: its records are not those of a {form} file") from None


def _unpacked(data: bytes) -> bytes:
    if data[:2] != GZIP_MAGIC:
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            whole = file.read(MOST_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        raise UnreadableStructure("cut off or damaged: it does not unpack") from None
    if len(whole) > MOST_FILE_BYTES:
        raise UnreadableStructure(f"it unpacks to more than {MOST_FILE_BYTES:,} bytes")
    return whole


def _form(data: bytes) -> str:
    head = data[:64]
    if head[0] >= 0x80 and any(key in head for key in (b"encoder", b"version", b"dataBlocks")):
        return "BinaryCIF"
    for line in data[: 1 << 16].lstrip(b"\xef\xbb\xbf").splitlines():
        if line.strip() and not line.startswith(b"#"):
            return "mmCIF" if line[:5].lower() == b"data_" else "PDB"
    return "PDB"


# PDB


@dataclass
class _Model:
    """Records of one model that are worth parsing, and what the parser cannot know about them."""

    lines: list[str]
    free: list[bool]
    closed: set[bytes]
    """Chains with a TER record: a HETATM after it is a molecule of its own, unless more of the chain follows."""


def _pdb_models(data: bytes, all_models: bool, mended: Counter[str]) -> Iterator[_Model]:
    models, chain, records = 0, b" ", 0
    model = _Model([], [], set())
    waiting: dict[bytes, list[int]] = {}
    for line in data.splitlines():
        kind = line[:6]
        if kind not in (b"ATOM  ", b"HETATM"):
            if SHIFTED.match(line):
                line, kind = line[1:], b"ATOM  "
                mended["a stray letter before ATOM"] += 1
            elif kind[:3] == b"TER":
                model.closed.add(chain)
                continue
            elif kind[:5] == b"MODEL" or kind[:3] == b"END":
                if model.lines:
                    yield model
                    models += 1
                    if not all_models:
                        return
                model, waiting = _Model([], [], set()), {}
                continue
            else:
                continue
        records += 1
        line, chain = _in_columns(line, mended), line[21:22]
        if kind == b"ATOM  " and chain in model.closed:
            model.closed.discard(chain)
            for place in waiting.pop(chain, ()):
                model.free[place] = False
        if line[12:16].strip() not in ATOM_NAMES or line[17:20] in WATER:
            continue
        free = chain in model.closed
        if free:
            waiting.setdefault(chain, []).append(len(model.lines))
        model.lines.append(_mended(line, mended))
        model.free.append(free)
    if not records:
        raise UnreadableStructure("no ATOM or HETATM record: not a structure")
    if model.lines or not models:
        yield model


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


def _pdb_atoms(model: _Model) -> Atoms:
    from biotite.structure.io.pdb import PDBFile

    if not model.lines:
        return _no_atoms()
    file = PDBFile.read(io.StringIO("\n".join(model.lines)))
    found = file.get_structure(model=1, altloc="all", extra_fields=["occupancy", "b_factor"])
    return Atoms(
        chain=found.chain_id,
        number=found.res_id.astype(np.int32),
        insertion=found.ins_code,
        residue=found.res_name,
        hetero=found.hetero,
        free=np.array(model.free, bool),
        atom=_places(found.atom_name),
        altloc=np.where(found.altloc_id == " ", "", found.altloc_id),
        occupancy=found.occupancy.astype(np.float32),
        b_factor=found.b_factor.astype(np.float32),
        xyz=found.coord.astype(np.float32),
    )


# mmCIF and BinaryCIF


def _cif_atoms(data: bytes, form: str, all_models: bool) -> list[Atoms]:
    site = _Site(_binary_site(data) if form == "BinaryCIF" else _text_site(data))
    site.keep = np.isin(site.text("label_atom_id", "auth_atom_id"), BACKBONE)
    hetero = site.text("group_PDB") == "HETATM"
    # A residue of a polymer has a place in its sequence; where no atom has one, the file does not say.
    nowhere = site.text("label_seq_id", default="") == ""
    atoms = Atoms(
        chain=site.text("auth_asym_id", "label_asym_id"),
        number=site.integers("auth_seq_id", "label_seq_id"),
        insertion=site.text("pdbx_PDB_ins_code", default=""),
        residue=site.text("label_comp_id", "auth_comp_id"),
        hetero=hetero,
        free=hetero & nowhere & ~nowhere.all(),
        atom=_places(site.text("label_atom_id", "auth_atom_id")),
        altloc=site.text("label_alt_id", default=""),
        occupancy=site.floats("occupancy", 1.0),
        b_factor=site.floats("B_iso_or_equiv", 0.0),
        xyz=np.stack([site.floats(f"Cartn_{axis}", np.nan, needed=True) for axis in "xyz"], axis=1),
    )
    model = site.text("pdbx_PDB_model_num", default="1")
    order = list(dict.fromkeys(model.tolist())) or ["1"]
    return [atoms[model == number] for number in (order if all_models else order[:1])]


class _Site:
    """Columns of an atom_site category, cut to the atoms in `keep`."""

    def __init__(self, category: Any) -> None:
        self.category = category
        self.keep: Any = slice(None)

    def text(self, *names: str, default: str | None = None) -> npt.NDArray[np.str_]:
        """The first of the columns that there is, "" where it says nothing."""
        for name in names:
            if name in self.category:
                column: npt.NDArray[np.str_] = self.category[name].as_array(str, "")[self.keep]
                return column
        if default is None:
            raise UnreadableStructure(f"its atom_site table has no column {names[0]}")
        return np.full(self.category.row_count, default)[self.keep]

    def integers(self, *names: str) -> npt.NDArray[np.int32]:
        """As `text`; what one column does not say is taken from the next."""
        found = [name for name in names if name in self.category]
        if not found:
            raise UnreadableStructure(f"its atom_site table has no column {names[0]}")
        value = self.text(found[0])
        for name in found[1:]:
            value = np.where(value == "", self.text(name), value)
        return value.astype(np.int32)

    def floats(self, name: str, default: float, needed: bool = False) -> npt.NDArray[np.float32]:
        if name not in self.category:
            if needed:
                raise UnreadableStructure(f"its atom_site table has no column {name}")
            return np.full(self.category.row_count, default, np.float32)[self.keep]
        column = self.category[name].as_array(np.float64, default)[self.keep]
        if not needed:
            column = np.where(np.isfinite(column), column, default)
        return np.asarray(column, np.float32)


def _text_site(data: bytes) -> Any:
    from biotite.structure.io.pdbx import CIFFile

    return _first_site(CIFFile.read(io.StringIO(data.decode("utf-8", "backslashreplace"))))


def _binary_site(data: bytes) -> Any:
    import msgpack
    from biotite.structure.io.pdbx import BinaryCIFFile

    content = msgpack.unpackb(data, use_list=True, raw=False)
    for block in content["dataBlocks"]:
        for category in block["categories"]:
            if category["name"] == "_atom_site":
                _check_sizes(category, len(data))
    return _first_site(BinaryCIFFile.deserialize(content))


def _first_site(file: Any) -> Any:
    for name in file:
        if "atom_site" in file[name]:
            return file[name]["atom_site"]
    raise UnreadableStructure("it has no atom_site table: not a structure")


def _check_sizes(category: dict[str, Any], most: int) -> None:
    """Sizes that a file only claims are memory once it is decoded. No atom of a real one takes less than a byte."""
    rows = int(category["rowCount"])

    def check(value: Any) -> None:
        if isinstance(value, dict):
            # Runs are stored as pairs, so an inner size may be twice the number of rows.
            if int(value.get("srcSize", 0) or 0) > 2 * rows + 2 or (
                value.get("kind") == "RunLength" and not value.get("srcSize")
            ):
                raise UnreadableStructure("it claims more values than it has rows")
            for inner in value.values():
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)

    if rows > min(most, MOST_ATOMS):
        raise UnreadableStructure("it claims more atoms than it has bytes, or than are read")
    check(category["columns"])


def _places(names: npt.NDArray[np.str_]) -> npt.NDArray[np.int8]:
    return np.select([names == name for name in BACKBONE], range(len(BACKBONE))).astype(np.int8)


def _no_atoms() -> Atoms:
    text, numbers, flags = np.array([], "U1"), np.array([], np.float32), np.array([], bool)
    whole = np.array([], np.int32)
    xyz = np.empty((0, 3), np.float32)
    return Atoms(text, whole, text, text, flags, flags, whole.astype(np.int8), text, numbers, numbers, xyz)
