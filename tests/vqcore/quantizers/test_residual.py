"""ResidualQuantizer: what is particular to levels. What every quantizer owes is in tests/contracts."""

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.together import Seat, together
from vqcore import noise
from vqcore.estimators import rotate, straight_through
from vqcore.quantizers import Quantized, Quantizer, ResidualQuantizer, VectorBatch, VectorQuantizer
from vqcore.quantizers.residual import DROPOUT
from vqcore.seeding import kmeans_plus_plus, random_rows, scaled_spherical
from vqcore.update import REVIVAL

D, SIZES = 4, (12, 8, 6)
L = len(SIZES)
KINDS = [
    pytest.param({"num_codes": 10 if shared else SIZES, "shared": shared, "decay": decay}, id=f"{name}-{decay}")
    for (name, shared), decay in product((("own", False), ("shared", True)), (0.9, None))
]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> ResidualQuantizer:
    given = {"num_codes": SIZES, "levels": L, "decay": 0.9, "seed": 2, **options}
    return ResidualQuantizer(given.pop("num_codes"), D, **given)


def bits(q: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in q.state_dict().items()}


def books(q: ResidualQuantizer) -> list[Tensor]:
    """The codebook of every level, a copy."""
    return [q.book_of(level).vectors.detach().clone() for level in range(q.levels)]


def walk(x: Tensor, vectors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """r_1 ... r_{L+1} and the codes of every level, by explicit distances in float64."""
    residuals, codes = [x.double()], []
    for book in vectors:
        difference = residuals[-1].unsqueeze(1) - book.double()
        codes.append(difference.square().sum(-1).argmin(1))
        residuals.append(residuals[-1] - book.double()[codes[-1]])
    return residuals, codes


# Construction


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_codes": 8, "levels": None}, "num_codes is 8 and levels is not given"),
        ({"num_codes": [8, 4], "levels": 3}, r"num_codes is \[8, 4\] and levels is 3"),
        ({"num_codes": []}, "one number a level"),
        ({"num_codes": (8, 0, 4)}, r"num_codes\[1\] is 0.*at least 1"),
        ({"num_codes": 0}, "num_codes is 0"),
        ({"levels": 0}, "levels is 0"),
        ({"num_codes": SIZES, "shared": True}, "a shared codebook has one size"),
        ({"dropout": 1.5}, r"dropout is 1.5.*\[0, 1\]"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"keep_levels": 0}, "keep_levels is 0"),
        ({"keep_levels": 4}, "keep_levels is 4; there are 3 levels"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"commitment_weight": -1.0}, "commitment_weight is -1.0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**options)


def test_it_is_a_quantizer_of_levels() -> None:
    q = made()
    assert isinstance(q, Quantizer)
    assert q.num_codes == made(levels=None).num_codes == SIZES
    assert [len(counts) for counts in q.last_counts] == list(SIZES)
    shared = made(num_codes=5, shared=True)
    assert shared.num_codes == (5, 5, 5)
    assert len(shared.codebooks) == 1
    assert len(dict(made(num_codes=5, shared=True, decay=None).named_parameters())) == 1
    assert len(dict(made(decay=None).named_parameters())) == L
    assert "levels=3" in repr(q)


def test_without_seeding_each_level_has_its_own_normal_codebook_which_more_levels_do_not_change() -> None:
    q = ResidualQuantizer(400, 16, levels=3, seed=7)
    assert torch.equal(q.book_of(0).vectors, VectorQuantizer(400, 16, seed=7).codebook.vectors)
    assert not torch.equal(q.book_of(0).vectors, q.book_of(1).vectors)
    for level in range(3):
        assert q.book_of(level).vectors.std().item() == pytest.approx(1.0, abs=0.03)
    fewer = ResidualQuantizer(400, 16, levels=2, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(books(fewer), books(q), strict=False))


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("shared", [False, True])
def test_one_level_is_a_vector_quantizer(shared: bool, decay: float | None) -> None:
    options: dict[str, Any] = {"decay": decay, "revive_below": 1.0, "seeding": kmeans_plus_plus, "estimator": rotate}
    q, plain = ResidualQuantizer(12, D, levels=1, shared=shared, **options), VectorQuantizer(12, D, **options)
    for one in (q, plain):
        one.seed([VectorBatch(drawn(50, 100, D))])
    for step in range(4):
        x, same = ((2 + drawn(step, 40, D)).requires_grad_() for _ in range(2))
        mask = drawn(10 + step, 40) > -1
        out, wanted = q(x, mask), plain(same, mask)
        assert torch.equal(out.codes.squeeze(-1), wanted.codes)
        assert torch.equal(out.vectors, wanted.vectors)
        torch.testing.assert_close(out.loss, wanted.loss)
        torch.testing.assert_close(out.squared_error, wanted.squared_error, rtol=1e-6, atol=0)
        (out.loss + out.vectors.sum()).backward()
        (wanted.loss + wanted.vectors.sum()).backward()
        torch.testing.assert_close(x.grad, same.grad)
        assert list(bits(q).values()) == list(bits(plain).values())


# One step, against references


@pytest.mark.parametrize("shared", [False, True])
def test_steps_match_a_numpy_reference(shared: bool) -> None:
    q = made(num_codes=10 if shared else SIZES, shared=shared, decay=0.8, commitment_weight=0.3, eps=0.1)
    v = [book.vectors.double().numpy() for book in q.codebooks]
    c, s = [np.ones(len(book)) for book in v], [book.copy() for book in v]
    for step in range(6):
        x, mask = drawn(step, 5, 6, D), drawn(100 + step, 5, 6) > -1
        out: Quantized = q(x, mask)
        keep = mask.reshape(-1).numpy()
        r = x.double().reshape(-1, D).numpy()[keep]
        counts, sums = [np.zeros(len(book)) for book in v], [np.zeros_like(book) for book in v]
        loss, added, found = 0.0, np.zeros_like(r), []
        for level in range(L):
            b = 0 if shared else level
            codes = ((r[:, None] - v[b]) ** 2).sum(-1).argmin(1)
            np.add.at(counts[b], codes, 1)
            np.add.at(sums[b], codes, r)
            assert q.last_counts[level].tolist() == np.bincount(codes, minlength=len(v[b])).tolist()
            r, added = r - v[b][codes], added + v[b][codes]
            loss += 0.3 * (r**2).sum() / D / keep.sum()
            found.append(codes)
        assert out.codes[mask].tolist() == np.stack(found, -1).tolist()
        assert (out.codes[~mask] == -1).all()
        np.testing.assert_allclose(out.vectors[mask].numpy(), added, rtol=1e-5, atol=1e-6)
        assert not out.vectors[~mask].any()
        assert out.loss.item() == pytest.approx(loss, rel=1e-5)
        assert out.squared_error.item() == pytest.approx((r**2).sum(), rel=1e-5)
        for b, book in enumerate(q.codebooks):
            c[b], s[b] = 0.8 * c[b] + 0.2 * counts[b], 0.8 * s[b] + 0.2 * sums[b]
            smooth = (c[b] + 0.1) / (c[b].sum() + len(c[b]) * 0.1) * c[b].sum()
            v[b] = np.where((counts[b] > 0)[:, None], s[b] / smooth[:, None], v[b]).astype(np.float32).astype(float)
            np.testing.assert_allclose(book.vectors.numpy(), v[b], rtol=1e-5, atol=1e-6)


# Exactness


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_sum_of_the_codewords_in_level_order(kind: dict[str, Any]) -> None:
    """EdoardoBotta/RQ-VAE-Recommender 54: output and code disagree."""
    q = made(**kind)
    for step in range(3):
        q(drawn(step, 50, D))
    q.eval()
    x, mask = drawn(4, 3, 50, 7, D), drawn(5, 3, 50, 7) > 0
    x[0, 0, 0] = torch.nan
    out, codes = q(x, mask), q.assign(x, mask)
    assert torch.equal(codes, out.codes)
    assert codes.shape == (3, 50, 7, L)
    assert torch.equal(q.look_up(codes), out.vectors)
    kept = mask & x.isfinite().all(-1)
    first, second, third = (book[codes[kept][:, level]] for level, book in enumerate(books(q)))
    assert torch.equal(out.vectors[kept], (first + second) + third)
    residuals, wanted = walk(x[kept], books(q))
    assert torch.equal(codes[kept], torch.stack(wanted, -1))
    torch.testing.assert_close(x[kept] - out.vectors[kept], residuals[-1].float(), rtol=1e-5, atol=1e-6)
    assert out.squared_error.item() == pytest.approx(residuals[-1].square().sum().item(), rel=1e-6)
    assert (codes[~kept] == -1).all()
    assert not out.vectors[~kept].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_forward_and_evaluation_agree_on_the_old_codebooks(kind: dict[str, Any]) -> None:
    """lucidrains/vector-quantize-pytorch 162: shared_codebook=True is good in training and noise in evaluation."""
    q = made(**kind, revive_below=1.0)
    for step in range(3):
        x = drawn(step, 50, D)
        codes, vectors = q.eval().assign(x), q(x).vectors
        out = q.train()(x)
        assert torch.equal(out.codes, codes)
        assert torch.equal(out.vectors, vectors)


def test_the_first_levels_are_a_quantizer_of_their_own() -> None:
    q, fewer = made(), ResidualQuantizer(SIZES[:2], D)
    for mine, other in zip(fewer.codebooks, q.codebooks, strict=False):
        mine.set_vectors(other.vectors)
    x = drawn(1, 300, D)
    codes = q.assign(x)
    assert torch.equal(fewer.assign(x), codes[:, :2])
    coarse = codes.clone()
    coarse[:, 2] = -1
    assert torch.equal(fewer.look_up(codes[:, :2]), q.look_up(coarse))
    assert torch.equal(q.look_up(coarse), fewer.eval()(x).vectors)


def test_a_level_of_minus_one_adds_nothing_and_wrong_codes_are_refused() -> None:
    q = made()
    v = books(q)
    found = q.look_up(torch.tensor([[3, -1, 2], [-1, 7, -1], [-1, -1, -1]], dtype=torch.int8))
    assert torch.equal(found, torch.stack([v[0][3] + v[2][2], v[1][7], torch.zeros(D)]))
    with pytest.raises(ValueError, match=r"shape \(3, 2\).*\[\.\.\., 3\]"):
        q.look_up(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes run from 0 to 8; this codebook has codes 0 to 7"):
        q.look_up(torch.tensor([[11, 8, 0], [0, 0, 0]]))


@pytest.mark.parametrize("shared", [False, True])
def test_residuals_shrink_level_by_level_on_vectors_never_seen(shared: bool) -> None:
    """A single vector's may grow (its nearest codeword can be longer than it), so the law is about the mean."""
    q = ResidualQuantizer(48, 8, levels=4, shared=shared, seeding=kmeans_plus_plus, decay=0.9)
    mix = drawn(60, 8, 8)
    q.seed([VectorBatch(drawn(61, 3000, 8) @ mix)])
    for step in range(20):
        q(drawn(step, 512, 8) @ mix)
    residuals, codes = walk(drawn(62, 3000, 8) @ mix, books(q))
    lengths = [residual.square().sum(-1).mean().item() for residual in residuals]
    assert all(after < 0.8 * before for before, after in pairwise(lengths)), lengths
    if not shared:
        assert all(len(level.unique()) > 40 for level in codes)


# The gradient contract


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_match_the_formula(kind: dict[str, Any]) -> None:
    """Mean over D, sum over levels, mean over vectors: EdoardoBotta/RQ-VAE-Recommender PR 66 mixed reductions."""
    q, beta = made(**kind, commitment_weight=0.7), 0.7
    x, mask = drawn(1, 30, D).requires_grad_(), drawn(2, 30) > -1
    residuals, codes = walk(x.detach()[mask], books(q))
    n = int(mask.sum())
    out = q(x, mask)
    out.loss.backward()
    learned = kind["decay"] is None
    total = sum(left.square().mean(-1).sum() for left in residuals[1:]) / n
    assert out.loss.item() == pytest.approx((beta + learned) * total.item(), rel=1e-5)
    wanted = torch.zeros(30, D).double()
    wanted[mask] = 2 * beta / (n * D) * sum(residuals[1:])
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-4, atol=1e-7)
    if learned:
        gradients = [torch.zeros(len(book), D).double() for book in books(q)]
        for level in range(L):
            into = gradients[0 if kind["shared"] else level]
            into.index_add_(0, codes[level], -2 / (n * D) * residuals[level + 1])
        for book, gradient in zip(q.codebooks, gradients, strict=False):
            torch.testing.assert_close(book.vectors.grad.double(), gradient, rtol=1e-4, atol=1e-7)


def test_the_commitment_is_that_of_partial_sums() -> None:
    """kakaobrain/rq-vae-transformer: |z - sg(z_hat of d levels)|^2, there averaged over depths and here added up."""
    q, x = made(commitment_weight=1.0), drawn(1, 30, D).requires_grad_()
    out = q.eval()(x)
    codes = out.codes.unsqueeze(0).repeat(L, 1, 1)
    for depth in range(L):
        codes[depth, :, depth + 1 :] = -1
    wanted = L * (x - q.look_up(codes)).square().mean()
    torch.testing.assert_close(out.loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(out.loss, x), torch.autograd.grad(wanted, x))


def prefixes(q: ResidualQuantizer, **options: Any) -> Iterator[ResidualQuantizer]:
    """Quantizers of the first 1, 2, ... levels of q."""
    for levels in range(1, q.levels + 1):
        fewer = ResidualQuantizer(q.num_codes[:levels], D, decay=None, **options)
        for mine, other in zip(fewer.codebooks, q.codebooks, strict=False):
            mine.set_vectors(other.vectors.detach())
        yield fewer


def test_every_level_sends_its_own_gradient_to_the_encoder() -> None:
    """Where residuals are taken from straight-through values, as in EdoardoBotta/RQ-VAE-Recommender and snap-research/
    GRID, all but the first of these are 0."""
    q, x = made(decay=None), drawn(1, 30, D)
    residuals, _ = walk(x, books(q))
    before = torch.zeros_like(x)
    for level, fewer in enumerate(prefixes(q)):
        leaf = x.clone().requires_grad_()
        fewer(leaf).loss.backward()
        own = leaf.grad - before
        assert (own.norm(dim=-1) > 1e-5).all()
        torch.testing.assert_close(own.double(), 2 * 0.25 / (30 * D) * residuals[level + 1], rtol=1e-3, atol=1e-6)
        before = leaf.grad


def test_no_codeword_gets_the_gradient_of_another_level() -> None:
    q, x = made(decay=None), drawn(1, 30, D).requires_grad_()
    q(x).loss.backward()
    for fewer in prefixes(q):
        fewer(x).loss.backward()
        for mine, other in zip(fewer.codebooks, q.codebooks, strict=False):
            assert torch.equal(mine.vectors.grad, other.vectors.grad)


def test_chosen_codewords_move_to_their_residuals_and_others_stay() -> None:
    q, x = made(decay=None), drawn(1, 6, D)
    before = books(q)
    residuals, codes = walk(x, before)
    q(x).loss.backward()
    torch.optim.SGD(q.parameters(), lr=D / 2).step()  # so far towards the mean as the code's share of the vectors
    for level, (old, new) in enumerate(zip(before, books(q), strict=True)):
        chosen = torch.zeros(len(old), dtype=torch.bool).index_fill(0, codes[level], True)
        assert not chosen.all()
        assert torch.equal(new[~chosen], old[~chosen])
        assert not q.book_of(level).vectors.grad[~chosen].any()
        for code in codes[level].unique():
            mean = residuals[level][codes[level] == code].mean(0)
            assert (new[code] - mean).norm() < 0.99 * (old[code] - mean).norm()


def test_beta_multiplies_the_encoders_term_alone() -> None:
    """CompVis/taming-transformers 46 and 57 have it on the codebook's; EdoardoBotta/RQ-VAE-Recommender 31 nowhere."""
    found = {}
    for beta in (0.0, 0.25, 1.0):
        q, x = made(decay=None, commitment_weight=beta), drawn(1, 30, D).requires_grad_()
        q(x).loss.backward()
        found[beta] = x.grad, [book.vectors.grad for book in q.codebooks]
    assert not found[0.0][0].any()
    assert found[1.0][0].any()
    torch.testing.assert_close(found[0.25][0], 0.25 * found[1.0][0])
    for beta in (0.0, 0.25):
        assert all(torch.equal(a, b) for a, b in zip(found[beta][1], found[1.0][1], strict=True))


@pytest.mark.parametrize("estimator", [straight_through, rotate])
def test_one_estimator_takes_the_gradient_of_the_sum(estimator: Any) -> None:
    calls = []

    def watching(x: Tensor, quantized: Tensor) -> Tensor:
        calls.append(quantized)
        return estimator(x, quantized)

    q, x, g = made(decay=None, estimator=watching), drawn(1, 30, D).requires_grad_(), drawn(2, 30, D)
    out = q(x)
    (out.vectors * g).sum().backward()
    (quantized,) = calls
    assert torch.equal(out.vectors, quantized)
    assert torch.equal(quantized, q.look_up(out.codes))
    leaf = x.detach().requires_grad_()
    (estimator(leaf, quantized) * g).sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    assert all(book.vectors.grad is None for book in q.codebooks)


# Dead codes


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("level", range(L))
def test_a_dead_code_becomes_a_residual_of_its_own_level(level: int, decay: float | None) -> None:
    """The residual with the smallest race key of that level; used codewords are as if nothing had died."""
    x, keys = drawn(1, 40, D), torch.arange(100, 140)

    def planted(revive_below: float, reduce: Any = None) -> ResidualQuantizer:
        q = made(decay=decay, revive_below=revive_below, reduce=reduce)
        vectors = books(q)[level]
        vectors[3] = 1e3
        q.codebooks[level].set_vectors(vectors)
        q.codebooks[level].counts[3] = 0.01
        return q

    q, without = planted(0.1), planted(0.0)
    residuals, _ = walk(x, books(q))
    q(x, None, keys)
    without(x, None, keys)
    row = int(noise.race(2, 0, keys, level=level, stream=REVIVAL).argmin())
    torch.testing.assert_close(q.codebooks[level].vectors[3].double(), residuals[level][row], rtol=1e-5, atol=1e-6)
    others = torch.arange(SIZES[level]) != 3
    assert torch.equal(q.codebooks[level].vectors[others], without.codebooks[level].vectors[others])
    for other in set(range(L)) - {level}:
        assert torch.equal(q.codebooks[other].vectors, without.codebooks[other].vectors)
        assert q.codebooks[other].revived is None
    assert [rows.nonzero().tolist() for _, rows in q.revived_parameters()] == ([[[3]]] if decay is None else [])

    def work(seat: Seat) -> ResidualQuantizer:
        part = planted(0.1, seat)
        mine = slice(0, 7) if seat.rank else slice(7, 40)
        part(x[mine], None, keys[mine])
        assert seat.calls == 2
        return part

    first, second = together(2, work)
    assert bits(first) == bits(second)
    torch.testing.assert_close(first.codebooks[level].vectors, q.codebooks[level].vectors, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.9, None])
def test_levels_that_share_a_codebook_race_apart_for_its_dead_codes(decay: float | None) -> None:
    """Every row offers L residuals under one key: they must not tie, or which one wins would depend on the split."""
    x, keys = 5 + drawn(1, 8, D), torch.arange(8)
    q = made(num_codes=16, shared=True, decay=decay, revive_below=2.0)
    residuals, codes = walk(x, books(q))
    counts = torch.ones(16) * 0.9 + 0.1 * torch.bincount(torch.cat(codes), minlength=16)
    if decay is None:
        counts = torch.ones(16) * 0.99 + 0.01 * torch.bincount(torch.cat(codes), minlength=16)
    dead = counts < 2.0
    races = torch.stack([noise.race(2, 0, keys, level=level, stream=REVIVAL) for level in range(L)])
    assert len(races.unique()) == races.numel()
    order = races.reshape(-1).argsort()[: min(int(dead.sum()), 8)]
    assert len((order // 8).unique()) == L, "the case must take residuals of every level"
    q(x, None, keys)
    taken = q.codebooks[0].vectors[dead][: len(order)]
    torch.testing.assert_close(taken.double(), torch.cat(residuals[:L])[order], rtol=1e-5, atol=1e-6)


# Workers


@pytest.mark.parametrize("dropout", [0.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_workers_on_parts_equal_one_worker_on_the_whole(kind: dict[str, Any], dropout: float) -> None:
    def run(mine: Tensor, reduce: Any) -> tuple[ResidualQuantizer, list[Quantized], list[Tensor], set[int]]:
        q = made(**kind, revive_below=1.0, dropout=dropout, reduce=reduce)
        outs, gradients, revived, world = [], [], set(), reduce.world if reduce else 1
        for step in range(6):
            x = (1.5 + drawn(step, 60, D))[mine].requires_grad_()
            q.zero_grad()
            outs.append(q(x, mine % 6 != 0, mine))
            (outs[-1].loss + world * outs[-1].vectors.square().sum()).backward()
            gradients.append(x.grad / world)
            for number, book in enumerate(q.codebooks):
                if book.revived is not None:
                    revived.add(number)
                if book.vectors.grad is not None:
                    gradient = book.vectors.grad.double()
                    if reduce:
                        reduce(gradient)
                    with torch.no_grad():
                        book.vectors -= 0.3 * gradient / world
        return q, outs, gradients, revived

    alone, wanted, gradients, revived = run(torch.arange(60), None)
    assert revived == set(range(len(alone.codebooks))), "the case must revive something at every level"
    assert len({int((out.codes[1] >= 0).sum()) for out in wanted}) > 1 or not dropout
    parts = [torch.arange(0, 1), torch.arange(1, 30), torch.arange(0), torch.arange(30, 60)]
    results = together(4, lambda seat: run(parts[seat.rank], seat))
    assert len({tuple(bits(q).items()) for q, *_ in results}) == 1
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(results[0][0].state_dict()[name], tensor, rtol=0, atol=1e-6)
    for step, out in enumerate(wanted):
        assert torch.equal(torch.cat([outs[step].codes for _, outs, *_ in results]), out.codes)
        torch.testing.assert_close(sum(outs[step].loss for _, outs, *_ in results) / 4, out.loss)
        torch.testing.assert_close(torch.cat([found[step] for _, _, found, _ in results]), gradients[step])
    for level, counts in enumerate(alone.last_counts):
        assert torch.equal(results[3][0].last_counts[level], counts)


@pytest.mark.parametrize("kind", KINDS)
def test_all_levels_travel_in_one_reduce_and_their_revivals_in_one_more(kind: dict[str, Any]) -> None:
    """lucidrains/vector-quantize-pytorch needs two a level: 8 for 4 levels."""

    def work(seat: Seat) -> list[list[int]]:
        carried = []
        for revive_below, count in ((0.0, 1.0), (0.5, 1.0), (0.5, 0.1)):
            q = made(**kind, revive_below=revive_below, reduce=seat)
            for book in q.codebooks:
                book.counts.fill_(count)
            seat.carried.clear()
            q(drawn(seat.rank, 6, D))
            carried.append(list(seat.carried))
        return carried

    sums = 0 if kind["decay"] is None else D
    packed = 10 * (L + sums) if kind["shared"] else sum(SIZES) * (1 + sums)
    for plain, healthy, dead in together(2, work):
        assert plain == healthy == [packed]
        assert len(dead) == 2
        assert dead[0] == packed


@pytest.mark.parametrize("kind", KINDS)
def test_accumulate_equals_one_forward_on_all(kind: dict[str, Any]) -> None:
    options = {**kind, "revive_below": 1.0, "dropout": 0.5}
    q, whole = made(**options), made(**options)
    for step in range(5):
        x, keys = 2 + drawn(step, 40, D), torch.arange(40)
        with q.accumulate(count=40):
            outs = [q(x[i : i + 15], None, keys[i : i + 15]) for i in (0, 15, 30)]
        wanted = whole(x, None, keys)
        assert torch.equal(torch.cat([out.codes for out in outs]), wanted.codes)
        torch.testing.assert_close(sum(out.loss for out in outs), wanted.loss)
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(q.state_dict()[name], tensor, rtol=0, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(q.last_counts, whole.last_counts, strict=True))


# Quantizer dropout


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_levels_add_nothing_and_change_nothing(kind: dict[str, Any]) -> None:
    q = made(**kind, dropout=1.0, revive_below=50.0)
    seen = set()
    for step in range(12):
        before, prefix = [bits(book) for book in q.codebooks], books(q)
        q.zero_grad()
        x = drawn(step, 30, D)
        out = q(x)
        kept = int((out.codes[0] >= 0).sum())
        seen.add(kept)
        assert (out.codes[:, :kept] >= 0).all()
        assert (out.codes[:, kept:] == -1).all()
        residuals, codes = walk(x, prefix[:kept])
        assert torch.equal(out.codes[:, :kept], torch.stack(codes, -1))
        torch.testing.assert_close(out.vectors, x - residuals[-1].float(), rtol=1e-5, atol=1e-6)
        learned = kind["decay"] is None
        total = sum(left.square().mean(-1).sum().item() for left in residuals[1:]) / 30
        assert out.loss.item() == pytest.approx((0.25 + learned) * total, rel=1e-5)
        assert [counts.sum().item() for counts in q.last_counts] == [30.0] * kept + [0.0] * (L - kept)
        if learned:
            out.loss.backward()
        if not kind["shared"]:
            for level in range(kept, L):
                assert bits(q.codebooks[level]) == before[level]
                if learned:
                    assert not q.codebooks[level].vectors.grad.any(), "0, not None: DDP waits for it"
    assert seen == {1, 2}


def test_the_number_of_levels_is_a_function_of_seed_and_step() -> None:
    def kept(q: ResidualQuantizer, steps: int) -> list[int]:
        return [int((q(drawn(step, 3, D)).codes[0] >= 0).sum()) for step in range(steps)]

    q = made(num_codes=4, levels=5, dropout=0.5, keep_levels=2)
    drawn_levels = kept(q, 200)
    assert kept(made(num_codes=4, levels=5, dropout=0.5, keep_levels=2), 40) == drawn_levels[:40]
    assert kept(made(num_codes=4, levels=5, dropout=0.5, keep_levels=2, seed=3), 40) != drawn_levels[:40]
    shares = np.bincount(drawn_levels, minlength=6) / 200
    assert shares[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(shares[2:], [1 / 6, 1 / 6, 1 / 6, 1 / 2], atol=0.08)
    assert DROPOUT > 0, "stream 0 is other quantizers'"
    assert set(kept(made(dropout=1.0, keep_levels=L), 20)) == {L}
    assert set(kept(made(), 20)) == {L}


def test_dropout_draws_anew_only_after_an_update_and_never_in_evaluation() -> None:
    q = made(dropout=1.0)
    with q.accumulate(count=60):
        inside = {int((q(drawn(i, 3, D)).codes[0] >= 0).sum()) for i in range(20)}
    assert len(inside) == 1
    assert (q.eval()(drawn(1, 3, D)).codes >= 0).all()
    assert (q.assign(drawn(1, 3, D)) >= 0).all()
    resumed = made(dropout=1.0)
    resumed.load_state_dict(q.state_dict())
    for step in range(10):
        assert torch.equal(q.train()(drawn(step, 30, D)).codes, resumed(drawn(step, 30, D)).codes)


def test_an_update_without_vectors_keeps_the_counts() -> None:
    q = made()
    q(drawn(1, 30, D))
    before = [counts.clone() for counts in q.last_counts]
    q(drawn(1, 30, D), torch.zeros(30, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(q.last_counts, before, strict=True))
    assert before[2].sum() == 30
    assert q.double().last_counts[0].dtype == torch.float64


# Seeding


def batches(rows: range, size: int = 9) -> Iterator[VectorBatch]:
    x = drawn(20, 200, D)
    x[50] = torch.nan
    index = torch.tensor(list(rows), dtype=torch.int64)
    for part in index.split(size):
        if len(part):
            yield VectorBatch(x[part], part % 5 != 0, part)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seeding", [random_rows, kmeans_plus_plus])
def test_seed_gives_the_same_codebooks_for_any_number_of_workers(seeding: Any, shared: bool) -> None:
    options = {"num_codes": 14 if shared else SIZES, "shared": shared, "seeding": seeding, "revive_below": 1.5}
    alone = made(**options)
    assert not alone.seeded
    said = alone.seed(batches(range(200)))
    sizes, where = ("5 + 5 + 4", " for one shared codebook") if shared else ("12 + 8 + 6", "")
    assert said == (
        f"{sizes} codes by {seeding.__name__}{where}, level by level, from 160 of 160 vectors and their residuals"
    )
    assert alone.seeded
    assert all(book.counts.tolist() == [3.0] * book.num_codes for book in alone.codebooks)

    def work(seat: Seat) -> ResidualQuantizer:
        q = made(**options, reduce=seat)
        parts = [range(0, 13), range(13, 13), range(13, 200)]
        assert q.seed(batches(parts[seat.rank], 9 + seat.rank)) == said
        return q

    for q in together(3, work):
        assert bits(q) == bits(alone)


@pytest.mark.parametrize("seeding", [random_rows, kmeans_plus_plus, scaled_spherical])
def test_every_level_is_seeded_from_what_the_levels_before_leave(seeding: Any) -> None:
    x = drawn(1, 2000, D)
    q, plain = made(seeding=seeding), VectorQuantizer(SIZES[0], D, seeding=seeding, seed=2)
    q.seed([VectorBatch(x)])
    plain.seed([VectorBatch(x)])
    assert torch.equal(q.book_of(0).vectors, plain.codebook.vectors)
    residuals, codes = walk(x, books(q))
    for level in range(L):
        assert len(codes[level].unique()) == SIZES[level]
        assert residuals[level + 1].square().sum() < 0.9 * residuals[level].square().sum()
        if seeding is random_rows:
            distances = torch.cdist(books(q)[level].double(), residuals[level])
            assert distances.min(1).values.max() < 1e-5
    assert books(q)[1].norm(dim=-1).min() > 0, "residuals of the rows that level 1 took"


def test_a_shared_codebook_holds_codewords_for_every_level() -> None:
    q = ResidualQuantizer(60, D, levels=3, shared=True, seeding=kmeans_plus_plus)
    x = drawn(1, 2000, D)
    q.seed([VectorBatch(x)])
    residuals, _ = walk(x, books(q))
    shares = [(b.square().sum() / a.square().sum()).item() for a, b in pairwise(residuals)]
    assert max(shares) < 0.5
    two = ResidualQuantizer(2, D, levels=3, shared=True, seeding=kmeans_plus_plus)
    assert two.seed([VectorBatch(x)]).startswith("1 + 1 codes")


@pytest.mark.parametrize("kind", KINDS)
def test_training_forwards_gather_until_there_are_enough(kind: dict[str, Any]) -> None:
    def work(seat: Seat) -> ResidualQuantizer:
        q = made(**kind, seeding=random_rows, reduce=seat)
        for step in range(2):
            assert not q.seeded
            x = drawn(step, 2 + 2 * seat.rank, D).requires_grad_()
            out = q(x)
            assert torch.equal(out.vectors, x)
            assert (out.codes == -1).all()
            assert out.codes.shape == (len(x), L)
            assert out.loss.item() == 0.0
        assert q.seeded
        assert (q(drawn(9, 5, D)).codes >= 0).all()
        return q

    first, second = together(2, work)
    assert bits(first) == bits(second)


def test_seeding_refuses_whole() -> None:
    q = made(seeding=kmeans_plus_plus)
    with pytest.raises(ValueError, match=r"11 usable vectors.*12 codes"):
        q.seed([VectorBatch(drawn(1, 11, D))])
    assert not any(book.is_seeded for book in q.codebooks)
    q = made(seeding=scaled_spherical)
    with pytest.raises(ValueError, match="not zero"):
        q.seed([VectorBatch(drawn(1, 12, D))])  # level 1 takes every vector and leaves nothing
    assert not any(book.is_seeded for book in q.codebooks)
    with pytest.raises(RuntimeError, match="never seeded"):
        q.eval().assign(drawn(1, 5, D))
    with pytest.raises(RuntimeError, match="seeding=None"):
        made().seed([VectorBatch(drawn(1, 50, D))])


def test_semantic_ids_survive_saving() -> None:
    """EdoardoBotta/RQ-VAE-Recommender 58: they change after save and load."""
    q = made(seeding=kmeans_plus_plus)
    q.seed([VectorBatch(drawn(1, 100, D))])
    q(drawn(2, 100, D))
    loaded = made(seeding=kmeans_plus_plus).eval()
    loaded.load_state_dict(q.state_dict())
    assert torch.equal(loaded.assign(drawn(3, 100, D)), q.assign(drawn(3, 100, D)))
    with pytest.raises(RuntimeError, match=r"codebooks\.2"):
        made(levels=2, num_codes=SIZES[:2]).load_state_dict(q.state_dict())
    with pytest.raises(RuntimeError, match="shape"):
        made(num_codes=12).load_state_dict(q.state_dict())
