"""Structure files to chains: the same from every format, one conformer a residue, no dirt lost and none unsaid."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pyarrow as pa
import pytest
import torch
from biotite.structure.io.pdbx import BinaryCIFBlock, BinaryCIFCategory, BinaryCIFColumn, BinaryCIFFile, compress

from pipelines import storage
from pipelines.columns import batch_of, values_of
from pipelines.corpora import Bad, Filtered, Row, _protein_files, proteins
from pipelines.corpora._protein_residues import LETTERS, RESIDUES
from pipelines.corpora.proteins import ProteinSettings
from pipelines.errors import Failed, Refused
from pipelines.ingest import ingest
from pipelines.shards import ShardReader

SHORT = ProteinSettings(min_length=1)
KEEP = ProteinSettings(min_length=1, missing="keep")


class Atom(NamedTuple):
    name: str
    residue: str = "ALA"
    number: int = 1
    chain: str = "A"
    xyz: Sequence[float] = (1.0, 2.0, 3.0)
    altloc: str = ""
    insertion: str = ""
    occupancy: float = 1.0
    b_factor: float = 0.0
    hetero: bool = False


def pdb(atoms: Iterable[Atom], tail: str = "") -> str:
    """Records in the columns of the format, one line an atom."""
    lines = []
    for serial, atom in enumerate(atoms, 1):
        x, y, z = atom.xyz
        name = f"{atom.name:<4}" if len(atom.name) == 4 else f" {atom.name:<3}"
        lines.append(
            f"{'HETATM' if atom.hetero else 'ATOM  '}{serial:5d} {name}{atom.altloc:1}{atom.residue:>3} {atom.chain:1}"
            f"{atom.number:4d}{atom.insertion:1}   {x:8.3f}{y:8.3f}{z:8.3f}{atom.occupancy:6.2f}{atom.b_factor:6.2f}"
            f"{'':10}{atom.name[0]:>2}{tail:2}"
        )
    return "\n".join(lines) + "\n"


COLUMNS = """
    group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_seq_id pdbx_PDB_ins_code
    Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_asym_id pdbx_PDB_model_num
""".split()  # noqa: SIM905


def table(atoms: Sequence[Atom], model: int = 1) -> list[list[str]]:
    """Rows of an atom_site table. A HETATM is a molecule of its own here, so it has no place in a sequence."""
    return [
        [
            *("HETATM" if a.hetero else "ATOM", str(serial), a.name[0], a.name, a.altloc or ".", a.residue, "Q"),
            *("." if a.hetero else str(a.number + 7), a.insertion or "?", *(f"{value:.3f}" for value in a.xyz)),
            *(f"{a.occupancy:.2f}", f"{a.b_factor:.2f}", str(a.number), a.chain, str(model)),
        ]
        for serial, a in enumerate(atoms, 1)
    ]


def cif(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    head = ["data_TEST", "_entry.id TEST", "loop_", *(f"_atom_site.{name}" for name in columns)]
    return "\n".join([*head, *(" ".join(row) for row in rows), "#", ""])


def bcif(rows: Sequence[Sequence[str]]) -> bytes:
    numbers = {"Cartn_x": float, "Cartn_y": float, "Cartn_z": float, "occupancy": float, "B_iso_or_equiv": float}
    numbers |= {"auth_seq_id": int, "pdbx_PDB_model_num": int, "id": int}
    columns = {}
    for place, name in enumerate(COLUMNS):
        texts = [row[place] for row in rows]
        masks = np.array([{".": 1, "?": 2}.get(text, 0) for text in texts], np.uint8)
        columns[name] = BinaryCIFColumn(np.array(texts, numbers.get(name, str)), masks if masks.any() else None)
    file = BinaryCIFFile({"TEST": BinaryCIFBlock({"atom_site": BinaryCIFCategory(columns)})})
    out = io.BytesIO()
    compress(file).write(out)
    return out.getvalue()


def residue(number: int, name: str = "ALA", chain: str = "A", at: float | None = None, **more: Any) -> list[Atom]:
    """N, CA, C, O and CB of one residue; every coordinate tells residue and atom."""
    base = float(number) if at is None else at
    names = ("N", "CA", "C", "O", "CB")
    return [Atom(n, name, number, chain, (base, place, -base / 4), **more) for place, n in enumerate(names)]


def chain(numbers: Iterable[int], chain: str = "A", **more: Any) -> list[Atom]:
    return [atom for number in numbers for atom in residue(number, chain=chain, **more)]


def given(home: Path, files: dict[str, str | bytes]) -> Path:
    for name, data in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return home


def units(source: Path, settings: ProteinSettings = SHORT) -> dict[str, list[Row] | Bad | Filtered]:
    """What became of every file."""
    survey = proteins.survey([str(source)], settings)
    json.dumps([survey.context, survey.ignored, [piece.meta for piece in survey.slices]])
    found: dict[str, list[Row] | Bad | Filtered] = {}
    for piece in survey.slices:
        numbers = []
        for unit, one, _ in proteins.read(piece, survey.context, settings, lambda _: True):
            numbers.append(unit)
            name = one[0].values["name"] if isinstance(one, list) else f"{piece.name}#{unit}"
            found[one.source if isinstance(one, Bad) else name] = one
        assert numbers == list(range(piece.stop - piece.start))
    return found


def rows_of(source: Path, settings: ProteinSettings = SHORT) -> list[dict[str, Any]]:
    """Values of all rows, where every file gives some."""
    found = units(source, settings)
    assert all(isinstance(one, list) for one in found.values()), found
    return [row.values for rows in found.values() if isinstance(rows, list) for row in rows]


def only(tmp_path: Path, text: str | bytes, settings: ProteinSettings = SHORT, name: str = "x.pdb") -> dict[str, Any]:
    """The one row of one file."""
    [row] = rows_of(given(tmp_path, {name: text}), settings)
    return row


def reason(tmp_path: Path, data: str | bytes, name: str = "x.pdb") -> str:
    [bad] = units(given(tmp_path, {name: data})).values()
    assert isinstance(bad, Bad)
    return bad.reason


def letters(row: dict[str, Any]) -> str:
    return "".join(LETTERS[place] for place in row["residues"])


Residues = dict[tuple[int, str], tuple[str, dict[str, tuple[float, ...]], float]]


def by_columns(text: str) -> dict[str, Residues]:
    """An independent reader: chain -> (number, insertion) -> (residue name, atom -> xyz, B-factor of CA)."""
    found: dict[str, Residues] = {}
    for line in text.splitlines():
        if line[:6] != "ATOM  " or line[17:20] not in RESIDUES or line[12:16].strip() not in ("N", "CA", "C", "O"):
            continue
        key = int(line[22:26]), line[26].strip()
        name, atoms, b_factor = found.setdefault(line[21], {}).get(key, (line[17:20], {}, 0.0))
        atoms[line[12:16].strip()] = tuple(float(line[at : at + 8]) for at in (30, 38, 46))
        if line[12:16] == " CA ":
            b_factor = float(line[60:66])
        found[line[21]][key] = name, atoms, b_factor
    return found


def agrees(row: dict[str, Any], reference: Residues) -> None:
    keys = [(n, chr(i) if i else "") for n, i in zip(row["numbers"].tolist(), row["insertions"].tolist(), strict=True)]
    assert keys == list(reference)
    assert [RESIDUES[place] for place in row["residues"]] == [name for name, _, _ in reference.values()]
    for place, (_, atoms, b_factor) in enumerate(reference.values()):
        assert row["b_factors"][place] == np.float32(b_factor)
        for slot, name in enumerate(("N", "CA", "C", "O")):
            assert row["atoms"][place, slot] == (name in atoms)
            assert row["backbone"][place, slot].tolist() == np.float32(atoms.get(name, (0, 0, 0))).tolist()


def a_structure() -> list[Atom]:
    """Three chains with gaps, negative numbers, insertion codes, missing O atoms, side chains and B-factors."""
    random = np.random.default_rng(0)
    atoms = []
    for name, start in (("B", -3), ("A", 95), ("c", 1)):
        number = start
        for _ in range(30):
            kind = RESIDUES[random.integers(20)]
            insertion = "" if random.random() < 0.8 else "ABC"[random.integers(3)]
            names = ["N", "CA", "C", *(["O"] if random.random() < 0.9 else []), "CB", "OXT"]
            for atom in names:
                xyz = random.uniform(-99, 99, 3).round(3).tolist()
                atoms.append(Atom(atom, kind, number, name, xyz, "", insertion, 1.0, float(random.uniform(1, 90))))
            number += int(random.integers(1, 3))
    return atoms


def test_chains_are_what_a_fixed_column_reader_sees(tmp_path: Path) -> None:
    text = pdb(a_structure())
    reference = by_columns(text)
    rows = rows_of(given(tmp_path, {"x.pdb": text}))
    assert [row["chain"] for row in rows] == list(reference) == ["B", "A", "c"]
    for row in rows:
        agrees(row, reference[row["chain"]])
        assert (row["name"], row["model"], row["copy"], row["length"], row["notes"]) == ("x.pdb", 1, 0, 30, "")


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    atoms = a_structure()
    forms: dict[str, str | bytes] = {"a.pdb": pdb(atoms), "b.cif": cif(table(atoms)), "c.bcif": bcif(table(atoms))}
    forms |= {"d.ent.gz": gzip.compress(pdb(atoms).encode()), "e.mmcif.GZ": gzip.compress(cif(table(atoms)).encode())}
    forms |= {"f.bcif.gz": gzip.compress(bcif(table(atoms))), "g.PDB1": pdb(atoms)}
    # What a file holds counts, not what it is called.
    forms |= {"h.pdb": cif(table(atoms)), "i.cif": gzip.compress(pdb(atoms).encode()), "j.pdb.gz": pdb(atoms)}
    rows = rows_of(given(tmp_path, forms))
    assert len(rows) == 3 * len(forms)
    for row in rows:
        first = next(one for one in rows if one["chain"] == row["chain"])
        for name, value in row.items():
            if isinstance(value, np.ndarray):
                assert value.dtype == first[name].dtype
                assert np.array_equal(value, first[name]), (row["name"], name)


# Conformers


def test_the_conformer_with_the_highest_occupancy_counts_and_of_equals_the_first(tmp_path: Path) -> None:
    atoms = []
    for number, (first, second) in enumerate([(0.3, 0.7), (0.7, 0.3), (0.5, 0.5)], 1):
        for one in residue(number):
            if one.name == "C":
                atoms.append(one)
                continue
            atoms.append(one._replace(altloc="A", occupancy=first))
            atoms.append(one._replace(altloc="B", occupancy=second, xyz=(50.0, 50.0, 50.0)))
    for name, data in {"x.pdb": pdb(atoms), "y.cif": cif(table(atoms))}.items():
        row = only(tmp_path / name, data, name=name)
        assert (row["backbone"][:, 1, 0] == [50, 2, 3]).all()
        assert (row["backbone"][:, 2, 0] == [1, 2, 3]).all()
        assert row["atoms"].all()


def test_conformers_are_not_mixed(tmp_path: Path) -> None:
    """A has more of the residue in all, though B wins at CA: every atom is from A."""
    a = [one._replace(altloc="A", occupancy=0.4) for one in residue(1)]
    b = [one._replace(altloc="B", occupancy=0.6, xyz=(9.0, 9.0, 9.0)) for one in residue(1) if one.name == "CA"]
    assert (only(tmp_path, pdb([*a, *b]))["backbone"][0, :, 0] == 1).all()


def test_conformers_one_after_another_and_of_two_residue_names(tmp_path: Path) -> None:
    ser = [one._replace(altloc="A", occupancy=0.45) for one in residue(2, "SER")]
    thr = [one._replace(altloc="B", occupancy=0.55, xyz=(9.0, 9.0, 9.0)) for one in residue(2, "THR")]
    row = only(tmp_path / "1", pdb([*residue(1), *ser, *thr, *residue(3)]))
    assert letters(row) == "ATA"
    assert row["backbone"][1, 1].tolist() == [9, 9, 9]
    # All of A from 2 to 3, and only then all of B.
    later = [one._replace(altloc="B", occupancy=0.2) for one in residue(3)]
    first = [one._replace(altloc="A", occupancy=0.8) for one in residue(3)]
    row = only(tmp_path / "2", pdb([*residue(1), *ser, *first, *thr, *later]))
    assert (letters(row), row["numbers"].tolist(), row["copy"]) == ("ATA", [1, 2, 3], 0)


# Which residues


def test_modified_residues_count_as_their_parents(tmp_path: Path) -> None:
    names = ["MSE", "SEP", "HYP", "KCX", "UNK", "SEC", "DAL", "CRO"]
    atoms = [atom for n, name in enumerate(names, 1) for atom in residue(n, name, hetero=True)]
    assert letters(only(tmp_path, pdb(atoms))) == "MSPKXXXX"


def test_names_of_force_fields_are_read_in_atom_records_only(tmp_path: Path) -> None:
    names = ["HSE", "HSD", "HIE", "CYX", "ASH", "GLH", "LYN"]
    atoms = [atom for n, name in enumerate(names, 1) for atom in residue(n, name)]
    assert letters(only(tmp_path / "1", pdb(atoms))) == "HHHCDEK"
    # In the component dictionary HSE is homoserine, whose parent is serine.
    assert letters(only(tmp_path / "2", pdb(residue(1, "HSE", hetero=True)))) == "S"


def test_a_name_that_no_dictionary_knows_is_unknown_where_it_has_a_backbone(tmp_path: Path) -> None:
    lipid = [Atom("N", "Q-7", 2), Atom("O", "Q-7", 2), Atom("C13", "Q-7", 2)]
    given(tmp_path, {"x.pdb": pdb([*residue(1, "Q-8"), *lipid])})
    assert [[letters(row) for row in rows_of(tmp_path, settings)] for settings in (SHORT, KEEP)] == [["X"], ["X"]]


def test_what_is_no_protein_is_left_out_of_chains(tmp_path: Path) -> None:
    water = [Atom("O", "HOH", 301, hetero=True), Atom("O", "SOL", 302)]
    ions = [Atom("CA", "CA", 303, hetero=True)]
    ligand = [Atom(name, "ATP", 304, hetero=True) for name in ("N", "CA", "C", "O", "PG")]
    dna = [Atom(name, "DA", 305) for name in ("P", "N1", "C2", "O", "C")]
    cap = [Atom("C", "ACE", 0), Atom("O", "ACE", 0)]
    atoms = [*cap, *residue(1), *residue(2), *dna, *ligand, *ions, *water]
    for name, data in {"x.pdb": pdb(atoms), "y.cif": cif(table(atoms))}.items():
        assert only(tmp_path / name, data, name=name)["numbers"].tolist() == [1, 2]


def test_a_free_amino_acid_is_a_ligand_and_a_modified_residue_is_not(tmp_path: Path) -> None:
    """The format puts TER behind the last residue of a chain; mmCIF gives ligands no place in a sequence."""
    ligand, modified = residue(201, "GLU", hetero=True), residue(2, "MSE", hetero=True)
    body = pdb(residue(1)) + pdb(modified) + pdb(residue(3))
    row = only(tmp_path / "1", body + "TER     \n" + pdb(ligand))
    assert (row["numbers"].tolist(), letters(row)) == ([1, 2, 3], "AMA")
    # A TER at a gap, with the chain going on after it.
    row = only(tmp_path / "2", pdb(residue(1)) + "TER     \n" + pdb(modified) + pdb(residue(3)) + "TER\n" + pdb(ligand))
    assert row["numbers"].tolist() == [1, 2, 3]
    # Of another chain, TER closes nothing here.
    row = only(tmp_path / "3", pdb(residue(1)) + pdb(modified))
    assert row["numbers"].tolist() == [1, 2]
    rows = table([*residue(1), *residue(3), *ligand])
    modified_rows = [[*row[:7], "9", *row[8:]] for row in table(modified)]
    row = only(tmp_path / "4", cif([*rows[:5], *modified_rows, *rows[5:]]), name="x.cif")
    assert row["numbers"].tolist() == [1, 2, 3]
    # A file that gives no residue a place in a sequence does not say which molecules are free.
    row = only(tmp_path / "5", cif([[*row[:7], ".", *row[8:]] for row in rows]), name="x.cif")
    assert row["numbers"].tolist() == [1, 3, 201]


def test_a_number_that_comes_back_begins_another_chain_of_that_name(tmp_path: Path) -> None:
    """Programs that know no chain names write molecules one after another."""
    rows = rows_of(given(tmp_path / "1", {"x.pdb": pdb([*chain([1, 2, 3]), *chain([1, 2], at=9.0)])}))
    assert [(row["copy"], row["numbers"].tolist()) for row in rows] == [(0, [1, 2, 3]), (1, [1, 2])]
    assert (rows[1]["backbone"][:, :, 0] == 9).all()
    twice = [*chain([1], "A"), *chain([1], "B"), *chain([1], "A", at=9.0)]
    rows = rows_of(given(tmp_path / "2", {"x.pdb": pdb(twice)}))
    assert [(row["chain"], row["copy"]) for row in rows] == [("A", 0), ("A", 1), ("B", 0)]


def test_residues_of_one_number_and_two_names_are_two(tmp_path: Path) -> None:
    row = only(tmp_path, pdb([*residue(1), *residue(2, "GLY"), *residue(2, "TRP", at=8.0), *residue(3)]))
    assert (letters(row), row["numbers"].tolist()) == ("AGWA", [1, 2, 2, 3])


def test_of_an_atom_given_twice_the_first_counts_and_it_is_said(tmp_path: Path) -> None:
    doubled = [atom for one in residue(1) for atom in (one, one._replace(xyz=(7.0, 7.0, 7.0)))]
    row = only(tmp_path, pdb([*doubled, *residue(2)]))
    assert (row["backbone"][0, :, 0] == 1).all()
    assert row["notes"] == "4 atoms given twice"


# What is missing


def test_residues_without_a_frame_are_dropped_or_kept_with_a_mask(tmp_path: Path) -> None:
    atoms = [atom for atom in chain(range(1, 5)) if (atom.number, atom.name) not in {(2, "C"), (3, "O")}]
    given(tmp_path, {"x.pdb": pdb(atoms)})
    [dropped] = rows_of(tmp_path)
    assert dropped["numbers"].tolist() == [1, 3, 4]
    assert dropped["atoms"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert dropped["notes"] == "1 residues without N, CA or C dropped"
    [kept] = rows_of(tmp_path, KEEP)
    assert kept["numbers"].tolist() == [1, 2, 3, 4]
    assert kept["atoms"][1].tolist() == [1, 1, 0, 1]
    assert not kept["backbone"][1, 2].any()
    assert kept["notes"] == ""


def test_a_chain_of_ca_atoms_only_and_one_of_hydrogens_only(tmp_path: Path) -> None:
    alphas = [atom for atom in chain(range(1, 9)) if atom.name == "CA"]
    hydrogens = [Atom(name, "ALA", number) for number in range(1, 9) for name in ("H", "HA", "HB1")]
    given(tmp_path, {"alpha.pdb": pdb(alphas), "hydrogen.pdb": pdb(hydrogens)})
    assert list(units(tmp_path).values()) == [Filtered("missing"), Filtered("no protein")]
    kept = units(tmp_path, KEEP)["alpha.pdb"]
    assert isinstance(kept, list)
    assert kept[0].values["atoms"].tolist() == [[0, 1, 0, 0]] * 8


def test_lengths_filter_chains_and_what_goes_with_them_is_said(tmp_path: Path) -> None:
    given(tmp_path, {"x.pdb": pdb([*chain(range(30), "A"), *chain(range(4), "B"), *chain(range(50), "C")])})
    [row] = rows_of(tmp_path, ProteinSettings(max_length=40))
    assert (row["chain"], row["notes"]) == ("A", "1 chains left out by max_length; 1 chains left out by min_length")
    assert list(units(tmp_path, ProteinSettings(min_length=51)).values()) == [Filtered("min_length")]


def test_a_structure_without_protein_is_filtered_not_bad(tmp_path: Path) -> None:
    """It is sound: a mirror of the PDB has thousands, and they must not count as damage."""
    dna = [Atom(name, "DG", number) for number in range(1, 30) for name in ("P", "C1'", "N9")]
    given(tmp_path, {"dna.pdb": pdb(dna), "dna.cif": cif(table(dna)), "ion.pdb": pdb([Atom("CA", "CA", hetero=True)])})
    assert list(units(tmp_path).values()) == [Filtered("no protein")] * 3


@pytest.mark.parametrize("form", ["pdb", "cif", "bcif"])
def test_models_are_rows_of_their_own_also_where_they_differ(tmp_path: Path, form: str) -> None:
    models = [chain([1, 2, 3]), chain([1, 2], at=20.0), chain([1, 2, 3, 4], at=30.0)]
    text = "".join(f"MODEL {n:8d}\n{pdb(model)}ENDMDL\n" for n, model in enumerate(models, 5))
    rows = [row for n, model in enumerate(models, 5) for row in table(model, n)]
    given(tmp_path, {f"x.{form}": {"pdb": text, "cif": cif(rows), "bcif": bcif(rows)}[form]})
    assert [(row["model"], row["length"]) for row in rows_of(tmp_path)] == [(1, 3)]
    found = rows_of(tmp_path, SHORT.model_copy(update={"models": "all"}))
    assert [(row["model"], row["length"], row["backbone"][0, 0, 0]) for row in found] == [
        (1, 3, 1),
        (2, 2, 20),
        (3, 4, 30),
    ]


# Dirt


def test_what_strict_parsers_refuse_is_mended_and_said(tmp_path: Path) -> None:
    clean = pdb(a_structure())
    lines = clean.splitlines()
    numbered = [f"{line[:72]}B   {n % 10_000:4d}" for n, line in enumerate(lines, 1_900)]
    stray = ["A" + line if n == 1 else line for n, line in enumerate(lines)]
    blank = [f"{line[:54]}{'':12}{line[66:]}" for line in lines]
    given(tmp_path, {"clean.pdb": clean, "numbered.pdb": "\n".join(numbered), "stray.pdb": "\n".join(stray)})
    given(tmp_path, {"short.pdb": "\n".join(line[:54] for line in lines), "blank.pdb": "\n".join(blank)})
    given(tmp_path, {"crlf.pdb": clean.replace("\n", "\r\n"), "charged.pdb": pdb(a_structure(), "1+")})
    rows = rows_of(tmp_path)
    clean_rows = {row["chain"]: row for row in rows if row["name"] == "clean.pdb"}
    notes = {row["name"]: row["notes"] for row in rows}
    backbone = sum(int(row["atoms"].sum()) for row in clean_rows.values())
    no_numbers = f"B-factors that are no numbers ({backbone}); occupancies that are no numbers ({backbone})"
    assert notes == {
        "blank.pdb": no_numbers,
        "charged.pdb": "",
        "clean.pdb": "",
        "crlf.pdb": "",
        "numbered.pdb": f"columns 77-80 hold no element and charge ({backbone})",
        "short.pdb": no_numbers,
        "stray.pdb": "a stray letter before ATOM (1)",
    }
    for row in rows:
        for name in ("backbone", "atoms", "residues", "numbers", "insertions"):
            assert np.array_equal(row[name], clean_rows[row["chain"]][name]), row["name"]


@pytest.mark.parametrize("wrong", ["     nan", "********", "     inf"])
def test_a_coordinate_that_is_no_number_is_a_missing_atom(tmp_path: Path, wrong: str) -> None:
    lines = pdb(chain([1, 2, 3])).splitlines()
    lines[6] = lines[6][:30] + wrong + lines[6][38:]  # CA of residue 2
    given(tmp_path, {"x.pdb": "\n".join(lines)})
    assert rows_of(tmp_path)[0]["numbers"].tolist() == [1, 3]
    [kept] = rows_of(tmp_path, KEEP)
    assert kept["atoms"][1].tolist() == [1, 0, 1, 1]
    assert np.isfinite(kept["backbone"]).all()


def test_an_atom_that_was_not_placed_is_a_missing_atom_and_it_is_said(tmp_path: Path) -> None:
    """9999.000, and a residue all at the origin."""
    lines = pdb(chain([1, 2, 3, 4])).splitlines()
    lines[6] = lines[6][:30] + "9999.000" * 3 + lines[6][54:]  # CA of residue 2
    for number in range(9, 13):
        lines[number] = lines[number][:30] + "   0.000" * 3 + lines[number][54:]
    given(tmp_path, {"x.pdb": "\n".join(lines)})
    [dropped] = rows_of(tmp_path)
    assert dropped["numbers"].tolist() == [1, 4]
    assert "5 atoms without a place" in dropped["notes"]
    [kept] = rows_of(tmp_path, KEEP)
    assert kept["numbers"].tolist() == [1, 2, 4]
    assert kept["atoms"][1].tolist() == [1, 0, 1, 1]
    assert float(np.abs(kept["backbone"]).max()) < 9000


def test_folders_named_as_splits_are_official_splits(tmp_path: Path) -> None:
    given(tmp_path, {f"{split}/{name}.pdb": pdb(chain([1])) for split in ("train", "valid", "test") for name in "ab"})
    found = [row for one in units(tmp_path, SHORT).values() if isinstance(one, list) for row in one]
    assert [(row.values["name"], row.split) for row in found] == [
        (f"{split}/{name}.pdb", split) for split in ("test", "train", "valid") for name in "ab"
    ]


def test_optional_columns_of_mmcif_may_be_absent_or_say_nothing(tmp_path: Path) -> None:
    names = "group_PDB label_atom_id label_comp_id label_asym_id auth_seq_id label_seq_id Cartn_x Cartn_y Cartn_z"
    names += " occupancy B_iso_or_equiv"
    rows = [["ATOM", a.name, a.residue, "Q", "?", str(a.number), *map(str, a.xyz), "?", "nan"] for a in chain([4, 5])]
    rows[1][6] = "?"  # CA of residue 4
    row = only(tmp_path, cif(rows, names.split()), KEEP, "x.cif")
    assert (row["chain"], row["numbers"].tolist(), row["model"]) == ("Q", [4, 5], 1)
    assert row["atoms"].tolist() == [[1, 0, 1, 1], [1, 1, 1, 1]]
    assert row["b_factors"].tolist() == [0, 0]


def test_rows_of_mmcif_may_lie_in_lines_as_they_like(tmp_path: Path) -> None:
    rows = table(a_structure())
    plain = cif(rows)
    quoted = [[f'"{word}"' if place == 3 else word for place, word in enumerate(row)] for row in rows]
    primed = [[*row[:3], "O5'", *row[4:]] if row[3] == "OXT" else row for row in rows]
    two_lines = [[*row[:9], "\n", *row[9:]] for row in rows]
    in_text = [[*row[:6], f"\n;{row[6]}\n;\n", *row[7:]] for row in rows]
    head, first, rest = plain.partition("ATOM ")
    forms = {"a": plain, "b": cif(quoted), "c": cif(primed), "d": cif(two_lines), "e": cif(in_text)}
    forms |= {"f": plain.replace("\n", "\r\n"), "g": plain.replace(" ", "\t"), "h": head + "\n\n" + first + rest}
    forms |= {"i": plain.replace("#", "loop_\n_other.id\n1\n2\n_more.name x\n"), "j": f"{plain}data_SECOND\n_x.y z\n"}
    found = rows_of(given(tmp_path, {f"{name}.cif": text for name, text in forms.items()}))
    assert len(found) == 3 * len(forms)
    for place, row in enumerate(found):
        for name in ("backbone", "atoms", "residues", "numbers", "insertions", "b_factors"):
            assert np.array_equal(row[name], found[place % 3][name]), row["name"]


@pytest.mark.parametrize("name", ["Cartn_y", "group_PDB", "label_comp_id", "auth_seq_id"])
def test_needed_columns_of_mmcif_are_named(tmp_path: Path, name: str) -> None:
    keep = [place for place, column in enumerate(COLUMNS) if column not in (name, "label_seq_id")]
    rows = [[row[place] for place in keep] for row in table(chain([1]))]
    assert reason(tmp_path, cif(rows, [COLUMNS[place] for place in keep]), "x.cif") == (
        f"its atom_site table has no column {name}"
    )


def test_files_that_are_no_structures_are_reported(tmp_path: Path) -> None:
    whole = pdb(chain(range(40)))
    packed = gzip.compress(whole.encode())
    assert reason(tmp_path / "1", b"") == "the file is empty"
    assert reason(tmp_path / "2", gzip.compress(b"\n")) == "the file is empty"
    assert reason(tmp_path / "3", b"\xff\xd8\xff\xe0" * 99) == "no ATOM or HETATM record: not a structure"
    assert reason(tmp_path / "4", "HEADER only\nEND\n") == "no ATOM or HETATM record: not a structure"
    assert reason(tmp_path / "5", packed[: len(packed) // 2]) == "cut off or damaged: it does not unpack"
    assert reason(tmp_path / "6", "data_X\n_cell.a 3\n") == "it has no atom_site table: not a structure"
    text = cif(table(chain(range(40))))
    assert (
        reason(tmp_path / "7", text[: len(text) // 2])
        == "cut off or damaged: its records are not those of a mmCIF file"
    )
    data = bcif(table(chain(range(40))))
    cut = "cut off or damaged: its records are not those of a BinaryCIF file"
    assert reason(tmp_path / "8", data[: len(data) // 2]) == cut
    shifted = whole.replace("ATOM     17  ", "ATOM     17 ")
    assert reason(tmp_path / "9", shifted) == "an ATOM record that is not in the columns of the PDB format"
    assert reason(tmp_path / "10", whole.replace(" A  17 ", " A 1x7 ")).startswith("cut off or damaged")


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_protein_files, "MOST_FILE_BYTES", 1 << 20)
    assert reason(tmp_path, gzip.compress(b" " * (9 << 20)), "x.pdb.gz") == "it unpacks to more than 1,048,576 bytes"


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.pdb").open("wb") as file:
        file.truncate(600 << 20)
    [bad] = units(tmp_path).values()
    assert isinstance(bad, Bad)
    assert "629,145,600 bytes" in bad.reason


@pytest.mark.parametrize("claim", ["rowCount", "srcSize", "no srcSize"])
def test_sizes_that_a_binary_file_only_claims_take_no_memory(tmp_path: Path, claim: str) -> None:
    content = msgpack.unpackb(bcif(table(chain(range(40)))))
    site = content["dataBlocks"][0]["categories"][0]
    if claim == "rowCount":
        site["rowCount"] = 2**31 - 1
    else:
        runs = [
            step
            for column in site["columns"]
            for step in column["data"]["encoding"][0].get("dataEncoding", column["data"]["encoding"])
            if step["kind"] == "RunLength"
        ]
        runs[0]["srcSize"] = 2**31 - 1 if claim == "srcSize" else None
    assert reason(tmp_path, msgpack.packb(content), "x.bcif").startswith("it claims more")


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    atoms = a_structure()
    originals = [pdb(atoms).encode(), cif(table(atoms)).encode(), bcif(table(atoms))]
    refused = 0
    for turn in range(150):
        data = bytearray(originals[turn % 3])
        for place in random.integers(0, len(data), 1 + turn % 4):
            data[place] = random.integers(256)
        for one in units(given(tmp_path, {"x.pdb": bytes(data)})).values():
            refused += isinstance(one, Bad)
    assert 40 < refused < 150


def test_a_file_that_vanished_after_the_survey_is_dirt(tmp_path: Path) -> None:
    given(tmp_path, {"x.pdb": pdb(chain([1]))})
    survey = proteins.survey([str(tmp_path)], SHORT)
    (tmp_path / "x.pdb").unlink()
    [(_, found, _)] = proteins.read(survey.slices[0], survey.context, SHORT, lambda _: True)
    assert isinstance(found, Bad)
    assert "could not be read" in found.reason


# Sources


def test_other_files_are_counted_and_nothing_to_read_is_refused(tmp_path: Path) -> None:
    given(tmp_path, {"a.pdb": pdb(chain([1])), "b.txt": "x", "._a.pdb": "x", "README": "x"})
    ignored = proteins.survey([str(tmp_path)], SHORT).ignored
    assert ignored == {"not a structure file (.txt)": 1, "hidden file": 1, "not a structure file (no suffix)": 1}
    given(tmp_path / "empty", {"x.txt": "x"})
    with pytest.raises(
        Refused, match=r"no structure in .*; it holds 1 x not a structure file \(\.txt\)\. Allowed are \.pdb"
    ):
        proteins.survey([str(tmp_path / "empty")], SHORT)
    with pytest.raises(Refused, match="nowhere"):
        proteins.survey([str(tmp_path / "nowhere")], SHORT)


def test_without_its_parser_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(tmp_path, {"a.pdb": pdb(chain([1]))})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install 'vqray\[proteins\]'"):
        proteins.survey([str(tmp_path)], SHORT)


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_members_of_a_tar_are_files(tmp_path: Path, name: str, mode: str) -> None:
    link = tarfile.TarInfo("soft.pdb")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = {"d/x.pdb": pdb(chain([1, 2])).encode(), "d/y.cif.gz": gzip.compress(cif(table(chain([3]))).encode())}
    members |= {"../climbs.pdb": b"x", "d/notes.txt": b"x", "d/bad.pdb": b"x"}
    with tarfile.open(tmp_path / name, mode) as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(link)
    survey = proteins.survey([str(tmp_path)], SHORT)
    assert survey.ignored == {"not a structure file (.txt)": 1}
    found = units(tmp_path)
    assert {key: one.reason for key, one in found.items() if isinstance(one, Bad)} == {
        f"{name}/../climbs.pdb": "its path climbs out of the archive",
        f"{name}/d/bad.pdb": "no ATOM or HETATM record: not a structure",
        f"{name}/soft.pdb": "it is a link, a device or a sparse file, not plain data",
    }
    good = [row for one in found.values() if isinstance(one, list) for row in one]
    assert [(row.values["name"], row.values["numbers"].tolist(), row.group) for row in good] == [
        (f"{name}/d/x.pdb", [1, 2], f"{name}/d/x"),
        (f"{name}/d/y.cif.gz", [3], f"{name}/d/y"),
    ]


def test_a_group_is_a_file_or_a_folder(tmp_path: Path) -> None:
    given(tmp_path, {f"{name}/{name}_{side}_u.pdb.gz": pdb(chain([1])) for name in ("1A2K", "1ACB") for side in "lr"})

    def groups(settings: ProteinSettings) -> list[str]:
        return [row.group for one in units(tmp_path, settings).values() if isinstance(one, list) for row in one]

    assert groups(SHORT) == ["1A2K/1A2K_l_u", "1A2K/1A2K_r_u", "1ACB/1ACB_l_u", "1ACB/1ACB_r_u"]
    folder = SHORT.model_copy(update={"group": "folder"})
    assert groups(folder) == ["1A2K", "1A2K", "1ACB", "1ACB"]
    with pytest.raises(Refused, match="one folder; use group=file"):
        proteins.survey([str(tmp_path / "1A2K")], folder)


def test_unwanted_units_are_not_read_and_a_fingerprint_is_that_of_the_bytes(tmp_path: Path) -> None:
    given(tmp_path, {"x.pdb": pdb(chain([1])), "y.pdb": pdb(chain([1])), "z.pdb": pdb(chain([2]))})
    survey = proteins.survey([str(tmp_path)], SHORT)
    prints = [
        mark for piece in survey.slices for _, _, mark in proteins.read(piece, survey.context, SHORT, lambda _: True)
    ]
    assert prints[0] == prints[1] != prints[2]
    assert list(proteins.read(survey.slices[0], survey.context, SHORT, lambda _: False)) == []


# Rows, tensors and files


def stored(rows: Sequence[dict[str, Any]], settings: ProteinSettings) -> dict[str, Any]:
    """As shards keep them and give them back."""
    schema = proteins.schema(settings)
    assert schema.names == list(rows[0])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch_of(rows, schema))
    return values_of(pa.ipc.open_file(sink.getvalue()).get_batch(0))


def test_tensors_are_filled_up_to_the_longest_row(tmp_path: Path) -> None:
    atoms = [atom for atom in chain(range(5), "A") if (atom.number, atom.name) != (3, "O")]
    rows = rows_of(given(tmp_path, {"x.pdb": pdb([*atoms, *chain([7, 8], "B", insertion="C", b_factor=9.5)])}))
    batch = proteins.tensors(stored(rows, SHORT), SHORT)
    assert set(batch) == set(proteins.shapes(SHORT))
    assert batch["residue_mask"].tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch["backbone"].shape == (2, 5, 4, 3)
    assert batch["backbone"].dtype == torch.float32
    for place, row in enumerate(rows):
        assert torch.equal(batch["backbone"][place, : row["length"]], torch.from_numpy(row["backbone"]))
        assert not batch["backbone"][place, row["length"] :].any()
    assert batch["atom_mask"].sum((1, 2)).tolist() == [19, 8]
    assert not batch["atom_mask"][0, 3, 3]
    assert batch["numbers"][1].tolist() == [7, 8, 0, 0, 0]
    assert batch["insertions"][1].tolist() == [67, 67, 0, 0, 0]
    assert batch["b_factors"][1].tolist() == [9.5, 9.5, 0, 0, 0]
    assert batch["residues"].dtype == torch.int64


def test_written_files_give_back_the_rows(tmp_path: Path) -> None:
    atoms = [atom for atom in a_structure() if atom.chain == "A"]
    rows = rows_of(given(tmp_path, {"x.pdb": pdb([*atoms, *chain([1, 2], "B")])}))
    batch = proteins.tensors(stored(rows, SHORT), SHORT)
    proteins.write_files(batch, ["one", "two"], str(tmp_path / "out"), SHORT)
    for stem, row in zip(["one", "two"], rows, strict=True):
        text = (tmp_path / f"out/{stem}.pdb").read_text()
        agrees(row, by_columns(text)["A"])
        assert text.endswith("TER\nEND\n")


def test_a_backbone_alone_can_be_written(tmp_path: Path) -> None:
    """As a decoder gives it: N, CA and C, numbered from 1."""
    backbone = torch.randn(1, 7, 3, 3, requires_grad=True)
    proteins.write_files({"backbone": backbone}, ["x"], str(tmp_path), SHORT)
    [residues] = by_columns((tmp_path / "x.pdb").read_text()).values()
    assert list(residues) == [(number, "") for number in range(1, 8)]
    assert {name for name, _, _ in residues.values()} == {"UNK"}
    xyz = np.array([[atoms[name] for name in ("N", "CA", "C")] for _, atoms, _ in residues.values()])
    assert np.allclose(xyz, backbone[0].detach().numpy(), atol=6e-4)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "not finite"), (123456.0, "does not fit the columns")])
def test_coordinates_that_a_pdb_file_cannot_hold_are_refused(tmp_path: Path, value: float, words: str) -> None:
    backbone = torch.zeros(1, 2, 4, 3)
    backbone[0, 1, 2, 1] = value
    with pytest.raises(Failed, match=f"row x .*{words}"):
        proteins.write_files({"backbone": backbone}, ["x"], str(tmp_path), SHORT)
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    mask[0, 1, 2] = False
    proteins.write_files({"backbone": backbone, "atom_mask": mask}, ["x"], str(tmp_path), SHORT)
    assert storage.exists(str(tmp_path / "x.pdb"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": "last"},
        {"min_length": 0},
        {"min_length": 30, "max_length": 20},
        {"table": "x.csv"},
        {"values": ("rmsf",)},
        {"table": "x.csv", "values": ("chain",)},
        {"table": "x.csv", "values": ("contact",), "contacts": "c.txt"},
        {"table": "x.csv", "values": ("atoms",)},
        {"table": "x.csv", "values": ("rmsf", "rmsf_known")},
        {"table": "x.csv", "values": ("two words",)},
        {"length": 3},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ProteinSettings(**wrong)


def test_an_ingest_counts_files_and_keeps_chains(
    ray_instance: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dirty = {"a/x.pdb.gz": gzip.compress(pdb(a_structure()).encode()), "a/y.cif": cif(table(chain(range(25))))}
    dirty |= {"b/z.bcif": bcif(table(chain(range(40), "B"))), "b/dna.pdb": pdb([Atom("P", "DG")]), "b/cut.pdb": ""}
    source = given(tmp_path / "files", {**dirty, "b/notes.txt": "x", "c/contacts.txt": "1 A CA 2 B CA 3\n"})
    given(source, {"c/short.pdb": pdb(chain(range(4))), "c/two.pdb": pdb([*chain(range(20)), *chain(range(20), "B")])})
    settings = ProteinSettings(group="folder", contacts="contacts.txt")
    out = str(tmp_path / "out")
    done = ingest("proteins", [str(source)], out, settings=settings, max_bad_fraction=0.5, holdout=0.3)
    assert (done.rows, done.quarantined) == (7, 1)
    assert done.filtered == {"min_length": 1, "no protein": 1, "not a structure file (.txt)": 1}
    assert "8 units: 4 kept in 7 rows" in capsys.readouterr().err
    reader = ShardReader(out)
    assert (reader.manifest.units.kept, reader.manifest.context["residues"]) == (4, list(RESIDUES))
    rows = reader.take("all", np.arange(7))
    read = [row.values for one in units(source, settings).values() if isinstance(one, list) for row in one]
    schema = proteins.schema(settings)
    # By their text: labels are NaN where there is none.
    assert repr(rows.select(schema.names).to_pylist()) == repr(batch_of(read, schema).to_pylist())
    folders: dict[str, set[int]] = {}
    for name, split in zip(rows.column("name").to_pylist(), rows.column("split").to_pylist(), strict=True):
        folders.setdefault(name.split("/")[0], set()).add(split)
    assert [len(splits) for splits in folders.values()] == [1, 1, 1]
