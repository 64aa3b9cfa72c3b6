"""The alignment's laws, pairs as they are named, and TM-align that may hang."""

import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from pipelines.errors import Failed, Refused
from pipelines.recipes import _sensitivity as sensitivity
from pipelines.recipes._tm_align import TmAligner
from tests.pipelines.protein_shards import backbone_of


def vectors(length: int, seed: int = 0, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


def by_hand(one: np.ndarray, other: np.ndarray) -> int:
    """Needleman and Wunsch's table."""
    unit = [
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
        for x in (one.astype(float), other.astype(float))
    ]
    match = np.rint(100 * unit[0] @ unit[1].T)
    table = np.zeros((len(one) + 1, len(other) + 1))
    table[:, 0], table[0] = -10 * np.arange(len(one) + 1), -10 * np.arange(len(other) + 1)
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            table[i, j] = max(table[i - 1, j - 1] + match[i - 1, j - 1], table[i - 1, j] - 10, table[i, j - 1] - 10)
    return int(table[-1, -1])


def test_the_score_is_that_of_the_table_and_symmetric():
    for lengths in ((1, 1), (5, 9), (20, 13)):
        one, other = vectors(lengths[0]), vectors(lengths[1], seed=1)
        assert sensitivity.alignment_score(one, other) == by_hand(one, other)
        assert sensitivity.alignment_score(other, one) == by_hand(one, other)


def test_a_sequence_with_itself_scores_a_hundred_a_residue_at_any_scale():
    book = vectors(300, width=32)
    codes = np.random.default_rng(2).integers(300, size=700)
    assert sensitivity.alignment_score(book[codes], 1e-3 * book[codes]) == 100 * 700


def test_the_score_with_itself_needs_no_alignment():
    book = vectors(20)
    book[[3, 4, 11]] = 0
    assert sensitivity.self_score(book) == by_hand(book, book) == sensitivity.alignment_score(book, book) == 1700


def test_gaps_count_at_the_ends_too():
    one = np.eye(5, dtype=np.float32)
    assert sensitivity.alignment_score(one, one[1:4]) == 300 - 2 * 10
    assert sensitivity.alignment_score(one, one[:0]) == -50


def test_pairs_are_found_by_suffix_by_model_and_in_a_table(tmp_path):
    keys = [
        ("x/x_u.pdb.gz", "A", 0, 1), ("x/x_b.pdb", "A", 0, 1), ("x/x_b.pdb", "B", 0, 1), ("y_u.pdb", "A", 0, 1),
        ("n.cif", "A", 0, 1), ("n.cif", "A", 0, 3), ("n.cif", "A", 0, 2),
    ]  # fmt: skip
    found = sensitivity.pairs_by_suffix(keys, ("_u", "_b"))
    assert [pair[:2] for pair in found] == [(0, 1)]
    assert [pair[:2] for pair in sensitivity.pairs_of_models(keys)] == [(4, 6), (4, 5), (6, 5)]
    table = tmp_path / "pairs.csv"
    table.write_text("a,chain_a,b,chain_b\nx_u,A,x/x_b.pdb,B\nx_u,A,gone,A\n")
    listed, lost = sensitivity.pairs_of_table(str(table), keys)
    assert ([pair[:2] for pair in listed], lost) == ([(0, 2)], 1)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(Refused, match="no column chain_a"):
        sensitivity.pairs_of_table(str(table), keys)


def test_of_many_pairs_an_even_choice_is_kept():
    pairs = [sensitivity.Pair(n, n, "") for n in range(100)]
    assert [pair.one for pair in sensitivity.spread(pairs, 4)] == [0, 33, 66, 99]
    assert sensitivity.spread(pairs, 100) == pairs


def test_a_fragment_scores_by_both_lengths():
    """It fits without a fault, so that each TM-score is the share of a chain that is aligned."""
    whole = backbone_of(np.random.default_rng(3), 40)[:, 1]
    with TmAligner(60.0) as aligner:
        assert aligner.mean_score(whole[:20], whole) == pytest.approx((1 + 20 / 40) / 2, abs=1e-3)
        assert aligner.mean_score(whole, whole[10:]) == pytest.approx((1 + 30 / 40) / 2, abs=1e-3)


def test_correlations_are_of_the_scores_with_tm_scores():
    drawn = np.random.default_rng(0)
    alphas, tokens = [], []
    for number in range(6):
        walk, book = backbone_of(drawn, 40)[:, 1], vectors(40, seed=number)
        alphas += [walk, walk + 1.5 * number * drawn.normal(size=walk.shape)]
        tokens += [book, book + 0.3 * number * vectors(40, seed=50 + number)]
    pairs = [sensitivity.Pair(2 * n, 2 * n + 1, str(n)) for n in range(6)]
    found = sensitivity.similarities(pairs, {"codes": dict(enumerate(tokens))}, dict(enumerate(alphas)), seconds=60)
    t = [row["tm"] for row in found["each"]]
    assert t[0] == pytest.approx(1.0, abs=1e-3)
    s = [by_hand(tokens[one], tokens[other]) for one, other, _ in pairs]
    told = found["correlations"]["codes"]
    assert told["pearson_raw"] == pytest.approx(pearsonr(s, t).statistic)
    assert told["spearman_raw"] == pytest.approx(spearmanr(s, t).statistic)
    # All chains have 40 residues, so both forms differ by a factor.
    assert told["pearson_normalised"] == pytest.approx(told["pearson_raw"])
    assert found["each"][0]["codes"]["normalised"] == 1.0
    assert told["pearson_raw"] > 0.8


def test_a_perfect_monotone_relation_has_spearman_one_and_too_few_pairs_none():
    rows = [{"tm": x, "codes": {"raw": np.exp(9 * x), "normalised": -x}} for x in (0.1, 0.5, 0.7, 0.9)]
    told = sensitivity._correlations(rows, "codes")
    assert (told["spearman_raw"], told["spearman_normalised"]) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert told["pearson_raw"] < 0.95
    assert set(sensitivity._correlations(rows[:2], "codes").values()) == {None}


HANGING = """
import json, sys, time
for line in sys.stdin:
    size = len(json.loads(line)["a"])
    if size == 1:
        time.sleep(600)
    if size == 2:
        sys.exit(0)
    print("[0.5, 0.7]", flush=True)
"""


def test_an_aligner_that_hangs_is_ended_and_the_next_pair_is_aligned(tmp_path: Path):
    (tmp_path / "child.py").write_text(HANGING)
    begun = time.monotonic()
    with TmAligner(1.0, tmp_path / "child.py") as aligner:
        assert aligner.mean_score(np.zeros((1, 3)), np.zeros((3, 3))) is None
        assert time.monotonic() - begun < 30
        aligner.seconds = 60
        assert aligner.mean_score(np.zeros((3, 3)), np.zeros((3, 3))) == pytest.approx(0.6)
        assert aligner.mean_score(np.zeros((2, 3)), np.zeros((3, 3))) is None, "it ended on this pair"
        assert aligner.mean_score(np.zeros((3, 3)), np.zeros((3, 3))) == pytest.approx(0.6)


def test_an_aligner_that_ends_before_it_has_aligned_anything_is_an_error(tmp_path: Path):
    (tmp_path / "child.py").write_text(HANGING)
    with TmAligner(60.0, tmp_path / "child.py") as aligner, pytest.raises(Failed, match="ended by itself"):
        aligner.mean_score(np.zeros((2, 3)), np.zeros((3, 3)))


def test_the_longer_of_two_suffixes_is_looked_for_first():
    keys = [("a_l_u.pdb", "A", 0, 1), ("a_u.pdb", "A", 0, 1)]
    for suffixes in (("_u", "_l_u"), ("_l_u", "_u")):
        [pair] = sensitivity.pairs_by_suffix(keys, suffixes)
        assert {pair.one, pair.other} == {0, 1}


def test_a_short_line_of_a_table_is_a_pair_that_is_not_there(tmp_path: Path):
    (tmp_path / "pairs.csv").write_text("a,chain_a,b,chain_b\nx,A,y\n")
    assert sensitivity.pairs_of_table(str(tmp_path / "pairs.csv"), [("x.pdb", "A", 0, 1)]) == ([], 1)
