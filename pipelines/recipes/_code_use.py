"""How a codebook of structure tokens is used, and how alike its codes are (StructTokenBench, Yuan et al. 2025).

Counts are pooled over all residues of a split. The authors' command averages over proteins, which bounds the usage of
4,096 codes by the length of a protein; their published numbers cannot come from that.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vqcore import metrics
from vqcore.codebook import unit

BINS = 400
"""Of the histogram of cosines from -1 to 1; quantiles are exact to half a bin."""
SHOWN = 80
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BLOCK_VALUES = 2**22


def efficiency(counts: Int64[Tensor, " K"]) -> dict[str, float]:
    """Usage (share of codes that occur), perplexity exp(H), and exp(H) and H over K, from pooled counts.

    H is in nats. The authors' code calls H / K `entropy_normalized`; it is taken for their marginal utility of
    vocabularization (MUV), which their text does not spell out.
    """
    size, perplexity = len(counts), float(metrics.perplexity(counts))
    return {
        "codes": float(size),
        "residues": float(counts.sum()),
        "usage": float(metrics.usage(counts)),
        "perplexity": perplexity,
        "perplexity_share": perplexity / size,
        "entropy_per_code": math.log(perplexity) / size if perplexity else 0.0,
    }


def distinctiveness(vectors: Float[Tensor, "K D"], counts: Int64[Tensor, " K"]) -> dict[str, Any]:
    """Cosines of all pairs of different codes, each pair alike (`all`) or weighing count_i x count_j (`used`).

    The cosine with a vector of length 0 is 0. Memory: some blocks of 2^22 cosines.
    """
    directions = unit(vectors.double())
    weights = counts.double() / max(1, int(counts.sum()))
    sums = {name: np.zeros(4) for name in ("all", "used")}
    bins = {name: np.zeros(BINS) for name in sums}
    block = max(1, BLOCK_VALUES // len(directions))
    for begin in range(0, len(directions), block):
        cosines = (directions[begin : begin + block] @ directions.T).clamp(-1, 1)
        rows = torch.arange(len(cosines))
        for name in sums:
            pair = torch.ones_like(cosines) if name == "all" else weights[begin : begin + block, None] * weights
            pair[rows, rows + begin] = 0.0
            moments = (pair, pair * cosines, pair * cosines.abs(), pair * cosines.square())
            sums[name] += [float(moment.sum()) for moment in moments]
            bins[name] += torch.histogram(
                cosines.flatten(), BINS, range=(-1.0, 1.0), weight=pair.flatten()
            ).hist.numpy()
    return {name: _summary(sums[name], bins[name]) for name in sums}


def _summary(sums: npt.NDArray[np.float64], bins: npt.NDArray[np.float64]) -> dict[str, Any] | None:
    """Mean, mean |cos|, standard deviation, quantiles and histogram (shares); None without pairs."""
    total, first, absolute, second = sums.tolist()
    if total <= 0:
        return None
    mean = first / total
    middles = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    along = np.cumsum(bins) / bins.sum()
    quantiles = {f"{q:g}": float(middles[min(BINS - 1, int(np.searchsorted(along, q)))]) for q in QUANTILES}
    return {
        "mean": mean,
        "mean_absolute": absolute / total,
        "deviation": math.sqrt(max(0.0, second / total - mean**2)),
        "quantiles": quantiles,
        "histogram": (bins.reshape(SHOWN, -1).sum(1) / bins.sum()).tolist(),
    }
