"""geoopt: the maps of the Poincare ball, distances, and the distance to a hyperplane that is behind a logit."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from tests.peers.verdict import peer_is_wrong
from vqcore.poincare import distance, exp_map_zero, log_map_zero, mobius_add, project, unidirectional_mlr

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # geoopt 0.5 is written in TorchScript
    import geoopt

PEER = "geoopt"
CURVATURES = (0.1, 1.0, 2.0)
ROWS, D = 200, 5


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ball(c: float) -> geoopt.PoincareBall:
    return geoopt.PoincareBall(c=torch.tensor(c, dtype=torch.float64))


def tangents(seed: int, c: float, farthest: float) -> Tensor:
    """Vectors of every direction, with s |v| spread over (0, farthest) in no order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(1e-9, farthest, ROWS, dtype=torch.float64)[torch.randperm(ROWS, generator=generator)]
    return torch.nn.functional.normalize(drawn(seed, ROWS, D), dim=-1) * lengths.unsqueeze(-1) / math.sqrt(c)


def points(seed: int, c: float) -> Tensor:
    return exp_map_zero(tangents(seed, c, 2.0), c)


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 if found.dtype == torch.float64 else 1e-6)


def test_the_exponential_map() -> None:
    """HyperVQ dossier, check 1: no factor 1/2."""
    for c in CURVATURES:
        v = tangents(1, c, 3.0)
        same(exp_map_zero(v, c), ball(c).expmap0(v))


def test_the_logarithmic_map() -> None:
    for c in CURVATURES:
        y = points(3, c)
        same(log_map_zero(y, c), ball(c).logmap0(y))


def test_the_addition() -> None:
    for c in CURVATURES:
        x, y = points(2, c), points(3, c)
        same(mobius_add(x, y, c), ball(c).mobius_add(x, y))


def test_the_distance() -> None:
    for c in CURVATURES:
        x, y = points(2, c), points(3, c)
        same(distance(x, y, c), ball(c).dist(x, y))


def test_the_projection() -> None:
    for c in CURVATURES:
        outside = 3 * drawn(4, ROWS, D)
        same(project(outside, c), ball(c).projx(outside))
        same(project(outside.float(), c), ball(c).projx(outside.float()))


def test_a_logit_is_its_distance_to_a_plane() -> None:
    """HyperVQ dossier, check 2: 2 |z| times the signed distance from the plane through exp_0(r [z]) across z."""
    for c in CURVATURES:
        z, r, y = drawn(5, 30, D) / math.sqrt(c), drawn(6, 30) / math.sqrt(c), points(7, c)
        length = z.norm(dim=-1)
        through = exp_map_zero(r.unsqueeze(-1) * z / length.unsqueeze(-1), c)
        apart = ball(c).dist2plane(y.unsqueeze(1), through, z, signed=True)
        # By Mobius addition, which loses digits near the boundary.
        torch.testing.assert_close(unidirectional_mlr(y, z, r, c), 2 * length * apart, rtol=1e-9, atol=1e-9)


def test_gradients_of_the_maps() -> None:
    for c in CURVATURES:
        for ours, theirs, at in (
            (exp_map_zero, ball(c).expmap0, tangents(1, c, 3.0)),
            (log_map_zero, ball(c).logmap0, points(2, c)),
        ):
            x, y, g = at.clone().requires_grad_(), at.clone().requires_grad_(), drawn(8, ROWS, D)
            (ours(x, c) * g).sum().backward()
            (theirs(y) * g).sum().backward()
            away = at.norm(dim=-1) * math.sqrt(c) > 1e-3  # its artanh loses digits towards 0
            torch.testing.assert_close(x.grad[away], y.grad[away], rtol=1e-8, atol=1e-10)


@peer_is_wrong(
    "the derivative of its logarithmic map at 0 is 0 in float32",
    right="the identity",
)
def test_the_derivative_of_the_logarithmic_map_at_0() -> None:
    y = torch.zeros(1, 3, requires_grad=True)
    (theirs,) = torch.autograd.grad(ball(1.0).float().logmap0(y).sum(), y)
    assert not theirs.any()
    (ours,) = torch.autograd.grad(log_map_zero(y, 1.0).sum(), y)
    assert torch.equal(ours, torch.ones_like(y))


@peer_is_wrong(
    "its artanh cuts at 1 - 1e-7 in float64 too: a point at distance 20 from the origin is at 16.81",
    right="20",
)
def test_the_distance_of_points_far_out() -> None:
    origin, far = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[10.0, 0.0, 0.0]], dtype=torch.float64)
    y = exp_map_zero(far, 1.0)
    assert ball(1.0).dist(origin, y).item() == pytest.approx(16.8112, abs=1e-3)
    assert distance(origin, y, 1.0).item() == pytest.approx(20.0, abs=1e-6)
    torch.testing.assert_close(log_map_zero(y, 1.0), far, rtol=1e-7, atol=0)


@peer_is_wrong(
    "geoopt.PoincareBall(c=0.1) keeps c in float32: points in float64 are 1e-7 off",
    right="c as it was given",
)
def test_a_curvature_given_as_a_number() -> None:
    v = tangents(1, 0.1, 3.0)
    wanted = torch.tanh(math.sqrt(0.1) * v.norm(dim=-1, keepdim=True)) * v / v.norm(dim=-1, keepdim=True) / 0.1**0.5
    off = (geoopt.PoincareBall(c=0.1).expmap0(v) - wanted).abs().max()
    assert 1e-8 < off < 1e-5
    torch.testing.assert_close(exp_map_zero(v, 0.1), wanted, rtol=0, atol=1e-14)
