"""Tokens made elsewhere are matched to rows, and what does not fit is refused and says why."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pipelines.errors import Refused
from pipelines.recipes import _protein_tokens as tokens
from pipelines.recipes import _structure_chains as chains
from pipelines.shards import ShardReader
from tests.pipelines.protein_shards import CODES, complexes, make_protein_shards, protein
from tests.vqcore.chains import chain as grown
from vqcore import frames
from vqcore.quantizers import VectorQuantizer


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.place,)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> ShardReader:
    return ShardReader(make_protein_shards(tmp_path_factory.mktemp("shards"), complexes(6)))


def lines_of(rows) -> list[dict]:
    return [
        {"name": row["name"], "chain": row["chain"], "codes": [int(code) for code in row["residues"]]}
        for _, row in rows
    ]


def written(home: Path, lines: list[dict], ending: str = ".jsonl", size: int = CODES) -> tuple[str, str]:
    file, book = home / f"codes{ending}", home / "vectors.npy"
    if ending == ".jsonl":
        file.write_text("\n".join(map(json.dumps, lines)))
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(lines), file)
    else:
        table = pa.Table.from_pylist(lines)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    np.save(book, np.eye(size, dtype=np.float64))
    return str(file), str(book)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".arrow"])
def test_codes_come_back_for_the_rows_they_are_of(reader, tmp_path, ending):
    rows = complexes(6)
    lines = lines_of(rows)
    lines[0]["codes"][3] = -1
    # The order of the file does not matter, and rows that the shards lack do no harm.
    more = [{"name": "other.pdb", "chain": "A", "codes": [1, 2]}]
    found = tokens.read_tokens(*written(tmp_path, more + lines[::-1], ending)).on(reader)
    held = chains.gather(reader, "all", found)
    expected = {row["name"]: row["residues"].astype(int) for _, row in rows}
    expected[rows[0][1]["name"]][3] = -1
    assert len(held) == 12
    for chain, key in enumerate(held.keys):
        assert held.codes[held.places(chain)].tolist() == expected[key[0]].tolist()
    assert found.missing == 0
    assert torch.equal(found.vectors, torch.eye(CODES))


def test_rows_without_tokens_are_counted_and_have_no_codes(reader, tmp_path):
    found = tokens.read_tokens(*written(tmp_path, lines_of(complexes(6))[:5])).on(reader)
    assert found.missing == 7
    held = chains.gather(reader, "all", found)
    assert sum(bool((held.codes[held.places(chain)] == -1).all()) for chain in range(len(held))) == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[0]["codes"].pop(), "give one code for every residue"),
        (lambda lines: lines[0]["codes"].__setitem__(0, CODES), f"has the code {CODES}, and there are {CODES} vectors"),
        (lambda lines: lines[0]["codes"].__setitem__(0, -2), "has the code -2"),
        (lambda lines: lines[0].__setitem__("codes", [0.5]), "no list of integers"),
        (lambda lines: lines.append(lines[0]), "has two rows of c00/c00_u.pdb chain A"),
        (lambda lines: [line.__setitem__("chain", "Z") for line in lines], "Names must be alike"),
        (lambda lines: [line.pop("chain") for line in lines], "has no column chain"),
    ],
)
def test_what_does_not_fit_is_refused(reader, tmp_path, change, said):
    lines = lines_of(complexes(6))
    change(lines)
    with pytest.raises(Refused, match=said):
        tokens.read_tokens(*written(tmp_path, lines)).on(reader)


def test_vectors_may_be_safetensors_and_are_never_unpickled(tmp_path):
    codes, book = written(tmp_path, lines_of(complexes(6)))
    save_file({"book": torch.eye(CODES)}, tmp_path / "v.safetensors")
    assert torch.equal(tokens.read_tokens(codes, str(tmp_path / "v.safetensors")).vectors, torch.eye(CODES))
    np.save(tmp_path / "bad.npy", np.array([Planted(str(tmp_path / "ran"))], object))
    with pytest.raises(Refused, match="cannot be read"):
        tokens.read_tokens(codes, str(tmp_path / "bad.npy"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Refused, match=r"allowed are \.npy and \.safetensors"):
        tokens.read_tokens(codes, codes)
    with pytest.raises(Refused, match="does not exist"):
        tokens.read_tokens(codes, book + ".gone.npy")
    with pytest.raises(Refused, match=r"allowed are \.parquet"):
        tokens.read_tokens(book, book)


def test_chains_are_the_rows_as_stored(reader):
    found = tokens.ProteinTokens(torch.eye(CODES), lambda batch: batch.columns["residues"], "residues")
    held = chains.gather(reader, "test", found, ("contact", "b_factors"))
    rows = [row for split, row in complexes(6) if split == "test"]
    assert [key[0] for key in held.keys] == [row["name"] for row in rows]
    np.testing.assert_array_equal(held.alphas, np.concatenate([row["backbone"][:, 1] for row in rows]))
    np.testing.assert_array_equal(held.labels["contact"], np.concatenate([row["contact"] for row in rows]))
    both = chains.joined([chains.gather(reader, split, found) for split in ("train", "test")])
    assert both.codes[both.places(len(both) - 1)].tolist() == rows[-1]["residues"].tolist()


def test_chains_that_are_not_finite_are_gone_with_their_labels(tmp_path):
    rows = complexes(6)
    for number in (1, 2, 7):
        rows[number][1]["backbone"] = rows[number][1]["backbone"].copy()
        rows[number][1]["backbone"][4, 0, 0] = np.nan
    reader = ShardReader(make_protein_shards(tmp_path, rows))
    found = tokens.ProteinTokens(
        torch.eye(CODES), lambda batch: batch.columns["residues"], "residues",
        lambda batch: batch.columns["residues"].unsqueeze(-1).float(),
    )  # fmt: skip
    held = chains.gather(reader, "all", found, ("contact", "b_factors"))
    sound = [row for number, (_, row) in enumerate(rows) if number not in (1, 2, 7)]
    assert [key[0] for key in held.keys] == [row["name"] for row in sound]
    assert np.diff(held.offsets).tolist() == [row["length"] for row in sound]
    np.testing.assert_array_equal(held.labels["contact"], held.codes < 4)
    np.testing.assert_array_equal(held.labels["b_factors"], 10 * held.codes)
    latents = chains.latents_of(reader, ("all",), found, len(held.codes), tmp_path / "latents")
    np.testing.assert_array_equal(latents[:, 0], held.codes)


def test_a_missing_atom_leaves_no_angle_that_needs_it(tmp_path):
    backbone = frames.with_oxygen(grown(12, 1)).float().numpy()
    atoms = np.ones((12, 4), np.uint8)
    atoms[3, 0] = atoms[7, 1] = atoms[9, 3] = 0
    drawn = np.random.default_rng(0)
    rows = [(split, protein(split, drawn, 12, backbone=backbone)) for split in ("train", "test")]
    rows[1][1]["atoms"] = atoms
    reader = ShardReader(make_protein_shards(tmp_path, rows))
    found = tokens.ProteinTokens(torch.eye(CODES), lambda batch: batch.columns["residues"], "residues")
    whole, holed = (chains.gather(reader, split, found) for split in ("train", "test"))
    there = np.ones((12, 3), bool)
    there[0, 0] = there[11, 1] = there[11, 2] = False
    assert np.array_equal(whole.angles.reshape(12, 3, 2).any(-1), there)
    for place in (3, 7):
        there[place] = there[place - 1, 1:] = there[place + 1, 0] = False
    np.testing.assert_allclose(holed.angles, whole.angles * there.repeat(2, 1), atol=1e-6)
    assert np.isnan(holed.alphas).any(1).nonzero()[0].tolist() == [7]
    assert not np.isnan(whole.alphas).any()


def trained_with(model: torch.nn.Module, encode, books=((CODES, 4),)) -> SimpleNamespace:
    recipe = SimpleNamespace(name="x", encode=encode, codebooks=lambda settings: list(books))
    return SimpleNamespace(recipe=recipe, settings=None, model=model)


def test_any_recipe_with_one_code_a_residue_gives_tokens(reader):
    quantizer = VectorQuantizer(CODES, 4)
    given = trained_with(torch.nn.Sequential(quantizer), lambda model, batch: batch.columns["residues"])
    found = tokens.tokens_of(given)
    assert torch.equal(found.vectors, quantizer.codebook.vectors)
    batch, _ = next(chains.walk(reader, "all"))
    real = batch.columns["residue_mask"]
    assert not bool(real.all())
    assert torch.equal(found.codes(batch) == -1, ~real)


def test_other_recipes_are_refused(reader):
    two = torch.nn.Sequential(VectorQuantizer(CODES, 4), VectorQuantizer(CODES, 4))
    with pytest.raises(Refused, match="of one codebook"):
        tokens.tokens_of(trained_with(two, None, ((CODES, 4), (CODES, 4))))
    one = trained_with(torch.nn.Sequential(VectorQuantizer(CODES, 4)), lambda model, batch: torch.zeros(3, 2))
    with pytest.raises(Refused, match="takes one code a residue"):
        tokens.tokens_of(one).codes(next(chains.walk(reader, "all"))[0])
