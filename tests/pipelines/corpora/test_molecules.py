"""Molecules to graphs: Hu et al.'s features, labels that may be missing, scaffolds, and all the dirt in between."""

import csv
import gzip
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rdkit import Chem
from rdkit.Chem.Scaffolds import MurckoScaffold

from jobs import cli
from pipelines.columns import batch_of, values_of
from pipelines.corpora import NOT_TEST, Bad, Filtered, Row, Survey, molecules
from pipelines.corpora import _molecule_features as features
from pipelines.corpora import _molecule_sdf as sdf
from pipelines.corpora._molecule_citations import opened
from pipelines.corpora.molecules import MoleculeSettings
from pipelines.errors import Failed, Refused
from pipelines.feed import to_batch

DRUGS = {
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "caffeine": "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    "morphine": "CN1CC[C@]23c4c5ccc(O)c4O[C@H]2[C@@H](O)C=C[C@H]3[C@H]1C5",
    "salt": "CC(=O)[O-].[Na+]",
    "crotonic": "C/C=C/C(=O)O",
    "ethanol": "CCO",
}


def table(path: Path, rows: Iterable[dict[str, Any]], **options: Any) -> Path:
    rows = list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def drugs(path: Path) -> Path:
    return table(path, ({"smiles": smiles} for smiles in DRUGS.values()))


def survey(source: Path, **settings: Any) -> tuple[Survey, MoleculeSettings]:
    chosen = MoleculeSettings(**settings)
    return molecules.survey([str(source)], chosen), chosen


def read_all(source: Path, **settings: Any) -> list[Row | Bad | Filtered]:
    found, chosen = survey(source, **settings)
    rows = []
    for piece in found.slices:
        units = list(molecules.read(piece, found.context, chosen, lambda _: True))
        assert [unit for unit, _, _ in units] == list(range(piece.stop - piece.start))
        rows += [row for _, row, _ in units]
    return rows


def rows_of(found: list[Row | Bad | Filtered]) -> list[dict[str, Any]]:
    assert all(isinstance(row, Row) for row in found), found
    return [row.values for row in found if isinstance(row, Row)]


def reasons(found: list[Row | Bad | Filtered]) -> list[str | None]:
    return [row.reason if isinstance(row, Bad) else None for row in found]


def graph(smiles: str) -> features.Graph:
    return features.graph(features.from_smiles(smiles))


def test_atoms_and_bonds_have_the_indices_of_hu_et_al() -> None:
    """Worked by hand: carbon is 6 - 1, both directions of a bond one behind the other, single, double, triple."""
    made = graph("CC=NC#N")
    assert made.nodes.tolist() == [[5, 0], [5, 0], [6, 0], [5, 0], [6, 0]]
    assert made.edges.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2], [3, 4], [4, 3]]
    assert made.edge_features.tolist() == [[0, 0]] * 2 + [[1, 0]] * 2 + [[0, 0]] * 2 + [[2, 0]] * 2
    benzene = graph("c1ccccc1")
    assert benzene.edge_features.tolist() == [[3, 0]] * 12
    assert sorted(map(tuple, benzene.edges.tolist())) == sorted(
        (a, b) for a in range(6) for b in ((a + 1) % 6, (a - 1) % 6)
    )


@pytest.mark.parametrize(("smiles", "chirality"), [("N[C@@](F)(Cl)Br", 1), ("N[C@](F)(Cl)Br", 2), ("NC(F)(Cl)Br", 0)])
def test_chirality_is_clockwise_one_and_counterclockwise_two(smiles: str, chirality: int) -> None:
    assert graph(smiles).nodes[:, 1].tolist() == [0, chirality, 0, 0, 0]


@pytest.mark.parametrize(("smiles", "directions"), [(r"F/C=C/F", [1, 0, 1]), (r"F/C=C\F", [1, 0, 2])])
def test_directions_are_those_of_the_bonds_beside_a_double_bond(smiles: str, directions: list[int]) -> None:
    assert graph(smiles).edge_features[::2, 1].tolist() == directions


def test_every_bond_is_two_edges_with_the_same_features() -> None:
    for smiles in DRUGS.values():
        made, bonds = graph(smiles), Chem.MolFromSmiles(smiles).GetNumBonds()
        assert made.edges.shape == made.edge_features.shape == (2 * bonds, 2)
        assert np.array_equal(made.edges[::2], made.edges[1::2, ::-1])
        assert np.array_equal(made.edge_features[::2], made.edge_features[1::2])


def test_what_has_no_feature_is_bad(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", ({"smiles": text} for text in ("C", "*C", "C$C", "C[Pt@SP1](F)(Cl)Br")))
    assert reasons(read_all(path)) == [
        None,
        "it has an atom of no element (*)",
        "no feature of Hu et al. stands for QUADRUPLE",
        "no feature of Hu et al. stands for CHI_SQUAREPLANAR",
    ]


def test_smiles_that_are_none_have_a_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = ["CCO", "not smiles", "CN(C)(C)(C)C", "c1cccc1", "", "C" * 10_001, "C1CC", " "]
    found = read_all(table(tmp_path / "x.csv", ({"smiles": text, "y": 1} for text in texts)))
    assert reasons(found) == [
        None,
        "RDKit cannot parse the SMILES",
        "an atom has more bonds than its valence allows",
        "its aromatic bonds cannot be kekulized",
        "the SMILES is empty",
        "the SMILES has more than 10,000 characters",
        "RDKit cannot parse the SMILES",
        "the SMILES is empty",
    ]
    assert [row.source for row in found[1:3] if isinstance(row, Bad)] == ["x.csv/1", "x.csv/2"]
    assert capfd.readouterr().err == ""


def test_a_row_holds_the_canonical_smiles_and_the_scaffold_its_split_goes_by(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", [{"smiles": "OCC"}, {"smiles": "Clc1cccc2ccccc12"}, {"smiles": "CC1CCCCC1"}])
    found = read_all(path)
    assert [(row["smiles"], row["scaffold"]) for row in rows_of(found)] == [
        ("CCO", ""),
        ("Clc1cccc2ccccc12", "c1ccc2ccccc2c1"),
        ("CC1CCCCC1", "C1CCCCC1"),
    ]
    assert [row.group for row in found if isinstance(row, Row)] == [row["scaffold"] for row in rows_of(found)]
    by_molecule = read_all(path, split_by="molecule")
    assert [row.group for row in by_molecule if isinstance(row, Row)] == [row["smiles"] for row in rows_of(found)]


def test_scaffolds_are_those_of_the_smiles_with_chirality_unless_told(tmp_path: Path) -> None:
    """The published split makes them from the text; RDKit's own function is the reference."""
    path = drugs(tmp_path / "x.csv")
    for chirality in (True, False):
        expected = [MurckoScaffold.MurckoScaffoldSmiles(text, includeChirality=chirality) for text in DRUGS.values()]
        assert [row["scaffold"] for row in rows_of(read_all(path, chirality=chirality))] == expected
        assert ("@" in expected[2]) == chirality


def test_fragments_and_max_atoms(tmp_path: Path) -> None:
    path = drugs(tmp_path / "x.csv")
    every = rows_of(read_all(path))
    assert [row["num_nodes"] for row in every] == [13, 14, 21, 5, 6, 3]
    assert every[3]["smiles"] == "CC(=O)[O-].[Na+]"
    largest = rows_of(read_all(path, fragments="largest"))
    assert [row["num_nodes"] for row in largest] == [13, 14, 21, 4, 6, 3]
    assert largest[3]["smiles"] == "CC(=O)[O-]"
    few = read_all(path, max_atoms=13)
    assert [type(row) for row in few] == [Row, Filtered, Filtered, Row, Row, Row]
    assert few[1] == Filtered("max_atoms")
    long = table(tmp_path / "long.csv", [{"smiles": "C" * 100}, {"smiles": "C" * 1001}])
    assert [type(row) for row in read_all(long)] == [Row, Filtered]


def test_without_rdkit_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    features.chemistry.cache_clear()
    with pytest.raises(Refused, match=r"pip install 'vqray\[molecules\]'"):
        survey(drugs(tmp_path / "x.csv"))


def test_labels_are_the_columns_of_numbers_that_count_no_rows(tmp_path: Path) -> None:
    rows = [
        {"": n, "smiles": text, "y": n % 2, "toxic": ["", "1", "nan", "0.5", "NA", "0"][n], "name": text, "num": n + 7}
        for n, text in enumerate(DRUGS.values())
    ]
    path = table(tmp_path / "x.csv", rows)
    assert survey(path)[0].context["labels"] == ["y", "toxic"]
    labels = [row["labels"] for row in rows_of(read_all(path))]
    nan = np.nan
    expected = [[0, nan], [1, 1], [0, nan], [1, 0.5], [0, nan], [1, 0]]
    assert np.array_equal(labels, np.array(expected, np.float32), equal_nan=True)
    assert all(row["labels"].shape == (0,) for row in rows_of(read_all(path, labels=None)))
    assert [row["labels"].tolist() for row in rows_of(read_all(path, labels="num"))] == [[n + 7] for n in range(6)]


def test_labels_of_text_are_classes(tmp_path: Path) -> None:
    rows = [{"smiles": "C" * (n + 1), "kind": ["red", "", " blue", "red"][n]} for n in range(4)]
    path = table(tmp_path / "x.csv", rows)
    assert survey(path)[0].context["labels"] == []
    assert survey(path, labels="kind")[0].context["classes"] == {"kind": ["blue", "red"]}
    labels = [row["labels"][0] for row in rows_of(read_all(path, labels="kind"))]
    assert np.array_equal(labels, [1, np.nan, 0, 1], equal_nan=True)


def test_a_label_that_is_no_number_or_not_finite_is_bad(tmp_path: Path) -> None:
    rows = [{"smiles": "C", "y": n % 2} for n in range(1100)]
    rows += [{"smiles": "C", "y": text} for text in ("oops", "inf", "1e300", "1e30")]
    found = read_all(table(tmp_path / "x.csv", rows))
    assert reasons(found)[1100:] == ["a label is no number", "a label is not finite", "a label is not finite", None]


def test_labels_of_several_files_stand_side_by_side(tmp_path: Path) -> None:
    table(tmp_path / "a.csv", [{"smiles": "C", "one": 1}, {"smiles": "CC", "one": 0}])
    table(tmp_path / "b.csv", [{"two": 3, "SMILES": "CCC"}, {"two": 2, "SMILES": "CO"}])
    found, _ = survey(tmp_path)
    assert found.context["labels"] == ["one", "two"]
    labels = [row["labels"] for row in rows_of(read_all(tmp_path))]
    nan = np.nan
    assert np.array_equal(labels, np.array([[1, nan], [0, nan], [nan, 3], [nan, 2]]), equal_nan=True)
    assert [row["name"] for row in rows_of(read_all(tmp_path))] == ["a.csv/0", "a.csv/1", "b.csv/0", "b.csv/1"]


def test_official_splits_win(tmp_path: Path) -> None:
    words = ["train", "Test", "valid", "train"]
    path = table(tmp_path / "x.csv", [{"smiles": "C" * (n + 1), "split": word} for n, word in enumerate(words)])
    assert [row.split for row in read_all(path) if isinstance(row, Row)] == ["train", "test", "valid", "train"]
    two = table(tmp_path / "y.csv", [{"smiles": "C", "set": "train"}, {"smiles": "CC", "set": "test"}])
    assert [row.split for row in read_all(two) if isinstance(row, Row)] == [None, None]
    assert [row.split for row in read_all(two, split="set") if isinstance(row, Row)] == [NOT_TEST, "test"]
    other = table(tmp_path / "z.csv", [{"smiles": "C", "split": "left"}, {"smiles": "CC", "split": "train"}])
    assert [row.split for row in read_all(other) if isinstance(row, Row)] == [None, None]
    assert reasons(read_all(other, split="split")) == ["its official split is none of train, valid and test", None]


def test_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", [{"structure": "C", "y": 1}])
    with pytest.raises(Refused, match=r"no column of x.csv .* It has: structure, y\. Name the column of SMILES"):
        survey(path)
    assert len(rows_of(read_all(path, smiles="structure"))) == 1
    with pytest.raises(Refused, match=r"no column 'smile'; allowed: structure, y|did you mean"):
        survey(path, smiles="smile")
    with pytest.raises(Refused, match=r"no file has a column 'z' of labels; allowed: structure, y"):
        survey(path, smiles="structure", labels=("z",))
    with pytest.raises(Refused, match=r"no file has a column 'w' of splits"):
        survey(path, smiles="structure", split="w")
    with pytest.raises(Refused, match=r"column 'y' holds 1, which are no splits; allowed: dev, test"):
        survey(path, smiles="structure", split="y")
    several = table(tmp_path / "y.csv", [{"smiles": "C", "SMILES": "C"}])
    with pytest.raises(Refused, match=r"several columns that could be the SMILES: \['smiles', 'SMILES'\]"):
        survey(several)
    many = table(tmp_path / "z.csv", [{"smiles": "C", "id": f"m{n}"} for n in range(1002)])
    with pytest.raises(Refused, match=r"text with more than 1,000 different values"):
        survey(many, labels="id")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "picture.png").write_bytes(b"x")
    with pytest.raises(Refused, match=r"there is no molecule in .* it holds 1 x not a file of molecules \(.png\)"):
        survey(tmp_path / "none")


def test_a_folder_of_many_kinds_of_files(tmp_path: Path) -> None:
    drugs(tmp_path / "a.csv")
    table(tmp_path / "about.csv", [{"file": "a.csv", "from": "memory"}])
    (tmp_path / "b.smi").write_text("CCO |ethanol\n\nc1ccccc1\tbenzene\n")
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"smiles\nC\n")[:-9])
    (tmp_path / "d.csv").write_bytes(b"")
    (tmp_path / "e.csv").write_text("smiles\n")
    (tmp_path / "f.csv").write_bytes(b"smiles\nC\n\xff\nC,C\n")
    (tmp_path / "notes.md").write_text("x")
    pq.write_table(pa.table({"smiles": ["CC", None]}), tmp_path / "g.parquet")
    found = read_all(tmp_path)
    assert reasons(found) == [
        *[None] * 6,
        *[None, "the SMILES is empty", None],
        *[None, "the gzip stream is cut off"],
        "the file is empty",
        *[None, "not UTF-8 text", "it has more fields than the header"],
        *[None, "the SMILES is empty"],
    ]
    assert [row.values["smiles"] for row in found if isinstance(row, Row)][6:] == ["CCO", "c1ccccc1", "C", "C", "CC"]
    assert survey(tmp_path)[0].ignored == {
        "a table without a column of SMILES": 1,
        "a file without records": 1,
        "not a file of molecules (.md)": 1,
    }


def test_names_in_tsv_may_be_quoted_and_hold_line_ends(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('name\tsmiles\ty\n"two\nlines"\tCCO\t1\nplain\tC\t0\n')
    assert [(row["smiles"], row["labels"].tolist()) for row in rows_of(read_all(tmp_path))] == [
        ("CCO", [1]),
        ("C", [0]),
    ]


def test_slices_are_small_because_a_molecule_takes_long(tmp_path: Path) -> None:
    rows = [{"smiles": smiles, "text": "x" * 900} for smiles in list(DRUGS.values()) * 100]
    path = table(tmp_path / "x.csv", rows)
    found, chosen = survey(path)
    assert len(found.slices) == 3
    second = found.slices[1]
    assert 270 < second.start < 290
    [(unit, row, digest)] = molecules.read(second, found.context, chosen, lambda unit: unit == 1)
    smiles = rows[second.start + 1]["smiles"]
    assert (unit, row.values["smiles"]) == (1, Chem.CanonSmiles(smiles))
    record = f"{smiles},{'x' * 900}\r\n".encode()
    assert digest == hashlib.sha256(record).digest()


def records(values: dict[str, dict[str, str]], ending: str = "\n") -> str:
    text = ""
    for name, properties in values.items():
        block = Chem.MolToMolBlock(Chem.MolFromSmiles(DRUGS[name]))
        text += block + "".join(f">  <{key}>\n{value}\n\n" for key, value in properties.items()) + "$$$$\n"
    return text.replace("\n", ending)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_sdf_is_cut_at_its_dollars_into_many_slices(tmp_path, monkeypatch, ending, packed) -> None:
    monkeypatch.setattr(sdf, "SLICE_BYTES", 2000)
    given = {name: {"logP": str(n / 2), "text": "$$$ no end"} for n, name in enumerate(DRUGS)}
    text = records(given, ending).encode()
    path = tmp_path / ("x.sdf.gz" if packed else "x.sdf")
    path.write_bytes(gzip.compress(text) if packed else text)
    found, _ = survey(path)
    assert len(found.slices) >= 3
    assert found.context["labels"] == ["logP"]
    rows = rows_of(read_all(path))
    assert [row["smiles"] for row in rows] == [Chem.CanonSmiles(text) for text in DRUGS.values()]
    assert [row["labels"].tolist() for row in rows] == [[n / 2] for n in range(6)]


def test_dirt_in_sdf_costs_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = records({"ethanol": {}})
    broken = good.replace("V2000", "V9000")
    greedy = good.replace("  1  2  1  0", "  1  1  1  0")
    (tmp_path / "x.sdf").write_bytes(
        (good + broken + greedy + good).encode() + b"\xff\n$$$$\n" + good.removesuffix("$$$$\n").encode() + b"\n\n"
    )
    found = read_all(tmp_path / "x.sdf")
    assert [reason is None for reason in reasons(found)] == [True, False, False, True, False, True]
    assert reasons(found)[4] == "not UTF-8 text"
    packed = gzip.compress(records({name: {} for name in DRUGS}).encode() * 20)
    (tmp_path / "y.sdf.gz").write_bytes(packed[: len(packed) // 2])
    found = read_all(tmp_path / "y.sdf.gz")
    assert reasons(found)[-1] == "the gzip stream is cut off"
    assert reasons(found)[:-1] == [None] * (len(found) - 1)
    monkeypatch.setattr("pipelines.corpora._text_records.MOST_RECORD_BYTES", 3000)
    (tmp_path / "z.sdf").write_text(good + "x\n" * 2000 + "$$$$\n" + "y" * 4000 + "\n$$$$\n" + good)
    assert reasons(read_all(tmp_path / "z.sdf")) == [None, "more than 3,000 bytes", "more than 3,000 bytes", None]
    monkeypatch.setattr(features, "MOST_SDF", len(good))
    (tmp_path / "w.sdf").write_text(good + "x" + good)
    assert reasons(read_all(tmp_path / "w.sdf")) == [None, f"the SDF record has more than {len(good)} characters"]
    (tmp_path / "empty.sdf").write_text("")
    assert reasons(read_all(tmp_path / "empty.sdf")) == ["the file is empty"]


def stored(rows: list[dict[str, Any]], settings: MoleculeSettings) -> dict[str, Any]:
    return values_of(batch_of(rows, molecules.schema(settings)))


def test_tensors_are_padded_and_a_missing_label_costs_no_row(tmp_path: Path) -> None:
    path = table(
        tmp_path / "x.csv", [{"smiles": "CCO", "y": "", "z": 2}, {"smiles": "C", "y": 1, "z": ""}, {"smiles": "C=C"}]
    )
    settings = MoleculeSettings()
    made = molecules.tensors(stored(rows_of(read_all(path)), settings), settings)
    assert made.keys() == molecules.shapes(settings).keys()
    assert made["nodes"][:, :, 0].tolist() == [[5, 5, 7], [5, 0, 0], [5, 5, 0]]
    assert made["nodes_mask"].tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert made["edges"].tolist() == [
        [[0, 1], [1, 0], [1, 2], [2, 1]],
        [[0, 0]] * 4,
        [[0, 1], [1, 0], [0, 0], [0, 0]],
    ]
    assert made["edges_mask"].tolist() == [[True] * 4, [False] * 4, [True, True, False, False]]
    assert made["edge_features"][2].tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]
    assert made["labels"].tolist() == [[0, 2], [1, 0], [0, 0]]
    assert made["labels_mask"].tolist() == [[False, True], [True, False], [False, False]]
    assert {column.dtype for column in made.values()} == {torch.int64, torch.bool, torch.float32}
    batch, lost = to_batch(made, np.arange(3), np.ones(3, bool))
    assert (lost, batch.mask.tolist()) == (0, [True] * 3)
    nothing = molecules.tensors(stored([], settings), settings)
    assert {len(column) for column in nothing.values()} == {0}


def test_files_are_sdf_that_read_back_as_the_same_graph(tmp_path: Path) -> None:
    settings = MoleculeSettings()
    rows = rows_of(read_all(drugs(tmp_path / "x.csv")))
    columns = molecules.tensors(stored(rows, settings), settings)
    molecules.write_files(columns, list(DRUGS), str(tmp_path / "files"), settings)
    for name, row in zip(DRUGS, rows, strict=True):
        back = Chem.MolFromMolFile(str(tmp_path / f"files/{name}.sdf"), sanitize=False)
        assert [atom.GetAtomicNum() - 1 for atom in back.GetAtoms()] == row["nodes"][:, 0].tolist()
        bonds = [sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())) for bond in back.GetBonds()]
        assert bonds == [sorted(edge) for edge in row["edges"][::2].tolist()]
        kinds = [features.BONDS.index(str(bond.GetBondType())) for bond in back.GetBonds()]
        assert kinds == row["edge_features"][::2, 0].tolist()
    with pytest.raises(Failed, match="decoded columns are vectors; an SDF needs nodes"):
        molecules.write_files({"vectors": torch.zeros(1, 3)}, ["a"], str(tmp_path / "files"), settings)


def citations(path: Path, *, nodes: int = 30, seed: int = 0, **arrays: Any) -> Path:
    random = np.random.default_rng(seed)
    counts = random.integers(0, 5, nodes)
    words = [np.sort(random.choice(20, count, replace=False)) for count in counts]
    given = {
        "x_indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        "x_indices": np.concatenate(words).astype(np.int32),
        "num_features": np.int64(20),
        "y": random.integers(-1, 4, nodes),
        "edge_index": random.integers(0, nodes, (2, 40)),
    }
    np.savez_compressed(path, **{**given, **arrays})
    return path


@pytest.mark.parametrize("hops", [0, 1, 2, 5])
def test_a_node_comes_with_all_that_reaches_it(tmp_path: Path, hops: int) -> None:
    """networkx cuts the same neighbourhoods out of the same graph."""
    path = citations(tmp_path / "x.npz")
    data = np.load(path)
    edges = data["edge_index"].T.tolist()
    into = nx.MultiDiGraph([(target, source) for source, target in edges])
    into.add_nodes_from(range(30))
    rows = rows_of(read_all(path, graphs="citations", hops=hops))
    for node, row in enumerate(rows):
        ids = row["node_ids"].tolist()
        steps = nx.single_source_shortest_path_length(into, node, cutoff=hops)
        assert ids == sorted(steps, key=lambda other, steps=steps: (steps[other], other))
        assert row["num_nodes"] == len(ids)
        inside = sorted(edge for edge in edges if edge[0] in steps and edge[1] in steps)
        assert sorted([ids[a], ids[b]] for a, b in row["edges"].tolist()) == inside
        words = np.split(row["words"], np.cumsum(row["word_counts"])[:-1])
        for place, other in enumerate(ids):
            start, stop = data["x_indptr"][other : other + 2]
            assert words[place].tolist() == data["x_indices"][start:stop].tolist()
        assert row["label"] == data["y"][node]
    assert len(rows) == 30


def test_citation_tensors_give_each_node_its_words(tmp_path: Path) -> None:
    settings = MoleculeSettings(graphs="citations", hops=1)
    rows = rows_of(read_all(citations(tmp_path / "x.npz"), graphs="citations", hops=1))
    made = molecules.tensors(stored(rows, settings), settings)
    assert made.keys() == molecules.shapes(settings).keys()
    for n, row in enumerate(rows):
        words = np.split(row["words"], np.cumsum(row["word_counts"])[:-1])
        assert made["nodes_mask"][n].sum() == len(words)
        for place, some in enumerate(words):
            assert made["words"][n, place][made["words_mask"][n, place]].tolist() == some.tolist()
        assert made["words_mask"][n].sum() == len(row["words"])
        assert made["edges"][n][made["edges_mask"][n]].tolist() == row["edges"].tolist()
    assert made["label"].tolist() == [row["label"] for row in rows]


def test_masks_of_a_citation_graph_are_its_official_split(tmp_path: Path) -> None:
    """What lies in no mask is a train row whose label is not given."""
    masks = {name: np.arange(30) // 10 == place for place, name in enumerate(("train_mask", "val_mask", "test_mask"))}
    masks["test_mask"] = np.arange(30) >= 25
    path = citations(tmp_path / "x.npz", y=np.ones(30, int), **masks)
    found = read_all(path, graphs="citations")
    assert [row.split for row in found if isinstance(row, Row)] == ["train"] * 10 + ["valid"] * 10 + ["train"] * 5 + [
        "test"
    ] * 5
    assert [row["label"] for row in rows_of(found)] == [1] * 20 + [-1] * 5 + [1] * 5


def test_damaged_citation_graphs_are_one_bad_unit(tmp_path: Path) -> None:
    citations(tmp_path / "a.npz", x_indptr=np.zeros(7, np.int32))
    citations(tmp_path / "b.npz", edge_index=np.full((2, 3), 30))
    citations(tmp_path / "c.npz", y=np.array([{}] * 30, object))
    citations(tmp_path / "d.npz", num_features=np.int64(3))
    (tmp_path / "e.npz").write_bytes(citations(tmp_path / "e.npz").read_bytes()[:300])
    np.savez(tmp_path / "f.npz", images=np.zeros(3))
    (tmp_path / "notes.txt").write_text("x")
    assert reasons(read_all(tmp_path, graphs="citations")) == [
        "not a citation graph: x_indptr does not fit x_indices and y",
        "not a citation graph: edge_index does not fit y",
        "not a citation graph: Object arrays cannot be loaded when allow_pickle=False",
        "not a citation graph: x_indices does not fit num_features",
        "not a citation graph: File is not a zip file",
        "not a citation graph: it has no array 'x_indptr'; needed are x_indptr, x_indices, num_features, y, edge_index",
    ]
    with pytest.raises(Refused, match=r"graphs=citations reads \.npz files"):
        survey(drugs(tmp_path / "x.csv"), graphs="citations")


def test_a_bomb_among_the_arrays_is_not_unpacked(tmp_path: Path) -> None:
    """A zip that promises 3 GiB: what it promises is added up before any of it is read."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("y.npy", b"")
    data = bytearray((tmp_path / "x.npz").read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + 24 : place + 28] = (3 << 30).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="unpack to more than"):
        opened(str(tmp_path / "x.npz"))


@pytest.mark.usefixtures("ray_instance")
def test_molecules_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"smiles": smiles, "y": n % 2} for n, smiles in enumerate([*list(DRUGS.values()) * 20, "oops"])]
    path = table(tmp_path / "x.csv", rows)
    words = ["ingest", "--corpus", "molecules", "--source", str(path), "--set", "max_atoms=20", "labels=y", "--out"]
    made = []
    for out in ("one", "two"):
        assert cli.main([*words, str(tmp_path / out)]) == 0
        made.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert made[0]["digest"] == made[1]["digest"]
    assert (made[0]["rows"], made[0]["quarantined"]) == (100, 1)
