"""Tasks are read from data, and targets and splits are what their definitions say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import Refused
from pipelines.recipes import _structure_tasks as tasks
from pipelines.recipes._protein_tokens import ProteinTokens
from pipelines.recipes._structure_chains import Chains, gather, joined
from pipelines.shards import ShardReader
from tests.pipelines.protein_shards import CODES, complexes, make_protein_shards

TOKENS = ProteinTokens(torch.eye(CODES), lambda batch: batch.columns["residues"], "residues")


def chains_of(*values: list[float], codes: list[int] | None = None) -> Chains:
    """Chains with one label, `x`."""
    flat = np.concatenate([np.array(one, np.float32) for one in values])
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int64)
    keys = [(f"{n}.pdb", "A", 0, 1) for n in range(len(values))]
    given = np.zeros(len(flat), np.int64) if codes is None else np.array(codes)
    nothing = np.zeros((len(flat), 6), np.float32)
    return Chains(keys, offsets, given, nothing, nothing[:, :3], {"x": flat, "secondary": flat})


def task(**given) -> tasks.Task:
    return tasks.Task(**{"name": "t", "label": "x", "kind": "regression", **given})


def written(home: Path, text: str) -> str:
    (home / "tasks.toml").write_text(text)
    return str(home / "tasks.toml")


def test_a_file_of_tasks_is_read(tmp_path):
    file = written(
        tmp_path,
        '[[task]]\nname = "Flex"\nlabel = "neq"\nkind = "regression"\nscale = 0.1\nsplit = "cath"\ncath = "c.csv"\n'
        '[[task]]\nname = "Homo"\nlabel = "fold"\nkind = "classes"\nlevel = "chain"\nclasses = { 1 = 7, "*" = "b" }\n',
    )
    flex, homo = tasks.read_tasks(file)
    assert (flex.scale, flex.cath, flex.level) == (0.1, "c.csv", "residue")
    assert homo.classes == {"1": "7", "*": "b"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[task]]\nname = "a"\nlabel = "x"\nkind = "guess"', "task.0.kind"),
        ('[[task]]\nname = "a"\nlabel = "x"\nkind = "binary"\nlable = 1', "task.0.lable"),
        ('[[task]]\nname = "a"\nlabel = "x"\nkind = "binary"\nsplit = "cath"', "go together"),
        ('[[task]]\nname = "a"\nlabel = "x"\nkind = "binary"\nscale = 2', "scale is for"),
        ('[[task]]\nname = "a"\nlabel = "x"\nkind = "binary"\nshares = [0.5, 0.5, 1]', "between 0 and 1"),
        ('[[task]]\nname = "a"\nlabel = "x"\nkind = "binary"\n' * 2, "alike but for signs: a"),
        ("= 3", "no TOML file"),
        ("", "task"),
    ],
)
def test_mistakes_in_a_file_are_refused(tmp_path, text, said):
    with pytest.raises(Refused, match=said):
        tasks.read_tasks(written(tmp_path, text))
    with pytest.raises(Refused, match="does not exist"):
        tasks.read_tasks(str(tmp_path / "gone.toml"))


def test_without_a_file_every_label_is_a_task(tmp_path):
    rows = [(split, {**row, "buried": row["contact"], "depth": row["b_factors"] / 7}) for split, row in complexes(4)]
    home = make_protein_shards(tmp_path, rows, table="t.csv", values=("buried", "depth"))
    reader = ShardReader(home)
    kinds = {one.name: one.kind for one in tasks.default_tasks(reader)}
    expected = {"contact": "binary", "secondary": "classes", "b_factors": "regression"}
    assert kinds == {**expected, "buried": "binary", "depth": "regression"}
    with pytest.raises(Refused, match="did you mean 'buried'"):
        tasks.check_label(task(label="burried"), reader)


def test_letters_of_dssp_become_three_classes():
    # "-HEBGITSP" are 0 to 8.
    found, names = tasks.targets_of(
        task(label="secondary", kind="classes", classes=tasks.HELIX_STRAND_OTHER), chains_of([*range(9), np.nan])
    )
    assert names == ["helix", "other", "strand"]
    assert [names[int(value)] for value in found[:9]] == [
        "other", "helix", "strand", "strand", "helix", "helix", "other", "other", "other",
    ]  # fmt: skip
    assert np.isnan(found[9])


def test_values_without_a_class_are_left_out_and_a_regression_is_scaled():
    found, names = tasks.targets_of(task(kind="classes", classes={"2": "two", "5": "five"}), chains_of([2, 3, 5]))
    assert names == ["five", "two"]
    np.testing.assert_array_equal(found, [1, np.nan, 0])
    np.testing.assert_allclose(tasks.targets_of(task(scale=0.01), chains_of([50, 7]))[0], [0.5, 0.07], rtol=1e-6)


def test_a_chain_has_the_value_that_its_residues_share():
    found, _ = tasks.targets_of(task(level="chain"), chains_of([3, 3, np.nan], [1, 2], [np.nan], [4]))
    np.testing.assert_array_equal(found, [3, np.nan, np.nan, 4])


def test_a_binary_label_that_is_not_says_so():
    with pytest.raises(tasks.Skipped, match="holds 2"):
        tasks.targets_of(task(kind="binary"), chains_of([0, 1, 2]))


def test_units_have_a_code_and_a_target():
    given = chains_of([1, np.nan, 2], [3, 4], [5], codes=[0, 0, -1, 1, 1, -1])
    values = given.labels["x"]
    assert tasks.units_of(task(), given, [0, 1, 2], values).tolist() == [0, 3, 4]
    assert tasks.units_of(task(), given, [1], values).tolist() == [3, 4]
    per_chain = np.array([1, np.nan, 3], np.float32)
    assert tasks.units_of(task(level="chain"), given, [0, 1, 2], per_chain).tolist() == [0]


def test_the_shards_splits_are_kept_apart(tmp_path):
    reader = ShardReader(make_protein_shards(tmp_path, complexes(8)))
    parts = {split: gather(reader, split, TOKENS, ("contact",)) for split in ("train", "valid", "test")}
    whole = joined(list(parts.values()))
    division = tasks.division_of(task(), whole, {split: len(part) for split, part in parts.items()}, 42)
    valid, test = division.tests["test"]
    for members, split in ((division.train, "train"), (valid, "valid"), (test, "test")):
        assert [whole.keys[n] for n in members] == parts[split].keys
    with pytest.raises(tasks.Skipped, match="too few chains"):
        tasks.division_of(task(), parts["train"], {"train": len(parts["train"]), "valid": 0, "test": 0}, 42)
