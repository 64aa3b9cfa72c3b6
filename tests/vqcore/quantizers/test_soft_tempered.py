"""TemperedQuantizer: CLVQ-VAE's quantizer against numpy; the checks of its dossier (section 8) that live here.

Frequencies of the draws and k = 1 are tested in test_assign, the spherical start in test_seeding.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.together import Seat, together
from vqcore import noise
from vqcore.codebook import Codebook
from vqcore.quantizers import Quantizer, TemperedQuantizer, VectorBatch, VectorQuantizer
from vqcore.quantizers.soft_tempered import ema_written_back
from vqcore.seeding import random_rows, scaled_spherical

K, D = 12, 4


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> TemperedQuantizer:
    return TemperedQuantizer(K, D, **{"decay": 0.8, "seed": 3, **options})


def bits(q: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in q.state_dict().items()}


def written_back(
    n: np.ndarray, m: np.ndarray, counts: np.ndarray, sums: np.ndarray, decay: float, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """The four lines of the dossier's section 4."""
    n = decay * n + (1 - decay) * counts
    total = n.sum()
    n = (n + eps) / (total + len(n) * eps) * total
    return n, decay * m + (1 - decay) * sums


def test_it_is_a_discrete_quantizer() -> None:
    assert isinstance(made(), Quantizer)
    assert made().discrete
    assert made().revived_parameters() == []


def test_the_defaults_are_the_sources() -> None:
    q = TemperedQuantizer(K, D)
    rule = q._updates.rules[0]
    assert (q.top_k, q.temperature, q.commitment_weight, q.ema, q.relative) == (5, 1.0, 0.1, "source", False)
    assert (rule.decay, rule.eps, rule.revive_below) == (0.99, 1e-5, 0.0)
    assert q.codebook.counts.tolist() == [1.0] * K
    assert torch.equal(q.codebook.sums, q.codebook.vectors.double())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"ema": "other"}, "'other'.*source, standard"),
        ({"decay": None}, "decay is None.*averages"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"commitment_weight": -0.1}, "commitment_weight"),
        ({"revive_below": 1.0}, "revive_below is 1.0.*after the update.*ema='standard'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**options)


@pytest.mark.parametrize("ema", ["source", "standard"])
def test_steps_match_a_numpy_reference(ema: str) -> None:
    """Squared distances, one draw a row among the k nearest, the update before the look-up (or after)."""
    q = made(ema=ema, eps=0.1, top_k=3, temperature=0.7)
    e = q.codebook.vectors.double().numpy()
    n, m = np.ones(K), e.copy()
    flipped = 0
    for step in range(6):
        x, keys = drawn(step, 5, 6, D), torch.arange(30).reshape(5, 6) + 30 * step
        mask = drawn(100 + step, 5, 6) > -1
        flat, keep = x.double().reshape(-1, D).numpy(), mask.reshape(-1).numpy()
        distances = ((flat[:, None] - e) ** 2).sum(-1)
        order = distances.argsort(-1)[:, :3]
        near = np.take_along_axis(distances, order, -1)
        p = np.exp((near[:, :1] - near) / 0.7)
        reached = p.cumsum(-1) / p.sum(-1, keepdims=True)
        u = noise.uniform(3, step, keys.reshape(-1)).numpy()
        codes = np.take_along_axis(order, (u >= reached).sum(-1, keepdims=True), -1)[:, 0]
        flipped += int((codes != order[:, 0])[keep].sum())
        counts, sums, old = np.bincount(codes[keep], minlength=K).astype(float), np.zeros((K, D)), e
        np.add.at(sums, codes[keep], flat[keep])
        if ema == "source":
            n, m = written_back(n, m, counts, sums, 0.8, 0.1)
            e = old = m / n[:, None]
        else:
            n, m = 0.8 * n + 0.2 * counts, 0.8 * m + 0.2 * sums
            read = m / ((n + 0.1) / (n.sum() + K * 0.1) * n.sum())[:, None]
            e = np.where((counts > 0)[:, None], read, e)
        out = q(x, mask, keys)
        assert out.codes.reshape(-1).tolist() == np.where(keep, codes, -1).tolist()
        np.testing.assert_allclose(
            out.vectors.reshape(-1, D), np.where(keep[:, None], old[codes], 0), rtol=1e-5, atol=1e-6
        )
        squared = ((flat - old[codes]) ** 2).sum(-1)[keep].sum()
        assert out.squared_error.item() == pytest.approx(squared, rel=1e-5)
        assert out.loss.item() == pytest.approx(0.1 * squared / D / keep.sum(), rel=1e-5)
        np.testing.assert_allclose(q.codebook.vectors, e, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(q.codebook.counts, n, rtol=1e-9)
        assert q.last_counts[0].tolist() == counts.tolist()
    assert flipped > 20, "the case must draw others than the nearest"


def test_with_one_nearest_and_the_standard_rule_it_is_the_vector_quantizer() -> None:
    """Dossier, check 1: top_k = 1 is argmin for any T."""
    q = made(top_k=1, temperature=1e6, ema="standard", revive_below=1.0, commitment_weight=0.25)
    plain = VectorQuantizer(K, D, decay=0.8, seed=3, revive_below=1.0)
    for step in range(5):
        x = 1.5 + drawn(step, 40, D)
        out, wanted = q(x), plain(x)
        assert torch.equal(out.codes, wanted.codes)
        assert torch.equal(out.vectors, wanted.vectors)
        assert out.loss == wanted.loss
    assert bits(q) == bits(plain)


@pytest.mark.parametrize("ema", ["source", "standard"])
def test_evaluation_is_argmin_whatever_the_temperature(ema: str) -> None:
    q = made(ema=ema, top_k=K, temperature=1e6)
    x, mask = drawn(1, 3, 50, D), drawn(2, 3, 50) > 0
    q(x)
    q.eval()
    before = bits(q)
    nearest = torch.cdist(x, q.codebook.vectors).argmin(-1).masked_fill(~mask, -1)
    out = q(x, mask)
    assert torch.equal(out.codes, nearest)
    assert torch.equal(q.assign(x, mask), nearest)
    assert torch.equal(q.look_up(nearest), out.vectors)
    assert out.loss.item() == pytest.approx(0.1 * out.squared_error.item() / D / mask.sum().item())
    assert bits(q) == before


def test_draws_change_with_the_step_and_not_with_the_order_of_rows() -> None:
    q, shuffled = made(temperature=100.0), made(temperature=100.0)
    x, keys = drawn(1, 200, D), torch.arange(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    first = q(x, None, keys).codes
    assert torch.equal(shuffled(x[order], None, keys[order]).codes, first[order])
    q.codebook.set_vectors(drawn(9, K, D))
    second = q(x, None, keys).codes
    q.codebook.set_vectors(drawn(9, K, D))
    assert not torch.equal(q(x, None, keys).codes, second)


# The source's update


def test_source_order_assigns_with_the_old_codebook_and_reads_from_the_new() -> None:
    q = made(top_k=1)
    x, old = drawn(1, 40, D), q.codebook.vectors.clone()
    out = q(x)
    assert torch.equal(out.codes, torch.cdist(x, old).argmin(-1))
    assert torch.equal(out.vectors, q.codebook.vectors[out.codes])
    assert not torch.equal(out.vectors, old[out.codes])
    assert out.squared_error.item() == pytest.approx(
        (x - q.codebook.vectors[out.codes]).square().sum().item(), rel=1e-5
    )


def test_source_order_refuses_accumulate_and_says_why() -> None:
    assert made(ema="standard").accumulates
    q = made()
    assert not q.accumulates
    with pytest.raises(RuntimeError, match=r"before each look-up.*ema='standard'"), q.accumulate(count=3):
        pass


def test_one_update_moves_a_code_to_the_stated_mean() -> None:
    """Dossier, check 3: (0.99 e0 + 0.01 c u) / (0.99 + 0.01 c), up to eps."""
    q = TemperedQuantizer(K, D, top_k=1, eps=1e-12)
    e0, u = q.codebook.vectors[4].clone(), q.codebook.vectors[4] + 0.01 * drawn(1, D)
    assert q(u.expand(7, D)).codes.tolist() == [4] * 7
    torch.testing.assert_close(q.codebook.vectors[4], (0.99 * e0 + 0.07 * u) / (0.99 + 0.07))


def test_a_code_converges_to_the_mean_of_its_vectors_at_the_rate_of_the_decay() -> None:
    """Dossier, check 3: with constant inputs the distance left after t steps is 0.99^t of the first, once counts
    are those of the batch."""
    book = Codebook(2, 1)
    book.set_vectors(torch.zeros(2, 1), count=5.0)
    counts, sums = torch.full((2,), 5.0).double(), torch.tensor([[10.0], [-5.0]]).double()
    for _ in range(300):
        ema_written_back(book, counts, sums, 0.99, 1e-5)
    left = torch.tensor([[2.0], [-1.0]]) - book.vectors
    torch.testing.assert_close(left, torch.tensor([[2.0], [-1.0]]) * 0.99**300, rtol=1e-4, atol=1e-6)


def test_smoothing_keeps_the_sum_of_counts() -> None:
    """Streamline dossier, check 8."""
    q = made(eps=0.5)
    for step in range(4):
        before = float(q.codebook.counts.sum())
        q(drawn(step, 40, D))
        assert float(q.codebook.counts.sum()) == pytest.approx(0.8 * before + 0.2 * 40, rel=1e-12)


def test_long_dead_codes_drift_to_the_origin() -> None:
    """Dossier, section 4: e stays while m and n shrink together, then n is held at eps / (1 - g) and e decays by g."""
    q = TemperedQuantizer(3, 2, top_k=1)
    q.codebook.set_vectors(torch.tensor([[1.0, 1.0], [30.0, 0.0], [0.0, 40.0]]))
    x = torch.ones(50, 2)
    first = q.codebook.vectors[1:].clone()
    n, m = np.ones(3), q.codebook.vectors.double().numpy()
    lengths = []
    for _ in range(1600):
        q(x)
        n, m = written_back(n, m, np.array([50.0, 0, 0]), np.array([[50.0, 50.0], [0, 0], [0, 0]]), 0.99, 1e-5)
        lengths.append(q.codebook.vectors[1:].norm(dim=-1))
    np.testing.assert_allclose(q.codebook.vectors, m / n[:, None], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lengths[99], first.norm(dim=-1), rtol=0.01, atol=0.0)
    assert (lengths[-1] < 0.01 * first.norm(dim=-1)).all()
    torch.testing.assert_close(lengths[-1] / lengths[-101], torch.full((2,), 0.99**100), rtol=1e-3, atol=0.0)
    assert q.codebook.counts[1].item() == pytest.approx(1e-5 / 0.01, rel=0.02)
    kept = TemperedQuantizer(3, 2, top_k=1, ema="standard")
    kept.codebook.set_vectors(torch.tensor([[1.0, 1.0], [30.0, 0.0], [0.0, 40.0]]))
    for _ in range(50):
        kept(x)
    assert torch.equal(kept.codebook.vectors[1:], first), "the standard rule leaves their bits"


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_an_update_of_no_vectors_changes_nothing(eps: float) -> None:
    q = made(eps=eps)
    q(drawn(1, 20, D))
    before = bits(q)
    x = drawn(2, 20, D).requires_grad_()
    out = q(x, torch.zeros(20, dtype=torch.bool))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert x.grad is not None
    assert bits(q) == before


# Padding, gradients, workers


@pytest.mark.parametrize("ema", ["source", "standard"])
def test_padding_changes_no_loss_count_or_code(ema: str) -> None:
    """Dossier, check 4."""
    q, shorter = made(ema=ema), made(ema=ema)
    for step in range(3):
        x, keys = drawn(step, 20, D), torch.arange(20)
        padded, mask = torch.cat([x, torch.zeros(9, D)]), torch.arange(29) < 20
        out, wanted = q(padded, mask, torch.arange(29)), shorter(x, None, keys)
        assert torch.equal(out.codes[:20], wanted.codes)
        assert (out.codes[20:] == -1).all()
        assert not out.vectors[20:].any()
        torch.testing.assert_close(out.loss, wanted.loss)
    assert bits(q) == bits(shorter)


@pytest.mark.parametrize("ema", ["source", "standard"])
def test_the_gradient_is_straight_through_plus_commitment(ema: str) -> None:
    """Dossier, check 6: identity, plus 2 beta (x - z_q) / (N d); the codebook gets none."""
    q = made(ema=ema)
    x, weight = drawn(1, 30, D).requires_grad_(), drawn(2, 30, D)
    out = q(x)
    (out.loss + (out.vectors * weight).sum()).backward()
    torch.testing.assert_close(x.grad, weight + 2 * 0.1 * (x.detach() - out.vectors.detach()) / (30 * D))
    assert list(q.parameters()) == [], "no gradient and no weight decay can reach the codebook"


@pytest.mark.parametrize("options", [{"ema": "source"}, {"ema": "standard", "revive_below": 1.0}, {"relative": True}])
def test_workers_on_parts_equal_one_worker_on_the_whole(options: dict[str, Any]) -> None:
    """Dossier, check 3: counts and sums are added up over workers before the update."""
    keys = torch.arange(60)
    parts = [keys[:3], keys[3:3], keys[3:60]]

    def run(mine: Tensor, reduce: Any) -> tuple[TemperedQuantizer, list[Tensor], list[Tensor], list[Tensor]]:
        q = made(reduce=reduce, temperature=2.0, **options)
        outs = [q((1 + drawn(step, 60, D))[mine], mine % 5 != 0, mine) for step in range(4)]
        return q, [out.codes for out in outs], [out.loss for out in outs], [out.vectors for out in outs]

    alone, codes, losses, vectors = run(keys, None)
    results = together(3, lambda seat: run(parts[seat.rank], seat))
    assert len({tuple(bits(result[0]).values()) for result in results}) == 1
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(results[0][0].state_dict()[name], tensor, rtol=0, atol=1e-6)
    for step in range(4):
        assert torch.equal(torch.cat([result[1][step] for result in results]), codes[step])
        torch.testing.assert_close(sum(result[2][step] for result in results) / 3, losses[step])
        torch.testing.assert_close(torch.cat([result[3][step] for result in results]), vectors[step])


def test_a_step_is_one_reduce() -> None:
    def work(seat: Seat) -> list[int]:
        q = made(reduce=seat)
        for step in range(3):
            q(drawn(step, 10, D))
        q.eval()(drawn(9, 10, D))
        return seat.carried

    assert together(2, work) == [[K * (1 + D)] * 3] * 2


# Seeding


def test_it_starts_from_data_by_forwards_or_at_once() -> None:
    q = made(seeding=random_rows)
    assert not q.seeded
    assert (q(drawn(1, 5, D)).codes == -1).all()
    with pytest.raises(RuntimeError, match="never seeded"):
        q.eval().assign(drawn(1, 5, D))
    q.train()(drawn(2, 10, D))
    assert q.seeded
    rows = torch.cat([drawn(1, 5, D), drawn(2, 10, D)])
    assert (torch.cdist(q.codebook.vectors, rows).amin(-1) == 0).all()
    at_once = made(seeding=random_rows)
    said = at_once.seed([VectorBatch(drawn(1, 5, D)), VectorBatch(drawn(2, 10, D))])
    assert said == f"{K} codes by random_rows from 15 of 15 vectors"
    assert bits(at_once) == bits(q)
    assert q.codebook.counts.tolist() == [1.0] * K, "n = 1 and m = e, as in the source"


def test_the_spherical_start_uses_more_codes_than_random_vectors() -> None:
    """Dossier, check 8: clusters with norms of 20 to 30, the same training, vectors that no one trained on."""
    directions = torch.nn.functional.normalize(drawn(1, 40, 8), dim=-1)

    def activations(seed: int, count: int) -> Tensor:
        lengths = 20 + 10 * torch.rand(count, 1, generator=torch.Generator().manual_seed(seed))
        return (directions[torch.arange(count) % 40] + 0.05 * drawn(seed, count, 8)) * lengths

    def trained(seeding: Any) -> tuple[int, float]:
        q = TemperedQuantizer(40, 8, seeding=seeding)
        x = activations(2, 600)
        q.seed([VectorBatch(x)])
        for _ in range(40):
            q(x)
        counts = torch.bincount(q.assign(activations(3, 120)), minlength=40)
        return int((counts > 0).sum()), torch.exp(torch.special.entr(counts / 120).sum()).item()

    (used, perplexity), (used_by_random, perplexity_of_random) = trained(scaled_spherical), trained(random_rows)
    assert used >= used_by_random + 2
    assert perplexity > perplexity_of_random + 3
