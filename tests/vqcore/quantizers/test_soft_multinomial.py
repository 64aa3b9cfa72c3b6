"""MultinomialQuantizer: IA-GPL's quantizer against numpy; the checks of its dossier, sections 8.2 to 8.5."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.together import Seat, together
from vqcore import noise
from vqcore.assign import nearest
from vqcore.codebook import Codebook
from vqcore.quantizers import MultinomialQuantizer, Quantizer, VectorBatch
from vqcore.quantizers.soft_multinomial import ema_of_means
from vqcore.seeding import random_rows

K, D, M = 12, 4, 3


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> MultinomialQuantizer:
    q = MultinomialQuantizer(K, D, **{"draws": M, "decay": 0.8, "seed": 3, **options})
    if q.seeded:
        q.codebook.set_vectors(drawn(8, K, D), q.codebook.counts[0].item())  # farther apart than the source's start
    return q


def bits(q: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in q.state_dict().items()}


def shares(x: Tensor, vectors: Tensor, temperature: float = 1.0) -> Tensor:
    """pi [..., K] in float64."""
    distances = (x.double().unsqueeze(-2) - vectors.double()).square().sum(-1)
    return (-distances / temperature).softmax(-1)


def test_it_is_a_quantizer_that_is_not_discrete() -> None:
    assert isinstance(made(), Quantizer)
    assert not made().discrete
    assert made().revived_parameters() == []


def test_the_defaults_are_the_sources() -> None:
    """T 1, b .9, eps .01, lambda .01; N starts at 1/m; codes are uniform within sqrt(6 / (K + D))."""
    torch.manual_seed(1)
    q = MultinomialQuantizer(50, 300, seed=4)
    torch.manual_seed(2)
    assert bits(MultinomialQuantizer(50, 300, seed=4)) == bits(q)
    rule = q._updates.rules[0]
    assert (q.draws, q.temperature, q.commitment_weight, q.ema, q.sample_in_eval) == (10, 1.0, 0.01, "source", False)
    assert (rule.decay, rule.eps, rule.revive_below) == (0.9, 0.01, 0.0)
    assert q.codebook.counts.tolist() == [0.1] * 50
    bound = (6 / 350) ** 0.5
    assert q.codebook.vectors.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert q.codebook.vectors.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draws": 0}, "draws is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"ema": "other"}, "'other'.*source, standard"),
        ({"decay": None}, "decay is None.*averages"),
        ({"commitment_weight": -0.1}, "commitment_weight"),
        ({"eps": -1.0}, "eps is -1.0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MultinomialQuantizer(**{"num_codes": K, "code_dim": D, **options})


@pytest.mark.parametrize("ema", ["source", "standard"])
def test_steps_match_a_numpy_reference(ema: str) -> None:
    """Draws from softmax(-D / T) over all codes, their mean from the old codebook, then the update."""
    q = made(ema=ema, eps=0.1, temperature=2.0, commitment_weight=0.3)
    e, n = q.codebook.vectors.double().numpy(), q.codebook.counts.numpy().copy()
    sums_kept = q.codebook.sums.numpy().copy()
    for step in range(6):
        x, keys = drawn(step, 5, 6, D), torch.arange(30).reshape(5, 6) + 30 * step
        mask = drawn(100 + step, 5, 6) > -1
        flat, keep = x.double().reshape(-1, D).numpy(), mask.reshape(-1).numpy()
        pi = shares(x.reshape(-1, D), torch.from_numpy(e), 2.0).numpy()
        u = noise.uniform(3, step, keys.reshape(-1), draws=M).numpy()
        codes = (u[:, :, None] >= pi.cumsum(-1)[:, None]).sum(-1)
        mean = e[codes].mean(1)
        s = (codes[:, :, None] == np.arange(K)).sum(1)
        assert (s.sum(-1) == M).all(), "dossier, check 2: counts sum to m"
        counts, sums = s[keep].sum(0) / M, (s[keep] / M).T @ flat[keep]
        if ema == "source":
            n = 0.8 * n + 0.2 * counts
            n = (n + 0.1) / (n.sum() + K * 0.1) * n.sum()
            moved = 0.8 * e + 0.2 * sums / n[:, None]
        else:
            n, sums_kept = 0.8 * n + 0.2 * counts, 0.8 * sums_kept + 0.2 * sums
            read = sums_kept / ((n + 0.1) / (n.sum() + K * 0.1) * n.sum())[:, None]
            moved = np.where((counts > 0)[:, None], read, e)
        out = q(x, mask, keys)
        assert torch.equal(out.codes.reshape(-1, M), torch.from_numpy(np.where(keep[:, None], codes, -1)))
        np.testing.assert_allclose(out.vectors.reshape(-1, D), np.where(keep[:, None], mean, 0), rtol=1e-5, atol=1e-6)
        squared = ((flat - mean) ** 2).sum(-1)[keep].sum()
        assert out.squared_error.item() == pytest.approx(squared, rel=1e-5)
        assert out.loss.item() == pytest.approx(0.3 * squared / D / keep.sum(), rel=1e-5)
        e = moved
        np.testing.assert_allclose(q.codebook.vectors, e, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(q.codebook.counts, n, rtol=1e-9)
        np.testing.assert_allclose(q.last_counts[0], counts, rtol=1e-9)


# Draws, what is stored, and evaluation


@pytest.mark.parametrize("draws", [1, 10, 1000])
def test_the_mean_of_draws_has_the_expectation_and_a_variance_of_one_over_m(draws: int) -> None:
    """Dossier, check 2."""
    rows = 100_000 // draws
    q = made(draws=draws, temperature=3.0, decay=0.0)
    vectors, x = q.codebook.vectors.double(), drawn(1, D)
    pi = shares(x, vectors, 3.0)
    expectation = pi @ vectors
    variance = pi @ (vectors - expectation).square() / draws
    output = q(x.expand(rows, D)).vectors.double()
    assert ((output.mean(0) - expectation).abs() < 5 * (variance / rows).sqrt()).all()
    torch.testing.assert_close(output.var(0), variance, rtol=max(0.03, 6 * (2 / rows) ** 0.5), atol=0.0)


@pytest.mark.parametrize("draws", [1, 4])
def test_a_cold_draw_is_the_nearest_code_exactly(draws: int) -> None:
    """Dossier, check 2: T -> 0, for any m (four equal vectors have an exact mean)."""
    q = made(draws=draws, temperature=1e-9)
    x, old = drawn(1, 40, D), q.codebook.vectors.clone()
    wanted = old[nearest(x, old)]
    assert torch.equal(q.eval()(x).vectors, wanted)
    assert torch.equal(q.look_up(q.assign(x)), wanted)
    assert torch.equal(q.train()(x).vectors, wanted)


def test_one_draw_is_a_single_code() -> None:
    q = made(draws=1, temperature=5.0)
    x, old = drawn(1, 40, D), q.codebook.vectors.clone()
    out = q(x)
    assert out.codes.shape == (40, 1)
    assert torch.equal(out.vectors, old[out.codes.squeeze(-1)])
    assert torch.equal(q.assign(x).squeeze(-1), nearest(x, q.codebook.vectors)), "stored without chance: the nearest"


@pytest.mark.parametrize("draws", [1, 3, 10])
def test_look_up_of_the_draws_is_the_training_output_bit_for_bit(draws: int) -> None:
    q = made(draws=draws, temperature=5.0)
    x, mask = drawn(1, 3, 40, D), drawn(2, 3, 40) > 0
    with q.accumulate(count=int(mask.sum())):  # the codebook waits, so that it is still the forward's
        out = q(x, mask)
        assert torch.equal(q.look_up(out.codes), out.vectors)
        assert torch.equal(q.look_up(out.codes.int().flatten(0, 1)[::7]), out.vectors.flatten(0, 1)[::7])
    assert (out.codes[~mask] == -1).all()
    assert not out.vectors[~mask].any()


def test_evaluation_is_the_expectation_and_stores_the_nearest_shares() -> None:
    q = made(draws=10, temperature=3.0)
    q(drawn(0, 40, D))
    q.eval()
    before = bits(q)
    x, mask = drawn(1, 3, 50, D), drawn(2, 3, 50) > 0
    pi = shares(x, q.codebook.vectors, 3.0)
    out = q(x, mask)
    wanted = torch.where(mask.unsqueeze(-1), pi @ q.codebook.vectors.double(), 0.0)
    torch.testing.assert_close(out.vectors.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(q(x, mask, torch.arange(150).reshape(3, 50)).vectors, out.vectors), "no key matters"
    assert torch.equal(q.assign(x, mask), out.codes)
    of_codes = torch.nn.functional.one_hot(out.codes.clamp(min=0), K).sum(-2) / 10
    assert (of_codes - pi).abs()[mask].max() < 0.1
    stored = q.look_up(out.codes)
    lost = (of_codes - pi).abs() @ q.codebook.vectors.double().norm(dim=-1)
    assert ((stored - out.vectors).norm(dim=-1) <= lost + 1e-5)[mask].all()
    assert not torch.allclose(stored, out.vectors, atol=1e-3)
    error = (x - out.vectors)[mask].square().sum().item()
    assert out.loss.item() == pytest.approx(0.01 * error / D / mask.sum().item(), rel=1e-5)
    assert bits(q) == before, "dossier, check 4: an evaluation leaves e and N"


def test_many_stored_codes_hold_the_expectation() -> None:
    q = made(draws=4096, temperature=3.0).eval()
    x = drawn(1, 20, D)
    torch.testing.assert_close(q.look_up(q.assign(x)), q(x).vectors, rtol=0, atol=5e-3)


def test_sampling_in_evaluation_is_a_setting() -> None:
    q = made(sample_in_eval=True, temperature=5.0).eval()
    x, keys = drawn(1, 40, D), torch.arange(40)
    out = q(x, None, keys)
    assert torch.equal(q.look_up(out.codes), out.vectors)
    assert torch.equal(q(x, None, keys).codes, out.codes)
    assert not torch.equal(q(x, None, keys + 1).codes, out.codes)
    assert torch.equal(q.train()(x, None, keys).codes, out.codes), "as training draws, at the same step"


def test_look_up_refuses_what_are_not_its_codes() -> None:
    q = made()
    with pytest.raises(ValueError, match=r"\(5, 2\).*\[\.\.\., 3\]"):
        q.look_up(torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 to 12"):
        q.look_up(torch.tensor([[0, 12, 3]]))
    vectors = q.codebook.vectors
    assert torch.equal(q.look_up(torch.tensor([4, -1, -1])), vectors[4] / 3), "-1 adds 0"


# Gradients and the source's update


@pytest.mark.parametrize("ema", ["source", "standard"])
def test_the_gradient_is_straight_through_plus_consistency(ema: str) -> None:
    """Dossier, check 3: identity, plus 2 lambda (p - p_q) / (N d); none for the codebook."""
    q = made(ema=ema, commitment_weight=0.5)
    x, weight, mask = drawn(1, 30, D).requires_grad_(), drawn(2, 30, D), torch.arange(30) % 4 != 0
    out = q(x, mask)
    (out.loss + (out.vectors * weight).sum()).backward()
    wanted = weight + 2 * 0.5 * (x.detach() - out.vectors.detach()) / (mask.sum() * D)
    torch.testing.assert_close(x.grad, torch.where(mask.unsqueeze(-1), wanted, 0.0))
    assert list(q.parameters()) == []


def test_an_undrawn_code_is_multiplied_by_the_decay() -> None:
    """Dossier, check 4: e' = 0.9 e exactly; the standard rule leaves its bits."""
    for ema in ("source", "standard"):
        q = made(ema=ema, temperature=1e-9, decay=0.9)
        old = q.codebook.vectors.clone()
        codes = q(old[:3]).codes
        assert codes.unique().tolist() == [0, 1, 2]
        wanted = (0.9 * old[3:].double()).float() if ema == "source" else old[3:]
        assert torch.equal(q.codebook.vectors[3:], wanted)


def test_codes_overshoot_the_mean_of_constant_vectors_and_return_to_it() -> None:
    """Dossier, sections 4 (ii) and 8.4: 80 hits a code peak near 1.87 times the mean around step 7."""
    book = Codebook(3, 1)
    book.set_vectors(torch.zeros(3, 1), count=0.1)
    mean = torch.tensor([[1.0], [-2.0], [0.5]])
    path = []
    for _ in range(200):
        ema_of_means(book, torch.full((3,), 80.0).double(), 80.0 * mean.double(), 0.9, 0.01)
        path.append((book.vectors / mean).squeeze(-1))
    ratio = torch.stack(path)
    assert int(ratio[:, 0].argmax()) + 1 in (6, 7, 8)
    torch.testing.assert_close(ratio.amax(0), torch.full((3,), 1.87), rtol=0.02, atol=0.0)
    assert (ratio[20] > 1.1).all()
    torch.testing.assert_close(ratio[-1], torch.ones(3), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(book.sums, book.vectors.double() * book.counts.unsqueeze(-1))


@pytest.mark.parametrize("eps", [0.0, 0.01])
@pytest.mark.parametrize("ema", ["source", "standard"])
def test_an_update_of_no_vectors_changes_nothing(ema: str, eps: float) -> None:
    q = made(ema=ema, eps=eps, revive_below=5.0)
    before = bits(q)
    x = drawn(2, 20, D).requires_grad_()
    out = q(x, torch.zeros(20, dtype=torch.bool))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert x.grad is not None
    assert bits(q) == before


def test_without_smoothing_a_code_that_is_never_drawn_stays_finite() -> None:
    book = Codebook(2, 1)
    book.set_vectors(torch.ones(2, 1), count=1e-300)
    for _ in range(300):
        ema_of_means(book, torch.tensor([5.0, 0.0]).double(), torch.tensor([[5.0], [0.0]]).double(), 0.5, 0.0)
    assert book.counts[1] == 0.0, "the case must run out of numbers"
    assert book.vectors.isfinite().all()


@pytest.mark.parametrize("ema", ["source", "standard"])
def test_dead_codes_are_revived_where_asked(ema: str) -> None:
    def near_the_vectors(revive_below: float) -> int:
        q = made(ema=ema, revive_below=revive_below)
        for step in range(12):
            q(20 + drawn(step, 60, D))
        return int((q.codebook.vectors.mean(-1) > 15).sum())

    assert near_the_vectors(0.0) <= 2
    assert near_the_vectors(0.5) > K // 2


# Workers


@pytest.mark.parametrize("options", [{}, {"revive_below": 1.0}, {"ema": "standard", "revive_below": 1.0}])
def test_workers_on_parts_equal_one_worker_on_the_whole(options: dict[str, Any]) -> None:
    """Dossier, check 5: sums of s and of s x over workers, then one update, with the same draws."""
    keys = torch.arange(60)
    parts = [keys[:3], keys[3:3], keys[3:60]]

    def run(mine: Tensor, reduce: Any) -> tuple[MultinomialQuantizer, list[Any]]:
        q = made(reduce=reduce, temperature=4.0, **options)
        return q, [q((1 + drawn(step, 60, D))[mine], mine % 5 != 0, mine) for step in range(4)]

    alone, wanted = run(keys, None)
    results = together(3, lambda seat: run(parts[seat.rank], seat))
    assert len({tuple(bits(q).values()) for q, _ in results}) == 1
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(results[0][0].state_dict()[name], tensor, rtol=0, atol=1e-6)
    for step in range(4):
        assert torch.equal(torch.cat([outs[step].codes for _, outs in results]), wanted[step].codes)
        torch.testing.assert_close(sum(outs[step].loss for _, outs in results) / 3, wanted[step].loss)
        torch.testing.assert_close(torch.cat([outs[step].vectors for _, outs in results]), wanted[step].vectors)


def test_a_step_is_one_reduce_of_counts_and_sums() -> None:
    def work(seat: Seat) -> list[int]:
        q = made(reduce=seat)
        for step in range(3):
            q(drawn(step, 10, D))
        q.eval()(drawn(9, 10, D))
        return seat.carried

    assert together(2, work) == [[K * (1 + D)] * 3] * 2


@pytest.mark.parametrize("ema", ["source", "standard"])
def test_accumulate_equals_one_forward_on_all(ema: str) -> None:
    q, whole = made(ema=ema, temperature=4.0, revive_below=1.0), made(ema=ema, temperature=4.0, revive_below=1.0)
    for step in range(4):
        x = 2 + drawn(step, 40, D)
        with q.accumulate(count=40):
            outs = [q(part) for part in x.split(15)]
        wanted = whole(x)
        assert torch.equal(torch.cat([out.codes for out in outs]), wanted.codes)
        torch.testing.assert_close(sum(out.loss for out in outs), wanted.loss)
        torch.testing.assert_close(q.codebook.vectors, whole.codebook.vectors)


def test_it_starts_from_data() -> None:
    q = made(seeding=random_rows)
    out = q(drawn(1, 5, D))
    assert out.codes.shape == (5, M)
    assert torch.equal(out.vectors, drawn(1, 5, D))
    q(drawn(2, 10, D))
    assert q.seeded
    assert q.codebook.counts.tolist() == [1 / M] * K
    again = made(seeding=random_rows, revive_below=2.0)
    again.seed([VectorBatch(drawn(1, 20, D))])
    assert again.codebook.counts.tolist() == [4.0] * K, "else every code would be dead at once"
    standard = made(seeding=random_rows, ema="standard")
    standard.seed([VectorBatch(drawn(1, 20, D))])
    assert standard.codebook.counts.tolist() == [1.0] * K
