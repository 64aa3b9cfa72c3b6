"""mmCIF and BinaryCIF through biotite: the columns of their atom_site table."""

import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.corpora._protein_atoms import BACKBONE, Atoms, UnreadableStructure, places_of

MOST_ATOMS = 16_000_000
ATOM_LOOP = re.compile(rb"^loop_[ \t]*\r?\n((?:[ \t]*_atom_site\.\S+[ \t]*\r?\n)+)", re.MULTILINE)
NAMES = frozenset(name.encode() for name in BACKBONE)


def cif_models(data: bytes, binary: bool, all_models: bool) -> list[Atoms]:
    """Backbone atoms of every model, or of the first."""
    site = _Site(_binary_site(data) if binary else _text_site(data))
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
        atom=places_of(site.text("label_atom_id", "auth_atom_id")),
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

    data = _backbone_loop(data) or data
    return _first_site(CIFFile.read(io.StringIO(data.decode("utf-8", "backslashreplace"))))


def _backbone_loop(data: bytes) -> bytes | None:
    """The atom_site table without most other atoms, which the parser reads in half the time and memory.

    None where rows are not one a line each: then only the parser can tell where they end.
    """
    if not (found := ATOM_LOOP.search(data)):
        return None
    columns = [name.strip() for name in found[1].splitlines()]
    places = [place for place, name in enumerate(columns) if name.endswith((b".label_atom_id", b".auth_atom_id"))]
    if not places:
        return None
    kept, rows = [b"data_x\nloop_\n", found[1]], 0
    file = io.BytesIO(data)
    file.seek(found.end())
    for line in file:
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        if words[0].startswith(b"_") or words[0].lower().startswith((b"loop_", b"data_")):
            break
        quoted = b"'" in line or b'"' in line
        if line.startswith(b";") or (len(words) != len(columns) and not quoted):
            return None
        if quoted or not rows or any(words[place] in NAMES for place in places):
            kept.append(line)
        rows += 1
    return b"".join(kept) if rows else None


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
