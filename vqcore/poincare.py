"""The Poincare ball of curvature -c, { y : c |y|^2 < 1 }, and classification by hyperplanes in it.

With s = sqrt(c) (Ganea et al. 2018; Shimizu et al. 2021, "Hyperbolic Neural Networks++"):

    exp_0(v) = tanh(s |v|) v / (s |v|)          log_0(y) = artanh(s |y|) y / (s |y|)
    x (+) y  = ((1 + 2c<x,y> + c|y|^2) x + (1 - c|x|^2) y) / (1 + 2c<x,y> + c^2 |x|^2 |y|^2)
    d(x, y)  = (2 / s) artanh(s |(-x) (+) y|)

The exponential map has no factor 1/2, so d(0, exp_0(v)) = 2 |v| (geoopt's convention). Everything is differentiable,
also at 0, and c is a positive number, not learned. Shapes: points [..., D]; K hyperplanes as z [K, D] and r [K].
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vqcore.codebook import unit

# Below this many curvature radii, a quotient such as tanh(u) / u is its series: at 0 it would be 0 / 0.
_NEAR_ZERO = 1e-3
_SMALLEST_DIVISOR = 1e-15
# Beyond 15 curvature radii (a point d = 30 / s from the origin) a plane is as far as float32 can say: asinh needs no
# more, while cosh(88) is an infinity.
_LARGEST_ANGLE = 30.0
_MARGIN = {torch.float64: 1e-5}
_MARGIN_FLOAT32 = 4e-3


def exp_map_zero(v: Float[Tensor, "... D"], c: float) -> Float[Tensor, "... D"]:
    """The point that the tangent vector `v` at the origin leads to. In float32 s |v| > 9 rounds to the boundary itself:
    `project` afterwards."""
    u, small, squared = _radius(v, c)
    return v * torch.where(small, 1 - squared / 3 + 2 * squared.square() / 15, torch.tanh(u) / u)


def log_map_zero(y: Float[Tensor, "... D"], c: float) -> Float[Tensor, "... D"]:
    """The tangent vector at the origin that leads to `y`; exp_map_zero's inverse inside the ball."""
    u, small, squared = _radius(y, c)
    return y * torch.where(small, 1 + squared / 3 + squared.square() / 5, _artanh(u) / u)


def project(y: Float[Tensor, "... D"], c: float, margin: float | None = None) -> Float[Tensor, "... D"]:
    """`y`, pulled back along its direction to |y| = (1 - margin) / s where it lies beyond; 4e-3 in float32, 1e-5 in
    float64 unless given (Hyperbolic Neural Networks++, geoopt)."""
    margin = _MARGIN.get(y.dtype, _MARGIN_FLOAT32) if margin is None else margin
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    largest = (1.0 - margin) / math.sqrt(c)
    return torch.where(norm > largest, y * (largest / norm.clamp(min=_SMALLEST_DIVISOR)), y)


def mobius_add(x: Float[Tensor, "... D"], y: Float[Tensor, "... D"], c: float) -> Float[Tensor, "... D"]:
    """x (+) y, the addition of the ball: neither commutative nor associative."""
    both = (x * y).sum(-1, keepdim=True)
    xx, yy = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    above = (1 + 2 * c * both + c * yy) * x + (1 - c * xx) * y
    return above / (1 + 2 * c * both + c * c * xx * yy).clamp(min=_SMALLEST_DIVISOR)


def distance(x: Float[Tensor, "... D"], y: Float[Tensor, "... D"], c: float) -> Float[Tensor, "..."]:
    """Geodesic distance; 0, with a gradient of 0, where x = y."""
    s = math.sqrt(c)
    return 2 / s * _artanh(s * torch.linalg.vector_norm(mobius_add(-x, y, c), dim=-1))


class Hyperplanes(NamedTuple):
    """K hyperplanes of the ball, as products with lifted points see them."""

    normals: Float[Tensor, "K D+1"]
    """(cosh(2 s r) z / |z|, -sinh(2 s r)): unit normals in the Lorentz model, <a, a> - b^2 = 1."""
    scales: Float[Tensor, " K"]
    """2 |z| / s: what a distance is worth as a logit."""


def hyperplanes(z: Float[Tensor, "K D"], r: Float[Tensor, " K"], c: float) -> Hyperplanes:
    """Plane k is orthogonal to z_k and passes through q_k = exp_0(r_k z_k / |z_k|), its point nearest to the origin."""
    s = math.sqrt(c)
    angle = (2 * s * r).clamp(-_LARGEST_ANGLE, _LARGEST_ANGLE).unsqueeze(-1)
    normals = torch.cat([angle.cosh() * unit(z), -angle.sinh()], dim=-1)
    return Hyperplanes(normals, 2 / s * torch.linalg.vector_norm(z, dim=-1))


def lift(y: Float[Tensor, "... D"], c: float) -> Float[Tensor, "... D+1"]:
    """(2 s y, 1 + c |y|^2) / (1 - c |y|^2): the point of the Lorentz model, b^2 - <a, a> = 1."""
    squared = c * y.square().sum(-1, keepdim=True)
    return torch.cat([2 * math.sqrt(c) * y, 1 + squared], dim=-1) / (1 - squared).clamp(min=_SMALLEST_DIVISOR)


def unidirectional_mlr(
    y: Float[Tensor, "N D"], z: Float[Tensor, "K D"], r: Float[Tensor, " K"], c: float
) -> Float[Tensor, "N K"]:
    """Logits of multinomial logistic regression (Shimizu et al. 2021; equation 6 of HyperVQ), all N x K of them:

        v_k(y) = (2 |z_k| / s) asinh((2 s <y, z_k/|z_k|> cosh(2 s r_k) - (1 + c|y|^2) sinh(2 s r_k)) / (1 - c|y|^2))

    which is 2 |z_k| times the signed distance from plane k. Along its axis, v_k(exp_0(t z_k / |z_k|)) =
    4 |z_k| (t - r_k); as c -> 0, v_k(y) -> 4 (<y, z_k> - |z_k| r_k).

    The argument of asinh is one product of lifted points and unit normals. torch.asinh is odd and exact to rounding for
    large negative arguments too, where log(t + sqrt(1 + t^2)) cancels (1e-3 off at t = -100 in float32, then -inf).
    """
    normals, scales = hyperplanes(z, r, c)
    return scales * torch.asinh(lift(y, c) @ normals.T)


def _radius(v: Tensor, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """(u = s |v|, whether it is too near 0 to divide by, u^2 there), [..., 1] each. Where one branch is taken the other
    gets harmless numbers: a NaN or an infinity behind `where` would come back in the gradient as 0 x NaN."""
    u = math.sqrt(c) * torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    small = u < _NEAR_ZERO
    squared = c * torch.where(small, v, 0.0).square().sum(-1, keepdim=True)
    return torch.where(small, 1.0, u), small, squared


def _artanh(u: Tensor) -> Tensor:
    """artanh of what must lie below 1 and may have been rounded to it."""
    return torch.atanh(u.clamp(max=1.0 - torch.finfo(u.dtype).eps))
