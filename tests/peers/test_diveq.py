"""diveq: SF-DiVeQ, the space-filling curve of the same authors with directional noise (Vali et al. 2025)."""

import diveq
import pytest
import torch
from torch import Tensor

from tests.peers.verdict import peer_is_wrong
from vqcore import curve
from vqcore.quantizers import Quantized, SpaceFillingQuantizer

PEER = "diveq"


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def peer(corners: Tensor, noise_var: float = 1e-9) -> diveq.SFDIVEQ:
    """Without its start-up phases. As its directional noise vanishes, its value is the dithered point itself."""
    made = diveq.SFDIVEQ(*corners.shape, noise_var=noise_var, skip_iters=0, avg_iters=0, allow_warning=False)
    made.codebook.data.copy_(corners)
    return made


def dithered_alike(
    made: diveq.SFDIVEQ, q: SpaceFillingQuantizer, x: Tensor, patch: pytest.MonkeyPatch
) -> tuple[tuple[Tensor, Tensor, float], Quantized]:
    """(its output, ours) of a training forward with the positions that it draws."""
    torch.manual_seed(3)
    positions = torch.rand(q.num_codes - 1, 1)
    patch.setattr("vqcore.noise.shared_uniform", lambda *_: positions[:, 0].double())
    torch.manual_seed(3)
    return made(x), q(x)


def test_the_dithered_codes_and_points(monkeypatch: pytest.MonkeyPatch) -> None:
    q = SpaceFillingQuantizer(12, 4, seed=2)
    (vectors, codes, _), out = dithered_alike(peer(q.codebook.vectors), q, drawn(1, 2000, 4), monkeypatch)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.vectors, vectors, rtol=0, atol=1e-5)


def test_the_projection_on_the_curve() -> None:
    corners, x = drawn(0, 40, 6), drawn(1, 3000, 6)
    wanted, _, _ = peer(corners).inference(x)
    torch.testing.assert_close(curve.at(corners, *curve.project(x, corners)), wanted, rtol=0, atol=1e-5)


@peer_is_wrong(
    "at inference it answers with the nearest corner, in training with the segment: one number, two meanings",
    right="a segment in both, and `project` gives the position on it",
)
def test_what_a_code_is() -> None:
    corners, x = drawn(0, 40, 6), drawn(1, 3000, 6)
    _, codes, _ = peer(corners).inference(x)
    assert torch.equal(codes, torch.cdist(x, corners).argmin(1))
    q = SpaceFillingQuantizer(40, 6).eval()
    q.codebook.set_vectors(corners)
    ours, positions = q.project(x)
    assert ours.max() < 39 <= codes.max()
    assert torch.equal(q.point(ours, positions), q(x).vectors)


@peer_is_wrong(
    "two equal corners, a segment of length 0: vectors near them are projected to NaN",
    right="such a segment is its corner",
)
def test_a_segment_of_length_0() -> None:
    corners, x = drawn(0, 6, 3), drawn(1, 100, 3)
    corners[1] = corners[0]
    assert peer(corners).inference(x)[0].isnan().any()
    segments, positions = curve.project(x, corners)
    assert positions.isfinite().all()
    squared = (x - curve.at(corners, segments, positions)).square().sum(-1)
    assert (squared <= torch.cdist(x, corners).amin(1).square() + 1e-5).all()


@peer_is_wrong(
    "one NaN in one vector gives the first two corners a NaN gradient",
    right="the vector is left out; the gradient is that of the other vectors",
)
def test_one_nan() -> None:
    q, clean = (SpaceFillingQuantizer(12, 4, seed=2, joint=True) for _ in range(2))
    made, x, keys = peer(q.codebook.vectors), drawn(1, 50, 4), torch.arange(50)
    x[7, 2] = torch.nan
    keep = keys != 7
    vectors, codes, _ = made(x)
    vectors.sum().backward()
    assert codes[7] == 0
    assert made.codebook.grad[:2].isnan().all()
    assert not made.codebook.grad[2:].isnan().any()
    q(x, keys=keys).vectors.sum().backward()
    clean(x[keep], keys=keys[keep]).vectors.sum().backward()
    torch.testing.assert_close(q.codebook.vectors.grad, clean.codebook.vectors.grad)
