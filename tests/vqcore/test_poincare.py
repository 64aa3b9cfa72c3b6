"""The Poincare ball against other forms of the same formulas and laws of its geometry; geoopt is in tests/peers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vqcore.poincare import (
    distance,
    exp_map_zero,
    hyperplanes,
    lift,
    log_map_zero,
    mobius_add,
    project,
    unidirectional_mlr,
)

CURVATURES = [0.1, 1.0, 2.0]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tangents(seed: int, c: float, farthest: float, rows: int = 200, dim: int = 5) -> Tensor:
    """Vectors of every direction with s |v| spread over (0, farthest)."""
    directions = torch.nn.functional.normalize(drawn(seed, rows, dim), dim=-1)
    return directions * torch.linspace(1e-9, farthest, rows, dtype=torch.float64).unsqueeze(-1) / math.sqrt(c)


def points(seed: int, c: float, rows: int = 200, dim: int = 5) -> Tensor:
    return exp_map_zero(
        tangents(seed, c, 2.0, rows, dim)[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))], c
    )


# Maps


@pytest.mark.parametrize("c", CURVATURES)
def test_log_undoes_exp(c: float) -> None:
    """HyperVQ dossier, check 1."""
    v = tangents(1, c, 5.0)
    y = exp_map_zero(v, c)
    assert (c * y.square().sum(-1) < 1).all()
    torch.testing.assert_close(log_map_zero(y, c), v, rtol=0, atol=1e-10 / math.sqrt(c))
    torch.testing.assert_close(exp_map_zero(log_map_zero(y, c), c), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("c", CURVATURES)
def test_distances(c: float) -> None:
    """HyperVQ dossier, check 1: no factor 1/2 in exp_0; then the axioms, and that a translation is an isometry."""
    v, x, y, a = tangents(1, c, 4.0), points(2, c), points(3, c), points(4, c)
    torch.testing.assert_close(distance(torch.zeros_like(v), exp_map_zero(v, c), c), 2 * v.norm(dim=-1))
    torch.testing.assert_close(distance(x, y, c), distance(y, x, c))
    torch.testing.assert_close(distance(mobius_add(a, x, c), mobius_add(a, y, c), c), distance(x, y, c))
    assert (distance(x, y, c) <= distance(x, a, c) + distance(a, y, c) + 1e-12).all()
    x.requires_grad_()
    same = distance(x, x.detach(), c)
    assert (same < 1e-12).all()
    same.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", CURVATURES)
def test_project_pulls_back_what_lies_beyond_and_touches_nothing_else(c: float, dtype: torch.dtype) -> None:
    margin = 4e-3 if dtype == torch.float32 else 1e-5
    far = exp_map_zero(tangents(1, c, 1000.0).to(dtype), c)
    if dtype == torch.float32:
        assert (c * far.square().sum(-1) >= 1 - 1e-6).any(), "the case must round to the boundary"
    kept = project(far, c)
    beyond = math.sqrt(c) * far.norm(dim=-1) > 1 - margin
    assert beyond.any()
    torch.testing.assert_close(
        kept[beyond].norm(dim=-1) * math.sqrt(c), torch.full_like(kept[beyond][:, 0], 1 - margin)
    )
    torch.testing.assert_close(*(torch.nn.functional.normalize(y[beyond], dim=-1) for y in (kept, far)))
    near = points(2, c).to(dtype)
    assert torch.equal(project(near, c), near)
    torch.testing.assert_close(project(far, c, 0.5).norm(dim=-1).amax() * math.sqrt(c), torch.tensor(0.5, dtype=dtype))


@pytest.mark.parametrize("size", [0.0, 1e-9, 9e-4, 1.1e-3, 0.3, 2.0])
def test_derivatives_of_the_maps_match_finite_differences(size: float) -> None:
    """Also at 0, and on both sides of where a series takes over."""
    v = (size * torch.nn.functional.normalize(drawn(1, 4, 3), dim=-1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: exp_map_zero(v, 1.0), (v,))
    assert torch.autograd.gradcheck(lambda v: log_map_zero(0.4 * v, 1.0), (v,))
    if size == 0.0:
        (gradient,) = torch.autograd.grad(exp_map_zero(v, 1.0).sum(), v)
        assert torch.equal(gradient, torch.ones_like(v))


def test_the_series_meets_the_quotient() -> None:
    u = torch.tensor([1e-3 * (1 - 1e-9), 1e-3 * (1 + 1e-9)], dtype=torch.float64).unsqueeze(-1)
    for name, map_ in (("tanh", exp_map_zero), ("arctanh", log_map_zero)):
        np.testing.assert_allclose(map_(u, 1.0).numpy(), getattr(np, name)(u.numpy()), rtol=1e-15)


# Hyperplanes


def planes(seed: int, c: float, rows: int = 40, dim: int = 5) -> tuple[Tensor, Tensor]:
    s = math.sqrt(c)
    return drawn(seed, rows, dim) / s, 1.2 * drawn(seed + 1, rows) / s


@pytest.mark.parametrize("c", CURVATURES)
def test_logits_are_those_of_ganea(c: float) -> None:
    """HyperVQ dossier, check 2: by Mobius addition, with a = z / cosh(s r)^2 and no lifted point anywhere."""
    (z, r), y, s = planes(1, c), points(3, c), math.sqrt(c)
    q = exp_map_zero(r.unsqueeze(-1) * z / z.norm(dim=-1, keepdim=True), c)
    a = z / torch.cosh(s * r).square().unsqueeze(-1)
    moved = mobius_add(-q.unsqueeze(0), y.unsqueeze(1), c)
    inner = (moved * a).sum(-1)
    length = a.norm(dim=-1)
    conformal = 2 / (1 - c * q.square().sum(-1))
    wanted = conformal * length / s * torch.asinh(2 * s * inner / ((1 - c * moved.square().sum(-1)) * length))
    torch.testing.assert_close(unidirectional_mlr(y, z, r, c), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("c", CURVATURES)
def test_logits_vanish_on_their_plane_and_grow_along_its_axis(c: float) -> None:
    """HyperVQ dossier, check 2: v_k(q_k) = 0, v_k(exp_0(t [z_k])) = 4 |z_k| (t - r_k), and so the sign."""
    z, r = planes(1, c)
    length = z.norm(dim=-1)
    unit = z / length.unsqueeze(-1)
    on_plane = unidirectional_mlr(exp_map_zero(r.unsqueeze(-1) * unit, c), z, r, c).diagonal()
    torch.testing.assert_close(on_plane, torch.zeros_like(r), rtol=0, atol=1e-9)
    for t in (-3.0, -1.0, 0.0, 0.5, 2.5):
        along = t / math.sqrt(c)
        found = unidirectional_mlr(exp_map_zero(along * unit, c), z, r, c).diagonal()
        torch.testing.assert_close(found, 4 * length * (along - r), rtol=0, atol=1e-9)
        assert torch.equal(found > 0, along > r)


@pytest.mark.parametrize("c", CURVATURES)
def test_a_logit_is_a_signed_distance_from_the_plane(c: float) -> None:
    """HyperVQ dossier, check 2, in 2-D: the nearest of many points { q (+) w : <w, z> = 0 }."""
    (z, r), y = planes(1, c, 6, 2), points(3, c, 20, 2)
    unit = z / z.norm(dim=-1, keepdim=True)
    across = torch.stack([-unit[:, 1], unit[:, 0]], -1)
    w = exp_map_zero(torch.linspace(-9, 9, 20_001, dtype=torch.float64).view(1, -1, 1) * across[:, None] / c**0.5, c)
    on_plane = mobius_add(exp_map_zero(r.unsqueeze(-1) * unit, c).unsqueeze(1), w, c)
    nearest = torch.stack([distance(point, on_plane, c).amin(-1) for point in y])
    found = unidirectional_mlr(y, z, r, c) / (2 * z.norm(dim=-1))
    torch.testing.assert_close(found.abs(), nearest, rtol=1e-4, atol=1e-3 / math.sqrt(c))


def test_a_flat_ball_is_a_linear_classifier() -> None:
    """HyperVQ dossier, check 3."""
    c = 1e-8
    x, z, r = drawn(1, 50, 5), drawn(2, 30, 5), drawn(3, 30)
    wanted = 4 * (x @ z.T - z.norm(dim=-1) * r)
    torch.testing.assert_close(exp_map_zero(x, c), x, rtol=1e-6, atol=0)
    torch.testing.assert_close(unidirectional_mlr(exp_map_zero(x, c), z, r, c), wanted, rtol=1e-5, atol=1e-5)
    found = unidirectional_mlr(exp_map_zero(x.float(), c), z.float(), r.float(), c)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("c", CURVATURES)
def test_derivatives_of_logits_match_finite_differences(c: float) -> None:
    """HyperVQ dossier, check 4."""
    z, r = planes(1, c, 4, 3)
    x = tangents(3, c, 2.0, 5, 3)
    x[0] = 0.0
    assert torch.autograd.gradcheck(
        lambda x, z, r: unidirectional_mlr(exp_map_zero(x, c), z, r, c),
        (x.requires_grad_(), z.requires_grad_(), r.requires_grad_()),
    )


def test_lifted_points_and_normals_are_units_of_the_lorentz_model() -> None:
    c = 0.7
    lifted, (normals, _) = lift(points(1, c), c), hyperplanes(*planes(2, c), c)
    torch.testing.assert_close(
        lifted[:, -1].square() - lifted[:, :-1].square().sum(-1), torch.ones(200, dtype=torch.float64)
    )
    torch.testing.assert_close(
        normals[:, :-1].square().sum(-1) - normals[:, -1].square(), torch.ones(40, dtype=torch.float64)
    )


def test_asinh_is_odd_and_exact_in_float32_where_a_sum_of_logarithms_cancels() -> None:
    """mil-tokyo/hyperbolic_nn_plusplus computes log(max(t + sqrt(1 + t^2), 1e-15))."""
    t = -torch.logspace(-6, 17, 2000)
    wanted = np.arcsinh(t.double().numpy())
    np.testing.assert_allclose(torch.asinh(t).numpy(), wanted, rtol=3e-7)
    assert torch.equal(torch.asinh(-t), -torch.asinh(t))
    theirs = torch.log((t + torch.sqrt(1 + t.square())).clamp(min=1e-15)).numpy()
    large = t.numpy() < -1e4
    assert (np.abs(theirs - wanted)[large] > 1).any()


@pytest.mark.parametrize("c", [0.01, 1.0, 4.0])
def test_float32_stays_finite_and_near_float64_at_any_norm(c: float) -> None:
    """HyperVQ dossier, check 4: |x| up to 1e3 and x = 0; planes too that lie beyond all points."""
    x = torch.cat([torch.zeros(1, 6), 1e3 * tangents(1, 1.0, 1.0, 99, 6).float()])
    z, r = drawn(2, 20, 6).float(), torch.cat([drawn(3, 16).float(), torch.tensor([1e3, -1e3, 50.0, 0.0])])
    for tensor in (x, z, r):
        tensor.requires_grad_()
    found = unidirectional_mlr(project(exp_map_zero(x, c), c), z, r, c)
    precise = unidirectional_mlr(project(exp_map_zero(x.double(), c), c, 4e-3), z.double(), r.double(), c)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), precise, rtol=1e-3, atol=1e-3)
    found.sum().backward()
    for tensor in (x, z, r):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert x.grad is not None
    assert x.grad[0].any()


def test_forms_seen_elsewhere_are_other_functions() -> None:
    """The artanh form of a port of HyperVQ, and hyperbolix's 2 (1 - c|x|^2) where 2 / (1 - c|x|^2) belongs."""
    c = 1.0
    (z, r), y = planes(1, c), points(3, c)
    found = unidirectional_mlr(y, z, r, c)
    unit = z / z.norm(dim=-1, keepdim=True)
    product = 2 * (1 - c * y.square().sum(-1, keepdim=True))
    argument = product * (y @ unit.T) * torch.cosh(2 * r) - (product - 1) * torch.sinh(2 * r)
    assert (2 * z.norm(dim=-1) * torch.asinh(argument) - found).abs().max() > 1
    q = exp_map_zero(r.unsqueeze(-1) * unit, c)
    inner = (mobius_add(-q.unsqueeze(0), y.unsqueeze(1), c) * z).sum(-1)
    conformal = 2 / (1 - q.square().sum(-1))
    port = conformal * z.norm(dim=-1) * torch.atanh((inner / (conformal * z.norm(dim=-1))).clamp(-1 + 1e-7, 1 - 1e-7))
    assert (port - found).abs().max() > 10
