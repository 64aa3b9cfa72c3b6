"""What is VectorQuantizer's own; what it shares with every quantizer is in tests/contracts/test_quantizers.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.together import Seat, together
from vqcore.estimators import rotate, straight_through
from vqcore.quantizers import Quantized, VectorBatch, VectorQuantizer
from vqcore.seeding import kmeans_plus_plus, random_rows
from vqcore.update import Rule

K, D = 12, 4
KINDS = [
    pytest.param(
        {"metric": metric, "decay": decay, "estimator": estimator}, id=f"{metric}-{decay}-{estimator.__name__}"
    )
    for metric, decay, estimator in product(("euclidean", "cosine"), (0.9, None), (straight_through, rotate))
]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> VectorQuantizer:
    return VectorQuantizer(K, D, **{"decay": 0.9, "seed": 2, **options})


# Construction


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_codes": 0}, "num_codes is 0.*at least 1"),
        ({"code_dim": 2.5}, "code_dim is 2.5"),
        ({"metric": "manhattan"}, "'manhattan'.*euclidean, cosine"),
        ({"decay": 1.0}, r"decay is 1.0.*\[0, 1\)"),
        ({"decay": -0.1}, "decay is -0.1"),
        ({"commitment_weight": -1.0}, "commitment_weight is -1.0"),
        ({"revive_below": float("nan")}, "revive_below is nan"),
        ({"eps": -1e-5}, "eps is"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VectorQuantizer(**{"num_codes": K, "code_dim": D, **options})


def test_without_seeding_the_codebook_is_normal_and_depends_on_the_seed_only() -> None:
    torch.manual_seed(1)
    vectors = VectorQuantizer(500, 40, seed=7).codebook.vectors
    torch.manual_seed(2)
    assert torch.equal(VectorQuantizer(500, 40, seed=7).codebook.vectors, vectors)
    assert not torch.equal(VectorQuantizer(500, 40, seed=8).codebook.vectors, vectors)
    assert vectors.mean().item() == pytest.approx(0.0, abs=0.03)
    assert vectors.std().item() == pytest.approx(1.0, abs=0.03)
    q = made(metric="cosine")
    assert q.seeded
    torch.testing.assert_close(q.codebook.vectors.norm(dim=-1), torch.ones(K))


# One step, against references


def test_steps_match_a_numpy_reference() -> None:
    q = made(decay=0.8, commitment_weight=0.3, eps=0.1)
    v = q.codebook.vectors.double().numpy()
    c, s = np.ones(K), v.copy()
    for step in range(8):
        x = drawn(step, 5, 6, D)
        mask = drawn(100 + step, 5, 6) > -1
        out: Quantized = q(x, mask)
        flat, keep = x.double().reshape(-1, D).numpy(), mask.reshape(-1).numpy()
        codes = ((flat[:, None] - v) ** 2).sum(-1).argmin(1)
        squared = ((flat - v[codes]) ** 2).sum(-1)[keep].sum()
        assert out.codes.reshape(-1).tolist() == np.where(keep, codes, -1).tolist()
        np.testing.assert_allclose(
            out.vectors.reshape(-1, D).numpy(), np.where(keep[:, None], v[codes], 0), rtol=1e-6, atol=1e-7
        )
        assert out.squared_error.item() == pytest.approx(squared, rel=1e-6)
        assert out.loss.item() == pytest.approx(0.3 * squared / D / keep.sum(), rel=1e-5)
        assert out.valid == keep.sum()
        counts = np.bincount(codes[keep], minlength=K)
        sums = np.zeros((K, D))
        np.add.at(sums, codes[keep], flat[keep])
        c, s = 0.8 * c + 0.2 * counts, 0.8 * s + 0.2 * sums
        read = s / ((c + 0.1) / (c.sum() + K * 0.1) * c.sum())[:, None]
        v = np.where((counts > 0)[:, None], read, v).astype(np.float32).astype(np.float64)
        np.testing.assert_allclose(q.codebook.vectors.numpy(), v, rtol=1e-6, atol=1e-7)
        assert q.last_counts[0].tolist() == counts.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_match_autograd(kind: dict[str, Any]) -> None:
    """CompVis/taming-transformers 46 and 57: beta on the codebook's term. EdoardoBotta/RQ-VAE-Recommender 31: never
    applied."""
    q = made(commitment_weight=0.7, **kind)
    x = drawn(1, 20, D).requires_grad_()
    vectors = q.codebook.vectors.detach().clone().requires_grad_()
    on_sphere: Callable[[Tensor], Tensor] = (
        partial(nn.functional.normalize, dim=-1) if kind["metric"] == "cosine" else lambda t: t
    )
    codes = torch.cdist(on_sphere(x.detach()), on_sphere(vectors.detach())).argmin(-1)
    wanted = 0.7 * (on_sphere(x) - on_sphere(vectors).detach()[codes]).square().mean()
    if kind["decay"] is None:
        wanted = wanted + (on_sphere(x).detach() - on_sphere(vectors)[codes]).square().mean()
    (wanted_x, *wanted_v) = torch.autograd.grad(wanted, [x, vectors][: 1 + (kind["decay"] is None)])
    out = q(x)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    torch.testing.assert_close(x.grad, wanted_x)
    if wanted_v:
        torch.testing.assert_close(q.codebook.vectors.grad, wanted_v[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_code_with_the_gradient_of_the_estimator(kind: dict[str, Any]) -> None:
    q = made(**kind)
    x, mask, g = drawn(1, 5, 6, D).requires_grad_(), drawn(2, 5, 6) > 0, drawn(3, 5, 6, D)
    before = q.codebook.readable().clone()
    out = q(x, mask)
    assert torch.equal(out.vectors[mask], before[out.codes[mask]]), "the forward value is the old code, exactly"
    assert torch.equal(out.vectors[~mask], torch.zeros(int((~mask).sum()), D))
    (out.vectors * g).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))
    assert q.codebook.vectors.grad is None or not q.codebook.vectors.grad.any()
    leaf = x.detach()[mask].requires_grad_()
    source = nn.functional.normalize(leaf, dim=-1) if kind["metric"] == "cosine" else leaf
    (kind["estimator"](source, before[out.codes[mask]]) * g[mask]).sum().backward()
    torch.testing.assert_close(x.grad[mask], leaf.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_may_write_over_the_output_and_the_graph_may_be_used_twice(kind: dict[str, Any]) -> None:
    """nn.ReLU(inplace=True) is many decoders' first layer."""
    q, x = made(**kind), drawn(1, 20, D).requires_grad_()
    before = q.codebook.readable().clone()
    out = q(x)
    codes = out.codes.clone()
    torch.relu_(out.vectors)
    whole = out.vectors.square().sum() + out.loss
    first, second = (torch.autograd.grad(whole, x, retain_graph=kept)[0] for kept in (True, False))
    assert torch.equal(first, second)
    again = made(**kind)
    again.codebook.set_vectors(before)
    out = again(x)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(torch.autograd.grad(out.vectors.relu().square().sum() + out.loss, x)[0], first)


@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluation_loss_is_the_mean_of_this_call(kind: dict[str, Any]) -> None:
    q = made(**kind).eval()
    out = q(drawn(1, 30, D), drawn(2, 30) > 0)
    weight = 0.25 + (kind["decay"] is None)
    assert out.loss.item() == pytest.approx(weight * out.squared_error.item() / int(out.valid) / D)


def test_the_cosine_loss_never_pushes_x_outwards() -> None:
    """lucidrains/vector-quantize-pytorch 26: under a cosine codebook the inputs' norm drifts from 22 to 20,000."""
    for estimator in (straight_through, rotate):
        q = made(metric="cosine", estimator=estimator)
        x = (20 * drawn(1, 30, D)).requires_grad_()
        out = q(x)
        (out.loss + (out.vectors * drawn(2, 30, D)).sum()).backward()
        assert x.grad is not None
        outwards = (x.grad * x.detach()).sum(-1) / (x.grad.norm(dim=-1) * x.detach().norm(dim=-1))
        torch.testing.assert_close(outwards, torch.zeros(30), rtol=0, atol=1e-3)


def test_beta_on_the_codebooks_term_is_a_quarter_of_the_loss_at_four() -> None:
    """VQGAN dossier, check 3: the legacy form, commitment 1 and codebook beta = 0.25, is this loss scaled."""
    q = made(decay=None, commitment_weight=4.0)
    x, vectors = drawn(1, 20, D).requires_grad_(), q.codebook.vectors.detach().clone().requires_grad_()
    leaf = x.detach().clone().requires_grad_()
    out = q(x)
    chosen = vectors[out.codes]
    legacy = (chosen.detach() - leaf).square().mean() + 0.25 * (chosen - leaf.detach()).square().mean()
    torch.testing.assert_close(0.25 * out.loss, legacy)
    legacy.backward()
    (0.25 * out.loss).backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    torch.testing.assert_close(q.codebook.vectors.grad, vectors.grad)
    unchosen = torch.bincount(out.codes, minlength=K) == 0
    assert unchosen.any()
    assert not q.codebook.vectors.grad[unchosen].any()


def test_keys_of_another_shape_are_refused() -> None:
    q = made(revive_below=1.0)
    with pytest.raises(ValueError, match="keys is torch\\.int64 of shape"):
        q(torch.zeros(3, D), None, torch.zeros(3, 1, dtype=torch.int64))


# Dead codes


def test_revival_uses_every_code_where_random_codes_collapse() -> None:
    """R9, facebookresearch/encodec 61, jishengpeng/WavTokenizer 89, espnet/espnet PR 6284,
    EdoardoBotta/RQ-VAE-Recommender 65: audiocraft's expiry is a no-op, 1 of 64 codes used on this case."""

    def used(revive_below: float) -> int:
        q = VectorQuantizer(64, 8, revive_below=revive_below)
        for step in range(300):
            q(5 + drawn(step, 256, 8))
        return q.assign(5 + drawn(300, 4096, 8)).unique().numel()

    assert used(0.0) < 16
    assert used(2.0) == 64


def test_a_revived_parameter_is_reported_once() -> None:
    q = made(decay=None, revive_below=1.0)
    assert q.revived_parameters() == []
    q(4 + drawn(0, 3, D))
    ((parameter, rows),) = q.revived_parameters()
    assert parameter is q.codebook.vectors
    assert int(rows.sum()) == 3
    assert ((parameter[rows] - 4).abs() < 4).all()
    q._updates.rules[0] = Rule(decay=None, revive_below=0.0, eps=1e-5, seed=2)
    q(4 + drawn(0, 3, D))
    assert q.revived_parameters() == []
    assert made(revive_below=1.0).revived_parameters() == []


# accumulate


def broken_block(q: VectorQuantizer) -> None:
    with q.accumulate(count=40):
        q(drawn(1, 40, D))
        raise KeyError


def test_default_keys_go_on_within_a_block() -> None:
    """Equal keys in two forwards of one update would race alike: all replacements would be pairs of equal position."""
    seen: list[Tensor] = []

    def watch(seed: int, step: int, keys: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(keys)
        return keys.double() + 1

    q = made(revive_below=5.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vqcore.update.noise.race", watch)
        with q.accumulate(count=40):
            for i in range(4):
                q(drawn(i, 10, D))
    assert torch.cat(seen).unique().numel() == 40


# Workers


@pytest.mark.parametrize("decay", [0.9, None])
def test_one_reduce_a_step_two_where_a_code_is_dead(decay: float | None) -> None:
    def work(seat: Seat) -> list[list[int]]:
        calls = []
        for revive_below, count in ((0.0, 1.0), (0.5, 1.0), (0.5, 0.1)):
            q = made(decay=decay, revive_below=revive_below, reduce=seat)
            q.codebook.counts.fill_(count)
            seat.carried.clear()
            q(drawn(seat.rank, 6, D))
            calls.append(list(seat.carried))
        return calls

    packed = K if decay is None else K * (1 + D)
    for plain, healthy, dead in together(2, work):
        assert plain == healthy == [packed]
        assert len(dead) == 2
        assert dead[0] == packed


# Seeding


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("seeding", [random_rows, kmeans_plus_plus])
def test_seed_says_what_it_used_and_counts_as_after_a_revival(metric: str, seeding: Any) -> None:
    """facebookresearch/faiss 789: k-means that takes 256 vectors a centroid and says nothing."""
    q = made(metric=metric, seeding=seeding, revive_below=1.5)
    x, mask = drawn(20, 200, D), torch.arange(200) % 5 != 0
    assert q.seed([VectorBatch(x, mask)]) == f"{K} codes by {seeding.__name__} from 160 of 160 vectors"
    assert q.codebook.counts.tolist() == [3.0] * K
    torch.testing.assert_close(q.codebook.sums, 3.0 * q.codebook.vectors.double())
    if metric == "cosine":
        torch.testing.assert_close(q.codebook.vectors.norm(dim=-1), torch.ones(K))


def test_a_drawn_codebook_refuses_to_seed_from_data() -> None:
    with pytest.raises(RuntimeError, match="seeding=None"):
        made().seed([VectorBatch(drawn(1, 50, D))])


def test_non_finite_and_masked_vectors_never_seed() -> None:
    x = torch.full((30, D), torch.nan)
    x[::2] = drawn(1, 15, D)
    mask = torch.arange(30) < 24
    q = made(seeding=random_rows)
    assert "12 of 12 vectors; 12 more were not finite" in q.seed([VectorBatch(x, mask)])
    assert torch.equal(q.codebook.vectors.sort(0).values, x[:24:2].sort(0).values)


def test_zero_vectors_never_seed_a_direction() -> None:
    x = torch.zeros(100, D)
    x[::5] = drawn(1, 20, D)
    q = made(metric="cosine", seeding=random_rows)
    assert "20 of 20" in q.seed([VectorBatch(x)])
    torch.testing.assert_close(q.codebook.vectors.norm(dim=-1), torch.ones(K))


def test_seedings_and_estimators_run_without_autocast() -> None:
    products: list[torch.dtype] = []

    def watching_seeding(rows: Tensor, num_codes: int, **_: Any) -> Tensor:
        products.append((rows @ rows.T).dtype)
        return rows[:num_codes]

    def watching_estimator(x: Tensor, quantized: Tensor) -> Tensor:
        products.append((x @ quantized.T).dtype)
        return straight_through(x, quantized)

    q = made(seeding=watching_seeding, estimator=watching_estimator)
    with torch.autocast("cpu", torch.bfloat16):
        q.seed([VectorBatch(drawn(1, 50, D))])
        q(drawn(2, 50, D))
        assert (torch.zeros(2, 2) @ torch.zeros(2, 2)).dtype == torch.bfloat16
    assert products == [torch.float32, torch.float32]


def test_a_broken_block_does_not_gather() -> None:
    q = made(seeding=random_rows)
    with pytest.raises(KeyError):
        broken_block(q)
    q(drawn(2, 11, D))
    assert not q.seeded
    q(drawn(3, 1, D))
    assert q.seeded
    known = torch.cat([drawn(2, 11, D), drawn(3, 1, D)])
    assert torch.equal(q.codebook.vectors.sort(0).values, known.sort(0).values)


# State


def test_the_float64_mode_keeps_float64() -> None:
    q = made().double()
    x = drawn(1, 30, D).double()
    out = q(x)
    assert out.vectors.dtype == out.loss.dtype == q.codebook.vectors.dtype == torch.float64
    chosen = q.last_counts[0] > 0
    wanted = q.codebook.sums / q.codebook.counts.unsqueeze(-1)
    torch.testing.assert_close(q.codebook.vectors[chosen], wanted[chosen], rtol=1e-4, atol=0)
    assert (q.codebook.vectors != q.codebook.vectors.float().double()).any()


def test_set_vectors_replaces_what_the_average_held() -> None:
    """R6: after `vq.codebook = new` one step of vector-quantize-pytorch 1.32 moves codes by up to 25."""
    q = made(decay=0.99)
    for step in range(20):
        q(50 + drawn(step, 100, D))
    v = drawn(30, K, D)
    q.codebook.set_vectors(v)
    q(v)
    torch.testing.assert_close(q.codebook.vectors, v, rtol=1e-4, atol=1e-4)


# Memory


MEMORY = """
import torch
torch.set_num_threads(1)
from vqcore.quantizers import VectorQuantizer
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
n, dim, num_codes = 16384, 8, 16384
x = torch.randn(n, dim).requires_grad_()
q = VectorQuantizer(num_codes, dim, revive_below=0.5)
def step():
    out = q(x)
    (out.loss + out.vectors.sum()).backward()
step()  # the library's own buffers, and x.grad
x.grad = None
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # start the peak again from here
before = peak()
step()
print(peak() - before, 16 * 2**20 + 8 * n + 20 * n * dim + 24 * num_codes * (dim + 1))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_a_training_step_keeps_no_matrix_of_vectors_by_codes() -> None:
    """apple/axlearn PR 823: a one-hot of 32 GB a batch; vector-quantize-pytorch's training step holds some 16 bytes a
    pair, here 4 GiB. The resident peak of another process, against the bound of DESIGN section 4.7."""
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment)
    beyond, bound = (int(number) for number in run.stdout.split())
    assert 2**20 < beyond < bound, f"{beyond / 2**20:.1f} of {bound / 2**20:.1f} MiB"
