"""Training steps that suit every quantizer, and what two of them must have in common."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tests.vqcore.quantizers.cases import D
from vqcore.codebook import Codebook
from vqcore.derived import DerivedCodebook
from vqcore.quantizers import Quantized, Quantizer
from vqcore.quantizers.updates import Updates
from vqcore.reduction import Alone, Reduction
from vqcore.update import Rule


class AnyQuantizer(Quantizer, Protocol):
    """The protocol, and what it leaves to nn.Module and to the shape of a method's codes."""

    def __call__(self, x: Tensor, mask: Tensor | None = None, keys: Tensor | None = None) -> Quantized: ...
    def assign(self, x: Tensor, mask: Tensor | None = None) -> Tensor: ...
    def look_up(self, codes: Tensor) -> Tensor: ...


class Stepped(NamedTuple):
    """One training step of one worker."""

    out: Quantized
    x_gradient: Tensor
    """Of W x this worker's share: divided by W it is the gradient of the global objective."""
    parameter_gradients: dict[str, Tensor]
    """Averaged over workers, 0 where a parameter had no part."""
    revived: bool


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in module.state_dict().items()}


def rules_of(q: nn.Module) -> list[Rule]:
    """The rules of every book that `q` or a part of it updates."""
    owned = [value for module in q.modules() for value in vars(module).values() if isinstance(value, Updates)]
    return [rule for updates in owned for rule in updates.rules]


def revives(q: nn.Module) -> bool:
    """Whether a dead code of `q` can come back."""
    return any(rule.revive_below > 0 for rule in rules_of(q))


def has_revived(q: nn.Module) -> bool:
    """Whether the newest update revived a code."""
    books = [module for module in q.modules() if isinstance(module, Codebook | DerivedCodebook)]
    return any(book.revived is not None for book in books)


def objective(out: Quantized, x: Tensor, count: int, world: int) -> Tensor:
    """The quantizer's own loss and a task's, which reaches the output: its mean over workers is the global mean.

    The task's target is a function of each row of `x`, so that it does not depend on who holds the row."""
    target = 0.3 + x.detach().to(out.vectors.dtype).nan_to_num(0.0, 0.0, 0.0).sin()
    task = (out.vectors * target + 0.1 * out.vectors.square()).sum()
    return out.loss + world * task / max(1, count) / D


def descend(q: nn.Module, reduce: Reduction, rate: float) -> dict[str, Tensor]:
    """Average the gradients over workers and take a step of SGD; returns the gradients."""
    gradients = {}
    for name, parameter in q.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        shared = gradient.double()
        reduce(shared)
        gradients[name] = (shared / reduce.world).to(parameter)
        with torch.no_grad():
            parameter -= rate * gradients[name]
        parameter.grad = None
    return gradients


def train_step(
    q: nn.Module,
    x: Tensor,
    mask: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    count: int,
    reduce: Reduction | None = None,
    rate: float = 0.2,
) -> Stepped:
    """Forward, backward and, where `q` has parameters, SGD. `count` is the global number of valid vectors."""
    reduce = reduce or Alone()
    x = x.detach().clone().requires_grad_()
    out = q(x, mask, keys)
    revived = has_revived(q)
    objective(out, x, count, reduce.world).backward()
    assert x.grad is not None
    return Stepped(out, x.grad, descend(q, reduce, rate), revived)


def assert_same_counts(q: AnyQuantizer, other: AnyQuantizer) -> None:
    """Whole numbers, or thirds where a vector is the mean of three codes: then the order of a sum rounds."""
    for mine, wanted in zip(q.last_counts, other.last_counts, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=0)


def assert_close_states(q: nn.Module, other: nn.Module, scale: float = 1.0) -> None:
    """Every number of the state within 1e-6 x `scale`, the largest |x| that the two have seen."""
    mine, wanted = q.state_dict(), other.state_dict()
    assert mine.keys() == wanted.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(
            tensor, wanted[name], rtol=0, atol=1e-6 * scale, msg=lambda said, name=name: f"{name}: {said}"
        )
