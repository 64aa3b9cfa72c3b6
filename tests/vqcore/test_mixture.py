"""Shares of all codes against dense references, and the laws that tiles must keep."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from vqcore import mixture, noise
from vqcore.assign import nearest
from vqcore.mixture import Noise, apportion, draw, mix

K, D = 20, 5


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(x: Tensor, vectors: Tensor, temperature: float, gumbel: Noise | None = None) -> Tensor:
    """Shares [N, K] with every distance written out, differentiable."""
    scores = -(x.unsqueeze(1) - vectors).square().sum(-1)
    if gumbel is not None:
        scores = scores + noise.gumbel(gumbel.seed, gumbel.step, gumbel.keys, draws=len(vectors))
    return (scores / temperature).softmax(-1)


def gumbel(rows: int, step: int = 3) -> Noise:
    return Noise(5, step, torch.arange(rows) + 100)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a tile, so that every case has several and a short one."""
    monkeypatch.setattr(mixture, "MOST_ROWS_PER_TILE", 7)


@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 10.0])
def test_the_mixture_and_its_gradients_match_a_dense_reference(temperature: float, with_noise: bool) -> None:
    g = gumbel(25) if with_noise else None
    x, vectors, weight = drawn(1, 25, D), drawn(2, K, D), drawn(3, 25, D)
    ours, theirs = [[t.clone().requires_grad_() for t in (x, vectors)] for _ in range(2)]
    mixed = mix(*ours, temperature, g)
    wanted = (dense(theirs[0].double(), theirs[1].double(), temperature, g) @ theirs[1].double()).float()
    torch.testing.assert_close(mixed, wanted)
    (mixed * weight).sum().backward()
    (wanted * weight).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_finite_differences_agree_with_the_gradient_at_fixed_noise() -> None:
    """Streamline dossier, check 3: no straight-through copy."""
    x, vectors = drawn(1, 9, 3).double().requires_grad_(), drawn(2, 6, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mix(a, b, 2.0, gumbel(9)), (x, vectors))


def test_shares_sum_to_one_and_the_mixture_lies_in_the_convex_hull() -> None:
    """Streamline dossier, check 2."""
    x, vectors = 3 * drawn(1, 40, D), drawn(2, K, D)
    for _, shares in mixture._tiles(x, vectors, 1.0, gumbel(40)):
        torch.testing.assert_close(shares.sum(-1), torch.ones(len(shares)))
    mixed = mix(x, vectors, 1.0)
    directions = drawn(4, 200, D)
    assert ((mixed @ directions.T) <= (vectors @ directions.T).amax(0) + 1e-5).all()


def test_temperature_runs_from_the_nearest_code_to_the_mean_of_all() -> None:
    x, vectors = drawn(1, 40, D), drawn(2, K, D)
    assert torch.equal(mix(x, vectors, 1e-9), vectors[nearest(x, vectors)]), "T -> 0 is the nearest code exactly"
    torch.testing.assert_close(mix(x, vectors, 1e9), vectors.mean(0).expand(40, D))
    assert torch.equal(mix(x, vectors, 1e-40), vectors[nearest(x, vectors)]), "a division that overflows"


def test_a_constant_added_to_all_distances_of_a_row_changes_nothing() -> None:
    """A last dimension in which all codes are 0 adds its square to every distance of a row."""
    x, vectors = drawn(1, 40, D), drawn(2, K, D)
    vectors[:, -1] = 0.0
    moved = x.clone()
    moved[:, -1] += 100.0
    torch.testing.assert_close(mix(moved, vectors, 1.0, gumbel(40)), mix(x, vectors, 1.0, gumbel(40)))


def test_no_split_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows_per_tile in (7, 512):
        monkeypatch.setattr(mixture, "MOST_ROWS_PER_TILE", rows_per_tile)
        x, vectors, keys = drawn(1, 700, 17), drawn(2, 300, 17), torch.arange(700)
        u = noise.uniform(1, 2, keys, draws=4)
        weight = drawn(3, 700, 17)

        def run(part: Tensor, x=x, vectors=vectors, u=u, weight=weight) -> list[Tensor]:
            rows = x[part].requires_grad_()
            mixed = mix(rows, vectors, 2.0, Noise(1, 2, part))
            (gradient,) = torch.autograd.grad((mixed * weight[part]).sum(), rows)
            codes = [draw(rows, vectors, 2.0, u[part]), apportion(rows, vectors, 2.0, 4)]
            return [mixed.detach(), gradient, *codes]

        whole = run(keys)
        for sizes in ([1] * 10 + [690], [512, 188], [0, 699, 1], [333, 367]):
            for found, wanted in zip(zip(*map(run, keys.split(sizes)), strict=True), whole, strict=True):
                assert torch.equal(torch.cat(found), wanted)


def test_only_inputs_are_kept_for_the_way_back() -> None:
    """The N x K shares are computed again (rivals keep about five such matrices)."""
    kept: list[int] = []
    x, vectors = drawn(1, 64, D).requires_grad_(), drawn(2, K, D).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        mix(x, vectors, 1.0, gumbel(64))
    assert sum(kept) == 64 * D + K * D


def test_the_way_back_draws_the_noise_of_the_way_forward_and_uses_the_codes_it_had() -> None:
    x, vectors, step = drawn(1, 9, D).requires_grad_(), drawn(2, K, D).requires_grad_(), 3
    wanted = torch.autograd.grad(mix(x, vectors, 1.0, gumbel(9, step)).square().sum(), (x, vectors))
    mixed = mix(x, vectors, 1.0, gumbel(9, step))
    with torch.no_grad():
        vectors += 1.0
    for found, expected in zip(torch.autograd.grad(mixed.square().sum(), (x, vectors)), wanted, strict=True):
        assert torch.equal(found, expected)


def test_a_second_differentiation_is_refused() -> None:
    x = drawn(1, 4, D).requires_grad_()
    (gradient,) = torch.autograd.grad(mix(x, drawn(2, K, D), 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_rows() -> None:
    x, vectors = torch.zeros(0, D).requires_grad_(), drawn(2, K, D).requires_grad_()
    mixed = mix(x, vectors, 1.0)
    mixed.sum().backward()
    assert mixed.shape == (0, D)
    assert vectors.grad is not None
    assert not vectors.grad.any()
    assert draw(x, vectors, 1.0, torch.zeros(0, 3)).shape == apportion(x, vectors, 1.0, 3).shape == (0, 3)


def test_float64_stays_float64_and_autocast_changes_nothing() -> None:
    x, vectors = drawn(1, 30, D), drawn(2, K, D)
    torch.testing.assert_close(
        mix(x.double(), vectors.double(), 1.0),
        dense(x.double(), vectors.double(), 1.0) @ vectors.double(),
        rtol=1e-12,
        atol=1e-12,
    )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mix(x, vectors, 1.0)
        assert (x @ vectors.T).dtype == torch.bfloat16
    assert torch.equal(mixed, mix(x, vectors, 1.0))


def test_draws_follow_the_shares() -> None:
    """IA-GPL dossier, check 2: a chi-square test over 60,000 draws."""
    x, vectors = drawn(1, 3, D), drawn(2, K, D)
    pi = dense(x.double(), vectors.double(), 4.0)
    u = noise.uniform(1, 0, torch.arange(3), draws=20_000)
    for row, codes in zip(pi, draw(x, vectors, 4.0, u), strict=True):
        counts = torch.bincount(codes, minlength=K)
        assert stats.chisquare(counts.numpy(), (row * 20_000).numpy()).pvalue > 1e-3


def test_draw_j_does_not_depend_on_how_many_are_drawn() -> None:
    x, vectors, u = drawn(1, 30, D), drawn(2, K, D), noise.uniform(1, 0, torch.arange(30), draws=6)
    assert torch.equal(draw(x, vectors, 4.0, u)[:, :2], draw(x, vectors, 4.0, u[:, :2]))


@pytest.mark.parametrize("draws", [1, 3, 10, 50])
def test_apportioned_shares_are_the_nearest_there_are(draws: int) -> None:
    x, vectors = drawn(1, 30, D), drawn(2, K, D)
    pi = dense(x.double(), vectors.double(), 3.0).numpy()
    codes = apportion(x, vectors, 3.0, draws)
    assert torch.equal(codes, codes.sort(-1).values)
    for row, of_row in zip(pi, codes.numpy(), strict=True):
        wanted = np.floor(row * draws)
        order = np.argsort(-(row * draws - wanted), kind="stable")[: draws - int(wanted.sum())]
        wanted[order] += 1
        found = np.bincount(of_row, minlength=K)
        assert found.tolist() == wanted.tolist()
        assert np.abs(found / draws - row).max() < 1 / draws
    if draws == 1:
        assert torch.equal(codes.squeeze(-1), nearest(x, vectors))


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.inf, np.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    """It may have been annealed too far: 0 / 0 would be NaN in every output."""
    x, vectors = drawn(0, 5, 3), drawn(1, 4, 3)
    for call in (
        lambda: mixture.mix(x, vectors, temperature),
        lambda: mixture.draw(x, vectors, temperature, torch.full((5, 2), 0.5)),
        lambda: mixture.apportion(x, vectors, temperature, 2),
    ):
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            call()
