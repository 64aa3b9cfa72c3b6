"""How a codebook is used, from counts of codes.

Counts are summed over all workers and a whole split before they come here: a mean of batch perplexities is not a
perplexity. [K], or [L, K] for one result per level; the last dimension is codes. Counts of zero everywhere mean that
nothing was encoded, and each function says what it returns then.

Residual codes are used jointly too: `tuple_counts` counts whole tuples, `collisions` says how many rows share one, and
entropy_bits and perplexity of its counts are those of the tuples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor


def counts_of(codes: Int64[Tensor, "..."], num_codes: int) -> Int64[Tensor, " K"]:
    """How often each code in [0, num_codes) occurs; -1 (masked) is left out.

    Raises:
        ValueError: another code outside [0, num_codes), or codes that are not integers.
    """
    # Shifted by one so that -1 falls into a bin of its own: no masked copy of the codes is made.
    return torch.bincount(_flat(codes, num_codes) + 1, minlength=num_codes + 1)[1:]


def _flat(codes: Shaped[Tensor, "..."], num_codes: int) -> Int64[Tensor, " N"]:
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise ValueError(f"codes are {codes.dtype}; they must be integers in [0, {num_codes}), or -1 where masked")
    flat = codes.reshape(-1).to(torch.int64)
    if flat.numel() and (flat.min() < -1 or flat.max() >= num_codes):
        wrong = flat[(flat < -1) | (flat >= num_codes)]
        raise ValueError(
            f"{wrong.numel()} of {flat.numel()} codes lie outside [0, {num_codes}), the first is {int(wrong[0])}; "
            "only -1 (masked) is allowed beside them: is this the codebook that made them?"
        )
    return flat


class TupleCounts(NamedTuple):
    """The M distinct tuples of L codes, in lexicographic order, and how often each occurs."""

    tuples: Int64[Tensor, "M L"]
    counts: Int64[Tensor, " M"]


def tuple_counts(
    codes: Int[Tensor, "... L"], num_codes: int | Sequence[int], counts: Int64[Tensor, "..."] | None = None
) -> TupleCounts:
    """How often each tuple of codes occurs; one of -1 at every level (masked) is left out, -1 at some levels (dropped)
    is a value like others. `num_codes` is K of every level or one number a level.

    `counts` says that a row stands for so many: the counts of the parts of a split, concatenated and counted again, are
    those of the whole. Exact for any L and every K below 2^63 / rows. Memory: a few int64 a row.

    Raises:
        ValueError: codes outside [0, K) of their level and not -1, or shapes that do not fit.
    """
    if codes.ndim == 0 or codes.shape[-1] == 0:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; they must be [..., L] with L at least 1")
    rows = codes.reshape(-1, codes.shape[-1])
    sizes = [num_codes] * rows.shape[1] if isinstance(num_codes, int) else list(num_codes)
    if len(sizes) != rows.shape[1]:
        raise ValueError(f"num_codes lists {len(sizes)} levels and codes have {rows.shape[1]}; they must agree")
    weights = torch.ones(len(rows), dtype=torch.int64, device=rows.device) if counts is None else counts.reshape(-1)
    if weights.shape != rows.shape[:1] or weights.dtype != torch.int64 or (weights < 0).any():
        raise ValueError(
            f"counts are {weights.dtype} of shape {tuple(weights.shape)} for {len(rows)} tuples; "
            "they must be int64, one a tuple, and not negative"
        )
    kept = ((rows >= 0).any(-1) & (weights > 0)).nonzero().squeeze(-1)
    ordered, order = _ranked(rows, sizes)[kept].sort()
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    order = kept[order]
    total = torch.zeros(int(first.sum()), dtype=torch.int64, device=rows.device)
    total.index_add_(0, first.cumsum(0) - 1, weights[order])
    return TupleCounts(rows[order[first]].to(torch.int64), total)


def _ranked(rows: Int[Tensor, "N L"], sizes: Sequence[int]) -> Int64[Tensor, " N"]:
    """One number a tuple, in lexicographic order: mixed radix, -1 being the digit 0. Refuses codes that do not fit."""
    key = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    values = 1
    for level, size in zip(rows.unbind(-1), sizes, strict=True):
        digit = _flat(level, size) + 1
        if values > (2**63 - 1) // (size + 1):
            # Ranks among the rows keep the order, and there are so few of them that the next digit fits.
            key = torch.unique(key, return_inverse=True)[1]
            values = max(1, len(rows))
        key = key * (size + 1) + digit
        values *= size + 1
    return key


class Collisions(NamedTuple):
    """How many rows share their tuple of codes with others."""

    rows: int
    distinct: int
    """Number of distinct tuples."""
    rate: float
    """(rows - distinct) / rows: the share of rows that find their tuple taken; 0 where nothing was encoded."""
    largest: int
    """Rows of the most frequent tuple."""


def collisions(counts: Int64[Tensor, " M"]) -> Collisions:
    """Collisions from the counts of `tuple_counts`, over all workers and the whole split."""
    rows, distinct = int(counts.sum()), int((counts > 0).sum())
    largest = int(counts.max()) if len(counts) else 0
    return Collisions(rows, distinct, (rows - distinct) / rows if rows else 0.0, largest)


def usage(counts: Shaped[Tensor, "*L K"]) -> Float[Tensor, "*L"]:
    """Share of codes chosen at least once; 0 where nothing was encoded."""
    return (_checked(counts) > 0).to(torch.float64).mean(-1)


def dead_codes(counts: Shaped[Tensor, "*L K"]) -> Int64[Tensor, "*L"]:
    """Number of codes never chosen; K where nothing was encoded."""
    return (_checked(counts) == 0).sum(-1)


def entropy_bits(counts: Shaped[Tensor, "*L K"]) -> Float[Tensor, "*L"]:
    """Entropy of the code distribution in bits, at most log2 K; 0 where nothing was encoded."""
    share = _shares(counts)
    # xlogy is 0 at 0. Adding 0 turns the -0 of a single code into 0.
    return -torch.special.xlogy(share, share).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64)) + 0.0


def perplexity(counts: Shaped[Tensor, "*L K"]) -> Float[Tensor, "*L"]:
    """exp of the entropy: how many equally used codes there might be, from 1 to K; 0 where nothing was encoded."""
    share = _shares(counts)
    return torch.exp(-torch.special.xlogy(share, share).sum(-1)) * (share.sum(-1) > 0)


def gini(counts: Shaped[Tensor, "*L K"]) -> Float[Tensor, "*L"]:
    """Gini coefficient of the counts: 0 (all alike) to 1 - 1/K (one code takes all); 0 where nothing was encoded.

    With counts in ascending order: sum_i (2 i - K - 1) c_i / (K sum_i c_i), i = 1..K.
    """
    share = _shares(counts).sort(-1).values
    num_codes = share.shape[-1]
    rank = torch.arange(1, num_codes + 1, dtype=torch.float64, device=share.device)
    return ((2 * rank - num_codes - 1) * share).sum(-1) / num_codes


def alikeness(vectors: Float[Tensor, "K D"]) -> dict[str, float]:
    """How many there are, and the mean cosine over all pairs of two of them; no cosine of fewer than two."""
    count = len(vectors)
    if count < 2:
        return {"active_codes": float(count)}
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    # Of sums over vectors: no K x K matrix.
    cosine = (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))
    return {"active_codes": float(count), "code_cosine": float(cosine)}


def _checked(counts: Tensor) -> Tensor:
    if counts.ndim not in (1, 2) or counts.shape[-1] == 0:
        raise ValueError(f"counts have shape {tuple(counts.shape)}; they must be [K] or [L, K] with K at least 1")
    if not torch.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("counts hold negative or non-finite numbers; they must be sums of occurrences")
    return counts


def _shares(counts: Tensor) -> Float[Tensor, "*L K"]:
    """Counts over their sum in float64; all 0 where the sum is 0."""
    exact = _checked(counts).to(torch.float64)
    total = exact.sum(-1, keepdim=True)
    return exact / torch.where(total > 0, total, 1)
