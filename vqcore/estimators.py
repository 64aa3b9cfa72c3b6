"""Estimators: the code vectors going forward, a gradient for the encoder going back.

`straight_through` and `rotate` are plain functions (x, quantized) -> vectors. Their value is `quantized` bit for bit
(the usual x + sg(quantized - x) rounds), their gradient reaches `x` alone: a codebook learns by its statistics or by
its own loss, never through them. `substitute_noise` is the other kind: its value is x with noise of the right length,
its gradient reaches both. It takes the noise as an argument, because only a quantizer knows (seed, step, keys).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

# Where unit x and unit code nearly cancel, the direction of their sum is rounding noise.
ANTIPODAL = 1e-3
ANTIPODAL_FLOAT64 = 1e-7


def straight_through(x: Float[Tensor, "... D"], quantized: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """The gradient of `quantized`, copied to `x` (van den Oord et al. 2017, section 3.2).

    Raises:
        ValueError: x and quantized differ in shape.
    """
    _check_shapes(x, quantized)
    return _StraightThrough.apply(x, quantized.detach())


def straight_through_in_place(x: Float[Tensor, "... D"], quantized: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """`straight_through` for a caller who gives `quantized` away: the result is in its memory, not in a copy.

    Raises:
        ValueError: x and quantized differ in shape.
    """
    _check_shapes(x, quantized)
    return _StraightThroughInPlace.apply(x, quantized.detach())


def rotate(x: Float[Tensor, "... D"], quantized: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """The rotation trick (Fifty et al. 2025, section 4.2): the code as a rotated and rescaled x, both held constant.

    With e = x, q = quantized, hats for unit vectors, r = unit(e_hat + q_hat), lambda = |q| / |e|, sg = stop-gradient:

        q_tilde = sg(lambda) (e - 2 sg(r) (sg(r) . e) + 2 sg(q_hat) (sg(e_hat) . e))        (= q)
        de      = lambda (g - 2 r (r . g) + 2 e_hat (q_hat . g))                            for dq_tilde = g

    so the angle between x and its gradient is the one between the code and g. Rows that have no such rotation take the
    straight-through gradient: x = 0 (or so small that lambda overflows), and x opposite to its code within
    rounding (|e_hat + q_hat| < 1e-3, in float64 1e-7). A code of 0 gives a gradient of 0. All in float32 or better.

    Raises:
        ValueError: x and quantized differ in shape.
    """
    _check_shapes(x, quantized)
    return _Rotate.apply(x, quantized.detach())


def substitute_noise(
    x: Float[Tensor, "... D"], quantized: Float[Tensor, "... D"], noise: Float[Tensor, "... D"]
) -> Float[Tensor, "... D"]:
    """x + |x - quantized| noise / |noise|: quantization error replaced by noise as long (NSVQ: Vali and Backstrom 2022;
    equation 4 of their Interspeech 2023 paper). For training only; inference returns the quantized vector.

    With u = noise / |noise|, held constant, and r = (x - quantized) / |x - quantized|:

        d output / dx = I + u r^T        d output / d quantized = -u r^T

    so a codebook learns from the task's loss, without a loss of its own. `noise` is standard normal (its length does
    not matter): noise.normal(seed, step, keys, draws=D) gives each row the same on any worker.

    At x = quantized the root has no derivative and naive code gives NaN; here r = 0 and the output is x, exactly. No
    epsilon is added anywhere: one under the root moves every row, and one outside the quotient (the authors' first
    code, |x - quantized| / |noise| + eps) makes the error longer by eps |noise|. All in float32 or better.

    Raises:
        ValueError: x, quantized and noise differ in shape.
    """
    _check_shapes(x, quantized)
    if noise.shape != x.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, x {tuple(x.shape)}; every number of x needs its own")
    given = torch.promote_types(x.dtype, quantized.dtype)
    dtype = torch.promote_types(given, torch.float32)
    direction, _ = _unit(noise.detach().to(dtype))
    _, length = _unit(x.to(dtype) - quantized.to(dtype))
    return (x.to(dtype) + length * direction).to(given)


def _check_shapes(x: Tensor, quantized: Tensor) -> None:
    if x.shape != quantized.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, quantized {tuple(quantized.shape)}; an estimator needs one code a row"
        )


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _StraightThroughInPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.detach()  # not itself: autograd takes that for a view, which nobody may write to

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        ctx.save_for_backward(x, quantized)
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, quantized = ctx.saved_tensors
        dtype = torch.promote_types(torch.promote_types(x.dtype, quantized.dtype), torch.float32)
        return _rotate_back(x.detach().to(dtype), quantized.to(dtype), gradient.to(dtype)).to(x.dtype), None


def _rotate_back(
    e: Float[Tensor, "... D"], q: Float[Tensor, "... D"], g: Float[Tensor, "... D"]
) -> Float[Tensor, "... D"]:
    """lambda R^T g, R^T = I - 2 r r^T + 2 e_hat q_hat^T, without the D x D matrix; g itself where R does not exist."""
    e_hat, e_norm = _unit(e)
    q_hat, q_norm = _unit(q)
    both = e_hat + q_hat
    squared = both.square().sum(-1, keepdim=True)
    scale = q_norm / e_norm
    tolerance = ANTIPODAL_FLOAT64 if e.dtype == torch.float64 else ANTIPODAL
    turns = torch.isfinite(scale) & (squared >= tolerance**2)
    # Other rows get harmless numbers, so that no NaN waits behind the last `where` for a second differentiation.
    squared, scale = torch.where(turns, squared, 1), torch.where(turns, scale, 1)
    # 2 r (r . g) with r = both / |both|: one division by |both|^2 and no root.
    across = both * (2 * (both * g).sum(-1, keepdim=True) / squared)
    along = e_hat * (2 * (q_hat * g).sum(-1, keepdim=True))
    return torch.where(turns, scale * (g - across + along), g)


def _unit(v: Float[Tensor, "... D"]) -> tuple[Float[Tensor, "... D"], Float[Tensor, "... 1"]]:
    """(v / |v|, |v|); 0 stays 0. Divided by the largest entry first, so that squares neither overflow nor vanish.

    Both are the same for any divisor, so it is a constant to the gradient. That of |v| at 0 is 0."""
    largest = v.detach().abs().amax(-1, keepdim=True)
    scaled = v / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(largest > 0, length, 1), largest * length
