"""The derived codebook, inside the smallest quantizer that could own one."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.together import Seat, together
from vqcore.derived import DerivedCodebook, refuse_misfit
from vqcore.update import Rule, Statistics, update

K, D = 6, 3


class Scaled(nn.Module):
    """Codes = scale x basis."""

    basis: Tensor

    def __init__(self, num_codes: int = K, code_dim: int = D) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))
        basis = torch.randn(num_codes, code_dim, generator=torch.Generator().manual_seed(1))
        self.register_buffer("basis", basis)
        self.codebook = DerivedCodebook(num_codes, code_dim, self.derive)

    def derive(self) -> Tensor:
        return self.scale * self.basis

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        refuse_misfit(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def owner() -> Scaled:
    made = Scaled()
    made.codebook.mark_seeded()
    return made


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in module.state_dict().items()}


def test_vectors_follow_the_parameters_with_a_gradient() -> None:
    made = owner()
    assert torch.equal(made.codebook.vectors, 2.0 * made.basis)
    (gradient,) = torch.autograd.grad(made.codebook.vectors.sum(), made.scale)
    torch.testing.assert_close(gradient, made.basis.sum().unsqueeze(0))
    assert not made.codebook.readable().requires_grad
    with torch.no_grad():
        made.scale.fill_(-3.0)
    wanted = -3.0 * made.basis
    assert torch.equal(made.codebook.readable(), wanted), "nothing is cached"
    assert torch.equal(made.codebook.look_up(torch.arange(K)), wanted)


def test_look_up_gives_rows_and_zero_for_masked() -> None:
    made = owner()
    found = made.codebook.look_up(torch.tensor([[0, 5], [-1, 2]], dtype=torch.int16))
    assert torch.equal(found[0], made.codebook.readable()[[0, 5]])
    assert torch.equal(found[1, 0], torch.zeros(D))
    assert made.codebook.look_up(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, D)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (torch.tensor([0, 6]), "from 0 to 6.*codes 0 to 5"),
        (torch.tensor([-2, 1]), "from -2 to 1"),
        (torch.tensor([1.0]), "float32"),
    ],
)
def test_look_up_refuses(codes: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        owner().codebook.look_up(codes)


def test_it_cannot_be_read_before_there_is_something_to_read() -> None:
    made = Scaled()
    assert not made.codebook.is_seeded
    with pytest.raises(RuntimeError, match="never seeded"):
        made.codebook.look_up(torch.tensor([0]))


def test_vectors_can_neither_be_set_nor_revived_and_the_reason_is_said() -> None:
    made = owner()
    before = bits(made)
    with pytest.raises(RuntimeError, match="derived from its quantizer's parameters"):
        made.codebook.set_vectors(torch.zeros(K, D))
    with pytest.raises(RuntimeError, match="revive_below=0"):
        made.codebook.revive(torch.tensor([0]), torch.zeros(1, D), 1.0)
    assert bits(made) == before


def test_an_update_is_one_reduce_of_the_counts_which_decay() -> None:
    rule = Rule(decay=None, revive_below=0.0, eps=0.0, seed=0)

    def work(seat: Seat) -> tuple[list[int], Scaled]:
        made = owner()
        for step in range(3):
            one = Statistics(made.codebook, rule)
            codes = torch.tensor([0, 1, 1, -1, 5, step])[2 * seat.rank : 2 * seat.rank + 2 + 2 * seat.rank]
            one.add(torch.zeros(len(codes), D), codes, None)
            update([one], seat)
        return seat.carried, made

    results = together(2, work)
    wanted = np.ones(K)
    for step in range(3):
        wanted = 0.99 * wanted + 0.01 * np.bincount([0, 1, 1, 5, step], minlength=K)
    for carried, made in results:
        assert carried == [K] * 3
        np.testing.assert_allclose(made.codebook.counts.numpy(), wanted, rtol=1e-14)
        assert made.codebook.last_counts.tolist() == [1, 2, 1, 0, 0, 1]
        assert int(made.codebook.step) == 3
        assert torch.equal(made.codebook.readable(), 2.0 * made.basis)


def test_a_global_count_of_zero_changes_nothing() -> None:
    made = owner()
    made.codebook.ema_update(torch.arange(6.0).double(), None, 0.9, 0.0)
    before, counts = bits(made), made.codebook.last_counts.clone()
    made.codebook.ema_update(torch.zeros(6).double(), None, 0.9, 0.0)
    assert bits(made) == before
    assert torch.equal(made.codebook.last_counts, counts)


def test_counts_stay_float64_whatever_the_module_around_them_becomes() -> None:
    made = owner()
    made.codebook.counts.fill_(1 / 3)
    for dtype in (torch.float16, torch.float32, torch.float64):
        made.to(dtype)
        assert made.codebook.dtype == dtype, "the owner decides for its parameters"
        assert torch.equal(made.codebook.counts, torch.full((K,), 1 / 3, dtype=torch.float64))
        assert made.codebook.last_counts.dtype == torch.float64


def test_a_state_goes_round_with_its_seeding_flag() -> None:
    made, fresh = owner(), Scaled()
    made.codebook.ema_update(torch.arange(6.0).double(), None, 0.9, 0.0)
    fresh.load_state_dict(made.state_dict())
    assert bits(fresh) == bits(made)
    assert fresh.codebook.is_seeded
    fresh.load_state_dict(Scaled().state_dict())
    assert not fresh.codebook.is_seeded


@pytest.mark.parametrize("other", [(7, D), (K, 4)])
def test_a_state_of_other_sizes_is_refused_whole(other: tuple[int, int]) -> None:
    model, given = nn.Sequential(owner()), nn.Sequential(Scaled(*other))
    given[0].codebook.step.fill_(41)
    with torch.no_grad():
        given[0].scale.fill_(9.0)
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"0\.basis has shape .* in the state and \(6, 3\) here"):
        model.load_state_dict(given.state_dict())
    assert bits(model) == before


def test_a_deep_copy_derives_from_its_own_parameters() -> None:
    made = owner()
    copied = copy.deepcopy(made)
    with torch.no_grad():
        copied.scale.fill_(7.0)
    assert torch.equal(made.codebook.readable(), 2.0 * made.basis)
    assert torch.equal(copied.codebook.readable(), 7.0 * made.basis)
