"""SpaceFillingQuantizer: the paper's equations against brute force, autograd and numpy; a curve that orders."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.together import Seat, together
from vqcore import curve, noise
from vqcore.estimators import substitute_noise
from vqcore.quantizers import Quantized, Quantizer, SpaceFillingQuantizer, VectorBatch
from vqcore.seeding import kmeans_plus_plus, norm_blocks

K, D = 12, 4
both = pytest.mark.parametrize("joint", [False, True], ids=["alone", "joint"])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> SpaceFillingQuantizer:
    return SpaceFillingQuantizer(K, D, **{"seed": 2, **options})


def bits(q: SpaceFillingQuantizer) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in q.state_dict().items()}


def lambdas_of(q: SpaceFillingQuantizer, seed: int = 2) -> Tensor:
    """Those that the next training forward of `q` draws."""
    return noise.shared_uniform(seed, int(q.codebook.step), q.num_codes - 1).to(q.codebook.vectors.dtype)


# Construction


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((1, D), "num_codes is 1; a line needs at least 2 corners"),
        ((0, D), "num_codes is 0"),
        ((K, 0), "code_dim is 0"),
    ],
)
def test_bad_arguments_are_refused(sizes: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SpaceFillingQuantizer(*sizes)


def test_it_is_a_quantizer_whose_codes_are_segments() -> None:
    q = made()
    assert isinstance(q, Quantizer)
    assert not q.discrete
    assert q.seeded
    assert isinstance(q.codebook.vectors, torch.nn.Parameter)
    assert q.revived_parameters() == []
    assert [len(counts) for counts in q.last_counts] == [K - 1]


# Training


@both
def test_a_training_forward_is_the_nearest_of_the_dithered_points(joint: bool) -> None:
    q = made(joint=joint)
    for step in range(5):
        corners, lam = q.codebook.vectors.detach().double().numpy(), lambdas_of(q).double().numpy()
        x, mask = 1.5 * drawn(step, 10, 20, D), drawn(50 + step, 10, 20) > -1
        out = q(x, mask)
        points = np.stack([(1 - lam[j]) * corners[j] + lam[j] * corners[j + 1] for j in range(K - 1)])
        flat, keep = x.double().reshape(-1, D).numpy(), mask.reshape(-1).numpy()
        squared = ((flat[:, None] - points) ** 2).sum(-1)
        codes = squared.argmin(1)
        assert out.codes.reshape(-1).tolist() == np.where(keep, codes, -1).tolist()
        wanted = squared.min(1)[keep].sum()
        assert out.squared_error.item() == pytest.approx(wanted, rel=1e-5)
        assert out.loss.item() == pytest.approx(0.0 if joint else wanted / keep.sum() / D, rel=1e-5)
        assert q.last_counts[0].tolist() == np.bincount(codes[keep], minlength=K - 1).tolist()
        if not joint:
            np.testing.assert_allclose(
                out.vectors.reshape(-1, D)[keep].detach().numpy(), points[codes[keep]], atol=1e-5
            )
    assert int(q.codebook.step) == 5


def test_the_loss_moves_the_two_corners_of_the_segment_by_their_share() -> None:
    q = made()
    lam = lambdas_of(q)
    x = drawn(1, 1, D)
    out = q(x)
    out.loss.backward()
    (j,) = out.codes.tolist()
    gradient = q.codebook.vectors.grad
    assert gradient is not None
    assert gradient.any(-1).nonzero().flatten().tolist() == [j, j + 1]
    torch.testing.assert_close(gradient[j] / (1 - lam[j]), gradient[j + 1] / lam[j])
    leaf = q.codebook.vectors.detach().clone().requires_grad_()
    ((x[0] - (1 - lam[j]) * leaf[j] - lam[j] * leaf[j + 1]).square().sum() / D).backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_alone_the_output_passes_its_gradient_to_x_and_the_loss_to_the_corners_only() -> None:
    q = made()
    x, g = drawn(1, 30, D).requires_grad_(), drawn(2, 30, D)
    out = q(x)
    (out.vectors * g).sum().backward(retain_graph=True)
    assert torch.equal(x.grad, g)
    assert q.codebook.vectors.grad is None or not q.codebook.vectors.grad.any()
    x.grad = None
    out.loss.backward()
    assert x.grad is None or not x.grad.any()
    assert q.codebook.vectors.grad.any()


def test_jointly_the_output_is_x_and_noise_of_seed_step_and_key() -> None:
    q = made(joint=True)
    for step in range(2):
        lam, leaf = lambdas_of(q), q.codebook.vectors.detach().clone().requires_grad_()
        x, keys, g = drawn(step, 5, 6, D).requires_grad_(), torch.arange(30).reshape(5, 6) + 7, drawn(9, 5, 6, D)
        mask = drawn(8, 5, 6) > 0
        out = q(x, mask, keys)
        v = noise.normal(2, step, keys[mask], draws=D).float()
        own = x.detach()[mask].requires_grad_()
        wanted = substitute_noise(own, curve.dithered(leaf, lam)[out.codes[mask]], v)
        assert torch.equal(out.vectors[mask], wanted)
        assert not out.vectors[~mask].any()
        q.zero_grad()
        (out.vectors * g).sum().backward()
        (wanted * g[mask]).sum().backward()
        torch.testing.assert_close(x.grad[mask], own.grad)
        assert not x.grad[~mask].any()
        torch.testing.assert_close(q.codebook.vectors.grad, leaf.grad)


def test_jointly_a_squared_error_as_task_gives_the_corners_the_gradient_of_equation_3() -> None:
    """|x~ - x|^2 = |x - x_hat|^2, so the paper's two ways of training agree where x is what the task wants back."""
    alone, joint = made(), made(joint=True)
    x = drawn(1, 200, D)
    alone(x).loss.backward()
    (joint(x).vectors - x).square().mean().backward()
    torch.testing.assert_close(joint.codebook.vectors.grad, alone.codebook.vectors.grad, rtol=1e-4, atol=1e-6)


def test_jointly_the_own_loss_is_0_and_attached() -> None:
    q = made(joint=True)
    x = drawn(1, 20, D).requires_grad_()
    out = q(x)
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert not q.codebook.vectors.grad.any()


def test_lambdas_change_with_the_step_and_not_inside_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    dithered = curve.dithered

    def watched(corners: Tensor, positions: Tensor) -> Tensor:
        seen.append(positions)
        return dithered(corners, positions)

    monkeypatch.setattr(curve, "dithered", watched)
    q = made()
    with q.accumulate(count=60):
        for part in drawn(1, 60, D).split(20):
            q(part)
    q(drawn(2, 20, D))
    q(drawn(2, 20, D), torch.zeros(20, dtype=torch.bool))  # no vector, no step ...
    q(drawn(2, 20, D))  # ... so the same lambdas again
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[3], seen[4])
    assert torch.equal(seen[4], seen[5])
    assert int(q.codebook.step) == 3


def test_noise_in_tiles_is_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(joint=True)(drawn(1, 100, D)).vectors
    monkeypatch.setattr("vqcore.quantizers.space_filling._NOISE_VALUES", 7 * D)
    assert torch.equal(made(joint=True)(drawn(1, 100, D)).vectors, whole)


@both
def test_default_keys_go_on_within_a_block(joint: bool) -> None:
    """Equal noise in two forwards of one update would be no noise on average."""
    q = made(joint=joint)
    x = drawn(1, 10, D)
    with q.accumulate(count=20):
        first, second = q(x).vectors, q(x).vectors
    assert torch.equal(first, second) != joint


@both
def test_backward_works_after_the_corners_have_moved(joint: bool) -> None:
    q, still = made(joint=joint), made(joint=joint)
    x, own = drawn(1, 40, D).requires_grad_(), drawn(1, 40, D).requires_grad_()
    out, wanted = q(x), still(own)
    q(drawn(2, 40, D))
    q.codebook.set_vectors(drawn(3, K, D))
    for one in (out, wanted):
        (one.loss + one.vectors.square().sum()).backward()
    assert torch.equal(x.grad, own.grad)
    assert torch.equal(q.codebook.vectors.grad, still.codebook.vectors.grad)


# Evaluation, and what a stored code is


@both
def test_evaluation_projects_on_the_curve(joint: bool) -> None:
    q = made(joint=joint).eval()
    x, mask = 1.5 * drawn(1, 20, 30, D), drawn(2, 20, 30) > 0
    x[0, 0] = torch.nan
    before = bits(q)
    out = q(x, mask)
    keep = mask.clone()
    keep[0, 0] = False
    segments, positions = curve.project(x[keep], q.codebook.readable())
    assert torch.equal(out.codes[keep], segments)
    torch.testing.assert_close(out.vectors[keep], curve.at(q.codebook.readable(), segments, positions))
    assert (out.codes[~keep] == -1).all()
    assert not out.vectors[~keep].any()
    nearest_corner = torch.cdist(x[keep], q.codebook.readable()).amin(1).square().sum()
    squared = (x[keep] - out.vectors[keep]).square().sum()
    assert squared < nearest_corner
    assert out.squared_error.item() == pytest.approx(squared.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(0.0 if joint else squared.item() / keep.sum().item() / D, rel=1e-5)
    assert bits(q) == before


def test_project_then_point_is_the_evaluation_output_bit_for_bit() -> None:
    q = made()
    x, mask = 1.5 * drawn(1, 20, 30, D), drawn(2, 20, 30) > 0
    x[0, 0] = torch.inf
    codes, positions = q.project(x, mask)
    out = q.eval()(x, mask)
    assert torch.equal(codes, out.codes)
    assert torch.equal(codes, q.assign(x, mask))
    assert torch.equal(q.point(codes, positions), out.vectors)
    assert not positions[codes == -1].any()
    assert 0 <= positions.min() < positions.max() <= 1
    assert ((codes >= -1) & (codes < K - 1)).all()


def test_a_code_alone_gives_the_middle_of_its_segment_half_a_segment_off_at_most() -> None:
    q = made()
    corners = q.codebook.readable()
    middle = (corners[:-1] + corners[1:]) / 2
    torch.testing.assert_close(q.look_up(torch.arange(K - 1)), middle)
    torch.testing.assert_close(q.look_up(torch.tensor([[3, -1]], dtype=torch.int16))[0, 0], middle[3])
    assert not q.look_up(torch.tensor([-1])).any()
    x = drawn(1, 500, D)
    codes = q.assign(x)
    off = (q.look_up(codes) - q.eval()(x).vectors).norm(dim=-1)
    half = corners.diff(dim=0).norm(dim=-1)[codes] / 2
    assert (off <= half + 1e-5).all()
    assert off.max() > 0.9 * half.min()


def test_codes_and_positions_that_no_vector_has_are_refused() -> None:
    q = made()
    with pytest.raises(ValueError, match=rf"codes run from 0 to {K - 1}; .* codes 0 to {K - 2}"):
        q.look_up(torch.tensor([0, K - 1]))
    with pytest.raises(ValueError, match=r"codes are torch\.float32"):
        q.look_up(torch.tensor([0.0]))
    for position in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            q.point(torch.tensor([0]), torch.tensor([position]))
    with pytest.raises(ValueError, match=r"positions are torch.float32 of shape \(2,\)"):
        q.point(torch.tensor([0]), torch.tensor([0.5, 0.5]))
    unseeded = made(seeding=norm_blocks).eval()
    for call in (unseeded, unseeded.assign, unseeded.project):
        with pytest.raises(RuntimeError, match="never seeded"):
            call(drawn(1, 5, D))
    for read in (lambda: unseeded.look_up(torch.tensor([0])), unseeded.doubled):
        with pytest.raises(RuntimeError, match="never seeded"):
            read()


# Doubling


@both
def test_doubling_goes_on_with_the_same_curve_settings_and_draws(joint: bool) -> None:
    def reduce(tensor: Tensor) -> None: ...

    reduce.rank, reduce.world = 0, 1  # type: ignore[attr-defined]
    q = made(joint=joint, seeding=norm_blocks, reduce=reduce).double()
    q.seed([VectorBatch(drawn(1, 50, D))])
    q(drawn(2, 30, D))
    q.eval()
    twice = q.doubled()
    assert (twice.num_codes, twice.code_dim, twice.joint, twice.seeding) == (2 * K, D, joint, norm_blocks)
    assert twice._updates.reduce is reduce
    assert not twice.training
    assert twice.codebook.vectors.dtype == torch.float64
    assert torch.equal(twice.codebook.vectors, curve.doubled(q.codebook.readable()))
    assert int(twice.codebook.step) == 1
    assert twice.codebook.counts.tolist() == [1.0] * 2 * K
    twice.train()(drawn(3, 30, D))
    assert int(q.codebook.step) == 1
    assert torch.equal(curve.doubled(q.codebook.readable()), twice.codebook.vectors), "the old one shares nothing"


# Workers


@both
@pytest.mark.parametrize("parts", [(30, 30), (7, 53), (60, 0), (0, 13, 17, 30)])
def test_workers_share_the_dithered_points_and_average_to_the_gradient_of_one(
    joint: bool, parts: tuple[int, ...]
) -> None:
    x, keys, mask = drawn(1, 60, D).double(), torch.arange(60), torch.arange(60) % 7 != 0

    def run(mine: slice, reduce: Any) -> tuple[list[Quantized], Tensor, Tensor, list[int]]:
        q = made(joint=joint, reduce=reduce).double()
        world = 1 if reduce is None else reduce.world
        outs, gradient = [], torch.zeros(K, D, dtype=torch.float64)
        for _ in range(3):
            q.zero_grad()
            out = q(x[mine], mask[mine], keys[mine])
            task = world * (out.vectors - 1).square().sum() / mask.sum() if joint else out.loss
            task.backward()
            gradient = q.codebook.vectors.grad.clone()
            if reduce is not None:
                reduce(gradient)
                gradient /= world
            with torch.no_grad():
                q.codebook.vectors -= 0.1 * gradient
            outs.append(out)
        return outs, gradient, q.codebook.vectors.detach().clone(), [] if reduce is None else reduce.carried

    wanted, gradient, corners, _ = run(slice(0, 60), None)
    edges = np.cumsum([0, *parts])
    results = together(len(parts), lambda seat: run(slice(edges[seat.rank], edges[seat.rank + 1]), seat))
    for outs, own_gradient, own_corners, carried in results:
        assert torch.equal(own_corners, results[0][2]), "workers disagree"
        torch.testing.assert_close(own_gradient, gradient, rtol=0, atol=1e-9)
        torch.testing.assert_close(own_corners, corners, rtol=0, atol=1e-9)
        assert carried == [K, K * D] * 3, "one reduce of the counts a step, beside the loop's gradient"
        assert len(outs) == 3
    for step in range(3):
        vectors = torch.cat([outs[step].vectors for outs, *_ in results])
        torch.testing.assert_close(vectors, wanted[step].vectors, rtol=0, atol=1e-9)
        codes = torch.cat([outs[step].codes for outs, *_ in results])
        assert torch.equal(codes, wanted[step].codes)
        loss = sum(outs[step].loss.item() for outs, *_ in results) / len(parts)
        assert loss == pytest.approx(wanted[step].loss.item(), abs=1e-12)


# Seeding


def test_norm_blocks_seed_the_same_curve_for_any_number_of_workers() -> None:
    x = 1.0 + drawn(1, 200, D)
    x[50] = torch.nan
    mask = torch.arange(200) % 5 != 0
    mask[50] = True

    def batches(rows: range) -> list[VectorBatch]:
        parts = torch.tensor(list(rows), dtype=torch.int64).split(9)
        return [VectorBatch(x[part], mask[part], part) for part in parts if len(part)]

    alone = made(seeding=norm_blocks)
    said = alone.seed(batches(range(200)))
    assert said == f"{K} codes by norm_blocks from 160 of 160 vectors; 1 more were not finite"
    usable = x[mask & x.isfinite().all(-1)]
    blocks = usable[usable.norm(dim=-1).argsort()].split([14, 13, 13] * 4)
    torch.testing.assert_close(alone.codebook.readable(), torch.stack([block.mean(0) for block in blocks]))

    def work(seat: Seat) -> SpaceFillingQuantizer:
        q = made(seeding=norm_blocks, reduce=seat)
        assert q.seed(batches([range(0, 13), range(13, 13), range(13, 200)][seat.rank])) == said
        return q

    for q in together(3, work):
        assert bits(q) == bits(alone)


def test_training_forwards_gather_until_there_are_enough() -> None:
    q = made(seeding=norm_blocks)
    for step, seeded in ((0, False), (1, False), (2, True)):
        x = drawn(step, 5, D).requires_grad_()
        out = q(x)
        assert torch.equal(out.vectors, x)
        assert (out.codes.tolist(), out.loss.item()) == ([-1] * 5, 0.0)
        assert q.seeded == seeded
    assert (q(drawn(9, 5, D)).codes >= 0).all()
    wanted = norm_blocks(torch.cat([drawn(i, 5, D) for i in range(3)]), K, metric="euclidean", seed=0)
    torch.testing.assert_close(q.codebook.readable(), wanted)


def test_only_a_quantizer_with_a_seeding_can_be_seeded() -> None:
    with pytest.raises(RuntimeError, match="seeding=None"):
        made().seed([VectorBatch(drawn(1, 50, D))])
    with pytest.raises(ValueError, match=r"11 usable vectors.*12 codes"):
        made(seeding=norm_blocks).seed([VectorBatch(drawn(1, 11, D))])


# What it is for: a curve that fills the data, in order


def gaussian() -> Tensor:
    return drawn(1, 8192, 2)


def ring() -> Tensor:
    return torch.nn.functional.normalize(drawn(2, 8192, 2), dim=-1) * (1 + 0.1 * drawn(3, 8192, 1))


def pentagon() -> Tensor:
    angles = torch.arange(5) * (2 * math.pi / 5)
    return torch.stack([angles.cos(), angles.sin()], 1).repeat(1638, 1) + 0.15 * drawn(4, 8190, 2)


def fitted(x: Tensor, bits: int, steps: int) -> SpaceFillingQuantizer:
    """The authors' schedule, shortened: 4 corners, train, double, a new Adam, train ..."""
    q = SpaceFillingQuantizer(4, 2, seeding=norm_blocks, seed=1)
    q.seed([VectorBatch(x)])
    draws = torch.Generator().manual_seed(0)
    for bit in range(2, bits + 1):
        q = q.doubled() if bit > 2 else q
        optimiser = torch.optim.Adam(q.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [int(0.6 * steps), int(0.8 * steps)], 0.5)
        for _ in range(steps):
            optimiser.zero_grad()
            q(x[torch.randint(len(x), (512,), generator=draws)]).loss.backward()
            optimiser.step()
            schedule.step()
    return q.eval()


def order(corners: Tensor) -> float:
    """Mean distance of neighbours over mean distance of all pairs: about 1 without order."""
    return (corners.diff(dim=0).norm(dim=-1).mean() / torch.pdist(corners).mean()).item()


@pytest.mark.parametrize("data", [gaussian, ring, pentagon])
def test_the_curve_orders_its_corners_and_quantizes_better_than_as_many_codes(data: Callable[[], Tensor]) -> None:
    x = data()
    q = fitted(x, bits=5, steps=150)
    corners = q.codebook.readable()
    assert corners.shape == (32, 2)
    assert order(corners) < 0.5
    shuffled = corners[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    assert order(shuffled) == pytest.approx(1.0, abs=0.25)
    plain = kmeans_plus_plus(x, 32, metric="euclidean", seed=0, iterations=25)
    plain_error = torch.cdist(x, plain).amin(1).square().sum()
    error = q(x).squared_error
    assert error < 0.95 * plain_error
    # The search is local: on curves that fold this densely it is off the nearest segment now and then.
    start, along = corners[:-1], corners.diff(dim=0)
    offset = x.unsqueeze(1) - start
    positions = ((offset * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
    everywhere = (offset - positions.unsqueeze(-1) * along).square().sum(-1).amin(1).sum()
    assert everywhere * (1 - 1e-5) <= error <= 1.5 * everywhere
