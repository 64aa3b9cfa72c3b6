"""torch.compile takes the evaluation path of vector and residual quantizers whole, with the same bits.

R8: vector-quantize-pytorch 1.32 breaks the graph 4 times (plain), 11 (k-means, dead codes) and 10 (residual, dropout).
The eager backend runs what was captured as it is, so that these tests need no compiler and see every break.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from vqcore.assign import nearest
from vqcore.estimators import rotate
from vqcore.quantizers import Quantized, ResidualQuantizer, VectorQuantizer
from vqcore.seeding import random_rows

K, D = 12, 4
Q = VectorQuantizer | ResidualQuantizer
CASES: dict[str, Callable[[], Q]] = {
    f"vector-{metric}-{decay}": partial(VectorQuantizer, K, D, metric=metric, decay=decay, estimator=rotate)
    for metric, decay in product(("euclidean", "cosine"), (0.9, None))
} | {
    f"residual-{'shared' if shared else 'own'}-{decay}": partial(
        ResidualQuantizer, K, D, levels=3, shared=shared, decay=decay, dropout=0.5, revive_below=1.0
    )
    for shared, decay in product((False, True), (0.9, None))
}


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


compiled: Callable[..., Any] = partial(torch.compile, fullgraph=True, backend="eager")


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_one_graph_with_the_same_bits(case: str) -> None:
    """lucidrains/vector-quantize-pytorch 41: a synchronised codebook fails under torch.compile."""
    q = CASES[case]()
    q(drawn(1, 50, D))
    q.eval()
    whole, codes_of = compiled(q), compiled(q.assign)
    x, mask = drawn(2, 5, 30, D), drawn(3, 5, 30) > -1
    x[0, 0, 0] = torch.nan
    for arguments in ((x,), (x, mask)):
        out, wanted = whole(*arguments), q(*arguments)
        assert isinstance(out, Quantized)
        for name in ("vectors", "codes", "loss", "valid", "non_finite"):
            assert torch.equal(getattr(out, name), getattr(wanted, name)), name
        # In tiles where it is not compiled: another order of the same float64 sum.
        torch.testing.assert_close(out.squared_error, wanted.squared_error, rtol=1e-13, atol=0)
        assert torch.equal(codes_of(*arguments), wanted.codes)


@pytest.mark.parametrize("case", ["vector-cosine-None", "residual-own-0.9"])
def test_a_loaded_quantizer_compiles_at_its_first_call_and_under_autocast(case: str) -> None:
    trained = CASES[case]()
    trained(drawn(1, 50, D))
    q = CASES[case]()
    q.seeding = random_rows
    for book in q.modules():
        if hasattr(book, "seeded") and isinstance(book.seeded, Tensor):
            book.seeded.fill_(False)
            book._known_seeded = False
    q.load_state_dict(trained.state_dict())
    x = drawn(2, 30, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(q.eval().assign)(x), trained.assign(x))
        assert torch.equal(compiled(q)(x).vectors, trained.eval()(x).vectors)


def test_gradients_pass_through_a_compiled_evaluation() -> None:
    q = CASES["residual-own-None"]().eval()
    x, same = drawn(2, 30, D).requires_grad_(), drawn(2, 30, D).requires_grad_()
    compiled(q)(x).loss.backward()
    q(same).loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, same.grad)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_search_is_one_operator(metric: Any) -> None:
    x, vectors = drawn(1, 700, D), drawn(2, 1100, D)
    found = compiled(partial(nearest, metric=metric))(x, vectors)
    assert torch.equal(found, nearest(x, vectors, metric=metric))
    torch.library.opcheck(torch.ops.vqcore.nearest.default, (x, vectors, metric == "euclidean"))
