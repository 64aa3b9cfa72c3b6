"""Laws of the generator: right distributions, no correlation along any coordinate, the same numbers on any worker."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from vqcore import noise

N = 40_000
# A correlation of N independent pairs has standard deviation 1 / sqrt(N): five of them.
NO_CORRELATION = 5 / math.sqrt(N)
KEYS = torch.arange(N)

UNIFORM = [
    [0.3833528003855965, 0.06890512775705238],
    [0.4508117143859316, 0.2797279782105071],
    [0.8284095415178283, 0.7220549591465207],
    [0.9371723658670139, 0.9106103972814287],
]
SHARED = [0.820056309503344, 0.3444530885363807, 0.2316689903229172]
RACE = [0.532684466370085, 0.25331264237530526, 0.45927591062677486, 0.7019723345626624]
EXTREME = [[0.7102169646740615]]


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1]))


@pytest.mark.parametrize("keys", [KEYS, KEYS * 4096, noise.default_keys(N, 3)], ids=["adjacent", "strided", "default"])
def test_distributions_are_the_stated_ones(keys: Tensor) -> None:
    assert stats.kstest(noise.uniform(7, 3, keys).numpy().ravel(), "uniform").pvalue > 1e-3
    assert stats.kstest(noise.normal(7, 4, keys).numpy().ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(noise.gumbel(7, 5, keys).numpy().ravel(), "gumbel_r").pvalue > 1e-3
    assert stats.kstest(noise.race(7, 6, keys).numpy(), "expon").pvalue > 1e-3
    assert stats.kstest(noise.shared_uniform(7, 6, N).numpy(), "uniform").pvalue > 1e-3


def test_low_and_high_bits_are_uniform() -> None:
    words = (noise.uniform(1, 2, KEYS) * 2.0**53).to(torch.int64).reshape(-1)
    for shift in (0, 12, 25, 45):
        counts = torch.bincount((words >> shift) & 255, minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3, f"bits {shift}..{shift + 8}"


def test_two_draws_fill_the_square() -> None:
    cells = (noise.uniform(1, 2, KEYS, draws=2) * 16).to(torch.int64)
    assert stats.chisquare(torch.bincount(cells[:, 0] * 16 + cells[:, 1], minlength=256).numpy()).pvalue > 1e-3


def test_no_coordinate_is_correlated_with_its_neighbour() -> None:
    base = noise.uniform(1, 2, KEYS)
    others = {
        "key": noise.uniform(1, 2, KEYS + 1),
        "key far": noise.uniform(1, 2, KEYS + 2**32),
        "seed": noise.uniform(2, 2, KEYS),
        "step": noise.uniform(1, 3, KEYS),
        "level": noise.uniform(1, 2, KEYS, level=1),
        "head": noise.uniform(1, 2, KEYS, head=1),
        "draw": noise.uniform(1, 2, KEYS, draws=2)[:, 1:],
        "race": torch.exp(-noise.race(1, 2, KEYS)),
        "shared": noise.shared_uniform(1, 2, N),
    }
    for name, other in others.items():
        assert correlation(base, other) < NO_CORRELATION, name


def test_exchanged_coordinates_give_other_numbers() -> None:
    """(seed, step) = (1, 2) and (2, 1), level and head, key and draw: no sum of coordinates is all that counts."""
    assert correlation(noise.uniform(1, 2, KEYS), noise.uniform(2, 1, KEYS)) < NO_CORRELATION
    assert correlation(noise.uniform(1, 2, KEYS, level=1), noise.uniform(1, 2, KEYS, head=1)) < NO_CORRELATION
    table = noise.uniform(1, 2, KEYS[:200], draws=200)
    assert table.unique().numel() == table.numel()


def test_mean_over_keys_does_not_wander_with_the_step() -> None:
    means = torch.stack([noise.normal(0, step, KEYS[:1000]).mean() for step in range(200)]) * math.sqrt(1000)
    assert stats.kstest(means.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("draw", [noise.uniform, noise.normal, noise.gumbel])
def test_a_row_keeps_its_numbers_in_any_split_and_order(draw) -> None:
    keys = torch.randint(-(2**62), 2**62, (1000,), generator=torch.Generator().manual_seed(0))
    whole = draw(5, 9, keys, level=2, head=1, draws=3)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(5, 9, keys[order], level=2, head=1, draws=3), whole[order])
    parts = torch.cat([draw(5, 9, part, level=2, head=1, draws=3) for part in keys.split([0, 1, 617, 382])])
    assert torch.equal(parts, whole)
    assert torch.equal(draw(5, 9, keys, level=2, head=1, draws=8)[:, :3], whole), "draw j depends on how many are drawn"


def test_race_is_the_same_in_any_split_and_streams_differ() -> None:
    weights = noise.uniform(0, 0, KEYS[:500]).reshape(-1)
    whole = noise.race(3, 1, KEYS[:500], weights)
    parts = [noise.race(3, 1, k, w) for k, w in zip(KEYS[:500].split(123), weights.split(123), strict=True)]
    assert torch.equal(torch.cat(parts), whole)
    assert correlation(noise.race(3, 1, KEYS), noise.race(3, 1, KEYS, stream=1)) < NO_CORRELATION
    assert correlation(noise.race(3, 1, KEYS), noise.race(3, 1, KEYS, level=1)) < NO_CORRELATION


def test_winners_of_a_race_follow_the_weights() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0], dtype=torch.float64)
    keys, races = torch.arange(5), 5000
    times = torch.stack([noise.race(0, step, keys, weights) for step in range(races)])
    assert torch.isinf(times[:, 3]).all()
    order = times.argsort(dim=1)
    won = torch.bincount(order[:, 0], minlength=5)[[0, 1, 2, 4]]
    assert stats.chisquare(won.numpy(), (weights[[0, 1, 2, 4]] / 10 * races).numpy()).pvalue > 1e-3
    # The second of two drawn without replacement, given that the row of weight 4 came first: 1 : 2 : 3.
    second = torch.bincount(order[order[:, 0] == 4][:, 1], minlength=5)[:3]
    assert stats.chisquare(second.numpy(), (weights[:3] / 6 * second.sum()).numpy()).pvalue > 1e-3


def test_extreme_hashes_stay_strictly_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([[0, -1, 1, 2**62, -(2**63)]])
    monkeypatch.setattr(noise, "_absorb", lambda state, coordinate: extremes)
    u = noise.uniform(0, 0, torch.arange(1), draws=5)
    assert u.dtype == torch.float64
    assert (u > 0).all()
    assert (u < 1).all()
    assert torch.isfinite(noise.normal(0, 0, torch.arange(1))).all()
    assert torch.isfinite(noise.gumbel(0, 0, torch.arange(1))).all()
    monkeypatch.setattr(noise, "_absorb", lambda state, coordinate: extremes[0])
    assert (noise.race(0, 0, torch.arange(5)) > 0).all()


def test_default_keys_never_meet() -> None:
    workers = [noise.default_keys(1000, rank) for rank in (0, 1, 2, 63)]
    assert torch.cat(workers).unique().numel() == 4000
    assert all((keys < 0).all() for keys in workers), "they must stay apart from row ids"
    assert torch.equal(noise.default_keys(300, 2, start=700), workers[2][700:])
    last_of_one, first_of_next = noise.default_keys(1, 4)[0] + 2**40 - 1, noise.default_keys(1, 3)[0]
    assert last_of_one < first_of_next


def test_a_hash_round_is_splitmix64() -> None:
    """Reference: the published outputs of SplitMix64 from state 1234567 (Vigna's splitmix64.c), state + i x golden."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    drawn = noise._absorb(1234567, torch.arange(4))
    assert [int(word) % 2**64 for word in drawn] == published
    assert noise._state(11, 12, 13) == int(noise._absorb(noise._state(11, 12), torch.tensor([13])))


def test_frozen_values() -> None:
    """Checkpoints continue with these numbers: if this fails, the generator changed and every seeded run with it."""
    keys = torch.tensor([0, 1, -5, 2**40 + 3])
    assert noise.uniform(1, 2, keys, level=3, head=4, draws=2).tolist() == UNIFORM
    assert noise.shared_uniform(1, 2, 3, stream=4).tolist() == SHARED
    assert torch.exp(-noise.race(1, 2, keys, level=3, stream=4)).tolist() == pytest.approx(RACE, rel=1e-12)
    assert noise.default_keys(2, 1).tolist() == [-(2**41), -(2**41) + 1]
    assert noise.uniform(-1, 2**70, keys[:1]).tolist() == EXTREME


def test_a_shared_draw_takes_the_step_as_a_tensor() -> None:
    assert torch.equal(noise.shared_uniform(1, torch.tensor(2), 3, stream=4), noise.shared_uniform(1, 2, 3, stream=4))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"torch\.int32"):
        noise.uniform(0, 0, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        noise.race(0, 0, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(2,\) weights for \(3,\) keys"):
        noise.race(0, 0, torch.arange(3), torch.ones(2))
    with pytest.raises(ValueError, match="-1"):
        noise.uniform(0, 0, torch.arange(3), draws=-1)
    with pytest.raises(ValueError, match="-2"):
        noise.shared_uniform(0, 0, -2)
    with pytest.raises(ValueError, match="rank -1"):
        noise.default_keys(3, -1)
    with pytest.raises(ValueError, match="positions 1099511627775 to 1099511627778"):
        noise.default_keys(3, 0, start=2**40 - 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_the_same_numbers() -> None:
    keys = torch.arange(1000)
    assert torch.equal(noise.uniform(1, 2, keys.cuda(), draws=3).cpu(), noise.uniform(1, 2, keys, draws=3))


def test_a_step_may_be_a_tensor() -> None:
    """It stays on its device: no draw waits for a Python number."""
    keys = torch.tensor([0, 1, -5, 2**40 + 3])
    for draw in (noise.uniform, noise.normal, noise.gumbel):
        for step in (0, 7, 2**40):
            wanted = draw(3, step, keys, level=2, head=5, draws=3)
            assert torch.equal(draw(3, torch.tensor(step), keys, level=2, head=5, draws=3), wanted)


def test_choices_follow_the_weights_and_their_own_uniform() -> None:
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.0, 5.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    u = noise.uniform(1, 0, torch.arange(2), draws=N)
    chosen = noise.choose(weights, u)
    counts = torch.bincount(chosen[0], minlength=6)[[1, 2, 4]]
    assert int(counts.sum()) == N, "an index of weight 0 was drawn"
    assert stats.chisquare(counts.numpy(), (weights[0][[1, 2, 4]] / 8 * N).numpy()).pvalue > 1e-3
    assert not chosen[1].any()
    assert torch.equal(noise.choose(weights, u[:, 5:9]), chosen[:, 5:9])
    reached = torch.tensor([0.0, 0.124, 0.126, 0.374, 0.376, 1 - 2**-53], dtype=torch.float64)
    assert noise.choose(weights[:1], reached.unsqueeze(0)).tolist() == [[1, 1, 2, 2, 4, 4]]


def test_the_largest_uniform_draws_no_weight_of_nought() -> None:
    totals = torch.cat(
        [
            1 + torch.arange(5).double() * 2.0**-52,
            2 - torch.arange(1, 6).double() * 2.0**-52,
            noise.uniform(0, 0, KEYS)[:, 0],
        ]
    )
    weights = torch.stack([totals, torch.zeros_like(totals)], dim=1)
    u = torch.full((len(totals), 1), 1 - 2**-53, dtype=torch.float64)
    assert not noise.choose(weights, u).any()
    assert noise.choose(torch.full((1, 3), torch.nan), u[:1]).item() in range(3)
