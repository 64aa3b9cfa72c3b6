"""Soft assignment: each vector as shares of all codes, made in tiles of rows; the N x K matrix is never kept.

    pi_k = softmax_k(-|x - v_k|^2 / T)        with Gumbel noise g: softmax_k((-|x - v_k|^2 + g_k) / T)

|x|^2 is the same for all codes and drops out. Every product has one number of rows, fixed by the codebook's shape and
filled up with zeros, so that a row's shares do not depend on the rows around it (see `assign`).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vqcore import noise
from vqcore.assign import exact_products

CELLS_PER_TILE = 2**18
MOST_ROWS_PER_TILE = 512


class Noise(NamedTuple):
    """Which Gumbel variables are added: one for each row and code, the same wherever and whenever they are drawn."""

    seed: int
    step: noise.Step
    keys: Int64[Tensor, " N"]


def mix(
    x: Float[Tensor, "N D"],
    vectors: Float[Tensor, "K D"],
    temperature: float,
    gumbel: Noise | None = None,
) -> Float[Tensor, "N D"]:
    """sum_k pi_k v_k: the mean of the codes by their shares, with its gradient to `x` and to all `vectors`.

    The way back computes the shares again, tile by tile, so that beyond its arguments and result it needs a copy of
    the codebook (which may have moved by then) and one tile. It can be differentiated once.
    """
    _check(temperature)
    return _Mix.apply(x, vectors, temperature, gumbel)


@torch.no_grad()
def draw(
    x: Float[Tensor, "N D"], vectors: Float[Tensor, "K D"], temperature: float, u: Float[Tensor, "N m"]
) -> Int64[Tensor, "N m"]:
    """m codes a row, drawn with probability pi_k by the uniforms `u`; column j depends on u[:, j] alone."""
    _check(temperature)
    codes = torch.empty(u.shape, dtype=torch.int64, device=x.device)
    with exact_products(x.device):
        for rows, shares in _tiles(x, vectors, temperature, None):
            codes[rows] = noise.choose(shares, u[rows])
    return codes


@torch.no_grad()
def apportion(
    x: Float[Tensor, "N D"], vectors: Float[Tensor, "K D"], temperature: float, draws: int
) -> Int64[Tensor, "N draws"]:
    """The `draws` codes, in ascending order, whose shares of 1/draws come nearest to pi: largest remainders.

    Every code appears floor(draws pi_k) times, and the codes with the largest remainders once more (ties: the lowest),
    so that each share is off by less than 1/draws. One draw gives the nearest code.
    """
    _check(temperature)
    codes = torch.empty(len(x), draws, dtype=torch.int64, device=x.device)
    most = min(draws, len(vectors))
    every = torch.arange(len(vectors), device=x.device)
    with exact_products(x.device):
        for rows, shares in _tiles(x, vectors, temperature, None):
            wanted = shares.double() * draws
            times = wanted.floor()
            left = draws - times.sum(-1, keepdim=True)
            order = (wanted - times).argsort(dim=-1, descending=True, stable=True)[:, :most]
            times.scatter_add_(1, order, (every[:most] < left).double())
            times, size = times.long().reshape(-1), len(shares) * draws
            codes[rows] = every.repeat(len(shares)).repeat_interleave(times, output_size=size).view(-1, draws)
    return codes


def _check(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be a positive number (near 0 is the nearest code)")


def _tiles(
    x: Tensor, vectors: Tensor, temperature: float, gumbel: Noise | None
) -> Iterator[tuple[slice, Float[Tensor, "n K"]]]:
    """(rows, their shares) one tile after the other."""
    num_codes = len(vectors)
    height = tile_height(num_codes)
    norms = vectors.square().sum(-1)
    for start in range(0, len(x), height):
        rows = slice(start, min(start + height, len(x)))
        scores = padded_product(x[rows], vectors.T, height).mul_(2.0).sub_(norms)
        if gumbel is not None:
            drawn = noise.gumbel(gumbel.seed, gumbel.step, gumbel.keys[rows], draws=num_codes)
            scores += drawn.to(scores.dtype)
        scores -= scores.amax(-1, keepdim=True)  # before the division, which may overflow where T is small
        yield rows, scores.div_(temperature).softmax(-1)


def tile_height(num_codes: int) -> int:
    """Rows of every product with this many codes."""
    return max(1, min(MOST_ROWS_PER_TILE, CELLS_PER_TILE // num_codes))


def padded_product(rows: Float[Tensor, "n A"], matrix: Float[Tensor, "A B"], height: int) -> Float[Tensor, "n B"]:
    """rows @ matrix, in a product of exactly `height` rows."""
    return (F.pad(rows, (0, 0, 0, height - len(rows))) @ matrix)[: len(rows)]


class _Mix(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, temperature: float, gumbel: Noise | None) -> Tensor:
        ctx.temperature, ctx.gumbel = temperature, gumbel
        ctx.save_for_backward(x, vectors.clone())
        mixed = torch.empty_like(x)
        with exact_products(x.device):
            for rows, shares in _tiles(x, vectors, temperature, gumbel):
                mixed[rows] = padded_product(shares, vectors, tile_height(len(vectors)))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, vectors = ctx.saved_tensors
        height = tile_height(len(vectors))
        to_x, to_vectors = torch.empty_like(x), torch.zeros_like(vectors)
        with exact_products(x.device):
            for rows, shares in _tiles(x, vectors, ctx.temperature, ctx.gumbel):
                given = gradient[rows]
                along = padded_product(given, vectors.T, height)  # dL/dpi_k
                # Softmax: dL/d(score_k) = pi_k (dL/dpi_k - sum_l pi_l dL/dpi_l) / T, and score_k = 2 x.v_k - |v_k|^2.
                to_scores = shares * (along - (along * shares).sum(-1, keepdim=True)) / ctx.temperature
                to_x[rows] = 2.0 * padded_product(to_scores, vectors, height)
                to_vectors += shares.T @ given + 2.0 * (to_scores.T @ x[rows])
                to_vectors -= 2.0 * to_scores.sum(0).unsqueeze(-1) * vectors
        return to_x, to_vectors, None, None
