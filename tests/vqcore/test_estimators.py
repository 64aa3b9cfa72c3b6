"""Estimators: exact values forward; backward against the formula, the explicit matrix and the geometry of the paper."""

import pytest
import torch
from torch import Tensor

from vqcore.estimators import rotate, straight_through, straight_through_in_place, substitute_noise


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient(estimator, x: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """Gradient at x of <g, estimator(x, q)>."""
    leaf = x.detach().clone().requires_grad_()
    (estimator(leaf, q) * g).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


def rotation(e: Tensor, q: Tensor) -> Tensor:
    """The explicit D x D matrix, as a product of two Householder reflections (paper, appendix A.5)."""
    e_hat, q_hat = unit(e), unit(q)
    r = unit(e_hat + q_hat)
    identity = torch.eye(len(e), dtype=e.dtype)
    return (identity - 2 * torch.outer(q_hat, q_hat)) @ (identity - 2 * torch.outer(r, r))


def detached_formula(x: Tensor, q: Tensor) -> Tensor:
    """Section 4.2 as printed, differentiated by torch: only the leading e carries a gradient."""
    e, q = x.detach(), q.detach()
    scale, r = q.norm(dim=-1, keepdim=True) / e.norm(dim=-1, keepdim=True), unit(unit(e) + unit(q))
    onto_r, onto_e = (r * x).sum(-1, keepdim=True), (unit(e) * x).sum(-1, keepdim=True)
    return scale * (x - 2 * r * onto_r + 2 * unit(q) * onto_e)


@pytest.mark.parametrize("estimator", [straight_through, rotate])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2, 3, 32, 256])
def test_value_is_the_code_bit_for_bit(estimator, dtype: torch.dtype, dim: int) -> None:
    """In EdoardoBotta/RQ-VAE-Recommender issue 54 the rotation's output is not the code."""
    x, q = random(50, dim, dtype=dtype).requires_grad_(), 1e-3 * random(50, dim, seed=1, dtype=dtype)
    q[0, 0], q[1] = -0.0, 0.0
    out = estimator(x, q)
    integers = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}[dtype]
    assert torch.equal(out.detach().view(integers), q.view(integers))
    assert out.requires_grad
    with torch.no_grad():
        assert torch.equal(estimator(x, q), q)


@pytest.mark.parametrize("estimator", [straight_through, rotate])
def test_output_may_be_changed_in_place_without_reaching_the_codebook(estimator) -> None:
    x, q = random(5, 3).requires_grad_(), random(5, 3, seed=1)
    before = q.clone()
    torch.relu_(estimator(x, q)).sum().backward()
    assert torch.equal(q, before)
    assert x.grad is not None


def test_in_place_it_is_the_given_memory_and_may_be_written_to() -> None:
    x, q = random(5, 3).requires_grad_(), random(5, 3, seed=1)
    wanted = straight_through(x, q)
    out = straight_through_in_place(x, q)
    assert torch.equal(out, wanted)
    assert out.data_ptr() == q.data_ptr()
    torch.relu_(out).sum().backward()
    assert torch.equal(x.grad, (wanted > 0).to(x.dtype))
    with pytest.raises(ValueError, match="one code a row"):
        straight_through_in_place(x, q[:2])


@pytest.mark.parametrize("estimator", [straight_through, rotate])
def test_no_gradient_reaches_the_codebook(estimator) -> None:
    x, q = random(5, 3).requires_grad_(), random(5, 3, seed=1).requires_grad_()
    estimator(x, q).square().sum().backward()
    assert x.grad is not None
    assert q.grad is None


def test_straight_through_copies_the_gradient() -> None:
    x, q, g = (random(7, 2, 5, seed=i) for i in range(3))
    assert torch.equal(gradient(straight_through, x, q, g), g)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dim", [2, 3, 32])
def test_gradient_is_the_explicit_rotation_transposed(dtype: torch.dtype, tolerance: float, dim: int) -> None:
    x, q, g = (random(40, dim, seed=i) for i in range(3))
    found = gradient(rotate, x.to(dtype), q.to(dtype), g.to(dtype)).double()
    for i in range(40):
        matrix = rotation(x[i], q[i])
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))
        torch.testing.assert_close(torch.linalg.det(matrix), torch.tensor(1.0, dtype=torch.float64))
        torch.testing.assert_close(matrix @ unit(x[i]), unit(q[i]))
        scale = q[i].norm() / x[i].norm()
        # Near-opposite pairs amplify rounding by 1 / |e_hat + q_hat|.
        slack = tolerance * scale * g[i].norm() / (unit(x[i]) + unit(q[i])).norm()
        assert (found[i] - scale * matrix.T @ g[i]).norm() <= slack


def test_gradient_equals_the_detached_formula() -> None:
    x, q, g = (random(6, 4, 8, seed=i) for i in range(3))
    torch.testing.assert_close(gradient(rotate, x, q, g), gradient(detached_formula, x, q, g), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(detached_formula(x, q), q, rtol=1e-12, atol=1e-12)


def test_angle_and_length_are_kept() -> None:
    """Paper A.6: the angle of x and its gradient is that of the code and g; the length grows by |q| / |e|."""
    x, q, g = (random(100, 6, seed=i) for i in range(3))
    found = gradient(rotate, x, q, g)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(x, found), cosine(q, g))
    torch.testing.assert_close(found.norm(dim=1), q.norm(dim=1) / x.norm(dim=1) * g.norm(dim=1))


def test_directions_across_the_plane_are_only_scaled() -> None:
    x, q, g = (random(5, seed=i) for i in range(3))
    plane, _ = torch.linalg.qr(torch.stack([x, q], dim=1))
    across = g - plane @ (plane.T @ g)
    torch.testing.assert_close(gradient(rotate, x, q, across), q.norm() / x.norm() * across)


def test_parallel_code_only_scales() -> None:
    x, g = random(10, 4), random(10, 4, seed=1)
    torch.testing.assert_close(gradient(rotate, x, 3 * x, g), 3 * g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_rows_take_the_straight_through_gradient(dtype: torch.dtype) -> None:
    x, g = random(6, 4, dtype=dtype), random(6, 4, seed=1, dtype=dtype)
    q = random(6, 4, seed=2, dtype=dtype)
    q[0] = -x[0]  # exactly opposite
    q[1] = -2 * x[1] * (1 + 4 * torch.finfo(dtype).eps)  # opposite within rounding
    x[2] = 0
    q[3] = 0
    x[4], q[4] = 0, 0
    found = gradient(rotate, x, q, g)
    assert torch.equal(found[[0, 1, 2, 4]], g[[0, 1, 2, 4]])
    assert torch.equal(found[3], torch.zeros(4, dtype=dtype))
    torch.testing.assert_close(found[5], gradient(detached_formula, x[5], q[5], g[5]))


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-12, 1e12, 1e18, 1e30])
def test_rows_of_any_size_stay_finite(size: float) -> None:
    """Squares of float32 beyond 1e19 overflow and below 1e-23 vanish; norms must not."""
    x, q, g = (random(20, 4, seed=i, dtype=torch.float32) for i in range(3))
    assert torch.isfinite(gradient(rotate, x, size * q, g)).all()
    assert torch.isfinite(gradient(rotate, size * x, q, g)).all()
    expected = gradient(rotate, x, q, g)
    if size > 1e-38:  # below, float32 itself has lost digits
        torch.testing.assert_close(gradient(rotate, size * x, size * q, g), expected, rtol=1e-4, atol=1e-4)


def test_points_of_one_cell_move_apart_or_together_only_under_rotation() -> None:
    """Paper section 4.3: along g parallel to q, straight-through shifts a cell rigidly, the rotation does not."""
    q = torch.tensor([1.0, 0.0], dtype=torch.float64)
    angles = torch.tensor([0.1, 0.6, 1.2], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    g = q.expand(3, 2)
    distances = torch.pdist(x)
    moved = {f: torch.pdist(x - 0.1 * gradient(f, x, q.expand(3, 2), g)) for f in (rotate, straight_through)}
    torch.testing.assert_close(moved[straight_through], distances)
    # |q| = |x| = 1 and g = q: R^T q = x, so every point shrinks towards the origin by a tenth.
    torch.testing.assert_close(moved[rotate], 0.9 * distances)


def test_far_from_the_origin_it_tends_to_straight_through() -> None:
    """Paper A.4: not translation invariant."""
    x, q, g = (random(20, 4, seed=i) for i in range(3))
    assert (gradient(rotate, x, q, g) - g).abs().max() > 0.1
    errors = [(gradient(rotate, x + shift, q + shift, g) - g).abs().max() for shift in (1e3, 1e4, 1e6)]
    assert errors[0] < 1e-2
    assert errors[1] < 1e-3
    assert errors[2] < 1e-5


def test_gradient_keeps_the_dtype_of_x_under_autocast() -> None:
    x, q, g = (random(50, 8, seed=i, dtype=torch.float32) for i in range(3))
    expected = gradient(rotate, x, q, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gradient(rotate, x, q, g), expected)
    half = gradient(rotate, x.bfloat16(), q, g)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, gradient(rotate, x.bfloat16().float(), q, g).bfloat16())


@pytest.mark.parametrize("estimator", [straight_through, rotate])
def test_shapes_must_agree(estimator) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        estimator(torch.zeros(2, 3), torch.zeros(3))


# Noise substitution


def authors_first_formula(x: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """noise_substitution_vq of MHVali/Space-Filling-Vector-Quantizer 8f067a4."""
    norm_error, norm_v = (x - q).square().sum(1, keepdim=True).sqrt(), v.square().sum(1, keepdim=True).sqrt()
    return x + (norm_error / norm_v + 1e-12) * v


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dim", [1, 2, 64])
def test_substituted_noise_is_as_long_as_the_error(dtype: torch.dtype, tolerance: float, dim: int) -> None:
    x, q, v = (random(200, dim, seed=i, dtype=dtype) for i in range(3))
    moved = substitute_noise(x, q, v) - x
    torch.testing.assert_close(moved.norm(dim=-1), (x - q).norm(dim=-1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(unit(moved), unit(v), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)
    torch.testing.assert_close(substitute_noise(x, q, 7 * v), x + moved)


def test_substituted_noise_is_x_on_average() -> None:
    x, q = random(1, 5), random(1, 5, seed=1)
    draws = substitute_noise(x.expand(40_000, 5), q.expand(40_000, 5), random(40_000, 5, seed=2))
    error = (draws.mean(0) - x).abs()
    assert (error < 5 * draws.std(0) / 200).all()


def test_gradients_of_noise_substitution_match_finite_differences_and_the_formula() -> None:
    x, q, v, g = (random(8, 3, seed=i) for i in range(4))
    assert torch.autograd.gradcheck(substitute_noise, (x.requires_grad_(), q.requires_grad_(), v))
    (substitute_noise(x, q, v) * g).sum().backward()
    u, r = unit(v), unit((x - q).detach())
    along = r * (u * g).sum(-1, keepdim=True)
    torch.testing.assert_close(x.grad, g + along)
    torch.testing.assert_close(q.grad, -along)
    v.requires_grad_()
    substitute_noise(x, q, v).sum().backward()
    assert v.grad is None, "the noise is frozen"


def test_a_code_that_is_x_passes_the_gradient_on_where_the_authors_first_formula_gives_nan() -> None:
    x, v, g = (random(4, 3, seed=i) for i in range(3))
    q = x.clone().requires_grad_()
    x.requires_grad_()
    out = substitute_noise(x, q, v)
    assert torch.equal(out, x)
    (out * g).sum().backward()
    assert torch.equal(x.grad, g)
    assert not q.grad.any()
    x.grad = None
    (authors_first_formula(x, q, v) * g).sum().backward()
    assert x.grad.isnan().all()


def test_no_epsilon_lengthens_the_error() -> None:
    """MHVali/Noise-Substitution-in-Vector-Quantization 3: an epsilon outside the quotient adds 1e-12 |v| to every
    error, which is all of it near a code."""
    x, v = torch.zeros(50, 64, dtype=torch.float64), random(50, 64, seed=1)
    q = 1e-13 * random(50, 64)
    error = q.norm(dim=-1)
    torch.testing.assert_close(substitute_noise(x, q, v).norm(dim=-1), error, rtol=1e-12, atol=0)
    assert (authors_first_formula(x, q, v).norm(dim=-1) > 5 * error).all()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e18, 1e30])
def test_noise_substitution_stays_finite_at_any_size(size: float) -> None:
    x, q, v, g = (random(20, 4, seed=i, dtype=torch.float32) for i in range(4))
    x, q = (size * x).requires_grad_(), (size * q).requires_grad_()
    out = substitute_noise(x, q, v)
    torch.testing.assert_close(out / size, substitute_noise(x / size, q / size, v), rtol=1e-4, atol=1e-4)
    (out * g).sum().backward()
    assert x.grad.isfinite().all()
    assert q.grad.isfinite().all()


def test_noise_substitution_runs_in_float32_and_refuses_other_shapes() -> None:
    x, q, v = (random(50, 8, seed=i, dtype=torch.float32) for i in range(3))
    half = substitute_noise(x.bfloat16(), q.bfloat16(), v)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, substitute_noise(x.bfloat16().float(), q.bfloat16().float(), v).bfloat16())
    with pytest.raises(ValueError, match=r"noise has shape \(50, 1\), x \(50, 8\)"):
        substitute_noise(x, q, v[:, :1])
    with pytest.raises(ValueError, match=r"\(50, 8\).*\(1, 8\)"):
        substitute_noise(x, q[:1], v)
