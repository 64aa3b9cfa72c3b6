"""HyperbolicQuantizer: HyperVQ against dense N x K autograd; the quantizer's part of its dossier's checks 4 to 8.

The logits themselves are compared with other forms of them in tests/vqcore/test_poincare.py.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.together import Seat, together
from vqcore import noise
from vqcore.metrics import perplexity
from vqcore.poincare import exp_map_zero, log_map_zero, project, unidirectional_mlr
from vqcore.quantizers import HyperbolicQuantizer, Quantizer, VectorBatch

K, D = 12, 4
variants = pytest.mark.parametrize(("curvature", "normalise"), [(1.0, True), (0.3, True), (1.0, False), (0.3, False)])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> HyperbolicQuantizer:
    return HyperbolicQuantizer(K, D, **{"seed": 3, **options})


def logits(q: HyperbolicQuantizer, x: Tensor, z: Tensor | None = None, r: Tensor | None = None) -> Tensor:
    """All N x K of them, in the type of `x`."""
    z, r = (own.detach().to(x) if given is None else given for own, given in ((q.z, z), (q.r, r)))
    return unidirectional_mlr(project(exp_map_zero(x, q.curvature), q.curvature, 4e-3), z, r, q.curvature)


def table(z: Tensor, r: Tensor, normalise: bool) -> Tensor:
    return r.unsqueeze(-1) * (z / z.norm(dim=-1, keepdim=True) if normalise else z)


def dense(q: HyperbolicQuantizer, x: Tensor, g: Tensor, z: Tensor, r: Tensor) -> Tensor:
    """The output whose gradient is straight-through on the weights, by the ports' formula w = onehot + p - sg(p)."""
    noisy = logits(q, x, z, r) + g
    p = (noisy / q.temperature).softmax(-1)
    w = F.one_hot(noisy.argmax(-1), q.num_codes) + p - p.detach()
    return w @ table(z, r, q.normalise)


# Construction


def test_it_is_a_quantizer_of_planes() -> None:
    q = made()
    assert isinstance(q, Quantizer)
    assert q.discrete
    assert q.seeded
    assert {name: tuple(p.shape) for name, p in q.named_parameters()} == {"z": (K, D), "r": (K,)}
    assert q.revived_parameters() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_codes": 0}, "num_codes is 0"),
        ({"code_dim": 0}, "code_dim is 0"),
        ({"curvature": 0.0}, "curvature is 0.0"),
        ({"curvature": -1.0}, "curvature is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.inf}, "temperature is inf"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HyperbolicQuantizer(**{"num_codes": K, "code_dim": D, **options})


@pytest.mark.parametrize("curvature", [1.0, 0.25])
def test_planes_start_by_the_seed_and_no_offset_starts_near_0(curvature: float) -> None:
    """HyperVQ dossier, section 4.7: |r_k| in [0.1, 1], z_k from N(0, 1/D) / s."""
    torch.manual_seed(1)
    q = HyperbolicQuantizer(2000, 16, curvature=curvature, seed=5)
    torch.manual_seed(2)
    same = HyperbolicQuantizer(2000, 16, curvature=curvature, seed=5)
    other = HyperbolicQuantizer(2000, 16, curvature=curvature, seed=6)
    for own, again, else_ in ((q.z, same.z, other.z), (q.r, same.r, other.r)):
        assert torch.equal(own, again)
        assert not torch.equal(own, else_)
    ordered = q.r.detach().abs().sort().values
    assert 0.1 <= ordered[0] <= ordered[-1] <= 1.0
    torch.testing.assert_close(ordered, torch.linspace(0.1, 1.0, 2000), rtol=0, atol=0.04)
    assert q.z.std().item() == pytest.approx(1 / math.sqrt(16 * curvature), rel=0.02)


def test_nothing_seeds_it_and_nothing_sets_its_codes() -> None:
    q = made()
    with pytest.raises(RuntimeError, match="come from its `seed`, not from data"):
        q.seed([VectorBatch(drawn(1, 50, D))])
    with pytest.raises(RuntimeError, match="derived from its quantizer's parameters"):
        q.codebook.set_vectors(drawn(1, K, D))


# Codes and code vectors


@variants
def test_codes_are_the_classes_of_the_logits_and_in_training_of_noisy_ones(curvature: float, normalise: bool) -> None:
    """HyperVQ dossier, checks 5 and 7."""
    q = made(curvature=curvature, normalise=normalise)
    x, keys = 1.5 * drawn(1, 20, 30, D), torch.arange(600).reshape(20, 30) + 77
    plain = logits(q, x.double().reshape(-1, D))
    codes = []
    for step in range(3):  # the same planes: nothing but an optimiser moves them
        out = q(x, None, keys)
        g = noise.gumbel(3, step, keys.reshape(-1), draws=K)
        assert out.codes.flatten().tolist() == (plain + g).argmax(-1).tolist()
        assert q.last_counts[0].tolist() == torch.bincount(out.codes.flatten(), minlength=K).tolist()
        codes.append(out.codes)
    assert not torch.equal(codes[0], codes[1])
    q.eval()
    assert q(x).codes.flatten().tolist() == plain.argmax(-1).tolist()
    assert torch.equal(q(x, None, keys + 1).codes, q(x).codes), "no key matters in evaluation"
    assert torch.equal(q(x).codes, q.assign(x))


def test_noise_draws_codes_with_the_probabilities_of_the_softmax() -> None:
    q = made(temperature=0.1)  # of p alone: the draw is the one at temperature 1
    x = 0.4 * drawn(1, 1, D)
    out = q(x.expand(20_000, D), None, torch.arange(20_000))
    share = torch.bincount(out.codes, minlength=K) / 20_000
    torch.testing.assert_close(share, logits(q, x)[0].softmax(-1), rtol=0, atol=0.015)


@variants
def test_output_rows_are_the_planes_points_nearest_the_origin(curvature: float, normalise: bool) -> None:
    """HyperVQ dossier, check 5: log_0(q_k) = r_k z_k / |z_k|, of length |r_k|; the ports' r_k z_k as an option."""
    q = made(curvature=curvature, normalise=normalise)
    with torch.no_grad():
        q.r[::2] *= -1
    z, r = q.z.detach().double(), q.r.detach().double()
    wanted = table(z, r, normalise)
    if normalise:
        points = exp_map_zero(wanted, curvature)
        torch.testing.assert_close(log_map_zero(points, curvature), wanted)
        on_plane = unidirectional_mlr(points, z, r, curvature).diagonal()
        torch.testing.assert_close(on_plane, torch.zeros_like(r), rtol=0, atol=1e-12)
        torch.testing.assert_close(q.codebook.readable().norm(dim=-1), q.r.detach().abs())
    torch.testing.assert_close(q.codebook.readable().double(), wanted, rtol=1e-6, atol=1e-6)
    x, mask = drawn(1, 20, 30, D), drawn(2, 20, 30) > -1
    for out in (q(x, mask), q.eval()(x, mask)):
        assert torch.equal(out.vectors, q.look_up(out.codes)), "the value is the row itself, in training too"
        assert not out.vectors[~mask].any()
        torch.testing.assert_close(out.vectors[mask].double(), wanted[out.codes[mask]], rtol=1e-6, atol=1e-6)
        error = (x.double() - out.vectors.double())[mask].square().sum()
        assert out.squared_error.item() == pytest.approx(error.item(), rel=1e-6)


def test_the_winner_need_not_be_the_nearest_code() -> None:
    q = made().eval()
    x = drawn(1, 500, D)
    assert (q.assign(x) != torch.cdist(x, q.codebook.readable()).argmin(-1)).any()


def test_evaluation_is_deterministic_and_without_temperature() -> None:
    """HyperVQ dossier, check 7."""
    q = made().eval()
    x = drawn(1, 200, D)
    first = q(x)
    q.temperature = 1e-3
    again = q(x)
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.vectors, again.vectors)


@pytest.mark.parametrize(("num_codes", "dim"), [(16, 4), (700, 33)])
def test_no_split_of_a_batch_changes_a_code_or_a_draw(num_codes: int, dim: int) -> None:
    """Planes in pairs that differ by one rounding, so that any other rounding of a product would choose differently."""
    x, keys = drawn(1, 1100, dim) / math.sqrt(dim), torch.arange(1100)

    def fresh() -> HyperbolicQuantizer:
        q = HyperbolicQuantizer(num_codes, dim, seed=4)
        with torch.no_grad():
            q.z[1::2] = torch.nextafter(q.z[::2], torch.tensor(torch.inf))
            q.r[1::2] = q.r[::2]
        return q

    whole, evaluated = fresh()(x, None, keys).codes, fresh().assign(x)
    assert {code % 2 for code in evaluated.tolist()} == {0, 1}
    for sizes in ([1] * 40 + [1060], [3, 509, 511, 77], [375, 375, 350]):
        q, parts = fresh(), x.split(sizes)
        with q.accumulate(count=1100):
            codes = [q(part, None, own).codes for part, own in zip(parts, keys.split(sizes), strict=True)]
        assert torch.equal(torch.cat(codes), whole)
        assert torch.equal(torch.cat([q.assign(part) for part in parts]), evaluated)


def test_default_keys_go_on_within_a_block() -> None:
    """Equal noise in two forwards of one update would be no noise on average."""
    q, whole = made(), made()
    x = 0.1 * drawn(1, 40, D)
    with q.accumulate(count=80):
        first, second = q(x).codes, q(x).codes
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([first, second]), whole(torch.cat([x, x])).codes)
    assert int(q.codebook.step) == 1


# Gradients


@variants
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_gradients_are_straight_through_on_the_weights(curvature: float, normalise: bool, temperature: float) -> None:
    """HyperVQ dossier, checks 4 and 6, over several tiles of rows; some x lie beyond the ball, one at its centre."""
    q = made(curvature=curvature, normalise=normalise, temperature=temperature).double()
    x, mask, keys, g = drawn(1, 1100, D).double(), drawn(2, 1100) > -1, torch.arange(1100), drawn(4, 1100, D).double()
    x[::7] *= 5
    x[0], mask[0] = 0.0, True
    q(drawn(5, 10, D).double())  # so that the step is not 0
    assert (x.norm(dim=-1) > 3.1 / math.sqrt(curvature)).any()
    x.requires_grad_()
    out = q(x, mask, keys)
    (out.loss + (out.vectors * g).sum()).backward()
    own, z, r = (tensor.detach().clone().requires_grad_() for tensor in (x, q.z, q.r))
    wanted = dense(q, own, noise.gumbel(3, 1, keys, draws=K), z, r)
    torch.testing.assert_close(out.vectors[mask], wanted[mask])
    ((wanted * g)[mask]).sum().backward()
    for found, reference in ((x, own), (q.z, z), (q.r, r)):
        assert reference.grad is not None
        assert reference.grad.any()
        torch.testing.assert_close(found.grad, reference.grad, rtol=1e-9, atol=1e-10)


def test_gradients_in_float32_are_those_of_float64() -> None:
    q, wide = made(temperature=0.7), made(temperature=0.7).double()
    x, keys, g = drawn(1, 600, D).requires_grad_(), torch.arange(600), drawn(4, 600, D)
    own = x.detach().double().requires_grad_()
    (q(x, None, keys).vectors * g).sum().backward()
    (wide(own, None, keys).vectors * g).sum().backward()
    for found, wanted in ((x, own), (q.z, wide.z), (q.r, wide.r)):
        assert found.grad is not None
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-3)


def test_x_gets_its_gradient_through_the_logits_alone() -> None:
    """HyperVQ dossier, check 6. A copy of the output's gradient to x would not vanish along a ray that leaves the
    ball, nor where one code is certain."""
    q = made()
    x, g = drawn(1, 100, D), drawn(2, 100, D)
    far = (20 * x).requires_grad_()
    (q(far).vectors * g).sum().backward()
    for parameter in (q.z, q.r, far):
        assert parameter.grad is not None
        assert parameter.grad.any()
    assert far.grad is not None
    along = (far.grad * F.normalize(x, dim=-1)).sum(-1)
    torch.testing.assert_close(along, torch.zeros(100), rtol=0, atol=1e-6)
    certain = made(temperature=1e-6)
    x.requires_grad_()
    (certain(x).vectors * g).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert certain.r.grad is not None
    assert certain.r.grad.any(), "the winner's vector learns all the same"


def test_a_high_temperature_shares_the_gradient_evenly() -> None:
    """HyperVQ dossier, check 7: p = 1/K, so that tau dv_k = (G.e_k - mean_l G.e_l) / K."""
    q = made(temperature=1e4).double()
    x, g = drawn(1, 30, D).double().requires_grad_(), drawn(2, 30, D).double()
    (q(x).vectors * g).sum().backward()
    along = g @ q.codebook.readable().T
    own = x.detach().clone().requires_grad_()
    (logits(q, own) * (along - along.mean(-1, keepdim=True)) / K).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(1e4 * x.grad, own.grad, rtol=0, atol=1e-2 * own.grad.abs().max().item())


def test_offsets_of_0_kill_every_gradient_but_their_own() -> None:
    """HyperVQ dossier, check 6, the negative control: the start of Hyperbolic Neural Networks++."""
    q = made()
    with torch.no_grad():
        q.r.zero_()
    x = drawn(1, 100, D).requires_grad_()
    out = q(x)
    (out.vectors * drawn(2, 100, D)).sum().backward()
    assert not out.vectors.any()
    assert not x.grad.any()
    assert not q.z.grad.any()
    assert q.r.grad.any()


@pytest.mark.parametrize("curvature", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_gradients_are_finite_at_any_norm_in_float32(curvature: float, temperature: float) -> None:
    """HyperVQ dossier, check 4: |x| from 0 to 1e3."""
    q = made(curvature=curvature, temperature=temperature)
    x = F.normalize(drawn(1, 200, D), dim=-1) * torch.logspace(-30, 3, 200).unsqueeze(-1)
    x[0] = 0.0
    x.requires_grad_()
    out = q(x)
    (out.vectors * drawn(2, 200, D)).sum().backward()
    assert out.vectors.isfinite().all()
    for leaf in (x, q.z, q.r):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    if temperature == 1.0:
        assert x.grad is not None
        assert x.grad[0].any(), "0 is an ordinary point"


def test_the_loss_is_exactly_zero_and_attached() -> None:
    q, x = made(), drawn(1, 30, D).requires_grad_()
    out = q(x)
    assert out.loss.item() == 0.0
    out.loss.backward()
    for leaf in (x, q.z, q.r):
        assert leaf.grad is not None
        assert not leaf.grad.any()
    assert q.eval()(x).loss.item() == 0.0


def test_backward_uses_the_noise_and_the_temperature_of_its_forward() -> None:
    q, still = made(), made()
    x, own = drawn(1, 50, D).requires_grad_(), drawn(1, 50, D).requires_grad_()
    out, wanted = q(x), still(own)
    q.temperature = 0.01
    q(drawn(2, 50, D))
    for one in (out, wanted):
        one.vectors.square().sum().backward()
    assert torch.equal(x.grad, own.grad)
    assert torch.equal(q.z.grad, still.z.grad)


def test_the_temperature_may_be_annealed_and_is_not_state() -> None:
    q = made()
    assert "temperature" not in " ".join(q.state_dict())
    sizes = []
    for temperature in (1.0, 1e3):
        q.temperature = temperature
        x = drawn(1, 50, D).requires_grad_()
        q(x).vectors.sum().backward()
        sizes.append(x.grad.norm().item())
    assert sizes[1] < 0.01 * sizes[0]
    with pytest.raises(ValueError, match=r"temperature is -1\.0"):
        q.temperature = -1.0
    assert q.temperature == 1e3


def test_workers_draw_the_codes_of_one_worker_and_add_up_to_its_gradient() -> None:
    x, keys, parts = drawn(1, 60, D).double(), torch.arange(60), [slice(0, 7), slice(7, 7), slice(7, 60)]

    def run(part: slice, reduce: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = made(reduce=reduce).double()
        for _ in range(2):
            q.zero_grad()
            out = q(x[part], None, keys[part])
            (out.vectors - 1).square().sum().backward()
        return out.codes, q.z.grad, q.r.grad, q.last_counts[0]

    codes, to_z, to_r, counts = run(slice(0, 60), None)

    def work(seat: Seat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = run(parts[seat.rank], seat)
        assert seat.carried == [K, K], "one reduce a step, of the counts"
        return found

    results = together(3, work)
    assert torch.equal(torch.cat([result[0] for result in results]), codes)
    torch.testing.assert_close(sum(result[1] for result in results), to_z)
    torch.testing.assert_close(sum(result[2] for result in results), to_r)
    assert all(torch.equal(result[3], counts) for result in results)


# Collapse watch


def clusters(seed: int, rows: int = 128) -> Tensor:
    """8 clusters on the unit circle."""
    angles = torch.arange(rows) % 8 * (2 * math.pi / 8)
    return torch.stack([angles.cos(), angles.sin()], 1) + 0.1 * drawn(seed, rows, 2)


@pytest.mark.parametrize("seed", range(5))
def test_codes_do_not_collapse_on_clusters(seed: int) -> None:
    """HyperVQ dossier, check 8: K = 16, trained to give x back."""
    q = HyperbolicQuantizer(16, 2, seed=seed)
    optimiser = torch.optim.Adam(q.parameters(), lr=0.02)
    for step in range(100):
        x = clusters(1000 * seed + step)
        optimiser.zero_grad()
        (q(x).vectors - x).square().mean().backward()
        optimiser.step()
    q.eval()
    x = clusters(99_999, 1024)
    out = q(x)
    counts = torch.bincount(out.codes, minlength=16)
    assert (counts > 0).sum() >= 8
    assert perplexity(counts) > 4
    assert out.squared_error < 0.1 * x.square().sum()
