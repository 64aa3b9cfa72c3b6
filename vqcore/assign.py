"""Assignment: which code each vector gets. The product of vectors and codes is walked in tiles and never kept whole."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from vqcore import noise

Metric = Literal["euclidean", "cosine"]

CODES_PER_TILE = 1024
# A row's scores change bits with the number of rows in the product, so that number is fixed by the codebook's shape
# and never by N: 512 loses at most 6 % to padding at N >= 8,192, and its scores (2 MiB) stay near a core's cache. Up to
# 256 codes 1,024 rows are 5 to 20 % faster, which pays for their padding (12 % at worst).
ROWS_PER_PRODUCT = 512
ROWS_PER_PRODUCT_OF_FEW_CODES = 1024
FEW_CODES = 256
ROWS_PER_PRODUCT_ON_CUDA = 2048
# Small codebooks put several products into one score buffer, so that the reduction's fixed cost is paid less often.
CELLS_PER_TILE = 2**18
ELEMENTS_OF_ROWS = 2**20
# Columns of filler behind the scores on CPU: rows a power of two apart fall into the same few sets of a cache, which
# costs up to a quarter of the product where D is small.
FILLER = 16
# Up to this many codes the norms are kept over the call (4 MiB); beyond, each tile computes its own again.
NORMS_KEPT = 2**20
NORM_CHUNK = 2**18


@torch.no_grad()
def nearest(
    x: Float[Tensor, "N D"],
    vectors: Float[Tensor, "K D"],
    *,
    metric: Metric = "euclidean",
) -> Int64[Tensor, " N"]:
    """The code of every row of `x`: argmin_k |x - v_k|, or argmax_k <x, v_k> for cosine. Ties take the lowest code.

    For cosine the caller passes unit-normalised rows and codes; lengths are not divided out here.

    Runs in float32, or float64 where an argument is float64, whatever autocast and the float32 precision settings say;
    no gradient. A row's code does not depend on the rows around it: no split of a batch changes a code. Euclidean
    scores are x.v - |v|^2 / 2, exact to rounding of |x||v| and |v|^2: codes whose distances differ by less are
    near-ties, and either may be returned (always the same one). Rows must be finite; others get some code in [0, K).

    Memory beyond arguments and result stays under 16 MiB for float32 and D <= 4096, at any N and K.

    Raises:
        ValueError: shapes that do not fit, an empty codebook, or an unknown metric.
    """
    _check(x, vectors, metric)
    return (_operator if torch.compiler.is_compiling() else _found)(x, vectors, metric == "euclidean")


def _found(x: Tensor, vectors: Tensor, euclidean: bool) -> Tensor:
    codes = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    if x.shape[0]:
        with exact_products(x.device):
            _search(x, vectors, euclidean, codes)
    return codes


# What torch.compile sees: one operator. The tiles and precision settings are no graph, and products that a compiler
# had fused would give other codes than evaluation without it.
_operator = torch.library.custom_op("vqcore::nearest", _found, mutates_args=())


@_operator.register_fake
def _unfilled(x: Tensor, vectors: Tensor, euclidean: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


@torch.no_grad()
def sample_top_k(
    x: Float[Tensor, "N D"],
    vectors: Float[Tensor, "K D"],
    k: int,
    temperature: float,
    u: Float[Tensor, " N"],
    *,
    relative: bool = False,
) -> Int64[Tensor, " N"]:
    """One of the `k` nearest codes of every row, drawn by its uniform in `u` (CLVQ-VAE's training assignment).

    With D_1 <= ... <= D_k the k smallest *squared* distances of a row, code j has probability
    exp(-D_j / T) / sum_l exp(-D_l / T). T is `temperature`; with `relative`, `temperature` times the row's own mean
    gap, sum_{j > 1} (D_j - D_1) / (k - 1), so that it means the same at any scale of x (equal distances: all k alike).
    `k` above K takes all codes; k = 1 is `nearest`, bit for bit, and so is T near 0.

    Precision, ties and splits as `nearest`; memory under 16 MiB and another 16 (k + 1) bytes for every row of a group.
    Raises ValueError on shapes that do not fit, k below 1, or a temperature that is not positive.
    """
    _check(x, vectors, "euclidean")
    if k < 1 or not 0.0 < temperature < math.inf or u.shape != x.shape[:1]:
        raise ValueError(
            f"sample_top_k got k={k}, temperature={temperature} and u of shape {tuple(u.shape)} for {len(x)} rows; "
            "it takes k of at least 1, a positive temperature, and one uniform a row"
        )
    codes = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    if x.shape[0]:
        with exact_products(x.device):
            for rows, scores, found in _best_k(x, vectors, min(k, vectors.shape[0])):
                gaps = 2.0 * (scores[:1] - scores).double()  # D_j - D_1, nearest first; 0 for the nearest
                if relative and len(gaps) > 1:
                    mean = gaps.sum(0) / (len(gaps) - 1)
                    gaps = gaps / torch.where(mean > 0, mean, 1.0)
                drawn = noise.choose(torch.exp(-gaps / temperature).T, u[rows].unsqueeze(-1))
                codes[rows] = found.T.gather(1, drawn).squeeze(-1)
    return codes


def _check(x: Tensor, vectors: Tensor, metric: str) -> None:
    if x.ndim != 2 or vectors.ndim != 2 or x.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"nearest got x of shape {tuple(x.shape)} and vectors of shape {tuple(vectors.shape)}; "
            "it takes x [N, D] and vectors [K, D] with one D: flatten the leading dimensions of x first"
        )
    if vectors.shape[0] == 0 or vectors.shape[1] == 0:
        raise ValueError(
            f"the codebook is empty: vectors have shape {tuple(vectors.shape)}, K and D must be at least 1"
        )
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"unknown metric {metric!r}; allowed: 'euclidean', 'cosine'")


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products in full float32: no autocast on this device, no TF32 on CUDA, no bfloat16 inside oneDNN."""
    settings = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # made at import, so mypy does not see it
    )
    before = [setting.fp32_precision for setting in settings]
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        try:
            for setting in settings:
                setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = precision


def _search(x: Tensor, vectors: Tensor, euclidean: bool, codes: Tensor) -> None:
    """Fill `codes`, one group of rows at a time, keeping each row's best score over the tiles of codes."""
    (n, dim), num_codes = x.shape, vectors.shape[0]
    dtype = torch.promote_types(torch.promote_types(x.dtype, vectors.dtype), torch.float32)
    per_product, per_group = _rows(num_codes, dim, x.device)
    per_group = min(per_group, _round_up(n, per_product))
    padded = torch.empty(per_group, dim, dtype=dtype, device=x.device)
    buffer = _buffer(per_group, num_codes, padded)
    tiles = vectors.split(CODES_PER_TILE)
    biases: Sequence[Tensor | None] = [None] * len(tiles)
    if euclidean and num_codes <= NORMS_KEPT:
        biases = _negated_half_norms(vectors, dtype).split(CODES_PER_TILE)
    for first in range(0, n, per_group):
        rows = _whole_products(x[first : first + per_group], per_product, padded)
        best, found = buffer, codes
        for number, (tile, bias) in enumerate(zip(tiles, biases, strict=True)):
            tile = tile.to(dtype).contiguous()
            if euclidean and bias is None:
                bias = _negated_half_norms(tile, dtype)
            top, code = _best_of_tile(_scores(rows, tile, bias, per_product, buffer))
            if number == 0:
                best, found = top, code
            else:  # strictly better, so that equal scores keep the lowest code
                found = torch.where(top > best, code.add_(number * CODES_PER_TILE), found)
                best = torch.maximum(best, top)
        here = min(per_group, n - first)
        codes[first : first + here] = found[:here]


def _best_k(x: Tensor, vectors: Tensor, k: int) -> Iterator[tuple[slice, Float[Tensor, "k N"], Int64[Tensor, "k N"]]]:
    """(rows, their k best scores, the codes) one group of rows at a time, best first, of equal scores the lowest code.

    The walk of `_search`, which keeps one score a row and is faster for it.
    """
    (n, dim), num_codes = x.shape, vectors.shape[0]
    dtype = torch.promote_types(torch.promote_types(x.dtype, vectors.dtype), torch.float32)
    per_product, per_group = _rows(num_codes, dim, x.device)
    per_group = min(per_group, _round_up(n, per_product))
    padded = torch.empty(per_group, dim, dtype=dtype, device=x.device)
    buffer = _buffer(per_group, num_codes, padded)
    for first in range(0, n, per_group):
        group = slice(first, min(first + per_group, n))
        rows = _whole_products(x[group], per_product, padded)
        width = len(rows) + _filler(x.device)
        best, found = padded.new_empty(0, width), torch.empty(0, width, dtype=torch.int64, device=x.device)
        for start in range(0, num_codes, CODES_PER_TILE):
            tile = vectors[start : start + CODES_PER_TILE].to(dtype).contiguous()
            scores = _scores(rows, tile, _negated_half_norms(tile, dtype), per_product, buffer)
            winners = []
            for _ in range(min(k, len(tile))):  # topk of torch costs sixty times one such pass
                winners.append(_best_of_tile(scores))
                scores.scatter_(0, winners[-1][1].unsqueeze(0), -torch.inf)
            top = torch.cat([best, torch.stack([score for score, _ in winners])])
            code = torch.cat([found, torch.stack([code for _, code in winners]) + start])
            best, order = top.sort(dim=0, descending=True, stable=True)
            best, found = best[:k], code.gather(0, order[:k])
        here = group.stop - group.start
        yield group, best[:, :here], found[:, :here]


def _scores(
    rows: Float[Tensor, "N D"],
    tile: Float[Tensor, "K D"],
    bias: Float[Tensor, "K 1"] | None,
    per_product: int,
    buffer: Tensor,
) -> Float[Tensor, "K M"]:
    """tile @ rows^T + bias inside `buffer`, in products of a fixed number of rows; filler in the columns behind N."""
    width = rows.shape[0] + _filler(rows.device)
    scores = buffer[: tile.shape[0] * width].view(tile.shape[0], width)
    for first in range(0, rows.shape[0], per_product):
        part, out = rows[first : first + per_product].T, scores[:, first : first + per_product]
        if bias is None:
            torch.mm(tile, part, out=out)
        else:
            torch.addmm(bias, tile, part, out=out)
    return scores


def _rows(num_codes: int, dim: int, device: torch.device) -> tuple[int, int]:
    """(rows of one product, rows of one group of products), from the codebook's shape alone."""
    per_product = ROWS_PER_PRODUCT if num_codes > FEW_CODES else ROWS_PER_PRODUCT_OF_FEW_CODES
    if device.type == "cuda":
        per_product = ROWS_PER_PRODUCT_ON_CUDA
    while per_product > 64 and per_product * dim > 2 * ELEMENTS_OF_ROWS:
        per_product //= 2
    room = min(CELLS_PER_TILE // min(num_codes, CODES_PER_TILE), ELEMENTS_OF_ROWS // dim)
    return per_product, max(per_product, room // per_product * per_product)


def _filler(device: torch.device) -> int:
    return FILLER if device.type == "cpu" else 0


def _buffer(per_group: int, num_codes: int, like: Tensor) -> Tensor:
    """Room for the scores of one group and one tile. New, so that its filler may be anything; nobody reads it."""
    return like.new_empty((per_group + _filler(like.device)) * min(num_codes, CODES_PER_TILE))


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _whole_products(x: Tensor, per_product: int, padded: Tensor) -> Tensor:
    """`x` itself where the products can read it as it is, else a copy filled up with rows of zeros."""
    if x.shape[0] % per_product == 0 and x.dtype == padded.dtype and x.is_contiguous():
        return x
    rows = padded[: _round_up(x.shape[0], per_product)]
    rows[: x.shape[0]] = x
    rows[x.shape[0] :] = 0
    return rows


def _negated_half_norms(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """-|v|^2 / 2 as a column, squaring a few codes at a time."""
    chunks = vectors.split(max(1, NORM_CHUNK // vectors.shape[1]))
    # Contiguous, because the order of a sum, and with it its last bit, follows the strides.
    norms = [chunk.to(dtype).contiguous().square().sum(1, keepdim=True) for chunk in chunks]
    return (norms[0] if len(norms) == 1 else torch.cat(norms)).mul_(-0.5)


def _best_of_tile(scores: Float[Tensor, "K N"]) -> tuple[Float[Tensor, " N"], Int64[Tensor, " N"]]:
    """The largest score of every column and the first row that reaches it.

    On CPU torch's max and argmax with indices visit one number at a time (1 to 4 ms for 2^20 scores). Max-pooling over
    a channels-last image whose channels are our columns is the one reduction with indices that is vectorised (0.13 ms).
    It runs one thread per image, so with several threads the tile is cut into images and their winners pooled again.
    """
    if scores.device.type != "cpu":
        top, code = scores.max(0)
        return top, code
    num_codes, n = scores.shape
    parts = math.gcd(num_codes, 16) if torch.get_num_threads() > 1 else 1
    height = num_codes // parts
    top, code = F.max_pool2d_with_indices(scores.view(parts, height, 1, n).permute(0, 3, 1, 2), (height, 1))
    top, code = top.view(parts, n), code.view(parts, n)
    if parts == 1:
        return top[0], code[0]
    best, part = F.max_pool2d_with_indices(top.view(1, parts, 1, n).permute(0, 3, 1, 2), (parts, 1))
    part = part.view(1, n)
    return best.view(n), (code.gather(0, part) + part * height).view(n)
