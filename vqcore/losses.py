"""Masked sums. Whoever calls divides by the global count of what was valid, which no single worker knows."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    difference = x.to(dtype) - y.to(dtype)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != x.shape[:1]:
            raise ValueError(
                f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; "
                f"it must be bool of shape {tuple(x.shape[:1])}, one a row"
            )
        # Before the square: a NaN hidden behind `where` afterwards would come back in the gradient as 0 x NaN.
        difference = torch.where(mask.view(-1, *[1] * (x.ndim - 1)), difference, 0)
    return difference.square().sum(dtype=torch.float64)


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
