"""How a codebook is used, from counts of codes.

Counts are summed over all workers and a whole split before they come here: a mean of batch perplexities is not a
perplexity. [K], or [L, K] for one result per level; the last dimension is codes. Counts of zero everywhere mean that
nothing was encoded, and each function says what it returns then.
"""

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor


def counts_of(codes: Int64[Tensor, "..."], num_codes: int) -> Int64[Tensor, " K"]:
    """How often each code in [0, num_codes) occurs; -1 (masked) is left out.

    Raises:
        ValueError: another code outside [0, num_codes), or codes that are not integers.
    """
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise ValueError(f"codes are {codes.dtype}; they must be integers in [0, {num_codes}), or -1 where masked")
    flat = codes.reshape(-1).to(torch.int64)
    if flat.numel() and (flat.min() < -1 or flat.max() >= num_codes):
        wrong = flat[(flat < -1) | (flat >= num_codes)]
        raise ValueError(
            f"{wrong.numel()} of {flat.numel()} codes lie outside [0, {num_codes}), the first is {int(wrong[0])}; "
            "only -1 (masked) is allowed beside them: is this the codebook that made them?"
        )
    # Shifted by one so that -1 falls into a bin of its own: no masked copy of the codes is made.
    return torch.bincount(flat + 1, minlength=num_codes + 1)[1:]


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
