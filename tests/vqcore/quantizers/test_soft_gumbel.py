"""GumbelQuantizer: the bottleneck of DVQ-VAE against dense references; checks of its dossier, section 9."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.together import Seat, together
from vqcore import noise
from vqcore.quantizers import GumbelQuantizer, Quantizer, VectorBatch, VectorQuantizer
from vqcore.seeding import kmeans_plus_plus

K, D = 12, 4


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> GumbelQuantizer:
    return GumbelQuantizer(K, D, **{"temperature": 2.0, "init_std": 1.0, "seed": 3, **options})


def dense(x: Tensor, vectors: Tensor, temperature: float, g: Tensor | float = 0.0) -> Tensor:
    distances = (x.unsqueeze(-2) - vectors).square().sum(-1)
    return ((g - distances) / temperature).softmax(-1) @ vectors


def test_it_is_a_quantizer_that_is_not_discrete() -> None:
    assert isinstance(made(), Quantizer)
    assert not made().discrete
    assert made().revived_parameters() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_codes": 0}, "num_codes is 0"),
        ({"temperature": 0.0}, "temperature is 0.0.*positive"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"init_std": -1.0}, "init_std is -1.0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GumbelQuantizer(**{"num_codes": K, "code_dim": D, **options})


def test_the_defaults_are_the_sources() -> None:
    """Temperature 10 and codes from N(0, 2^2), a function of the seed alone."""
    torch.manual_seed(1)
    q = GumbelQuantizer(512, 64, seed=7)
    torch.manual_seed(2)
    assert torch.equal(GumbelQuantizer(512, 64, seed=7).codebook.vectors, q.codebook.vectors)
    assert q.codebook.vectors.std().item() == pytest.approx(2.0, abs=0.03)
    assert sum(p.numel() for p in q.parameters()) == 32_768, "the dossier's 694,851 - 662,083"
    assert q.temperature == 10.0
    assert not q.noise_in_eval


def test_training_mixes_by_noisy_distances_and_evaluation_without_noise() -> None:
    q = made()
    x, keys = drawn(1, 5, 6, D), torch.arange(30).reshape(5, 6) + 50
    vectors = q.codebook.vectors.detach().double()
    for step in range(3):  # the same codebook: nothing but an optimiser moves it
        g = noise.gumbel(3, step, keys.reshape(-1), draws=K).reshape(5, 6, K)
        out = q(x, None, keys)
        torch.testing.assert_close(out.vectors.double(), dense(x.double(), vectors, 2.0, g), rtol=1e-5, atol=1e-5)
        error = (x.double() - out.vectors.double()).square().sum().item()
        assert out.squared_error.item() == pytest.approx(error, rel=1e-5)
    before = int(q.codebook.step)
    out = q.eval()(x, None, keys)
    assert int(q.codebook.step) == before == 3
    torch.testing.assert_close(out.vectors.double(), dense(x.double(), vectors, 2.0), rtol=1e-5, atol=1e-5)
    assert torch.equal(q(x).vectors, out.vectors), "no key matters in evaluation"


def test_noise_in_evaluation_is_a_setting() -> None:
    q = made(noise_in_eval=True).eval()
    x, keys = drawn(1, 30, D), torch.arange(30)
    out = q(x, None, keys)
    g = noise.gumbel(3, 0, keys, draws=K)
    wanted = dense(x.double(), q.codebook.vectors.detach().double(), 2.0, g)
    torch.testing.assert_close(out.vectors.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(q(x, None, keys).vectors, out.vectors)
    assert not torch.equal(q(x, None, keys + 1).vectors, out.vectors)
    assert torch.equal(q(x).vectors[:10], q(x[:10]).vectors), "default keys are positions"


def test_codes_are_the_peak_of_p_without_noise() -> None:
    q = made()
    x, mask = drawn(1, 50, D), drawn(2, 50) > -1
    nearest = torch.cdist(x, q.codebook.vectors.detach()).argmin(-1)
    out = q(x, mask)
    assert torch.equal(out.codes, nearest.masked_fill(~mask, -1))
    assert torch.equal(q.last_counts[0], torch.bincount(nearest[mask], minlength=K).double())
    assert torch.equal(q.assign(x, mask), out.codes)
    assert torch.equal(q.eval()(x, mask).codes, out.codes)
    assert torch.equal(q.look_up(out.codes)[mask], q.codebook.vectors[nearest[mask]])
    assert not q.look_up(out.codes)[~mask].any()


def test_cold_mixtures_are_the_nearest_code_and_hot_ones_the_mean() -> None:
    """Dossier, check 2; what the stored code loses is nothing at tau -> 0."""
    x = drawn(1, 50, D)
    cold = made(temperature=1e-9).eval()
    assert torch.equal(cold(x).vectors, cold.look_up(cold.assign(x)))
    hot = made(temperature=1e9).eval()
    torch.testing.assert_close(hot(x).vectors, hot.codebook.vectors.mean(0).expand(50, D))


def test_every_code_gets_a_gradient_where_hard_assignment_moves_the_chosen_alone() -> None:
    """Dossier, check 3."""
    x = drawn(1, 3, D)
    q, hard = GumbelQuantizer(64, D), VectorQuantizer(64, D, decay=None)
    q(x).vectors.square().sum().backward()
    hard(x).loss.backward()
    assert (q.codebook.vectors.grad != 0).any(-1).double().mean() > 0.95
    assert (hard.codebook.vectors.grad != 0).any(-1).sum() <= 3


def test_gradients_are_those_of_the_mixture_at_fixed_noise() -> None:
    """Dossier, check 3: through p, with no straight-through copy; masked vectors get and give none."""
    q = made()
    x, mask, keys = drawn(1, 30, D).requires_grad_(), drawn(2, 30) > 0, torch.arange(30)
    weight = drawn(3, 30, D)
    (q(x, mask, keys).vectors * weight).sum().backward()
    leaf, vectors = x.detach().clone().requires_grad_(), q.codebook.vectors.detach().clone().requires_grad_()
    mixed = dense(leaf, vectors, 2.0, noise.gumbel(3, 0, keys, draws=K).float())
    (mixed * weight)[mask].sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.codebook.vectors.grad, vectors.grad, rtol=1e-4, atol=1e-5)
    assert x.grad is not None
    assert not x.grad[~mask].any()
    assert not torch.allclose(x.grad[mask], weight[mask], atol=0.1)


def test_the_loss_is_exactly_zero_and_attached() -> None:
    """Dossier, check 4."""
    q, x = made(), drawn(1, 30, D).requires_grad_()
    out = q(x)
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert not q.codebook.vectors.grad.any()


def test_masked_and_non_finite_vectors_take_no_part() -> None:
    q, shorter = made(), made()
    x, keys = drawn(1, 30, D), torch.arange(30)
    mask = keys % 3 != 0
    bad = x.clone()
    bad[~mask], bad[1] = torch.nan, torch.inf
    keep = mask & (keys != 1)
    bad.requires_grad_()
    out, wanted = q(bad, mask, keys), shorter(x[keep], None, keys[keep])
    torch.testing.assert_close(out.vectors[keep], wanted.vectors)
    assert not out.vectors[~keep].any()
    assert (out.codes[~keep] == -1).all()
    assert (out.valid, out.non_finite) == (19, 1)
    for one in (out, wanted):
        (one.vectors.square().sum() + one.loss).backward()
    torch.testing.assert_close(q.codebook.vectors.grad, shorter.codebook.vectors.grad)
    assert bad.grad is not None
    assert bad.grad.isfinite().all()


def test_forwards_of_one_update_share_a_step_and_default_keys_go_on() -> None:
    q, whole = made(), made()
    x = drawn(1, 40, D)
    with q.accumulate(count=40):
        parts = [q(part).vectors for part in x.split(15)]
    torch.testing.assert_close(torch.cat(parts), whole(x).vectors)
    assert torch.equal(q.last_counts[0], whole.last_counts[0])
    assert int(q.codebook.step) == 1


def test_backward_after_the_codebook_has_moved_uses_what_the_forward_saw() -> None:
    q, still = made(), made()
    x, moved = drawn(1, 30, D).requires_grad_(), drawn(1, 30, D).requires_grad_()
    wanted, out = still(x).vectors, q(moved).vectors
    q.codebook.set_vectors(drawn(2, K, D))
    wanted.square().sum().backward()
    out.square().sum().backward()
    torch.testing.assert_close(moved.grad, x.grad)


def test_workers_draw_the_noise_of_one_worker_and_average_to_its_gradient() -> None:
    x, keys = drawn(1, 40, D), torch.arange(40)
    parts = [slice(0, 7), slice(7, 40)]

    def run(part: slice, reduce: Any) -> tuple[Tensor, Tensor, Tensor]:
        q = made(reduce=reduce)
        for _ in range(2):
            out = q(x[part], None, keys[part])
        out.vectors.square().sum().backward()
        return out.vectors.detach(), q.codebook.vectors.grad, q.last_counts[0]

    vectors, gradient, counts = run(slice(0, 40), None)

    def work(seat: Seat) -> tuple[Tensor, Tensor, Tensor]:
        return run(parts[seat.rank], seat)

    results = together(2, work)
    assert torch.equal(torch.cat([result[0] for result in results]), vectors)
    torch.testing.assert_close(results[0][1] + results[1][1], gradient)
    assert all(torch.equal(result[2], counts) for result in results)


def test_it_can_start_from_data() -> None:
    q = made(seeding=kmeans_plus_plus)
    with pytest.raises(RuntimeError, match="never seeded"):
        q.eval()(drawn(1, 5, D))
    q.train()
    out = q(drawn(1, 5, D))
    assert torch.equal(out.vectors, drawn(1, 5, D))
    assert not q.seeded
    assert q.seed([VectorBatch(drawn(2, 100, D))]).startswith(f"{K} codes by kmeans_plus_plus from 100 of 100")
    assert q.seeded
    with pytest.raises(RuntimeError, match="seeding=None"):
        made().seed([VectorBatch(drawn(2, 100, D))])


def test_training_by_gradient_alone_lowers_the_error() -> None:
    q = GumbelQuantizer(16, 2, temperature=0.1)
    centres = 3 * drawn(1, 16, 2)
    optimiser = torch.optim.Adam(q.parameters(), lr=0.1)
    errors = []
    for step in range(150):
        x = centres[torch.arange(64) % 16] + 0.05 * drawn(step, 64, 2)
        optimiser.zero_grad()
        out = q(x)
        (out.vectors - x).square().mean().backward()
        optimiser.step()
        errors.append(out.squared_error.item())
    assert errors[-1] < 0.2 * errors[0]
