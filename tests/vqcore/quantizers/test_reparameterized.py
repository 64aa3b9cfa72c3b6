"""ReparameterizedQuantizer: AminoAseed against dense autograd of its formula and plain VQ; its dossier's checks 1-3."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.together import Seat, together
from vqcore.estimators import rotate, straight_through
from vqcore.metrics import perplexity, usage
from vqcore.quantizers import Quantizer, ReparameterizedQuantizer, VectorBatch, VectorQuantizer
from vqcore.seeding import random_rows

K, D = 12, 4


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> ReparameterizedQuantizer:
    return ReparameterizedQuantizer(K, D, **{"seed": 2, **options})


def gradients(q: ReparameterizedQuantizer) -> tuple[Tensor, Tensor]:
    assert q.weight.grad is not None
    assert q.bias.grad is not None
    return q.weight.grad, q.bias.grad


def nearest(x: Tensor, vectors: Tensor) -> list[int]:
    wide = x.detach().double().reshape(-1, 1, x.shape[-1]).numpy() - vectors.detach().double().numpy()
    return (wide**2).sum(-1).argmin(1).tolist()


# Construction


def test_it_is_a_quantizer_that_learns_a_map_and_no_codebook() -> None:
    q = made()
    assert isinstance(q, Quantizer)
    assert q.discrete
    assert q.seeded
    assert [name for name, _ in q.named_parameters()] == ["weight", "bias"]
    assert not q.basis.requires_grad
    assert q.revived_parameters() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_codes": 0}, "num_codes is 0"),
        ({"code_dim": 0}, "code_dim is 0"),
        ({"commitment_weight": -1.0}, "commitment_weight is -1.0"),
        ({"commitment_weight": math.inf}, "commitment_weight is inf"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReparameterizedQuantizer(**{"num_codes": K, "code_dim": D, **options})


def test_the_map_starts_as_that_of_nn_linear_and_follows_from_the_seed() -> None:
    dim = 64
    torch.manual_seed(1)
    q, linear = ReparameterizedQuantizer(8, dim, seed=5), nn.Linear(dim, dim)
    torch.manual_seed(2)
    same, other = ReparameterizedQuantizer(8, dim, seed=5), ReparameterizedQuantizer(8, dim, seed=6)
    for name in ("weight", "bias"):
        own, torchs = getattr(q, name).detach(), getattr(linear, name).detach()
        assert torch.equal(getattr(same, name), own)
        assert not torch.equal(getattr(other, name), own)
        assert own.shape == torchs.shape
        assert own.abs().max() <= 1 / math.sqrt(dim)
        assert own.std().item() == pytest.approx(torchs.std().item(), rel=0.2)
    ordered = q.weight.detach().flatten().sort().values * math.sqrt(dim)
    torch.testing.assert_close(ordered, torch.linspace(-1, 1, dim * dim), rtol=0, atol=0.04)  # uniform throughout


def test_the_basis_drawn_by_default_is_nearly_orthogonal() -> None:
    """AminoAseed dossier, check 6: cosines of standard deviation 1/sqrt(D)."""
    basis = ReparameterizedQuantizer(100, 512, seed=3).basis
    assert basis.std().item() == pytest.approx(1.0, abs=0.02)
    cosines = torch.corrcoef(basis)[~torch.eye(100, dtype=torch.bool)]
    assert cosines.std().item() == pytest.approx(1 / math.sqrt(512), rel=0.05)


def test_workers_start_alike_and_share_one_reduce_of_the_counts_a_step() -> None:
    def work(seat: Seat) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        q = made(reduce=seat)
        started = q.codebook.readable()
        q(drawn(seat.rank, 20 + seat.rank, D))
        return started, q.basis, q.last_counts[0], seat.carried

    (vectors, basis, counts, carried), other = together(2, work)
    assert torch.equal(vectors, other[0])
    assert torch.equal(basis, other[1])
    assert torch.equal(counts, other[2])
    assert counts.sum() == 41
    assert carried == other[3] == [K]


# The codebook is the map of the basis


def test_codes_vectors_and_look_up_are_those_of_the_mapped_basis() -> None:
    q = made()
    mapped = q.basis.double().numpy() @ q.weight.detach().double().numpy().T + q.bias.detach().double().numpy()
    np.testing.assert_allclose(q.codebook.vectors.detach().numpy(), mapped, atol=1e-6)
    x = drawn(1, 10, 20, D)
    codes = nearest(x, torch.tensor(mapped))
    unmapped = nearest(x, q.basis)
    assert np.mean(np.array(codes) != np.array(unmapped)) > 0.5, "the case must tell the two apart"
    out = q(x)
    assert out.codes.flatten().tolist() == codes
    assert q.assign(x).flatten().tolist() == codes
    assert q.eval()(x).codes.flatten().tolist() == codes
    for vectors in (out.vectors, q(x).vectors, q.look_up(out.codes)):
        np.testing.assert_allclose(vectors.detach().reshape(-1, D).numpy(), mapped[codes], atol=1e-6)
    assert q.last_counts[0].tolist() == np.bincount(codes, minlength=K).tolist()
    squared = ((x.double().reshape(-1, D).numpy() - mapped[codes]) ** 2).sum()
    assert out.squared_error.item() == pytest.approx(squared, rel=1e-5)


def test_with_the_identity_as_map_it_is_plain_vq() -> None:
    """AminoAseed dossier, check 1."""
    q, plain = made(), VectorQuantizer(K, D, decay=None, revive_below=0.0, commitment_weight=0.25)
    with torch.no_grad():
        q.weight.copy_(torch.eye(D))
        q.bias.zero_()
    plain.codebook.set_vectors(q.basis)
    x, own = drawn(1, 50, D).requires_grad_(), drawn(1, 50, D).requires_grad_()
    out, wanted = q(x), plain(own)
    assert torch.equal(out.codes, wanted.codes)
    assert torch.equal(out.vectors, wanted.vectors)
    # Plain VQ adds a row's squares up in float32.
    torch.testing.assert_close(out.loss, wanted.loss)
    torch.testing.assert_close(out.squared_error, wanted.squared_error, rtol=1e-6, atol=0)
    for one in (out, wanted):
        (one.loss + one.vectors.square().sum()).backward()
    torch.testing.assert_close(x.grad, own.grad)
    # Row k of plain VQ's gradient, seen through q_k = W c_k + b.
    assert isinstance(plain.codebook.vectors.grad, Tensor)
    to_weight, to_bias = gradients(q)
    torch.testing.assert_close(to_weight, plain.codebook.vectors.grad.T @ q.basis)
    torch.testing.assert_close(to_bias, plain.codebook.vectors.grad.sum(0))


def test_every_code_moves_on_every_step_and_the_basis_on_none() -> None:
    """AminoAseed dossier, check 2: one code is hit; plain VQ moves that one."""
    q, plain = made(), VectorQuantizer(K, D, decay=None, revive_below=0.0)
    plain.codebook.set_vectors(q.codebook.readable())
    basis = q.basis.numpy().tobytes()
    optimisers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (q, plain)]
    for step in range(3):
        x = q.codebook.readable()[[7]] + 0.01 * drawn(step, 20, D)
        plain.codebook.set_vectors(q.codebook.readable())
        moved = []
        for one, optimiser in zip((q, plain), optimisers, strict=True):
            before = one.codebook.readable().clone()
            optimiser.zero_grad()
            out = one(x)
            assert (out.codes == 7).all()
            out.loss.backward()
            optimiser.step()
            moved.append((one.codebook.readable() != before).any(-1).nonzero().flatten().tolist())
        assert moved == [list(range(K)), [7]]
    assert q.basis.numpy().tobytes() == basis
    assert q.basis.grad is None
    assert len(optimisers[0].param_groups[0]["params"]) == 2


# Gradients


@pytest.mark.parametrize("commitment_weight", [0.25, 2.0])
def test_gradients_are_those_of_the_formula(commitment_weight: float) -> None:
    q = made(commitment_weight=commitment_weight).double()
    x, mask, g = drawn(1, 6, 10, D).double().requires_grad_(), drawn(2, 6, 10) > -0.5, drawn(3, 6, 10, D).double()
    out = q(x, mask)
    (out.loss + (out.vectors * g).sum()).backward()
    own, weight, bias = (t.detach().clone().requires_grad_() for t in (x, q.weight, q.bias))
    vectors = q.basis @ weight.T + bias
    kept = own[mask]
    chosen = vectors[nearest(kept, vectors)]
    loss = (kept.detach() - chosen).square().mean() + commitment_weight * (kept - chosen.detach()).square().mean()
    (loss + ((kept + (chosen - kept).detach()) * g[mask]).sum()).backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for found, wanted in ((x, own), (q.weight, weight), (q.bias, bias)):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-12)


def test_the_two_terms_have_weights_1_and_commitment_weight() -> None:
    x, mask = drawn(1, 40, D), drawn(2, 40) > 0
    for commitment_weight in (0.0, 0.25, 3.0):
        for q in (made(commitment_weight=commitment_weight), made(commitment_weight=commitment_weight).eval()):
            out = q(x, mask)
            mean = out.squared_error.item() / (int(mask.sum()) * D)
            assert out.loss.item() == pytest.approx((1.0 + commitment_weight) * mean, rel=1e-6)


def test_the_codebook_term_trains_the_map_and_the_commitment_trains_x() -> None:
    x = drawn(1, 40, D).requires_grad_()
    codebook_only, both = made(commitment_weight=0.0), made(commitment_weight=0.5)
    codebook_only(x).loss.backward()
    assert x.grad is not None
    assert not x.grad.any()
    both(x).loss.backward()
    for alone, found in zip(gradients(codebook_only), gradients(both), strict=True):
        assert found.any()
        assert torch.equal(alone, found), "the commitment reached the map"
    codes = both.assign(x)
    torch.testing.assert_close(x.grad, 2 * 0.5 * (x.detach() - both.look_up(codes)) / x.numel())


@pytest.mark.parametrize("estimator", [straight_through, rotate])
def test_the_gradient_of_the_output_is_the_estimators_and_never_reaches_the_map(estimator: Any) -> None:
    q = made(estimator=estimator)
    x, own, g = drawn(1, 40, D).requires_grad_(), drawn(1, 40, D).requires_grad_(), drawn(2, 40, D)
    out = q(x)
    (out.vectors * g).sum().backward()
    (estimator(own, q.look_up(out.codes)) * g).sum().backward()
    torch.testing.assert_close(x.grad, own.grad)
    assert q.weight.grad is None
    assert q.bias.grad is None


def test_padding_pulls_neither_the_map_nor_the_loss() -> None:
    """The source assigns padding too and averages both terms over it."""
    q, shorter, source = made(), made(), made()
    x, keep = drawn(1, 40, D), torch.arange(40) < 25
    padded = torch.where(keep.unsqueeze(-1), x, 5.0)
    out, wanted, theirs = q(padded, keep), shorter(x[:25]), source(padded)
    assert out.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    assert out.loss.item() != pytest.approx(theirs.loss.item(), rel=0.1)
    for one in (out, wanted, theirs):
        one.loss.backward()
    for found, alone, pulled in zip(gradients(q), gradients(shorter), gradients(source), strict=True):
        torch.testing.assert_close(found, alone)
        assert not torch.allclose(found, pulled, rtol=0.1)
    assert torch.equal(q.last_counts[0], shorter.last_counts[0])


# Precision


def test_products_stay_float32_under_autocast_on_the_way_back_too() -> None:
    """A bfloat16 product of the basis moves every code by 1 part in 256, and rounds the gradient of W as much."""
    q, plain = (ReparameterizedQuantizer(64, 32, seed=2) for _ in range(2))
    x = drawn(1, 200, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q.codebook.vectors, plain.codebook.vectors.detach())
        out = q(x)
        out.loss.backward()
        assert (q.basis @ q.weight.T).dtype == torch.bfloat16, "the case must autocast"
    plain(x).loss.backward()
    for found, wanted in zip(gradients(q), gradients(plain), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_leaves_the_basis_and_the_map_in_float32(dtype: torch.dtype) -> None:
    q, plain = made().to(dtype), made()
    assert q.basis.dtype == q.weight.dtype == q.bias.dtype == q.codebook.vectors.dtype == torch.float32
    assert torch.equal(q.codebook.vectors, plain.codebook.vectors)
    assert q.double().codebook.vectors.dtype == torch.float64


# The basis from data


def test_a_basis_from_data_is_rows_of_it_for_any_number_of_workers() -> None:
    x = 3 + drawn(1, 100, D)
    x[50] = torch.nan
    mask = torch.arange(100) % 5 != 1

    def batches(rows: range) -> list[VectorBatch]:
        parts = torch.tensor(list(rows), dtype=torch.int64).split(9)
        return [VectorBatch(x[part], mask[part], part) for part in parts if len(part)]

    alone = made(seeding=random_rows)
    assert not alone.seeded
    said = alone.seed(batches(range(100)))
    assert said == f"the basis of {K} codes by random_rows from 79 of 79 vectors; 1 more were not finite"
    rows = [(x == row).all(-1).nonzero().item() for row in alone.basis]
    assert len(set(rows)) == K
    assert all(mask[row] for row in rows)
    assert torch.equal(alone.weight, made().weight), "data moves the basis alone"
    torch.testing.assert_close(alone.codebook.readable(), alone.basis @ alone.weight.detach().T + alone.bias.detach())

    def work(seat: Seat) -> Tensor:
        q = made(seeding=random_rows, reduce=seat)
        assert q.seed(batches([range(0, 13), range(13, 13), range(13, 100)][seat.rank])) == said
        return q.basis

    for basis in together(3, work):
        assert torch.equal(basis, alone.basis)


def test_training_forwards_gather_the_basis() -> None:
    q = made(seeding=random_rows)
    for step in range(3):
        assert not q.seeded
        out = q(drawn(step, 5, D))
        assert (out.codes.tolist(), out.loss.item()) == ([-1] * 5, 0.0)
    assert q.seeded
    seen = torch.cat([drawn(step, 5, D) for step in range(3)])
    assert all((seen == row).all(-1).any() for row in q.basis)
    assert (q(drawn(9, 5, D)).codes >= 0).all()


def test_what_a_derived_codebook_cannot_do_is_refused() -> None:
    q = made()
    before = {name: tensor.clone() for name, tensor in q.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"derived from its quantizer's parameters.*use VectorQuantizer"):
        q.codebook.set_vectors(drawn(1, K, D))
    with pytest.raises(RuntimeError, match=r"seeding=None.*seeding=vqcore\.seeding\.random_rows"):
        q.seed([VectorBatch(drawn(1, 50, D))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in q.state_dict().items())
    unseeded = made(seeding=random_rows).eval()
    for call in (unseeded, unseeded.assign):
        with pytest.raises(RuntimeError, match="never seeded"):
            call(drawn(1, 5, D))
    with pytest.raises(RuntimeError, match="never seeded"):
        unseeded.look_up(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"11 usable vectors.*12 codes"):
        unseeded.seed([VectorBatch(drawn(1, 11, D))])


# What it is for


@pytest.mark.parametrize("num_codes", [512, 4096])
def test_more_codes_stay_in_use_than_in_plain_vq_where_the_encoder_drifts(num_codes: int) -> None:
    """AminoAseed dossier, check 3: the same outputs, size, seed and steps."""
    q = ReparameterizedQuantizer(num_codes, 8, seed=1)
    plain = VectorQuantizer(num_codes, 8, decay=None, revive_below=0.0)
    plain.codebook.set_vectors(q.codebook.readable())
    optimisers = [torch.optim.Adam(one.parameters(), lr=0.02) for one in (q, plain)]
    for step in range(150):
        x = 0.3 * drawn(step, 256, 8) + 4 * step / 150
        for one, optimiser in zip((q, plain), optimisers, strict=True):
            optimiser.zero_grad()
            one(x).loss.backward()
            optimiser.step()
    counts = [torch.bincount(one.assign(0.3 * drawn(999, 4096, 8) + 4), minlength=num_codes) for one in (q, plain)]
    assert usage(counts[0]) > 2 * usage(counts[1])
    assert perplexity(counts[0]) > 2 * perplexity(counts[1])


def test_the_commitment_does_not_grow_under_the_rotation_trick() -> None:
    """lucidrains/vector-quantize-pytorch 177: its mapped codebook with the rotation trick has a growing loss."""
    q = ReparameterizedQuantizer(64, 4, seed=1, estimator=rotate)
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 6)
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *q.parameters()], lr=0.01)
    path = []
    for step in range(300):
        x = drawn(step, 256, 6)
        out = q(encoder(x))
        reconstruction = (decoder(out.vectors) - x).square().mean()
        optimiser.zero_grad()
        (reconstruction + out.loss).backward()
        optimiser.step()
        path.append((out.loss.item(), reconstruction.item()))
    losses, errors = np.array(path).T
    assert losses[-50:].mean() < 0.5 * losses[:10].mean()
    assert losses[-50:].mean() < 1.1 * losses[-150:-100].mean()
    assert errors[-50:].mean() < 0.8 * errors[:10].mean()
