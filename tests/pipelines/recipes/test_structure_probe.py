"""The probe learns what vectors hold and nothing else, and its metrics are pooled over residues."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from pipelines.recipes import _structure_probe as probes
from pipelines.recipes._structure_probe import Goal, Plan, Residues

PLAN = Plan(steps=60, rates=(1e-2, 1e-6), hidden=16)


def data(chains: int = 40, length: int = 12, seed: int = 0) -> tuple[Residues, np.ndarray]:
    """Codes at random, 6 of them, and orthogonal vectors of very small length."""
    drawn = np.random.default_rng(seed)
    codes = drawn.integers(6, size=chains * length)
    vectors = 1e-3 * torch.eye(6)
    offsets = np.arange(0, chains * length + 1, length)
    every = np.ones(len(codes), bool)
    return Residues(offsets, lambda places: vectors[torch.from_numpy(codes[places])], 6, every), codes


def parts(total: int) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    train, valid, test = np.split(np.arange(total), [total // 2, 3 * total // 4])
    return train, {"test": (valid, test)}


def auroc(targets: np.ndarray, outputs: np.ndarray) -> float:
    """From ranks (Mann and Whitney)."""
    ranks, positives = rankdata(outputs), targets > 0.5
    count = positives.sum()
    return (ranks[positives].sum() - count * (count + 1) / 2) / (count * (~positives).sum())


@pytest.mark.parametrize("kind", ["binary", "regression", "classes"])
def test_what_codes_say_is_learned_and_noise_is_not(kind):
    residues, codes = data()
    told = {"binary": codes < 3, "regression": codes / 6, "classes": codes % 3}[kind].astype(np.float32)
    noise = np.random.default_rng(1).permutation(told)
    outputs = 3 if kind == "classes" else 1
    train, tests = parts(len(codes))
    found = {
        name: probes.probed(residues, Goal(kind, targets, outputs), train, tests, PLAN)["test"]
        for name, targets in (("told", told), ("noise", noise))
    }
    least, chance = {"binary": (0.95, 0.5), "regression": (0.9, 0.0), "classes": (0.95, 1 / 3)}[kind]
    assert found["told"].score > least
    assert abs(found["noise"].score - chance) < 0.25
    assert found["told"].rate == 1e-2
    assert found["told"].units == len(codes) // 4


def test_test_targets_are_never_seen():
    residues, codes = data(chains=16)
    train, tests = parts(len(codes))
    targets = (codes < 3).astype(np.float32)
    spoilt = targets.copy()
    spoilt[tests["test"][1]] = 1 - targets[tests["test"][1]]
    one, other = (probes.probed(residues, Goal("binary", t, 1), train, tests, PLAN)["test"] for t in (targets, spoilt))
    assert (one.rate, one.valid) == (other.rate, other.valid)
    assert one.score == pytest.approx(1 - other.score)


def test_the_length_of_vectors_does_not_matter():
    residues, codes = data(chains=16)
    longer = Residues(residues.offsets, lambda places: 1024 * residues.look_up(places), 6, residues.coded)
    goal, parted = Goal("regression", codes.astype(np.float32), 1), parts(len(codes))
    assert probes.probed(residues, goal, *parted, PLAN) == probes.probed(longer, goal, *parted, PLAN)


def test_chains_are_told_by_the_mean_of_their_residues():
    residues, codes = data(chains=160)
    shares = (codes.reshape(160, 12) < 3).mean(1)
    train, tests = parts(160)
    goal = Goal("regression", 4 * shares.astype(np.float32), 1, of_chains=True)
    plan = Plan(steps=150, rates=(1e-2,), hidden=16, chains=32)
    assert probes.probed(residues, goal, train, tests, plan)["test"].score > 0.8


def test_residues_without_a_token_are_in_no_chains_mean_and_no_scale():
    """The first of each chain has none; what is looked up for it must not matter."""
    residues, codes = data(chains=160)
    coded = np.arange(len(codes)) % 12 > 0
    shares = ((codes < 3) & coded).reshape(160, 12).sum(1) / 11

    def looked_up(places, at_first):
        return torch.where(torch.from_numpy(coded[places]).unsqueeze(1), residues.look_up(places), at_first)

    train, tests = parts(160)
    goal = Goal("regression", 4 * shares.astype(np.float32), 1, of_chains=True)
    plan = Plan(steps=60, rates=(1e-2,), hidden=16, chains=32)
    small, large = (
        probes.probed(
            Residues(residues.offsets, lambda places, at_first=at_first: looked_up(places, at_first), 6, coded),
            goal, train, tests, plan,
        )
        for at_first in (0.0, 1e4)
    )  # fmt: skip
    assert small == large


def test_probes_that_diverge_at_every_rate_have_no_score():
    residues, codes = data()
    goal, parted = Goal("regression", codes.astype(np.float32), 1), parts(len(codes))
    answer = probes.probed(residues, goal, *parted, Plan(steps=20, rates=(1e30,), hidden=16))["test"]
    assert (answer.score, answer.valid) == (None, None)


def test_a_position_can_be_told_from_the_embedding_alone():
    offsets = np.arange(0, 481, 12)
    blind = Residues(offsets, lambda places: torch.zeros(len(places), 4), 4, np.ones(480, bool))
    train, tests = parts(480)
    targets = (np.arange(480) % 12 < 6).astype(np.float32)
    assert probes.probed(blind, Goal("binary", targets, 1), train, tests, PLAN)["test"].score > 0.95


def test_residues_beyond_the_last_position_share_it():
    torch.manual_seed(0)
    probe = probes.Probe(4, 1, 8).eval()
    with torch.no_grad():
        torch.nn.init.normal_(probe.positions)
    offsets = np.array([0, 710])
    residues = Residues(offsets, lambda places: torch.zeros(len(places), 4), 4, np.ones(710, bool))
    goal = Goal("regression", np.zeros(710, np.float32), 1)
    found = probes.outputs_of(probe, residues, goal, np.arange(710))[:, 0]
    assert np.allclose(found[700:], found[699])
    assert len(np.unique(found[:700])) > 600


def test_scores_are_those_of_all_residues():
    drawn = np.random.default_rng(0)
    targets = (drawn.uniform(size=200) < 0.1).astype(np.float32)
    outputs = drawn.normal(size=(200, 1)) + targets[:, None]
    assert probes.score("binary", targets, outputs) == pytest.approx(auroc(targets, outputs[:, 0]))
    values = drawn.normal(size=200)
    ranks = np.corrcoef(rankdata(values), rankdata(outputs[:, 0]))[0, 1]
    assert probes.score("regression", values, outputs) == pytest.approx(ranks)
    # Class 0: precision 1, recall 1/2; class 1: precision 1/2, recall 1.
    given = np.array([[1.0, 0], [0, 1], [0, 1]])
    assert probes.score("classes", np.array([0.0, 0, 1]), given) == pytest.approx(2 / 3)


def test_what_is_undefined_is_none_and_what_exploded_loses():
    ones, outputs = np.ones(5, np.float32), np.arange(5.0)[:, None]
    assert probes.score("binary", ones, outputs) is None
    assert probes.score("regression", ones, outputs) is None
    assert probes.score("regression", np.arange(5.0), np.ones((5, 1))) == 0.0
    assert probes.score("binary", np.array([0.0, 1]), np.array([[np.nan], [0]])) == -np.inf


def test_the_loss_weighs_both_classes_alike():
    outputs = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(50) < 4).float()
    each = torch.nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")
    expected = (each[:4].mean() + each[4:].mean()) / 2
    assert float(probes.loss_of("binary", outputs, targets)) == pytest.approx(float(expected))


def test_the_rate_warms_up_stays_and_falls_to_a_tenth():
    rates = [probes.schedule(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19:120] == [1.0] * 101
    assert all(later < earlier for earlier, later in pairwise(rates[121:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)


def test_the_control_is_the_constant():
    targets = np.array([0, 1, 1, 1, 0], np.float32)
    every = np.arange(5)
    assert probes.control(Goal("binary", targets, 1), every, every) == 0.5
    assert probes.control(Goal("regression", targets, 1), every, every) == 0.0
    # All are said to be 1: F1 of 0 for class 0, 2 x 0.6 / 1.6 for class 1.
    assert probes.control(Goal("classes", targets, 2), every, every) == pytest.approx(0.375)


def test_the_control_says_the_class_that_is_most_frequent_in_train():
    targets = np.array([0, 0, 0, 1, 0, 1, 1, 1], np.float32)
    train, test = np.arange(4), np.arange(4, 8)
    # All are said to be 0: F1 of 2 x 0.25 / 1.25 for class 0, 0 for class 1.
    assert probes.control(Goal("classes", targets, 2), train, test) == pytest.approx(0.2)
