"""Masked sums: plain numpy on the valid rows, and nothing of the others, neither value nor gradient."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vqcore.losses import explained, passing_squared_error, psnr, squared_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 3, 4, 4)])
def test_sums_over_valid_rows_with_their_gradient(shape: tuple[int, ...]) -> None:
    x, y = random(*shape).requires_grad_(), random(*shape, seed=1)
    mask = torch.tensor([True, False, True, True, False, True])
    found = squared_error(x, y, mask)
    valid = mask.numpy()
    expected = ((x.detach().numpy()[valid].astype("f8") - y.numpy()[valid]) ** 2).sum()
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)
    found.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    weight = mask.view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(x.grad, 2 * (x.detach() - y) * weight)
    assert float(squared_error(x.detach(), y)) == pytest.approx(float(((x.detach() - y) ** 2).sum()), rel=1e-6)


def test_parts_add_up_to_the_whole() -> None:
    x, y = random(1000, 8), random(1000, 8, seed=1)
    mask = random(1000, seed=2) > 0
    parts = [squared_error(a, b, m) for a, b, m in zip(x.split(77), y.split(77), mask.split(77), strict=True)]
    assert float(sum(parts)) == pytest.approx(float(squared_error(x, y, mask)), rel=1e-14)


def test_a_long_sum_keeps_small_terms() -> None:
    """2^24 and many ones: a float32 sum would stand still."""
    x = torch.ones(5001)
    x[0] = 2.0**12
    assert float(squared_error(x, torch.zeros(5001))) == 2.0**24 + 5000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_masked_rows_cannot_be_seen(bad: float) -> None:
    x, y = random(3, 4), random(3, 4, seed=1)
    x[1], y[1, 2] = bad, -bad
    x.requires_grad_()
    found = squared_error(x, y, torch.tensor([True, False, True]))
    found.backward()
    assert float(found.detach()) == pytest.approx(float(squared_error(x[::2], y[::2]).detach()))
    assert x.grad is not None
    assert torch.equal(x.grad[1], torch.zeros(4))
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_valid_is_zero_and_attached(rows: int) -> None:
    x = random(rows, 4).requires_grad_()
    found = squared_error(x, torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool))
    found.backward()
    assert float(found.detach()) == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_stored_types_are_compared_in_float32() -> None:
    """uint8 pixels do not wrap around, and the difference of two bfloat16 is not rounded to bfloat16."""
    pixels = torch.tensor([[3], [200]], dtype=torch.uint8)
    assert float(squared_error(pixels, pixels.flip(0))) == 2 * 197**2
    one, small = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 2.0**-10, dtype=torch.bfloat16)
    assert float(squared_error(one, small)) == (1 - 2.0**-10) ** 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        squared_error(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"bool of shape \(2,\)"):
        squared_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        squared_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uses", ["both", "sum", "x"])
def test_the_passed_x_and_the_sum_have_the_gradients_they_would_have_apart(uses: str, dtype: torch.dtype) -> None:
    x, y, g = (random(300, 7, seed=seed).to(dtype) for seed in range(3))
    x.requires_grad_()
    passed, found = passing_squared_error(x, y)
    assert torch.equal(passed, x)
    expected = ((x.detach().double() - y.double()) ** 2).sum()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-7, atol=0)
    y.fill_(torch.nan)  # kept by nobody
    apart = {"both": g + 0.6 * (x.detach() - random(300, 7, seed=1).to(dtype)), "x": g}
    apart["sum"] = apart["both"] - g
    reached = {"both": (passed * g).sum() + 0.3 * found, "sum": 0.3 * found, "x": (passed * g).sum()}[uses]
    # Twice over the same graph: the first time nothing of it may be overwritten, the second time it may.
    for kept in (True, False):
        (found_gradient,) = torch.autograd.grad(reached, x, retain_graph=kept)
        torch.testing.assert_close(found_gradient, apart[uses], rtol=1e-5, atol=1e-6)


def test_the_sum_that_passes_x_on_can_be_differentiated_twice() -> None:
    x, y = random(4, 3).double().requires_grad_(), random(4, 3, seed=1).double()

    def mixed(x: Tensor) -> Tensor:
        passed, found = passing_squared_error(x, y)
        return passed.sin().sum() * found + found.square()

    assert torch.autograd.gradcheck(mixed, x)
    assert torch.autograd.gradgradcheck(mixed, x)


def test_the_sum_that_passes_x_on_does_not_depend_on_the_split() -> None:
    x, y = random(1000, 24), random(1000, 24, seed=1)
    whole = passing_squared_error(x, y)[1]
    parts = [passing_squared_error(a, b)[1] for a, b in zip(x.split(77), y.split(77), strict=True)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-14)
    assert float(passing_squared_error(x[:0], y[:0])[1]) == 0
    with pytest.raises(ValueError, match=r"\(1000, 24\).*\(24,\)"):
        passing_squared_error(x, y[0])
    with pytest.raises(ValueError, match=r"float32.*float64"):
        passing_squared_error(x, y.double())


def test_psnr() -> None:
    assert psnr(1.0, 255.0) == pytest.approx(48.1308036, abs=1e-6)  # 20 log10(255)
    assert psnr(0.01, 1.0) == pytest.approx(20)
    assert psnr(0.04, 2.0) == pytest.approx(20)
    assert psnr(0.0, 1.0) == math.inf
    for error, peak in [(-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)]:
        with pytest.raises(ValueError, match="peak"):
            psnr(error, peak)


def test_explained_is_one_less_the_share_of_the_variance_of_numpy():
    drawn = np.random.default_rng(0)
    x, error = drawn.normal(3, 2, (500, 7)), 0.9
    mean, square = torch.from_numpy(x.mean(0)), torch.tensor((x**2).sum(1).mean())
    assert explained(error, mean, square) == pytest.approx(1 - error / x.var(0).mean(), rel=1e-9)
    assert explained(0.0, torch.ones(7), torch.tensor(7.0)) == 0.0
