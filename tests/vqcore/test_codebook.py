"""The codebook's state and its arithmetic, against numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from vqcore.codebook import Codebook, unit


def book(num_codes: int = 6, code_dim: int = 3, **options: bool) -> Codebook:
    made = Codebook(num_codes, code_dim, **options)
    made.set_vectors(torch.randn(num_codes, code_dim, generator=torch.Generator().manual_seed(1)))
    return made


def state_bits(made: Codebook) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in made.state_dict().items()}


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_seven_updates_match_a_numpy_reference(eps: float) -> None:
    made = book()
    rng = np.random.default_rng(3)
    vectors = made.vectors.numpy().astype(np.float64)
    c, s = np.ones(6), vectors.copy()
    for _ in range(7):
        counts = rng.integers(0, 4, 6).astype(np.float64)
        counts[0], counts[5] = 0.0, 3.0
        sums = rng.normal(size=(6, 3)) * counts[:, None]
        before = made.vectors.clone()
        made.ema_update(torch.tensor(counts), torch.tensor(sums), 0.8, eps)
        c, s = 0.8 * c + 0.2 * counts, 0.8 * s + 0.2 * sums
        n = c.sum()
        read = s / ((c + eps) / (n + 6 * eps) * n)[:, None]
        vectors[counts > 0] = read[counts > 0]
        np.testing.assert_allclose(made.counts.numpy(), c, rtol=1e-13)
        np.testing.assert_allclose(made.sums.numpy(), s, rtol=1e-13, atol=1e-14)
        np.testing.assert_array_equal(made.vectors.numpy(), vectors.astype(np.float32))
        untouched = torch.tensor(counts == 0)
        assert torch.equal(made.vectors[untouched], before[untouched])
        assert torch.equal(made.last_counts, torch.tensor(counts))
    assert int(made.step) == 7


@pytest.mark.parametrize("learned", [False, True])
def test_a_global_count_of_zero_changes_nothing(learned: bool) -> None:
    made = book(learned=learned)
    made.ema_update(torch.ones(6).double(), None if learned else torch.ones(6, 3).double(), 0.9, 1e-5)
    before, counts = state_bits(made), made.last_counts.clone()
    made.ema_update(torch.zeros(6).double(), None if learned else torch.zeros(6, 3).double(), 0.9, 1e-5)
    assert state_bits(made) == before
    assert torch.equal(made.last_counts, counts)


def test_set_vectors_starts_the_average_anew() -> None:
    """lucidrains/vector-quantize-pytorch forgets its sums there, and one later step moves codes by up to 25."""
    made = book()
    made.ema_update(torch.full((6,), 100.0).double(), torch.full((6, 3), 2000.0).double(), 0.5, 0.0)
    new = torch.arange(18.0).reshape(6, 3)
    made.set_vectors(new)
    assert torch.equal(made.counts, torch.ones(6).double())
    assert torch.equal(made.sums, new.double())
    mean = torch.full((6, 3), -4.0).double()
    made.ema_update(torch.full((6,), 2.0).double(), 2 * mean, 0.99, 0.0)
    wanted = (0.99 * new + 0.01 * 2 * mean) / (0.99 + 0.02)
    torch.testing.assert_close(made.vectors, wanted.float())


@pytest.mark.parametrize(
    ("vectors", "said"),
    [(torch.zeros(5, 3), r"\(5, 3\).*\(6, 3\)"), (torch.full((6, 3), torch.nan), "NaN"), (torch.zeros(6), r"\(6,\)")],
)
def test_set_vectors_refuses(vectors: torch.Tensor, said: str) -> None:
    made = book()
    before = state_bits(made)
    with pytest.raises(ValueError, match=said):
        made.set_vectors(vectors)
    assert state_bits(made) == before


def test_look_up_gives_rows_and_zero_for_masked() -> None:
    made = book()
    codes = torch.tensor([[0, 5], [-1, 2]], dtype=torch.int16)
    found = made.look_up(codes)
    assert found.shape == (2, 2, 3)
    assert torch.equal(found[0], made.vectors[[0, 5]])
    assert torch.equal(found[1, 0], torch.zeros(3))
    assert made.look_up(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, 3)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (torch.tensor([0, 6]), "from 0 to 6.*codes 0 to 5"),
        (torch.tensor([-2, 1]), "from -2 to 1"),
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([True]), "bool"),
    ],
)
def test_look_up_refuses(codes: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        book().look_up(codes)


def test_an_unseeded_codebook_cannot_be_read() -> None:
    with pytest.raises(RuntimeError, match="never seeded"):
        Codebook(6, 3).look_up(torch.tensor([0]))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_survives_a_cast_of_the_model(dtype: torch.dtype, wanted: torch.dtype, learned: bool) -> None:
    made = book(learned=learned)
    made.counts.fill_(1 / 3)
    made.vectors.grad = torch.ones_like(made.vectors) if learned else None
    vectors = made.vectors.detach().clone()
    model = nn.Sequential(nn.Linear(3, 3), made).to(dtype)
    assert next(model[0].parameters()).dtype == dtype
    assert made.vectors.dtype == wanted
    assert torch.equal(made.vectors.detach(), vectors.to(wanted))
    assert isinstance(made.vectors, nn.Parameter) == learned
    assert made.counts.dtype == made.sums.dtype == made.last_counts.dtype == torch.float64
    assert torch.equal(made.counts, torch.full((6,), 1 / 3, dtype=torch.float64))
    assert made.step.dtype == torch.int64
    if learned:
        assert made.vectors.grad is not None
        assert made.vectors.grad.dtype == wanted


def test_a_float64_codebook_goes_back_to_float32() -> None:
    assert book().double().float().vectors.dtype == torch.float32


def test_the_whole_book_moves_between_devices() -> None:
    assert {tensor.device.type for tensor in book().to("meta").buffers()} == {"meta"}


def test_state_round_trip_keeps_every_bit() -> None:
    made = book()
    made.ema_update(torch.arange(6.0).double(), torch.rand(6, 3).double(), 0.9, 1e-5)
    fresh = Codebook(6, 3)
    assert not fresh.is_seeded
    fresh.load_state_dict(made.state_dict())
    assert state_bits(fresh) == state_bits(made)
    assert fresh.is_seeded
    fresh.load_state_dict(Codebook(6, 3).state_dict())
    assert not fresh.is_seeded


@pytest.mark.parametrize("other", [(7, 3), (6, 4)])
def test_a_mismatching_state_is_refused_whole(other: tuple[int, int]) -> None:
    made, given = book(), book(*other)
    given.step.fill_(41)
    before = state_bits(made)
    with pytest.raises(RuntimeError) as error:
        made.load_state_dict(given.state_dict())
    assert str(other) in str(error.value)
    assert "(6, 3)" in str(error.value)
    assert state_bits(made) == before


def test_a_learned_state_does_not_fit_a_moving_average() -> None:
    with pytest.raises(RuntimeError, match=r"sums has shape \(0, 3\)"):
        book().load_state_dict(book(learned=True).state_dict())


def test_a_euclidean_state_does_not_fit_a_cosine_codebook() -> None:
    """All shapes agree, and codes would follow lengths. Between learned books it may: they are read on the sphere."""
    given, cosine = book(), Codebook(6, 3, unit_norm=True)
    before = cosine.vectors.clone()
    with pytest.raises(RuntimeError, match="not of length 1: this codebook is cosine"):
        cosine.load_state_dict(given.state_dict())
    assert torch.equal(cosine.vectors, before)
    assert not cosine.is_seeded
    cosine.load_state_dict(Codebook(6, 3).state_dict())  # nothing in it yet
    other = Codebook(6, 3, unit_norm=True)
    other.set_vectors(given.vectors)
    cosine.load_state_dict(other.state_dict())
    assert torch.equal(cosine.vectors, other.vectors)


def test_unit_norm_reads_out_directions() -> None:
    made = book(unit_norm=True)
    torch.testing.assert_close(made.vectors.norm(dim=-1), torch.ones(6))
    counts = torch.tensor([2.0, 0, 1, 0, 0, 2.0]).double()
    sums = torch.zeros(6, 3).double()
    sums[0], sums[2] = torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 1, 0])
    before = made.vectors.clone()
    made.ema_update(counts, sums, 0.0, 1e-5)
    assert torch.equal(made.vectors[[0, 2]], torch.eye(3)[:2])
    assert torch.equal(made.vectors[[1, 3, 4]], before[[1, 3, 4]])
    assert torch.equal(made.vectors[5], before[5]), "sums that cancel have no direction to move to"


def test_unit_is_safe_at_zero() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    made = unit(x)
    torch.testing.assert_close(made.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    made.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0.032, -0.024], [0.0, 0.0]]))


def test_a_learned_unit_norm_book_is_read_on_the_sphere() -> None:
    made = book(unit_norm=True, learned=True)
    with torch.no_grad():
        made.vectors.mul_(5.0)
    torch.testing.assert_close(made.look_up(torch.arange(6)).norm(dim=-1), torch.ones(6))


def test_revival_sets_vector_count_and_sum() -> None:
    made = book()
    before = made.vectors.clone()
    made.revive(torch.tensor([1, 4]), torch.tensor([[1.0, 2, 3], [4, 5, 6]]), 4.0)
    assert torch.equal(made.vectors[[1, 4]], torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert torch.equal(made.vectors[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    assert made.counts.tolist() == [1, 4, 1, 1, 4, 1]
    assert torch.equal(made.sums[[1, 4]], 4.0 * made.vectors[[1, 4]].double())
    assert made.revived is not None
    assert made.revived.tolist() == [False, True, False, False, True, False]
    made.ema_update(torch.ones(6).double(), torch.ones(6, 3).double(), 0.9, 1e-5)
    assert made.revived is None


def test_revival_forgets_the_gradient_taken_at_the_old_place() -> None:
    made = book(learned=True)
    made.vectors.grad = torch.ones_like(made.vectors)
    made.revive(torch.tensor([2]), torch.ones(1, 3), 1.0)
    assert made.vectors.grad.sum(-1).tolist() == [3, 3, 0, 3, 3, 3]
