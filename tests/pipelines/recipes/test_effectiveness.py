"""Tasks on tiny shards: what tokens hold of labels is read from them, and from geometry that holds nothing is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.recipes import _effectiveness as effects
from pipelines.recipes import _structure_tasks as tasks
from pipelines.recipes._protein_tokens import ProteinTokens
from pipelines.recipes._structure_chains import Chains
from pipelines.recipes._structure_probe import Goal, Plan
from pipelines.shards import ShardReader
from tests.pipelines.protein_shards import CODES, complexes, make_protein_shards

PLAN = Plan(steps=60, rates=(1e-2,), hidden=16)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> ShardReader:
    return ShardReader(make_protein_shards(tmp_path_factory.mktemp("shards"), complexes(16)))


@pytest.fixture(scope="module")
def asked(reader, tmp_path_factory) -> effects.Asked:
    """Tokens are residues up to pairs of them, latents the residues."""
    book = torch.eye(CODES // 2)
    tokens = ProteinTokens(
        book, lambda batch: (batch.columns["residues"] // 2).masked_fill(~batch.columns["residue_mask"], -1), "",
        lambda batch: torch.nn.functional.one_hot(batch.columns["residues"], CODES).float(),
    )  # fmt: skip
    scratch = tmp_path_factory.mktemp("latents") / "latents"
    return effects.ask(reader, tokens, tasks.labels_in(reader), latents=True, scratch=scratch)


def answer(reader, asked, label: str, **changes) -> dict:
    (task,) = (one for one in tasks.default_tasks(reader) if one.name == label)
    return effects.effectiveness(task.model_copy(update=changes), asked, PLAN, kmeans=True, seed=0)


def test_codes_lose_what_they_do_not_tell_apart(reader, asked):
    found = answer(reader, asked, "secondary")["tests"]["test"]
    scores = {name: one["score"] for name, one in found["scores"].items()}
    # A residue modulo 3 follows from the residue, and from half of it only in part.
    assert scores["latents"] > 0.95
    assert scores["control"] < scores["codes"] < 0.9
    assert abs(scores["dihedrals"] - 1 / 3) < 0.2
    assert found["test"] == sum(row["length"] for split, row in complexes(16) if split == "test")


def test_labels_that_codes_hold_are_read_from_them(reader, asked):
    found = answer(reader, asked, "contact")
    scores = {name: one["score"] for name, one in found["tests"]["test"]["scores"].items()}
    assert scores["codes"] > 0.9
    assert scores["control"] == 0.5
    assert abs(scores["dihedrals"] - 0.5) < 0.25
    assert answer(reader, asked, "b_factors")["tests"]["test"]["scores"]["codes"]["score"] > 0.9


@pytest.mark.parametrize(("level", "length"), [("residue", 12), ("chain", 1)])
def test_of_test_chains_nothing_is_learned(level, length):
    """Their codes, half of all, occur in no other chain: whoever knows their labels has seen them."""
    drawn = np.random.default_rng(0)
    sizes = {"train": 600 // length, "valid": 240 // length, "test": 600 // length}
    codes = np.concatenate([drawn.integers(75, size=840), drawn.integers(75, 150, size=600)])
    labels = {"contact": (drawn.permutation(150) % 2).astype(np.float32)[codes]}
    keys = [(str(n), "A", 0, 1) for n in range(1440 // length)]
    flat = {"angles": np.zeros((1440, 6), np.float32), "alphas": np.zeros((1440, 3), np.float32)}
    chains = Chains(keys, np.arange(0, 1441, length), codes, labels=labels, **flat)
    book = torch.randn(150, 32, generator=torch.Generator().manual_seed(0))
    asked = effects.Asked(ProteinTokens(book, lambda batch: batch, ""), chains, sizes, book[codes].numpy())
    task = tasks.Task(name="x", label="contact", kind="binary", level=level)
    plan = Plan(steps=150, rates=(1e-2,), hidden=64, chains=96 // length)
    found = effects.effectiveness(task, asked, plan, kmeans=False, seed=0)["tests"]["test"]
    for method in ("codes", "latents"):
        assert found["scores"][method]["valid"] > 0.9
        assert abs(found["scores"][method]["score"] - 0.5) < 0.2


def test_clusters_are_as_many_as_codes_and_fitted_on_train_alone(reader, asked):
    train = list(range(asked.sizes["train"]))
    residues = effects._clustered(asked, train, seed=0)
    every = torch.arange(len(asked.chains.codes)).numpy()
    assert len(residues.look_up(every).unique(dim=0)) == CODES // 2
    spoilt = asked.chains.angles.copy()
    spoilt[asked.chains.offsets[len(train)] :] = 9.0
    other = effects._clustered(replace(asked, chains=replace(asked.chains, angles=spoilt)), train, seed=0)
    places = effects._residues_of(asked, train)
    assert torch.equal(residues.look_up(places), other.look_up(places))
    small = replace(asked, tokens=replace(asked.tokens, vectors=torch.zeros(10**6, 1)))
    assert "one a train residue" in effects._fewer(small, train)[0]


def test_train_chains_of_one_class_are_no_task(reader, asked):
    found = effects.effectiveness(
        tasks.Task(name="x", label="contact", kind="classes", classes={"1": "yes"}), asked, PLAN, kmeans=False, seed=0
    )
    assert "hold 1 class of contact" in found["skipped"]
    assert "tests" not in found


def test_rare_classes_are_left_out_and_named(reader, asked):
    task = tasks.Task(name="x", label="secondary", kind="classes", least=10**6)
    assert "hold 0 class" in effects.effectiveness(task, asked, PLAN, kmeans=False, seed=0)["skipped"]
    counts = [
        int((asked.chains.labels["secondary"][: asked.chains.offsets[asked.sizes["train"]]] == n).sum())
        for n in range(3)
    ]
    task = tasks.Task(name="x", label="secondary", kind="classes", least=min(counts) + 1)
    found = effects.effectiveness(task, asked, PLAN, kmeans=False, seed=0)
    assert len(found["classes"]) == 2
    assert "want of train examples" in found["notes"][0]
    assert found["tests"]["test"]["test"] < asked.chains.offsets[-1] - asked.chains.offsets[-1 - asked.sizes["test"]]


def test_a_cath_split_asks_two_tests(reader, asked, tmp_path):
    names = sorted({key[0] for key in asked.chains.keys})
    lines = ["file,chain,code", *(f"{name},A,1.10.{n % 2}.{n // 2 % 4}" for n, name in enumerate(names))]
    (tmp_path / "cath.csv").write_text("\n".join(lines))
    # 4 proteins a superfamily: one in five of them is none, so only folds are asked about.
    found = answer(reader, asked, "contact", split="cath", cath=str(tmp_path / "cath.csv"))
    assert list(found["tests"]) == ["fold"]
    assert found["tests"]["fold"]["scores"]["codes"]["score"] > 0.9


def test_a_test_without_both_classes_is_left_out_and_the_others_are_asked():
    goal = Goal("binary", np.array([0, 1, 1, 1, 0, 1], np.float32), 1)
    both, ones = np.array([0, 1]), np.array([1, 2])
    kept, lost = effects._askable(goal, {"fold": (both, ones), "superfamily": (both, both)})
    assert list(kept) == ["superfamily"]
    assert "the test part of fold has 2 examples of 1 different values" in lost[0]
    with pytest.raises(tasks.Skipped, match="valid part of fold"):
        effects._askable(goal, {"fold": (ones, both)})
