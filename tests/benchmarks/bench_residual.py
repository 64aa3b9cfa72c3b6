"""An EMA training step of ResidualQuantizer by number of levels, against as many bare products and
vector-quantize-pytorch's ResidualVQ, one thread each. Prints ratios, asserts no time.

What a level adds to a VectorQuantizer's step is one residual and one sum of N x D; the reduce stays one.
"""

import torch
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

from tests.benchmarks.bench_assign import bare_product
from tests.benchmarks.bench_step import step
from tests.benchmarks.timing import milliseconds, one_thread, paired, ratio
from vqcore.quantizers import ResidualQuantizer

SHAPES = [(16384, 64, 1024), (16384, 32, 256), (4096, 256, 2048)]
LEVELS = (1, 4, 8)


def run(quick: bool = False) -> None:
    head = ("L x bare ms", "x L x bare", "step ms", "peer ms", "peer x step")
    print(f"{'N':>6} {'D':>4} {'K':>6} {'L':>2}" + "".join(f"{title:>14}" for title in head))
    for n, dim, num_codes in [(4096, 16, 512)] if quick else SHAPES:
        for levels in (2,) if quick else LEVELS:
            with one_thread():
                print(_row(n, dim, num_codes, levels), flush=True)


def _row(n: int, dim: int, num_codes: int, levels: int) -> str:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, dim, generator=generator) for _ in range(2))
    quantizer = ResidualQuantizer(num_codes, dim, levels=levels).train()
    peer = ResidualVQ(dim=dim, num_quantizers=levels, codebook_size=num_codes, decay=0.99, commitment_weight=0.25)
    product = bare_product(x, torch.randn(num_codes, dim, generator=generator))

    def products() -> None:
        for _ in range(levels):
            product()

    def of_ours(x: Tensor) -> tuple[Tensor, Tensor]:
        out = quantizer(x)
        return out.vectors, out.loss

    def of_peer(x: Tensor) -> tuple[Tensor, Tensor]:
        output, _, losses = peer.train()(x.unsqueeze(0))
        return output[0], losses.sum()

    bare, ours = paired(products, step(of_ours, x, weight))
    mine, theirs = paired(step(of_ours, x, weight), step(of_peer, x, weight), rounds=3)
    return (
        f"{n:>6} {dim:>4} {num_codes:>6} {levels:>2}{milliseconds(bare):>14.1f}{ratio(ours, bare):>14.2f}"
        f"{milliseconds(ours):>14.1f}{milliseconds(theirs):>14.1f}{ratio(theirs, mine):>14.1f}"
    )
