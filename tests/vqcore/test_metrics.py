"""Metrics against scipy, definitions written out, and corners worked by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from vqcore.metrics import (
    Collisions,
    alikeness,
    collisions,
    counts_of,
    dead_codes,
    entropy_bits,
    gini,
    perplexity,
    tuple_counts,
    usage,
)

COUNTS = torch.tensor([5, 0, 1, 7, 0, 12, 3, 3])


def test_counts_ignore_masked_codes() -> None:
    codes = torch.tensor([[3, -1, 0], [3, 3, -1]])
    assert counts_of(codes, 5).tolist() == [1, 0, 0, 3, 0]
    assert counts_of(codes.to(torch.int8), 5).tolist() == [1, 0, 0, 3, 0]
    assert counts_of(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]
    assert counts_of(torch.full((4,), -1), 3).tolist() == [0, 0, 0]
    assert counts_of(torch.tensor([127, -1], dtype=torch.int8), 128)[127] == 1, "int8 overflowed"


@pytest.mark.parametrize("wrong", [-2, 5])
def test_codes_of_another_codebook_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"1 of 3 codes lie outside \[0, 5\), the first is {wrong}"):
        counts_of(torch.tensor([1, wrong, -1]), 5)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        counts_of(torch.ones(3), 5)


def test_agree_with_independent_definitions() -> None:
    counts = COUNTS.double().numpy()
    assert float(entropy_bits(COUNTS)) == pytest.approx(stats.entropy(counts, base=2), rel=1e-14)
    assert float(perplexity(COUNTS)) == pytest.approx(np.exp(stats.entropy(counts)), rel=1e-14)
    assert float(usage(COUNTS)) == 6 / 8
    assert int(dead_codes(COUNTS)) == 2
    # Half the relative mean absolute difference of all pairs.
    pairs = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
    assert float(gini(COUNTS)) == pytest.approx(pairs, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_even_and_single_codes(dtype: torch.dtype) -> None:
    even, single = torch.full((16,), 3, dtype=dtype), torch.zeros(16, dtype=dtype)
    single[4] = 9
    both = torch.stack([even, single])
    assert usage(both).tolist() == [1, 1 / 16]
    assert dead_codes(both).tolist() == [0, 15]
    assert entropy_bits(both).tolist() == pytest.approx([4, 0], abs=1e-14)
    assert perplexity(both).tolist() == pytest.approx([16, 1])
    assert gini(both).tolist() == pytest.approx([0, 1 - 1 / 16], abs=1e-15)
    assert math.copysign(1, entropy_bits(single).item()) == 1, "entropy of one code printed as -0"


def test_nothing_encoded_has_the_documented_values() -> None:
    counts = torch.stack([torch.zeros(8, dtype=torch.int64), COUNTS])
    assert usage(counts).tolist() == [0, 6 / 8]
    assert dead_codes(counts).tolist() == [8, 2]
    assert entropy_bits(counts)[0] == 0
    assert perplexity(counts)[0] == 0
    assert gini(counts)[0] == 0


@pytest.mark.parametrize("metric", [usage, dead_codes, entropy_bits, perplexity, gini])
def test_levels_are_independent_and_codes_may_be_renamed(metric) -> None:
    levels = torch.stack([COUNTS, 3 * COUNTS.flip(0), torch.arange(8)])
    assert torch.equal(metric(levels), torch.stack([metric(level) for level in levels]))
    assert float(metric(levels[0])) == pytest.approx(float(metric(levels[1])), rel=1e-14)


def test_counts_of_halves_add_up_but_perplexities_do_not() -> None:
    """bshall/VectorQuantizedVAE issue 3: the mean of batch perplexities is not the split's. Nor is a batch's usage, or
    that of a buffer of fixed length (deepseek-ai/Janus PR 232; lucidrains/vector-quantize-pytorch 63 and 109 ask for
    either). AminoAseed dossier, check 4: usage averaged over proteins is smaller."""
    codes = torch.arange(64) // 8
    halves = [counts_of(half, 8) for half in codes.chunk(2)]
    assert torch.equal(halves[0] + halves[1], counts_of(codes, 8))
    assert float(perplexity(halves[0] + halves[1])) == pytest.approx(8)
    assert float(sum(perplexity(half) for half in halves) / 2) == pytest.approx(4)
    assert float(usage(halves[0] + halves[1])) == 1
    assert float(sum(usage(half) for half in halves) / 2) == 0.5


@pytest.mark.parametrize("metric", [usage, dead_codes, entropy_bits, perplexity, gini])
def test_what_is_not_counts_is_refused(metric) -> None:
    for wrong in ([1, -1], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="negative or non-finite"):
            metric(torch.tensor(wrong))
    for shape in ((0,), (2, 2, 2)):
        with pytest.raises(ValueError, match="shape"):
            metric(torch.zeros(shape))


# Tuples of codes


def drawn_codes(seed: int, rows: int, sizes: list[int]) -> torch.Tensor:
    """Codes in [-1, K), with masked and partly dropped rows among them, and few enough values to collide."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(-1, min(size, 3), (rows,), generator=generator) for size in sizes], -1)


@pytest.mark.parametrize("sizes", [[5], [256, 256, 256], [2048] * 8, [2**31, 3, 2**40, 2**20, 7], [2**40, 2**40]])
def test_tuples_are_counted_exactly_at_any_size(sizes: list[int]) -> None:
    codes = drawn_codes(1, 400, sizes)
    wanted = Counter(map(tuple, codes.tolist()))
    wanted.pop((-1,) * len(sizes), None)
    assert len(wanted) > 1
    tuples, counts = tuple_counts(codes, sizes)
    assert dict(zip(map(tuple, tuples.tolist()), counts.tolist(), strict=True)) == wanted
    assert [tuple(row) for row in tuples.tolist()] == sorted(wanted)
    assert tuples.dtype == counts.dtype == torch.int64
    small = tuple_counts(codes.to(torch.int16).reshape(20, 20, -1), sizes)
    assert torch.equal(small.tuples, tuples)
    assert torch.equal(small.counts, counts)


def test_counts_of_parts_make_the_counts_of_the_whole() -> None:
    codes = drawn_codes(2, 300, [16, 16, 16])
    parts = [tuple_counts(part, 16) for part in codes.split([0, 100, 1, 199])]
    merged = tuple_counts(torch.cat([p.tuples for p in parts]), 16, torch.cat([p.counts for p in parts]))
    whole = tuple_counts(codes, [16, 16, 16])
    assert torch.equal(merged.tuples, whole.tuples)
    assert torch.equal(merged.counts, whole.counts)


def test_collisions_are_rows_that_find_their_tuple_taken() -> None:
    codes = torch.tensor([[0, 1], [0, 1], [1, 0], [-1, -1], [0, 1], [1, 1], [1, 1], [0, -1]])
    counts = tuple_counts(codes, 2).counts
    assert collisions(counts) == Collisions(rows=7, distinct=4, rate=3 / 7, largest=3)
    assert float(perplexity(counts)) == pytest.approx(np.exp(stats.entropy([1, 3, 1, 2])))
    distinct = tuple_counts(torch.cartesian_prod(torch.arange(5), torch.arange(4)), [5, 4]).counts
    assert collisions(distinct) == Collisions(20, 20, 0.0, 1)
    nothing = tuple_counts(torch.full((3, 2), -1), 2).counts
    assert collisions(nothing) == Collisions(0, 0, 0.0, 0)


def test_tuples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 codes lie outside \[0, 4\), the first is 4"):
        tuple_counts(torch.tensor([[3, 4], [4, 0]]), [5, 4])
    with pytest.raises(ValueError, match="lists 3 levels and codes have 2"):
        tuple_counts(torch.zeros(3, 2, dtype=torch.int64), [5, 4, 3])
    with pytest.raises(ValueError, match=r"shape \(3, 0\)"):
        tuple_counts(torch.zeros(3, 0, dtype=torch.int64), 5)
    for counts in (torch.ones(2, dtype=torch.int64), torch.ones(3), torch.tensor([1, -1, 1])):
        with pytest.raises(ValueError, match=r"for 3 tuples.*int64, one a tuple"):
            tuple_counts(torch.zeros(3, 2, dtype=torch.int64), 5, counts)


def test_alikeness_is_the_mean_over_pairs():
    vectors = torch.randn(7, 5)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    cosines = [float(unit[i] @ unit[j]) for i in range(7) for j in range(7) if i != j]
    found = alikeness(vectors)
    assert found == {"active_codes": 7.0, "code_cosine": pytest.approx(np.mean(cosines), abs=1e-6)}
    assert alikeness(vectors[:1]) == {"active_codes": 1.0}
