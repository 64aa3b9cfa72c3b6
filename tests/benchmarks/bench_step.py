"""An EMA training step (forward, backward of output and loss, update) against the bare product and
vector-quantize-pytorch's, one thread each. Prints ratios and bars, asserts no time.

Bars: 1.75x bare for D < 256, 1.5x from there; vector-quantize-pytorch's step takes 8 times as long as ours at the three
shapes of the contract and 4 times everywhere else. Its step keeps several N x K arrays: at K = 65,536 some GiB and tens
of seconds, so two rounds must do there, and its column takes 2,048 rows on both sides at K = 16,384 and above.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from tests.benchmarks.bench_assign import bare_product
from tests.benchmarks.timing import ROUNDS, above, against, milliseconds, one_thread, paired, ratio
from vqcore.assign import nearest
from vqcore.quantizers import VectorQuantizer

SHAPES = [(16384, 64, 1024), (16384, 256, 8192), (8192, 32, 65536)]
GRID = [(8192, dim, num_codes) for num_codes in (256, 1024, 4096, 16384) for dim in (8, 32, 64, 256, 512)]


def run(quick: bool = False) -> None:
    head = ("bare ms", "search x bare", "step x bare", "step ms", "peer ms", "peer x step", "peer rounds")
    print(f"{'N':>6} {'D':>4} {'K':>6}" + "".join(f"{title:>14}" for title in head))
    for n, dim, num_codes in [(8192, 16, 512)] if quick else [*SHAPES, *GRID]:
        with one_thread():
            print(_row(n, dim, num_codes), flush=True)


def _row(n: int, dim: int, num_codes: int) -> str:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, dim, generator=generator) for _ in range(2))
    quantizer, start = VectorQuantizer(num_codes, dim).train(), torch.randn(num_codes, dim, generator=generator)
    quantizer.codebook.set_vectors(start)
    ours = step(lambda x: _of_ours(quantizer, x), x, weight)
    bare, search, whole = paired(bare_product(x, start), lambda: nearest(x, start), ours)
    peer = VectorQuantize(dim, num_codes, decay=0.99, commitment_weight=0.25).train()
    theirs = step(lambda x: _of_peer(peer, x), x, weight)
    rounds = ROUNDS if n * num_codes <= 2**24 else 5 if n * num_codes <= 2**27 else 2
    mine, others = paired(ours, theirs, rounds=rounds)
    bar = 8.0 if (n, dim, num_codes) in SHAPES else 4.0
    return (
        f"{n:>6} {dim:>4} {num_codes:>6}{milliseconds(bare):>14.1f}{ratio(search, bare):>14.2f}"
        f"{against(ratio(whole, bare), 1.75 if dim < 256 else 1.5)}{milliseconds(whole):>14.1f}"
        f"{milliseconds(others):>14.1f}{above(ratio(others, mine), bar)}{rounds:>14}"
    )


def step(forward: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, weight: Tensor) -> Callable[[], None]:
    """One training step on `x`: `forward` gives (output, loss), and `weight` stands for the decoder's gradient."""
    x = x.clone().requires_grad_()

    def once() -> None:
        x.grad = None
        output, loss = forward(x)
        torch.autograd.backward([output, loss], [weight, torch.ones_like(loss)])

    return once


def _of_ours(quantizer: VectorQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    out = quantizer(x)
    return out.vectors, out.loss


def _of_peer(peer: VectorQuantize, x: Tensor) -> tuple[Tensor, Tensor]:
    output, _, loss = peer(x.unsqueeze(0))
    return output[0], loss.sum()
