"""Annotations of residues: joined by chain, number and insertion code; what fits no residue is counted."""

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.corpora import Bad, Row, Survey, _protein_annotations, proteins
from pipelines.corpora.proteins import ProteinSettings
from pipelines.errors import Refused
from tests.pipelines.corpora.test_proteins import Atom, chain, given, pdb, residue, rows_of, stored, units

NAN = float("nan")
CONTACTS = ProteinSettings(min_length=1, contacts="contacts.txt", missing="keep")
STRINGS = ProteinSettings(min_length=1, strings=".dssp")
TABLE = ProteinSettings(min_length=1, table="flex.csv", values=("rmsf", "site"))


def same(found: Any, wanted: list[float]) -> bool:
    return found.dtype == np.float32 and np.array_equal(found, np.float32(wanted), equal_nan=True)


def atoms() -> list[Atom]:
    """Chain A: 1, 2, 2A, 3; chain B: -1, 0."""
    inserted = residue(2, at=2.5, insertion="A")
    return [*chain([1, 2]), *inserted, *chain([3]), *chain([-1, 0], "B")]


def test_contacts_label_both_chains_of_every_file_of_their_folder(tmp_path: Path) -> None:
    contacts = "1 A CB -1 B CA 4.79\n1 A CA -1 B CA 4.9\n\n2A A O -1 B N 3.0\n"
    given(tmp_path, {"x/both.pdb": pdb(atoms()), "x/b.pdb": pdb(chain([-1, 0], "B")), "x/contacts.txt": contacts})
    given(tmp_path, {"y/none.pdb": pdb(chain([1]))})
    found = {(row["name"], row["chain"]): row for row in rows_of(tmp_path, CONTACTS)}
    assert same(found["x/both.pdb", "A"]["contact"], [1, 0, 1, 0])
    assert same(found["x/both.pdb", "B"]["contact"], [1, 0])
    assert same(found["x/b.pdb", "B"]["contact"], [1, 0])
    assert same(found["y/none.pdb", "A"]["contact"], [NAN])
    assert proteins.survey([str(tmp_path)], CONTACTS).ignored == {}


def test_contacts_of_no_residue_are_counted(tmp_path: Path) -> None:
    contacts = "1 A CB 7 B CA 4.79\n9 A CB 7 B CA 4.9\n9 A CA 8 B N 3.0\n5 C CA 0 B N 3.0\n"
    given(tmp_path, {"x.pdb": pdb(atoms()), "contacts.txt": contacts})
    assert [(row["chain"], row["unmatched"]) for row in rows_of(tmp_path, CONTACTS)] == [("A", 1), ("B", 2)]


def test_a_list_that_is_none_costs_its_structures(tmp_path: Path) -> None:
    given(tmp_path, {"x.pdb": pdb(atoms()), "contacts.txt": "1 A CB 2 B CA 4.79\nresidue A CB 2 B CA 1\n"})
    [bad] = units(tmp_path, CONTACTS).values()
    assert isinstance(bad, Bad)
    assert bad.reason == "contacts.txt beside it is no list of `residue chain atom residue chain atom`: line 2"


def test_strings_are_joined_letter_by_letter(tmp_path: Path) -> None:
    given(tmp_path, {"x.pdb.gz": gzip.compress(pdb(atoms()).encode()), "x.pdb.dssp": "-HEt x.pdb\nGC x.pdb\n"})
    given(tmp_path, {"y.pdb": pdb(chain([1, 2])), "y.dssp": "B?\n", "z.pdb": pdb(chain([1, 2])), "z.pdb.dssp": "HHH\n"})
    given(tmp_path, {"none.pdb": pdb(chain([1]))})
    found = {(row["name"], row["chain"]): row for row in rows_of(tmp_path, STRINGS)}
    assert same(found["x.pdb.gz", "A"]["secondary"], [0, 1, 2, 6])
    assert same(found["x.pdb.gz", "B"]["secondary"], [4, 0])
    assert same(found["y.pdb", "A"]["secondary"], [3, NAN])
    assert same(found["z.pdb", "A"]["secondary"], [NAN, NAN])
    assert same(found["none.pdb", "A"]["secondary"], [NAN])
    unmatched = {name: row["unmatched"] for (name, _), row in found.items()}
    assert unmatched == {"none.pdb": 0, "x.pdb.gz": 0, "y.pdb": 0, "z.pdb": 3}


@pytest.mark.parametrize(("string", "wanted"), [("HEG", [1, 4]), ("HG", [1, 4])])
def test_a_string_may_leave_out_residues_without_a_frame(tmp_path: Path, string: str, wanted: list[float]) -> None:
    part = [atom for atom in chain([1, 2, 3]) if (atom.number, atom.name) != (2, "C")]
    [row] = rows_of(given(tmp_path, {"x.pdb": pdb(part), "x.dssp": string}), STRINGS)
    assert same(row["secondary"], wanted)


def write_table(path: Path, header: list[str], rows: list[list[Any]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


@pytest.mark.parametrize("name", ["d/x.pdb", "x.pdb", "d/x", "x"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_is_joined_by_file_chain_number_and_insertion_code(tmp_path: Path, name: str, ending: str) -> None:
    rows = [[0.5, name, "A", "2A", 1, "x"], ["", name, "B", " -1 ", 0, "x"], [0.25, name, "A", 1, 0, "x"]]
    header = ["RMSF", "file", "chain", "residue", "site", "other"]
    write_table(tmp_path / f"flex.{ending}", header, rows, "," if ending == "csv" else "\t")
    given(tmp_path, {"d/x.pdb": pdb(atoms()), "e/y.pdb": pdb(chain([1]))})
    settings = TABLE.model_copy(update={"table": f"flex.{ending}"})
    found = {(row["name"], row["chain"]): row for row in rows_of(tmp_path, settings)}
    assert same(found["d/x.pdb", "A"]["rmsf"], [0.25, NAN, 0.5, NAN])
    assert same(found["d/x.pdb", "A"]["site"], [0, NAN, 1, NAN])
    assert same(found["d/x.pdb", "B"]["rmsf"], [NAN, NAN])
    assert same(found["d/x.pdb", "B"]["site"], [0, NAN])
    assert same(found["e/y.pdb", "A"]["site"], [NAN])


def test_a_column_complex_names_the_folder(tmp_path: Path) -> None:
    write_table(tmp_path / "flex.csv", ["complex", "chain", "residue", "rmsf", "site"], [["1A2K", "B", 2, 7, 0]])
    given(tmp_path, {f"set/1A2K/{name}.pdb": pdb(chain([1, 2], "B")) for name in ("bound", "free")})
    found = rows_of(tmp_path, TABLE)
    assert [same(row["rmsf"], [NAN, 7]) for row in found] == [True, True]


def test_rows_of_a_table_that_fit_nothing_are_counted(tmp_path: Path) -> None:
    rows = [["x", "A", 77, 1, 1], ["x", "Z", 1, 1, 1], ["gone", "A", 1, 1, 1], ["gone", "A", 2, 1, 1]]
    rows += [["x", "A", "?", 1, 1], ["x", "A", 1, "high", 1], ["x", "A", 1, "inf", 1], ["x", "A"]]
    write_table(tmp_path / "flex.csv", ["file", "chain", "residue", "rmsf", "site"], rows)
    given(tmp_path, {"x.pdb": pdb(atoms())})
    # 77 is not in A, and Z not in the file: that is said on the file's first row.
    assert [(row["chain"], row["unmatched"]) for row in rows_of(tmp_path, TABLE)] == [("A", 2), ("B", 0)]
    assert proteins.survey([str(tmp_path)], TABLE).ignored == {
        "annotation of no structure here": 2,
        "annotation that is no number": 4,
    }


def test_the_nearest_table_above_counts_and_bytes_that_are_no_utf8_are_no_matter(tmp_path: Path) -> None:
    header = "file,chain,residue,rmsf,site,remark\n"
    given(tmp_path, {name: pdb(chain([1])) for name in ("a/b/x.pdb", "c/x.pdb")})
    given(
        tmp_path, {"flex.csv": (header + "x,A,1,1,1,caf").encode() + b"\xe9\n", "a/flex.csv": header + "x,A,1,2,2,\n"}
    )
    assert [(row["name"], row["rmsf"][0]) for row in rows_of(tmp_path, TABLE)] == [("a/b/x.pdb", 2), ("c/x.pdb", 1)]


def test_annotations_that_are_nowhere_or_lack_a_column_are_refused(tmp_path: Path) -> None:
    given(tmp_path, {"x.pdb": pdb(chain([1]))})
    for settings, words in [
        (CONTACTS, "contacts=contacts.txt was given, and there is no such file beside any structure"),
        (STRINGS, "strings=.dssp was given"),
        (TABLE, "table=flex.csv was given, and there is no such file in the folder of a structure or above it"),
    ]:
        with pytest.raises(Refused, match=words):
            proteins.survey([str(tmp_path)], settings)
    given(tmp_path, {"flex.csv": "entry,chain,resnum,rmsf\nx,A,1,1\n"})
    with pytest.raises(
        Refused, match=r"no column file or complex, residue, site; it has 'entry', 'chain', 'resnum', 'rmsf'"
    ):
        proteins.survey([str(tmp_path)], TABLE)
    longest = max(csv.field_size_limit(), 2**17)  # one for the whole process: whoever reads longer texts raises it
    given(tmp_path, {"flex.csv": b'file,chain,residue,rmsf,site\n"' + b"x" * (longest + 1)})
    with pytest.raises(Refused, match=r"table=flex\.csv was given, but it cannot be read"):
        proteins.survey([str(tmp_path)], TABLE)


def test_moving_a_corpus_changes_nothing_and_another_label_does(tmp_path: Path) -> None:
    settings = TABLE.model_copy(update={"contacts": "contacts.txt", "strings": ".dssp"})
    files = {"d/x.pdb": pdb(atoms()), "d/contacts.txt": "1 A CB -1 B CA 4.79\n", "d/x.dssp": "HHHH\nEE\n"}
    files["flex.csv"] = "file,chain,residue,rmsf,site\nx,A,1,1,1\n"

    def read(home: Path) -> tuple[list[Any], list[bytes]]:
        survey: Survey = proteins.survey([str(home)], settings)
        [piece] = survey.slices
        [(_, rows, mark)] = proteins.read(piece, survey.context, settings, lambda _: True)
        assert isinstance(rows, list)
        assert all(isinstance(row, Row) for row in rows)
        return [survey.context, survey.ignored, piece.name, piece.meta], [mark]

    before = read(given(tmp_path / "one", files))
    assert read(given(tmp_path / "deep/er/two", files)) == before
    # Of the same size and in the same place: no process may remember the old ones.
    for name, text in {"flex.csv": "file,chain,residue,rmsf,site\nx,A,1,2,1\n", "d/x.dssp": "EEEE\nEE\n"}.items():
        given(tmp_path / "one", {**files, name: text})
        assert read(tmp_path / "one")[1] != before[1]


def test_a_table_that_changed_after_the_survey_is_not_joined(tmp_path: Path) -> None:
    header = "file,chain,residue,rmsf,site\n"
    given(tmp_path, {"x.pdb": pdb(atoms()), "flex.csv": f"{header}x,A,1,1,1\n"})
    survey = proteins.survey([str(tmp_path)], TABLE)
    given(tmp_path, {"flex.csv": f"{header}x,A,1,3,1\n"})
    _protein_annotations.table_of.cache_clear()  # as on another worker
    [(_, found, _)] = proteins.read(survey.slices[0], survey.context, TABLE, lambda _: True)
    assert found == Bad("x.pdb", "flex.csv changed while it was read")


def test_tensors_of_labels_are_zero_where_there_is_none(tmp_path: Path) -> None:
    write_table(tmp_path / "flex.csv", ["file", "chain", "residue", "rmsf", "site"], [["x", "A", 2, 0.5, ""]])
    rows = rows_of(given(tmp_path, {"x.pdb": pdb(atoms())}), TABLE)
    batch = proteins.tensors(stored(rows, TABLE), TABLE)
    assert set(batch) == set(proteins.shapes(TABLE))
    assert batch["rmsf"].tolist() == [[0, 0.5, 0, 0], [0, 0, 0, 0]]
    assert batch["rmsf_known"].tolist() == [[False, True, False, False], [False] * 4]
    assert not batch["site_known"].any()
    assert all(column.isfinite().all() for column in batch.values())
