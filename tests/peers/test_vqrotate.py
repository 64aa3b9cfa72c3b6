"""vqrotate: the rotation trick's gradient as an autograd function."""

import pytest
import torch
from torch import Tensor
from vqrotate import RotationQuantization

from tests.peers.verdict import peer_is_wrong
from vqcore.estimators import rotate, straight_through

PEER = "vqrotate"


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def theirs(x: Tensor, q: Tensor, strategy: str = "rotation") -> Tensor:
    return RotationQuantization.apply(x, q, strategy, False, 1e-8)


def gradient(estimator, x: Tensor, q: Tensor, g: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad((estimator(x, q) * g).sum(), x)
    return found


def paper(x: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """lambda R^T g with R^T as a D x D matrix in float64 (Fifty et al. 2025, section 4.2): d q_tilde = lambda R dx."""
    rows = []
    for e, code, upstream in zip(x.double(), q.double(), g.double(), strict=True):
        e_hat, q_hat = e / e.norm(), code / code.norm()
        r = (e_hat + q_hat) / (e_hat + q_hat).norm()
        rotation = torch.eye(len(e), dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q_hat, e_hat)
        rows.append(code.norm() / e.norm() * (rotation.T @ upstream))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", [(50, 8), (4, 10, 8)])
def test_the_value_is_the_code(shape: tuple[int, ...]) -> None:
    x, q = drawn(1, *shape), drawn(2, *shape)
    assert torch.equal(theirs(x, q), q)
    assert torch.equal(rotate(x, q), q)


def test_straight_through() -> None:
    x, q, g = drawn(1, 50, 8), drawn(2, 50, 8), drawn(3, 50, 8)
    assert torch.equal(gradient(lambda a, b: theirs(a, b, "ste"), x, q, g), gradient(straight_through, x, q, g))


def test_the_gradient_where_the_upstream_one_is_across_both() -> None:
    """Orthogonal to x and to its code a rotation leaves g alone: only |q| / |x| remains."""
    x, q, g = drawn(1, 50, 3), drawn(2, 50, 3), torch.zeros(50, 3)
    g = torch.linalg.cross(x, q)
    torch.testing.assert_close(gradient(theirs, x, q, g), gradient(rotate, x, q, g), rtol=1e-4, atol=1e-4)


def test_the_gradient_where_x_lies_along_its_code() -> None:
    x, g = drawn(1, 50, 8), drawn(3, 50, 8)
    torch.testing.assert_close(gradient(theirs, x, 2 * x, g), gradient(rotate, x, 2 * x, g))


@peer_is_wrong(
    "vqrotate multiplies the gradient by the rotation R where backpropagation multiplies by its transpose",
    right="lambda R^T g, as the paper's formula differentiates",
)
def test_the_gradient_is_of_the_transposed_rotation() -> None:
    x, q, g = drawn(1, 50, 8), drawn(2, 50, 8), drawn(3, 50, 8)
    wanted = paper(x, q, g).float()
    torch.testing.assert_close(gradient(rotate, x, q, g), wanted, rtol=1e-4, atol=1e-4)
    assert (gradient(theirs, x, q, g) - wanted).abs().max() > 1
    # What it computes is R g: the same trick with x and code exchanged, each keeping its length.
    scale = (q.norm(dim=-1) / x.norm(dim=-1)).unsqueeze(-1).square()
    torch.testing.assert_close(gradient(theirs, x, q, g), gradient(rotate, q, x, g) * scale, rtol=1e-3, atol=1e-3)


@peer_is_wrong(
    "vqrotate multiplies the gradient of x = 0 by |q| / 1e-8",
    right="no rotation exists at 0: the straight-through gradient",
)
def test_the_gradient_at_zero() -> None:
    x, q, g = torch.zeros(1, 4), drawn(2, 1, 4), drawn(3, 1, 4)
    assert gradient(theirs, x, q, g).abs().max() > 1e6
    assert torch.equal(gradient(rotate, x, q, g), g)
