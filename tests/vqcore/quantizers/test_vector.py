"""VectorQuantizer in one process: the contract's sentences one by one, workers as threads."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.together import Seat, together
from vqcore.estimators import rotate, straight_through
from vqcore.quantizers import Quantized, Quantizer, VectorBatch, VectorQuantizer
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


def bits(q: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in q.state_dict().items()}


def assert_same_state(q: VectorQuantizer, other: VectorQuantizer, atol: float = 1e-6) -> None:
    for (name, tensor), wanted in zip(q.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=atol, msg=lambda said, name=name: f"{name}: {said}")


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


def test_it_is_a_quantizer() -> None:
    assert isinstance(made(), Quantizer)
    assert made().discrete


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(3, D + 1),), r"shape \(3, 5\).*\[\.\.\., 4\]"),
        ((torch.zeros(3, D, dtype=torch.int64),), "int64"),
        ((torch.zeros(3, D), torch.ones(4, dtype=torch.bool)), r"mask is torch.bool of shape \(4,\)"),
        ((torch.zeros(3, D), torch.ones(3)), "mask is torch.float32"),
        ((torch.zeros(3, D), None, torch.zeros(3, 1, dtype=torch.int64)), "keys is torch.int64 of shape"),
    ],
)
def test_wrong_shapes_are_refused(arguments: tuple[Any, ...], said: str) -> None:
    q = made(revive_below=1.0)
    before = bits(q)
    with pytest.raises(ValueError, match=said):
        q(*arguments)
    assert bits(q) == before


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


def test_fifty_steps_match_vector_quantize_pytorch() -> None:
    reference_library = pytest.importorskip(
        "vector_quantize_pytorch", reason="vector-quantize-pytorch, of the dev extra, is the reference here"
    )
    q = VectorQuantizer(64, 8, decay=0.8, commitment_weight=0.25, eps=0.0)
    reference = reference_library.VectorQuantize(
        dim=8, codebook_size=64, decay=0.8, eps=0.0, commitment_weight=0.25, threshold_ema_dead_code=0
    )
    book = reference._codebook
    book.embed.data.copy_(q.codebook.vectors.unsqueeze(0))
    book.embed_avg.data.copy_(q.codebook.sums.unsqueeze(0))
    book.cluster_size.data.copy_(q.codebook.counts.unsqueeze(0))
    for step in range(50):
        x = drawn(step, 4, 64, 8)
        out = q(x)
        vectors, codes, loss = reference(x)
        assert torch.equal(out.codes, codes)
        torch.testing.assert_close(out.vectors, vectors, rtol=0, atol=1e-5)
        assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(q.codebook.vectors, book.embed[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_match_autograd(kind: dict[str, Any]) -> None:
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


# Masks, bad numbers, evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_equals_a_shorter_input(kind: dict[str, Any]) -> None:
    """lucidrains/vector-quantize-pytorch 62 and 149: padding that updates the codebook."""
    q, shorter = made(**kind, revive_below=1.0), made(**kind, revive_below=1.0)
    x, mask, keys = drawn(1, 8, 5, D), drawn(2, 8, 5) > 0, torch.arange(40).reshape(8, 5)
    padded = torch.where(mask.unsqueeze(-1), x, 1e6)
    for _ in range(3):
        out, wanted = q(padded, mask, keys), shorter(x[mask], None, keys[mask])
        assert torch.equal(out.codes[mask], wanted.codes)
        assert torch.equal(out.vectors[mask], wanted.vectors)
        assert (out.codes[~mask] == -1).all()
        torch.testing.assert_close(out.loss, wanted.loss)
        assert out.valid == wanted.valid == mask.sum()
        assert_same_state(q, shorter, 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_vectors_are_dropped_and_counted(kind: dict[str, Any]) -> None:
    """One NaN row turns all K codes of vector-quantize-pytorch 1.32 to NaN in one step."""
    q, clean = made(**kind), made(**kind)
    x = drawn(1, 30, D)
    bad = x.clone()
    bad[3, 1], bad[7, 0], bad[8], bad[9, 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    keep = torch.ones(30, dtype=torch.bool)
    keep[[3, 7, 8, 9]] = False
    mask = torch.ones(30, dtype=torch.bool)
    mask[9] = False
    bad.requires_grad_()
    out, wanted = q(bad, mask), clean(x[keep])
    assert out.codes.tolist() == torch.full((30,), -1).masked_scatter(keep, wanted.codes).tolist()
    assert not out.vectors[~keep].any()
    assert (out.valid, out.non_finite) == (26, 3)
    torch.testing.assert_close(out.loss, wanted.loss)
    assert_same_state(q, clean, 1e-7)
    (out.loss + out.vectors.sum()).backward()
    assert bad.grad is not None
    assert bad.grad.isfinite().all()
    assert not bad.grad[~keep].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 5])
def test_a_batch_without_valid_vectors_changes_nothing(kind: dict[str, Any], rows: int) -> None:
    """All-masked batches: NaN loss or an exception in vector-quantize-pytorch 1.32."""
    q = made(**kind, revive_below=5.0)
    before = bits(q)
    x = drawn(1, rows, D).requires_grad_()
    out = q(x, torch.zeros(rows, dtype=torch.bool))
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert bits(q) == before
    assert q.revived_parameters() == []


class _Forbidden:
    rank, world = 0, 2

    def __call__(self, tensor: Tensor) -> None:
        raise AssertionError("eval mode never reduces")


@pytest.mark.parametrize("kind", KINDS)
def test_eval_never_trains_and_never_reduces(kind: dict[str, Any]) -> None:
    """k-means initialisation of vector-quantize-pytorch 1.32 also runs in eval: the first validation batch trains."""
    q = made(**kind, revive_below=50.0, reduce=_Forbidden()).eval()
    before = bits(q)
    with q.accumulate(count=30):
        out = q(drawn(1, 30, D))
    assert bits(q) == before
    assert out.loss.item() == pytest.approx((0.25 + (kind["decay"] is None)) * out.squared_error.item() / 30 / D)
    unseeded = made(**kind, seeding=random_rows, reduce=_Forbidden()).eval()
    for call in (unseeded, unseeded.assign):
        with pytest.raises(RuntimeError, match="never seeded"):
            call(drawn(1, 30, D))
    with pytest.raises(RuntimeError, match="never seeded"):
        unseeded.look_up(torch.tensor([0]))
    assert not unseeded.seeded


@pytest.mark.parametrize("kind", KINDS)
def test_look_up_of_assign_is_the_evaluation_output_bit_for_bit(kind: dict[str, Any]) -> None:
    q = made(**kind)
    for step in range(3):
        q(drawn(step, 50, D))
    if kind["decay"] is None:
        with torch.no_grad():
            q.codebook.vectors.add_(drawn(9, K, D))
    q.eval()
    x, mask = drawn(4, 3, 50, 7, D), drawn(5, 3, 50, 7) > 0
    x[0, 0, 0] = torch.nan
    codes = q.assign(x, mask)
    out = q(x, mask)
    assert torch.equal(codes, out.codes)
    assert torch.equal(q.look_up(codes), out.vectors)
    assert torch.equal(q.look_up(codes.reshape(-1)[::3]), out.vectors.reshape(-1, D)[::3])
    assert (codes[~mask] == -1).all()
    assert codes[0, 0, 0] == -1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_neither_codes_nor_codebook(dtype: torch.dtype) -> None:
    """Under CPU autocast 1.7 % of the indices of vector-quantize-pytorch 1.32 differ from float32."""
    q, plain = VectorQuantizer(256, 16, decay=0.9), VectorQuantizer(256, 16, decay=0.9)
    for step in range(3):
        x = drawn(step, 2000, 16)
        with torch.autocast("cpu", dtype):
            out = q(x)
            codes = q.assign(x)
        assert torch.equal(out.codes, plain(x).codes)
        assert torch.equal(codes, plain.assign(x))
    assert bits(q) == bits(plain)
    assert out.vectors.dtype == torch.float32


def test_half_precision_input_is_widened() -> None:
    q, plain = made(), made()
    x = drawn(1, 30, D).bfloat16()
    assert torch.equal(q(x).vectors, plain(x.float()).vectors)
    assert bits(q) == bits(plain)


# Dead codes


def test_revival_uses_every_code_where_random_codes_collapse() -> None:
    """facebookresearch/encodec 61: audiocraft's expiry is a no-op, 1 of 64 codes used on this case."""

    def used(revive_below: float) -> int:
        q = VectorQuantizer(64, 8, revive_below=revive_below)
        for step in range(300):
            q(5 + drawn(step, 256, 8))
        return q.assign(5 + drawn(300, 4096, 8)).unique().numel()

    assert used(0.0) < 16
    assert used(2.0) == 64


@pytest.mark.parametrize("kind", KINDS)
def test_revival_depends_on_keys_and_not_on_the_order_of_rows(kind: dict[str, Any]) -> None:
    q, shuffled = made(**kind, revive_below=1.0), made(**kind, revive_below=1.0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    revived = 0
    for step in range(3):
        x, keys = 3 + drawn(step, 40, D), torch.arange(40) + 1000 * step
        q(x, None, keys)
        shuffled(x[order], None, keys[order])
        revived += q.codebook.revived is not None
    assert revived, "the case must revive something"
    assert_same_state(q, shuffled)


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


@pytest.mark.parametrize("kind", KINDS)
def test_backward_works_after_the_codebook_has_moved(kind: dict[str, Any]) -> None:
    q = made(**kind, revive_below=5.0)
    x = drawn(1, 40, D).requires_grad_()
    out = q(x)
    q(drawn(2, 40, D))
    q.codebook.set_vectors(drawn(3, K, D))
    (out.loss + out.vectors.sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


# accumulate


@pytest.mark.parametrize("kind", KINDS)
def test_accumulate_equals_one_forward_on_all(kind: dict[str, Any]) -> None:
    """lucidrains/vector-quantize-pytorch 221: an update at every forward does not fit gradient accumulation."""
    q, whole = made(**kind, revive_below=1.0), made(**kind, revive_below=1.0)
    revived = 0
    for step in range(4):
        x, keys = 2 + drawn(step, 40, D), torch.arange(40)
        parts = x.clone().requires_grad_()
        q.zero_grad()
        whole.zero_grad()
        with q.accumulate(count=40):
            outs = [q(parts[i : i + 15], None, keys[i : i + 15]) for i in (0, 15, 30)]
            sum(out.loss + out.vectors.square().sum() for out in outs).backward()
        x.requires_grad_()
        wanted = whole(x, None, keys)
        (wanted.loss + wanted.vectors.square().sum()).backward()
        assert torch.equal(torch.cat([out.codes for out in outs]), wanted.codes)
        torch.testing.assert_close(sum(out.loss for out in outs), wanted.loss)
        torch.testing.assert_close(parts.grad, x.grad)
        assert torch.equal(q.last_counts[0], whole.last_counts[0])
        assert_same_state(q, whole)
        revived += whole.codebook.revived is not None
        if kind["decay"] is None:
            with torch.no_grad():
                for one in (q, whole):
                    one.codebook.vectors -= 0.1 * whole.codebook.vectors.grad
    assert revived


def broken_block(q: VectorQuantizer) -> None:
    with q.accumulate(count=40):
        q(drawn(1, 40, D))
        raise KeyError


def test_an_exception_inside_accumulate_leaves_the_state_as_it_was() -> None:
    q = made(revive_below=5.0)
    before = bits(q)
    with pytest.raises(KeyError):
        broken_block(q)
    assert bits(q) == before
    fresh = made(revive_below=5.0)
    fresh(drawn(2, 40, D))
    q(drawn(2, 40, D))
    assert bits(q) == bits(fresh), "what the broken block had gathered must be gone"


def test_accumulate_does_not_nest_and_refuses_a_negative_count() -> None:
    q = made()
    with pytest.raises(RuntimeError, match="already open"), q.accumulate(count=1), q.accumulate(count=1):
        pass
    with pytest.raises(ValueError, match="count is -1"), q.accumulate(count=-1):
        pass


def test_accumulate_without_a_count_averages_each_forward() -> None:
    def work(seat: Seat) -> tuple[list[float], list[int]]:
        q = made(reduce=seat)
        with q.accumulate():
            outs = [q(drawn(i, 20, D)[: 5 + 10 * seat.rank]) for i in range(2)]
        return [out.loss.item() for out in outs], seat.carried

    results = together(2, work)
    assert {tuple(carried) for _, carried in results} == {(1, 1, K * (1 + D))}
    for i in range(2):
        q = made()
        x = drawn(i, 20, D)
        wanted = q(torch.cat([x[:5], x[:15]])).loss.item()
        assert np.mean([losses[i] for losses, _ in results]) == pytest.approx(wanted, rel=1e-5)


def test_a_block_of_no_vectors_has_loss_zero() -> None:
    q = made()
    before = bits(q)
    x = drawn(1, 5, D).requires_grad_()
    with q.accumulate(count=0):
        out = q(x, torch.zeros(5, dtype=torch.bool))
        out.loss.backward()
    assert out.loss.item() == 0.0
    assert bits(q) == before


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


PARTS = {
    "2 uneven": [range(0, 7), range(7, 60)],
    "2 one empty": [range(0, 60), range(0, 0)],
    "4 uneven": [range(0, 1), range(1, 30), range(30, 30), range(30, 60)],
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_workers_on_parts_equal_one_worker_on_the_whole(kind: dict[str, Any], parts: str) -> None:
    rows = [torch.tensor(list(part), dtype=torch.int64) for part in PARTS[parts]]

    def run(mine: Tensor, reduce: Any) -> tuple[VectorQuantizer, list[Quantized], list[Tensor], list[Tensor]]:
        q = made(**kind, revive_below=1.0, reduce=reduce)
        outs, gradients, codebook_gradients = [], [], []
        for step in range(4):
            x = (1.5 + drawn(step, 60, D))[mine].requires_grad_()
            q.zero_grad()
            out = q(x, mine % 6 != 0, mine)
            out.loss.backward()
            assert x.grad is not None
            outs.append(out)
            gradients.append(x.grad)
            codebook_gradients.append(torch.zeros(0))
            if kind["decay"] is None:
                gradient = q.codebook.vectors.grad
                assert gradient is not None
                shared = gradient.double()
                if reduce is not None:
                    reduce(shared)
                    shared /= reduce.world
                codebook_gradients[-1] = shared.float()
                with torch.no_grad():
                    q.codebook.vectors -= 0.5 * shared.float()
        return q, outs, gradients, codebook_gradients

    alone, wanted, wanted_gradients, wanted_codebook = run(torch.arange(60), None)
    results = together(len(rows), lambda seat: run(rows[seat.rank], seat))
    world = len(rows)
    assert len({tuple(bits(q).values()) for q, *_ in results}) == 1, "workers disagree"
    assert_same_state(results[0][0], alone)
    for step in range(4):
        outs = [result[1][step] for result in results]
        assert torch.equal(torch.cat([out.codes for out in outs]), wanted[step].codes)
        torch.testing.assert_close(sum(out.loss for out in outs) / world, wanted[step].loss)
        gradients = torch.cat([result[2][step] for result in results]) / world
        torch.testing.assert_close(gradients, wanted_gradients[step])
        torch.testing.assert_close(results[0][3][step], wanted_codebook[step], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fully_masked_worker_stays_in_step(kind: dict[str, Any]) -> None:
    """vector-quantize-pytorch 1.32: a worker whose rows are all masked skips a collective and the job hangs."""
    x = drawn(1, 30, D)

    def work(seat: Seat) -> tuple[VectorQuantizer, int, float]:
        q = made(**kind, revive_below=1.0, reduce=seat)
        out = q(x, torch.full((30,), seat.rank == 0), torch.arange(30))
        return q, seat.calls, out.loss.item()

    alone = made(**kind, revive_below=1.0)
    loss = alone(x, None, torch.arange(30)).loss.item()
    results = together(2, work)
    for q, calls, _ in results:
        assert_same_state(q, alone)
        assert calls == 2
    assert [own / 2 for *_, own in results] == [pytest.approx(loss), 0.0]


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


def batches(rows: range, size: int = 9) -> Iterator[VectorBatch]:
    x = drawn(20, 200, D)
    x[50] = torch.nan
    index = torch.tensor(list(rows), dtype=torch.int64)
    for part in index.split(size):
        if len(part):
            yield VectorBatch(x[part], part % 5 != 0, part)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("seeding", [random_rows, kmeans_plus_plus])
def test_seed_gives_the_same_codebook_for_any_number_of_workers(metric: str, seeding: Any) -> None:
    alone = made(metric=metric, seeding=seeding, revive_below=1.5)
    assert not alone.seeded
    said = alone.seed(batches(range(200)))
    assert f"{K} codes by {seeding.__name__} from 160 of 160 vectors" in said
    assert alone.seeded
    assert alone.codebook.counts.tolist() == [3.0] * K, "as after a revival"
    torch.testing.assert_close(alone.codebook.sums, 3.0 * alone.codebook.vectors.double())
    if metric == "cosine":
        torch.testing.assert_close(alone.codebook.vectors.norm(dim=-1), torch.ones(K))

    def work(seat: Seat) -> VectorQuantizer:
        q = made(metric=metric, seeding=seeding, revive_below=1.5, reduce=seat)
        parts = [range(0, 13), range(13, 13), range(13, 200)]
        assert q.seed(batches(parts[seat.rank], 9 + seat.rank)) == said
        return q

    for q in together(3, work):
        assert bits(q) == bits(alone)


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


def test_too_few_vectors_refuse_to_seed_and_say_both_numbers() -> None:
    """lucidrains/vector-quantize-pytorch fills up with duplicates: 30 distinct codes of 64."""
    q = made(seeding=kmeans_plus_plus)
    with pytest.raises(ValueError, match=r"11 usable vectors.*12 codes"):
        q.seed([VectorBatch(drawn(1, 11, D))])
    assert not q.seeded
    with pytest.raises(RuntimeError, match="seeding=None"):
        made().seed([VectorBatch(drawn(1, 50, D))])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("block", [False, True])
def test_training_forwards_gather_until_there_are_enough(metric: str, block: bool) -> None:
    def work(seat: Seat) -> tuple[list[bool], VectorQuantizer]:
        q = made(metric=metric, seeding=random_rows, reduce=seat)
        seeded = []
        for step in range(4):
            x = drawn(step, 4, D)[2 * seat.rank : 2 * seat.rank + 2].requires_grad_()
            keys = torch.arange(2) + 10 * step + 2 * seat.rank
            if block:
                with q.accumulate(count=4):
                    out = q(x, None, keys)
                    out.loss.backward()
            else:
                out = q(x, None, keys)
                out.loss.backward()
            assert torch.equal(out.vectors, x)
            assert out.codes.tolist() == [-1, -1]
            assert (out.loss.item(), out.valid.item()) == (0.0, 2)
            assert x.grad is not None
            seeded.append(q.seeded)
            if q.seeded:
                break
        assert (q(drawn(9, 5, D)).codes >= 0).all()
        return seeded, q

    results = together(2, work)
    assert [seeded for seeded, _ in results] == [[False, False, True]] * 2
    assert bits(results[0][1]) == bits(results[1][1])


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


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_gives_the_bits_of_never_having_stopped(kind: dict[str, Any]) -> None:
    q = made(**kind, revive_below=1.0)
    for step in range(3):
        q(2 + drawn(step, 30, D))
    resumed = made(**kind, revive_below=1.0, seeding=random_rows)
    resumed.load_state_dict(q.state_dict())
    assert resumed.seeded
    for step in range(3, 6):
        q(2 + drawn(step, 30, D))
        resumed(2 + drawn(step, 30, D))
    assert bits(resumed) == bits(q)


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
    q = made(decay=0.99)
    for step in range(20):
        q(50 + drawn(step, 100, D))
    v = drawn(30, K, D)
    q.codebook.set_vectors(v)
    q(v)
    torch.testing.assert_close(q.codebook.vectors, v, rtol=1e-4, atol=1e-4)
