"""Laws of usage and of the likeness of codes."""

import math

import numpy as np
import pytest
import torch

from pipelines.recipes import _code_use as use
from pipelines.recipes._code_use import distinctiveness, efficiency


def test_uniform_use_is_all_and_one_code_is_one():
    found = efficiency(torch.full((64,), 5))
    assert found["usage"] == 1
    assert found["perplexity_share"] == pytest.approx(1)
    assert found["entropy_per_code"] == pytest.approx(math.log(64) / 64)
    single = torch.zeros(64, dtype=torch.int64)
    single[3] = 9
    found = efficiency(single)
    assert (found["usage"], found["perplexity_share"], found["entropy_per_code"]) == (1 / 64, 1 / 64, 0)
    assert efficiency(torch.zeros(4, dtype=torch.int64))["perplexity"] == 0


def test_pooled_counts_use_more_codes_than_proteins_do_on_average():
    drawn = torch.Generator().manual_seed(0)
    each = torch.stack([torch.bincount(torch.randint(256, (40,), generator=drawn), minlength=256) for _ in range(20)])
    per_protein = [efficiency(counts)["usage"] for counts in each]
    assert max(per_protein) <= 40 / 256
    assert efficiency(each.sum(0))["usage"] > 2 * np.mean(per_protein)


def test_orthogonal_codes_are_distinct_and_copies_are_not():
    counts = torch.ones(16, dtype=torch.int64)
    assert distinctiveness(torch.eye(16), counts)["all"]["mean_absolute"] == 0
    copies = distinctiveness(torch.ones(16, 3), counts)["all"]
    assert copies["mean"] == pytest.approx(1)
    assert copies["histogram"][-1] == 1


@pytest.mark.parametrize("values", [1, 40, 200])
def test_a_code_is_in_no_block_its_own_pair(values, monkeypatch):
    monkeypatch.setattr(use, "BLOCK_VALUES", values)
    vectors, counts = torch.eye(16), torch.arange(16)
    for found in distinctiveness(vectors, counts).values():
        assert (found["mean"], found["mean_absolute"], found["deviation"]) == (0, 0, 0)
    opposite = torch.cat([torch.ones(8, 2), -torch.ones(8, 2)])
    assert distinctiveness(opposite, torch.ones(16))["all"]["mean"] == pytest.approx((8 * 7 - 8 * 8) / (8 * 15))


def test_gaussian_codes_have_the_spread_of_their_dimension():
    vectors = torch.randn(2000, 1024, generator=torch.Generator().manual_seed(0))
    found = distinctiveness(vectors, torch.ones(2000, dtype=torch.int64))["all"]
    assert found["deviation"] == pytest.approx(1 / 32, rel=0.01)
    assert found["mean"] == pytest.approx(0, abs=1e-3)
    # A normal distribution has a quarter of its mass beyond 0.674 deviations.
    assert found["quantiles"]["0.75"] == pytest.approx(0.674 / 32, abs=0.004)


def test_pairs_weigh_as_the_tokens_that_are_drawn_from_them():
    drawn = torch.Generator().manual_seed(0)
    vectors = torch.randn(9, 4, generator=drawn)
    counts = torch.tensor([7, 0, 1, 2, 3, 0, 5, 1, 1])
    tokens = torch.repeat_interleave(torch.arange(9), counts)
    pairs = [(a, b) for a in tokens.tolist() for b in tokens.tolist() if a != b]
    cosines = [float(torch.cosine_similarity(vectors[a], vectors[b], dim=0)) for a, b in pairs]
    found = distinctiveness(vectors, counts)["used"]
    assert found["mean"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["mean_absolute"] == pytest.approx(np.mean(np.abs(cosines)), abs=1e-6)
    assert found["deviation"] == pytest.approx(np.std(cosines), abs=1e-6)


def test_one_code_in_use_has_no_pairs():
    counts = torch.tensor([4, 0, 0])
    assert distinctiveness(torch.eye(3), counts)["used"] is None
