"""Masked sums. Whoever calls divides by the global count of what was valid, which no single worker knows."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import Function

from vqcore.estimators import straight_through

_TILE = 2**16  # numbers widened to float64 at a time: they stay in cache, and no second N x D array is written


def squared_error(
    x: Float[Tensor, "N ..."], y: Float[Tensor, "N ..."], mask: Bool[Tensor, " N"] | None = None
) -> Float[Tensor, ""]:
    """Sum of (x - y)^2 over every entry of the rows where `mask` holds, added up in float64, with its gradient.

    [B, C, H, W] images and [N, D] vectors alike. What a masked row holds does not matter, not even NaN or infinity:
    it adds 0 to the sum and to the gradient. No valid row gives 0, still attached to the graph.

    Raises:
        ValueError: x and y differ in shape, or the mask is not one bool a row.
    """
    if x.shape != y.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}; they must be equal, nothing is broadcast")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:1]):
        raise ValueError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; "
            f"it must be bool of shape {tuple(x.shape[:1])}, one a row"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    if torch.compiler.is_compiling():
        return _difference(x.to(dtype), y.to(dtype), mask).double().square().sum()
    return _SquaredError.apply(x.to(dtype), y.to(dtype), mask)


def passing_squared_error(
    x: Float[Tensor, "N D"], target: Float[Tensor, "N D"]
) -> tuple[Float[Tensor, "N D"], Float[Tensor, ""]]:
    """(x, sum of (x - target)^2 over every entry), the target held constant.

    Whoever goes on with the returned x instead of the given one gets the sum's gradient added to that of everything
    behind it in one pass over memory, where autograd would take four and an array more. Only x - target is kept for
    going back, so `target` may be written to. A row's squares are added up in float32 (finite while |x - target| is
    below 1e19), the rows in float64.

    Raises:
        ValueError: x and target differ in shape or type.
    """
    if x.shape != target.shape or x.dtype != target.dtype:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, target {target.dtype} of shape {tuple(target.shape)}; "
            "they must be equal, nothing is broadcast"
        )
    return _PassingSquaredError.apply(x, target.detach())


class _PassingSquaredError(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        difference = x - target
        ctx.save_for_backward(x, difference)
        ctx.set_materialize_grads(False)
        length = torch.linalg.vector_norm(difference, dim=-1).double()
        return x, torch.dot(length, length)

    @staticmethod
    def backward(ctx: Any, passed: Tensor | None, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        if gradient is None:
            return passed, None
        x, difference = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second differentiation, in which the difference moves with x
            difference = straight_through(x, difference)
        scale = (2 * gradient).to(difference.dtype)
        room = None if torch.is_grad_enabled() or _graph_is_kept() else difference
        if passed is None:
            return torch.mul(difference, scale, out=room), None
        return torch.addcmul(passed, difference, scale, out=room), None


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running may be followed by another over the same graph. If not, a node may
    write its result over what it saved: a new array of the size of x costs its first writer more than the product."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


class _SquaredError(Function):
    """No array of the size of x forward, one backward; autograd's own way would write six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y, mask)
        if x.device.type != "cpu":
            return _difference(x, y, mask).square().sum(dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        rows = max(1, _TILE * len(x) // max(1, x.numel()))
        for start in range(0, len(x), rows):
            tile = slice(start, start + rows)
            wide = _difference(x[tile], y[tile], None if mask is None else mask[tile]).double().reshape(-1)
            total += torch.dot(wide, wide)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, mask = ctx.saved_tensors
        difference, scale = _difference(x, y, mask), (2 * gradient).to(x.dtype)
        # In place where no second differentiation needs the difference: fresh memory costs more than the product.
        of_x = difference * scale if torch.is_grad_enabled() else difference.mul_(scale)
        return of_x if ctx.needs_input_grad[0] else None, -of_x if ctx.needs_input_grad[1] else None, None


def _difference(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """x - y, and 0 in the rows that the mask leaves out: also there where `inf - inf` would not be."""
    difference = x - y
    return difference if mask is None else torch.where(mask.view(-1, *[1] * (x.ndim - 1)), difference, 0)


def psnr(mean_squared_error: float, peak: float) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(peak^2 / mse): of a mean over the split, not a mean of ratios.

    `peak` is the range of the values (1 for [0, 1], 2 for [-1, 1]). An error of 0 gives infinity.

    Raises:
        ValueError: a negative error or a peak that is not positive.
    """
    if not mean_squared_error >= 0 or not peak > 0:
        raise ValueError(
            f"mean_squared_error is {mean_squared_error} and peak {peak}; need an error >= 0 and a peak > 0"
        )
    return math.inf if mean_squared_error == 0 else 10 * math.log10(peak**2 / mean_squared_error)


def explained(mse: float, mean: Float[Tensor, " D"], square: Float[Tensor, ""]) -> float:
    """The share of vectors' variance that an error leaves explained; 0 where they do not vary, and below it where the
    error is larger than their variance.

    Args:
        mse: mean squared error a dimension.
        mean, square: means over vectors of x and of |x|^2.
    """
    variance = float((square - mean.square().sum()) / mean.numel())
    return 1.0 - mse / variance if variance > 0 else 0.0
