"""The contract of DESIGN section 4, sentence by sentence, over every quantizer; workers are threads here.

Docstrings name the public issue that a law answers.
"""

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vqcore.quantizers
from tests.contracts.steps import (
    AnyQuantizer,
    Stepped,
    assert_close_states,
    assert_same_counts,
    bits,
    drawn,
    has_revived,
    objective,
    revives,
    train_step,
)
from tests.together import Seat, together
from tests.vqcore.quantizers.cases import D, all_cases
from vqcore.quantizers import Quantizer, VectorBatch
from vqcore.reduction import OverGroup
from vqcore.seeding import kmeans_plus_plus, random_rows

Make = Callable[..., Any]

CASES = all_cases()
DISCRETE = [name for name, make in CASES.items() if make().discrete]
ACCUMULATING = [name for name, make in CASES.items() if make().accumulates]
SEEDED_FROM_DATA = [name for name, make in CASES.items() if "seeding" in inspect.signature(make).parameters]
MODULES = {name.split("-")[0] for name in CASES}
ROWS = 60


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Make:
    return CASES[request.param]


def batch(step: int, rows: int = ROWS) -> Tensor:
    """Away from the origin, so that codes drawn from N(0, 1) starve and come back."""
    return 3 + drawn(step, rows, D)


def trained(make: Make, steps: int = 3, **options: Any) -> Any:
    q = make(seed=2, **options)
    for step in range(steps):
        train_step(q, batch(step), None, torch.arange(ROWS) + ROWS * step, count=ROWS)
    return q


def sizes(q: AnyQuantizer) -> list[int]:
    return [len(counts) for counts in q.last_counts]


class Forbidden:
    rank, world = 0, 2

    def __call__(self, tensor: Tensor) -> None:
        raise AssertionError("eval mode never reduces")


# What a quantizer is


def test_it_is_a_quantizer(make: Make) -> None:
    q = make(seed=1)
    assert isinstance(q, Quantizer)
    assert q.seeded
    assert q.revived_parameters() == []
    assert all(counts.dtype == torch.float64 and not counts.any() for counts in q.last_counts)
    assert q.last_counts


def test_printed_it_says_its_sizes_and_settings(make: Make) -> None:
    said, taken = repr(make()), inspect.signature(make).parameters
    assert "num_codes=" in said
    assert f"code_dim={D}" in said
    for name in ("metric", "decay", "revive_below", "temperature", "draws", "joint", "curvature", "top_k"):
        assert name not in taken or f"{name}=" in said, said


def test_every_quantizer_of_the_package_has_cases() -> None:
    """A quantizer that no case builds would keep none of these promises."""
    calls = ("discrete", "accumulates", "seeded", "last_counts", "seed", "accumulate", "revived_parameters")
    defined = set()
    for module in pkgutil.iter_modules(vqcore.quantizers.__path__):
        members = vars(importlib.import_module(f"vqcore.quantizers.{module.name}"))
        for value in members.values():
            if isinstance(value, type) and issubclass(value, nn.Module) and all(hasattr(value, c) for c in calls):
                defined.add(value)
    assert defined
    built = {
        module: {type(make()) for name, make in CASES.items() if name.startswith(f"{module}-")} for module in MODULES
    }
    for quantizer in defined:
        home = quantizer.__module__.removeprefix("vqcore.quantizers.")
        assert quantizer in built.get(home, ()), (
            f"tests/vqcore/quantizers/cases/{home}.py builds no {quantizer.__name__}"
        )
        assert getattr(vqcore.quantizers, quantizer.__name__, None) is quantizer, (
            f"{quantizer.__name__} is not exported"
        )


WRONG = {
    "estimator": [("rotate", r"'rotate'.*vqcore\.estimators\.rotate")],
    "seeding": [("kmeans", r"'kmeans'.*vqcore\.seeding\.kmeans_plus_plus"), (True, "True")],
    "reduce": [(torch.distributed.all_reduce, "lacks rank, world"), (2, "is 2, which lacks")],
    "seed": [(None, "seed is None.*whole number"), (1.5, r"seed is 1\.5"), (True, "seed is True")],
    "commitment_weight": [(-1.0, r"-1\.0.*0 or a positive"), (float("inf"), "is inf")],
    "temperature": [(0.0, r"temperature is 0\.0.*positive")],
    "revive_below": [(-1.0, r"revive_below is -1\.0"), (float("nan"), "is nan")],
    "decay": [(1.0, r"decay is 1\.0.*\[0, 1\)")],
}


def test_wrong_settings_are_refused_when_built_and_say_what_was_given(make: Make) -> None:
    taken = WRONG.keys() & inspect.signature(make).parameters.keys()
    assert {"reduce", "seed"} <= taken
    for name in taken:
        for value, said in WRONG[name]:
            with pytest.raises(ValueError, match=said):
                make(**{name: value})


def test_a_reduction_that_has_no_group_yet_may_be_given(make: Make) -> None:
    """R1: the order of building a quantizer and its group does not matter."""
    assert make(reduce=OverGroup()).seeded


@pytest.mark.parametrize("name", SEEDED_FROM_DATA)
@pytest.mark.parametrize("given", [drawn(1, 3, ROWS, D), [drawn(1, ROWS, D)]], ids=["a tensor", "tensors"])
def test_seed_refuses_what_are_not_batches(name: str, given: Any) -> None:
    q = CASES[name](seed=2, seeding=random_rows)
    with pytest.raises(ValueError, match=r"got a Tensor.*VectorBatch\(x\)"):
        q.seed(given)
    assert not q.seeded


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(3, D).numpy(),), "device 'cpu' of another library.*from_numpy"),
        ((torch.zeros(3, D + 1),), r"shape \(3, 5\).*\[\.\.\., 4\]"),
        ((torch.zeros(3, D, dtype=torch.int64),), "int64"),
        ((torch.zeros(3, D), torch.ones(4, dtype=torch.bool)), r"mask is torch.bool of shape \(4,\)"),
        ((torch.zeros(3, D), torch.ones(3)), "mask is torch.float32"),
    ],
    ids=["numpy", "code_dim", "integers", "mask shape", "mask type"],
)
def test_wrong_shapes_are_refused(make: Make, arguments: tuple[Any, ...], said: str) -> None:
    q = make(seed=2)
    before = bits(q)
    for call in (q, q.assign):
        with pytest.raises(ValueError, match=said):
            call(*arguments)
    assert bits(q) == before


def test_leading_dimensions_are_kept(make: Make) -> None:
    q = trained(make).eval()
    flat = q(batch(9))
    out = q(batch(9).reshape(3, 4, 5, D))
    assert out.vectors.shape == (3, 4, 5, D)
    assert out.codes.shape == (3, 4, 5, *flat.codes.shape[1:])
    assert torch.equal(out.vectors.reshape(-1, D), flat.vectors)
    assert torch.equal(out.codes.reshape(flat.codes.shape), flat.codes)
    assert out.codes.dtype == torch.int64


# Masks and bad numbers


def test_a_mask_equals_a_shorter_input(make: Make) -> None:
    """lucidrains/vector-quantize-pytorch 62 and 149: padding that updates the codebook."""
    q, shorter = make(seed=2), make(seed=2)
    mask, keys = (drawn(50, ROWS) > 0).reshape(12, 5), torch.arange(ROWS).reshape(12, 5)
    for step in range(3):
        x = batch(step).reshape(12, 5, D)
        padded = torch.where(mask.unsqueeze(-1), x, 1e6)
        found = train_step(q, padded, mask, keys, count=int(mask.sum()))
        wanted = train_step(shorter, x[mask], None, keys[mask], count=int(mask.sum()))
        assert torch.equal(found.out.codes[mask], wanted.out.codes)
        assert (found.out.codes[~mask] == -1).all()
        assert not found.out.vectors[~mask].any()
        assert not found.x_gradient[~mask].any()
        torch.testing.assert_close(found.out.vectors[mask], wanted.out.vectors)
        torch.testing.assert_close(found.x_gradient[mask], wanted.x_gradient)
        torch.testing.assert_close(found.out.loss, wanted.out.loss)
        assert found.out.valid == wanted.out.valid == mask.sum()
        assert_close_states(q, shorter)
    codes = q.eval().assign(padded, mask)
    assert torch.equal(codes[mask], q.assign(x[mask]))
    assert (codes[~mask] == -1).all()


def test_non_finite_vectors_are_dropped_and_counted(make: Make) -> None:
    """R4: one NaN row turns all K codes of vector-quantize-pytorch 1.32 to NaN in one step."""
    q, clean = make(seed=2), make(seed=2)
    x, keys = batch(1, 30), torch.arange(30)
    bad = x.clone()
    bad[3, 1], bad[7, 0], bad[8], bad[9, 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    keep, mask = torch.ones(30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)
    keep[[3, 7, 8, 9]] = False
    mask[9] = False
    found = train_step(q, bad, mask, keys, count=26)
    wanted = train_step(clean, x[keep], None, keys[keep], count=26)
    assert torch.equal(found.out.codes[keep], wanted.out.codes)
    assert (found.out.codes[~keep] == -1).all()
    assert not found.out.vectors[~keep].any()
    assert (found.out.valid, found.out.non_finite) == (26, 3)
    torch.testing.assert_close(found.out.loss, wanted.out.loss)
    torch.testing.assert_close(found.x_gradient[keep], wanted.x_gradient)
    assert not found.x_gradient[~keep].any()
    assert_close_states(q, clean)
    assert (q.eval().assign(bad)[[3, 7, 8, 9]] == -1).all()


@pytest.mark.parametrize("rows", ["none", "masked", "non-finite"])
def test_a_batch_without_valid_vectors_changes_nothing(make: Make, rows: str) -> None:
    """R5: all-masked batches are an exception or a NaN loss in vector-quantize-pytorch 1.32."""
    q = trained(make)
    before, counts = bits(q), [counts.clone() for counts in q.last_counts]
    x = torch.full((5, D), torch.nan) if rows == "non-finite" else drawn(1, 0 if rows == "none" else 5, D)
    x.requires_grad_()
    mask = torch.zeros(len(x), dtype=torch.bool) if rows == "masked" else None
    out = q(x, mask)
    assert out.loss.item() == 0.0
    assert out.valid == 0
    out.loss.backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in q.parameters())
    assert bits(q) == before
    assert all(torch.equal(now, then) for now, then in zip(q.last_counts, counts, strict=True))
    assert q.revived_parameters() == []


def test_vectors_that_lie_on_codes_have_finite_gradients(make: Make) -> None:
    """lucidrains/vector-quantize-pytorch 106: the root of a distance of 0, or of less by rounding, is NaN."""
    q = trained(make)
    on_codes = q.look_up(q.eval().assign(batch(4)))
    q.train()
    x = torch.cat([on_codes, torch.zeros(3, D)])
    found = train_step(q, x, None, torch.arange(len(x)), count=len(x), rate=0.0)
    assert found.out.loss.isfinite()
    assert found.x_gradient.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found.parameter_gradients.values())


# Evaluation


def test_eval_never_trains_and_never_reduces(make: Make) -> None:
    """R5: k-means of vector-quantize-pytorch 1.32 also runs in eval: the first validation batch makes the codebook."""
    q = trained(make)
    alone = make(seed=2, reduce=Forbidden())
    alone.load_state_dict(q.state_dict())
    alone.eval()
    before = bits(alone)
    x, keys = batch(7), torch.arange(ROWS)
    out = alone(x, None, keys)
    if alone.accumulates:
        with alone.accumulate(count=ROWS):
            alone(x)
    assert bits(alone) == before
    again, twice = alone(x, None, keys), alone(torch.cat([x, x]), None, torch.cat([keys, keys]))
    assert torch.equal(again.codes, out.codes)
    assert torch.equal(again.vectors, out.vectors)
    torch.testing.assert_close(twice.loss, out.loss)
    torch.testing.assert_close(twice.squared_error, 2 * out.squared_error, rtol=1e-6, atol=0)


def test_an_unseeded_quantizer_cannot_be_read(make: Make) -> None:
    q = make(seed=2, reduce=Forbidden())
    state = q.state_dict()
    flags = [name for name in state if name.endswith("seeded")]
    assert flags, "the seeding flag belongs to the state"
    q.load_state_dict(state | {name: torch.tensor(False) for name in flags})
    q.eval()
    assert not q.seeded
    for call in (q, q.assign):
        with pytest.raises(RuntimeError, match="never seeded"):
            call(batch(1))
    codes = torch.zeros_like(make().assign(batch(1)))
    with pytest.raises(RuntimeError, match="never seeded"):
        q.look_up(codes)
    assert not q.seeded


@pytest.mark.parametrize("name", DISCRETE)
def test_look_up_of_assign_is_the_evaluation_output_bit_for_bit(name: str) -> None:
    """lucidrains/vector-quantize-pytorch 102 and KatarinaYuan/StructTokenBench 5: outputs that codes do not give back;
    EdoardoBotta/RQ-VAE-Recommender 54: an output that is not the code."""
    q = trained(CASES[name]).eval()
    x, mask = 3 + drawn(4, 3, 50, 7, D), drawn(5, 3, 50, 7) > 0
    x[0, 0, 0] = torch.nan
    codes = q.assign(x, mask)
    out = q(x, mask)
    assert torch.equal(codes, out.codes)
    assert torch.equal(q.look_up(codes), out.vectors)
    flat = codes.reshape(-1, *codes.shape[3:])
    assert torch.equal(q.look_up(flat[::3]), out.vectors.reshape(-1, D)[::3])
    assert torch.equal(q.look_up(codes.to(torch.int8)), out.vectors)
    assert (codes[~mask] == -1).all()
    assert (codes[0, 0, 0] == -1).all()


def test_look_up_takes_minus_one_and_refuses_other_strangers(make: Make) -> None:
    q = trained(make).eval()
    codes = q.assign(batch(1))
    nothing = q.look_up(torch.full_like(codes, -1))
    assert nothing.shape == (ROWS, D)
    assert not nothing.any()
    levels = codes.reshape(ROWS, -1)
    for level in range(levels.shape[1]):
        for stranger in (-2, sizes(q)[min(level, len(sizes(q)) - 1)]):
            wrong = levels.clone()
            wrong[3, level] = stranger
            with pytest.raises(ValueError, match=str(stranger)):
                q.look_up(wrong.reshape(codes.shape))
    with pytest.raises(ValueError, match="float32"):
        q.look_up(codes.float())


def test_codes_do_not_depend_on_the_split_of_a_batch(make: Make) -> None:
    q = trained(make).eval()
    x = batch(3, 200)
    whole = q.assign(x)
    assert torch.equal(torch.cat([q.assign(part) for part in x.split([1, 7, 92, 100])]), whole)
    keys = torch.arange(200)
    parts = zip(x.split([150, 50]), keys.split([150, 50]), strict=True)
    assert torch.equal(torch.cat([q(part, None, named).codes for part, named in parts]), q(x, None, keys).codes)


# Numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_neither_codes_nor_state(make: Make, dtype: torch.dtype) -> None:
    """R7: under CPU autocast 1.7 % of the indices of vector-quantize-pytorch 1.32 differ from float32 (also its
    issues 10, 85, 144 and 145)."""
    q, plain = make(seed=2), make(seed=2)
    for step in range(3):
        x, keys = batch(step, 2000), torch.arange(2000)  # bfloat16 would move some of so many
        with torch.autocast("cpu", dtype):
            out = q(x, None, keys)
            codes = q.assign(x)
        wanted = plain(x, None, keys)
        assert torch.equal(out.codes, wanted.codes)
        assert torch.equal(out.vectors, wanted.vectors)
        assert torch.equal(out.loss, wanted.loss)
        assert torch.equal(codes, plain.assign(x))
    assert bits(q) == bits(plain)
    assert out.vectors.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_module_around_it_changes_nothing(make: Make, dtype: torch.dtype) -> None:
    """lucidrains/vector-quantize-pytorch 144 and 145: a codebook in bfloat16 merges codes."""
    model, plain = nn.Sequential(nn.Linear(D, D), make(seed=2)).to(dtype), make(seed=2)
    assert model[0].weight.dtype == dtype
    x, keys = batch(1).to(dtype), torch.arange(ROWS)
    found = train_step(model[1], x, None, keys, count=ROWS)
    wanted = train_step(plain, x.float(), None, keys, count=ROWS)
    assert torch.equal(found.out.codes, wanted.out.codes)
    assert torch.equal(found.out.vectors, wanted.out.vectors)
    assert bits(model[1]) == bits(plain)
    assert found.x_gradient.dtype == dtype


def test_the_float64_mode_keeps_float64(make: Make) -> None:
    q = make(seed=2).double()
    found = train_step(q, batch(1).double(), None, torch.arange(ROWS), count=ROWS)
    assert found.out.vectors.dtype == found.out.loss.dtype == torch.float64
    assert all(t.dtype == torch.float64 for t in q.state_dict().values() if t.is_floating_point())
    assert q.eval().look_up(q.assign(batch(2).double())).dtype == torch.float64


# State


def test_resuming_gives_the_bits_of_never_having_stopped(make: Make, tmp_path: Path) -> None:
    """EdoardoBotta/RQ-VAE-Recommender 58: other codes after saving and loading; lucidrains/vector-quantize-pytorch
    PR 61: a state that does not load."""
    q = trained(make)
    save_file(q.state_dict(), tmp_path / "state.safetensors")
    resumed = make(seed=2)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert resumed.seeded
    assert torch.equal(resumed.assign(batch(8)), q.assign(batch(8)))
    for step in range(3, 6):
        keys = torch.arange(ROWS) + ROWS * step
        wanted = train_step(q, batch(step), None, keys, count=ROWS)
        found = train_step(resumed, batch(step), None, keys, count=ROWS)
        assert torch.equal(found.out.codes, wanted.out.codes)
    assert bits(resumed) == bits(q)


def test_a_deep_copy_is_independent(make: Make) -> None:
    """Bound methods and lists of books inside must come along: a copy that trains the original is the trap."""
    q = trained(make)
    copied = copy.deepcopy(q)
    before = bits(q)
    assert bits(copied) == before
    train_step(copied, batch(3), None, torch.arange(ROWS), count=ROWS)
    assert bits(q) == before
    train_step(q, batch(3), None, torch.arange(ROWS), count=ROWS)
    assert bits(copied) == bits(q)


def test_a_mismatching_state_is_refused(make: Make) -> None:
    q = trained(make)
    state = q.state_dict()
    for name, tensor in state.items():
        if tensor.ndim and len(tensor):
            with pytest.raises(RuntimeError, match=name):
                make(seed=2).load_state_dict(state | {name: tensor[:-1]})
        with pytest.raises(RuntimeError, match=name):
            make(seed=2).load_state_dict({key: value for key, value in state.items() if key != name})


# accumulate


def test_what_cannot_accumulate_says_so() -> None:
    for name in CASES.keys() - ACCUMULATING:
        q = CASES[name](seed=2)
        with pytest.raises((RuntimeError, ValueError), match="forward"), q.accumulate(count=1):
            pass


@pytest.mark.parametrize("name", ACCUMULATING)
def test_accumulate_equals_one_forward_on_all(name: str) -> None:
    """lucidrains/vector-quantize-pytorch 221: an update at every forward does not fit gradient accumulation."""
    q, whole = CASES[name](seed=2), CASES[name](seed=2)
    revived = False
    for step in range(4):
        x, keys = batch(step), torch.arange(ROWS)
        parts = x.clone().requires_grad_()
        with q.accumulate(count=ROWS):
            outs = [q(parts[i : i + 25], None, keys[i : i + 25]) for i in (0, 25, 50)]
            sum(objective(out, parts[25 * i : 25 * i + 25], ROWS, 1) for i, out in enumerate(outs)).backward()
        gradients = {key: parameter.grad for key, parameter in q.named_parameters()}
        wanted = train_step(whole, x, None, keys, count=ROWS, rate=0.0)
        assert torch.equal(torch.cat([out.codes for out in outs]), wanted.out.codes)
        torch.testing.assert_close(sum(out.loss for out in outs), wanted.out.loss)
        torch.testing.assert_close(parts.grad, wanted.x_gradient)
        for key, gradient in gradients.items():
            theirs = wanted.parameter_gradients[key]
            torch.testing.assert_close(torch.zeros_like(theirs) if gradient is None else gradient, theirs)
        assert_same_counts(q, whole)
        assert_close_states(q, whole)
        revived = revived or wanted.revived
        q.zero_grad()
        with torch.no_grad():
            for (key, parameter), other in zip(q.named_parameters(), whole.parameters(), strict=True):
                parameter -= 0.2 * wanted.parameter_gradients[key]
                other -= 0.2 * wanted.parameter_gradients[key]
    assert revived or not revives(q), "the case must revive something"


@pytest.mark.parametrize("name", ACCUMULATING)
def test_a_batch_may_come_in_a_buffer_that_is_filled_again(name: str) -> None:
    """Raw data often does. Vectors that a block keeps for revival must not change under it."""
    q, fresh = CASES[name](seed=2), CASES[name](seed=2)
    buffer, named = torch.empty(20, D), torch.empty(20, dtype=torch.int64)
    for step in range(4):
        with q.accumulate(count=ROWS), fresh.accumulate(count=ROWS):
            for part in range(3):
                x, keys = batch(3 * step + part, 20), torch.arange(20) + 20 * (3 * step + part)
                q(buffer.copy_(x), None, named.copy_(keys))
                fresh(x, None, keys)
            buffer.fill_(torch.nan)
        assert has_revived(q) == has_revived(fresh)
    assert bits(q) == bits(fresh)


def broken_block(q: AnyQuantizer, x: Tensor) -> None:
    with q.accumulate(count=ROWS):
        q(x)
        raise KeyError


@pytest.mark.parametrize("name", ACCUMULATING)
def test_an_exception_inside_accumulate_leaves_the_state_as_it_was(name: str) -> None:
    q, fresh = CASES[name](seed=2), CASES[name](seed=2)
    before = bits(q)
    with pytest.raises(KeyError):
        broken_block(q, batch(1))
    assert bits(q) == before
    fresh(batch(2))
    q(batch(2))
    assert bits(q) == bits(fresh), "what the broken block had gathered must be gone"


@pytest.mark.parametrize("name", ACCUMULATING)
def test_accumulate_does_not_nest_and_refuses_what_is_no_number_of_vectors(name: str) -> None:
    q = CASES[name](seed=2)
    with pytest.raises(RuntimeError, match="already open"), q.accumulate(count=1), q.accumulate(count=1):
        pass
    for count, said in ((-1, "count is -1"), (2.5, r"count is 2\.5"), (torch.tensor(3), r"count is tensor\(3\)")):
        with pytest.raises(ValueError, match=said), q.accumulate(count=count):
            pass


@pytest.mark.parametrize("name", ACCUMULATING)
def test_a_block_of_no_vectors_has_loss_zero(name: str) -> None:
    q = CASES[name](seed=2)
    before = bits(q)
    x = drawn(1, 5, D).requires_grad_()
    with q.accumulate(count=0):
        out = q(x, torch.zeros(5, dtype=torch.bool))
        out.loss.backward()
    assert out.loss.item() == 0.0
    assert bits(q) == before


@pytest.mark.parametrize("name", ACCUMULATING)
def test_accumulate_without_a_count_averages_each_forward(name: str) -> None:
    x = [batch(i, 20) for i in range(2)]

    def work(seat: Seat) -> tuple[list[float], int, bool]:
        q = CASES[name](seed=2, reduce=seat)
        part = slice(0, 5) if seat.rank == 0 else slice(5, 20)
        with q.accumulate():
            outs = [q(x[i][part], None, torch.arange(20)[part]) for i in range(2)]
        return [out.loss.item() for out in outs], seat.calls, has_revived(q)

    results = together(2, work)
    for _, calls, revived in results:
        assert calls == 2 + 1 + revived
    for i in range(2):
        wanted = CASES[name](seed=2)(x[i], None, torch.arange(20)).loss.item()
        assert sum(losses[i] for losses, *_ in results) / 2 == pytest.approx(wanted, rel=1e-5)


# Workers

PARTS = {
    "2 uneven": [range(0, 20), range(20, ROWS)],
    "2 one empty": [range(0, ROWS), range(0, 0)],
    "2 one masked": [range(0, 7), range(7, ROWS)],
    "4 uneven, one empty, one masked": [range(0, 1), range(1, 30), range(30, 30), range(30, ROWS)],
}


def run(make: Make, mine: Tensor, reduce: Seat | None, keyed: bool = True) -> tuple[Any, list[Stepped], list[int]]:
    """Four steps on the rows `mine` of each batch, the first seven of which are masked. And each step's reduces."""
    mask = (torch.arange(ROWS) >= 7) & (torch.arange(ROWS) % 6 != 0)
    q = make(seed=2, reduce=reduce)
    steps, calls = [], []
    for step in range(4):
        before = reduce.calls if reduce else 0
        keys = mine + ROWS * step if keyed else None
        steps.append(train_step(q, batch(step)[mine], mask[mine], keys, count=int(mask.sum()), reduce=reduce))
        calls.append((reduce.calls if reduce else 0) - before - len(list(q.parameters())))
    return q, steps, calls


def test_one_worker_alone_is_a_group_of_one(make: Make) -> None:
    ((found, _, calls),) = together(1, lambda seat: run(make, torch.arange(ROWS), seat))
    alone, steps, _ = run(make, torch.arange(ROWS), None)
    assert bits(found) == bits(alone)
    assert calls == [1 + step.revived for step in steps]
    assert any(step.revived for step in steps) or not revives(alone), "the case must revive something"


@pytest.mark.parametrize("parts", PARTS)
def test_workers_on_parts_equal_one_worker_on_the_whole(make: Make, parts: str) -> None:
    """R3: a worker whose rows are all masked skips a collective of vector-quantize-pytorch 1.32, and the job hangs.
    R2: its mean over workers is the worker's own share; here losses and gradients average to those of the whole.

    Also its issues 105, 141 and 198 (hangs), 205 (dead codes over workers), PR 17 and issue 222 (a codebook of its own
    on every worker), and ZhikangNiu/encodec-pytorch 25 and 26; ray-project/ray 66085: parts of any size arrive."""
    rows = [torch.tensor(list(part), dtype=torch.int64) for part in PARTS[parts]]
    alone, wanted, _ = run(make, torch.arange(ROWS), None)
    results = together(len(rows), lambda seat: run(make, rows[seat.rank], seat))
    world = len(rows)
    assert len({tuple(bits(q).values()) for q, *_ in results}) == 1, "workers disagree"
    assert_close_states(results[0][0], alone, scale=6.0)
    for step, whole in enumerate(wanted):
        stepped = [steps[step] for _, steps, _ in results]
        outs = [one.out for one in stepped]
        assert torch.equal(torch.cat([out.codes for out in outs]), whole.out.codes)
        torch.testing.assert_close(torch.cat([out.vectors for out in outs]), whole.out.vectors)
        torch.testing.assert_close(sum(out.loss for out in outs) / world, whole.out.loss)
        torch.testing.assert_close(
            sum(out.squared_error for out in outs), whole.out.squared_error, rtol=1e-6, atol=1e-9
        )
        assert sum(int(out.valid) for out in outs) == whole.out.valid
        torch.testing.assert_close(torch.cat([one.x_gradient for one in stepped]) / world, whole.x_gradient)
        for name, gradient in whole.parameter_gradients.items():
            torch.testing.assert_close(stepped[0].parameter_gradients[name], gradient, atol=1e-6, rtol=1e-5)
        for _, _, calls in results:
            assert calls[step] == 1 + whole.revived, "one reduce a step, one more where a code is dead"
    for q, *_ in results:
        assert_same_counts(q, alone)


def test_without_keys_workers_still_agree(make: Make) -> None:
    """lucidrains/vector-quantize-pytorch 198: a seed that has to travel first."""
    rows = [torch.tensor(list(part), dtype=torch.int64) for part in PARTS["2 uneven"]]
    results = together(2, lambda seat: run(make, rows[seat.rank], seat, keyed=False))
    assert bits(results[0][0]) == bits(results[1][0])


def test_the_order_of_rows_does_not_matter(make: Make) -> None:
    """Also revival: it goes by keys."""
    q, shuffled = make(seed=2), make(seed=2)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    for step in range(3):
        x, keys = batch(step), torch.arange(ROWS) + 1000 * step
        wanted = train_step(q, x, None, keys, count=ROWS)
        found = train_step(shuffled, x[order], None, keys[order], count=ROWS)
        assert torch.equal(found.out.codes, wanted.out.codes[order])
        assert_close_states(q, shuffled)


def test_backward_works_after_another_forward(make: Make) -> None:
    """The update writes to the codebook in place; the graph of an earlier forward must not read what it writes."""
    q, plain = make(seed=2), make(seed=2)
    wanted = train_step(plain, batch(1), None, torch.arange(ROWS), count=ROWS).x_gradient
    x = batch(1).requires_grad_()
    out = q(x, None, torch.arange(ROWS))
    for step in (2, 3):
        q(batch(step))
    objective(out, x, ROWS, 1).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)


# Seeding


def batches(rows: range, size: int) -> list[VectorBatch]:
    x = batch(20, 200)
    x[50] = torch.nan
    index = torch.tensor(list(rows), dtype=torch.int64)
    return [VectorBatch(x[part], part % 5 != 0, part) for part in index.split(size) if len(part)]


@pytest.mark.parametrize("seeding", [random_rows, kmeans_plus_plus])
@pytest.mark.parametrize("name", SEEDED_FROM_DATA)
def test_seed_gives_the_same_codebook_to_any_number_of_workers(name: str, seeding: Any) -> None:
    """lucidrains/vector-quantize-pytorch 25 and PR 17, NVIDIA/cuml 5958, 7245 and 7389, NVIDIA/cuvs PR 2066 (one worker
    is empty)."""
    alone = CASES[name](seed=2, seeding=seeding)
    assert not alone.seeded
    said = alone.seed(batches(range(200), 9))
    assert "160" in said, "how many vectors were used"
    assert alone.seeded

    def work(seat: Seat) -> Any:
        q = CASES[name](seed=2, seeding=seeding, reduce=seat)
        parts = [range(0, 13), range(13, 13), range(13, 200)]
        assert q.seed(batches(parts[seat.rank], 9 + seat.rank)) == said
        return q

    for q in together(3, work):
        assert bits(q) == bits(alone)
    assert all(tensor.isfinite().all() for tensor in alone.state_dict().values())


@pytest.mark.parametrize(
    ("name", "block"), [(n, b) for n in SEEDED_FROM_DATA for b in (False, True) if n in ACCUMULATING or not b]
)
def test_training_forwards_gather_until_there_are_enough(name: str, block: bool) -> None:
    def work(seat: Seat) -> Any:
        q = CASES[name](seed=2, seeding=random_rows, reduce=seat)
        for step in range(40):
            x = batch(step, 4)[2 * seat.rank : 2 * seat.rank + 2].requires_grad_()
            with q.accumulate(count=4) if block else nullcontext():
                out = q(x, None, torch.arange(2) + 10 * step + 2 * seat.rank)
                out.loss.backward()
            assert torch.equal(out.vectors, x)
            assert (out.codes == -1).all()
            assert (out.loss.item(), out.valid.item()) == (0.0, 2)
            assert x.grad is not None
            assert not x.grad.any()
            if q.seeded:
                break
        assert step > 0, "two workers with two vectors each are too few"
        assert (q(batch(9, 5)).codes >= -1).all()
        return q

    results = together(2, work)
    assert bits(results[0]) == bits(results[1])


@pytest.mark.parametrize("name", SEEDED_FROM_DATA)
def test_vectors_that_wait_to_seed_are_kept_from_a_buffer_that_is_filled_again(name: str) -> None:
    q, fresh = CASES[name](seed=2, seeding=random_rows), CASES[name](seed=2, seeding=random_rows)
    buffer, named = torch.empty(5, D), torch.empty(5, dtype=torch.int64)
    step = 0
    while not fresh.seeded:
        x, keys = batch(step, 5), torch.arange(5) + 5 * step
        q(buffer.copy_(x), None, named.copy_(keys))
        fresh(x, None, keys)
        step += 1
    assert step > 1, "the first batch must not be enough"
    assert bits(q) == bits(fresh)


@pytest.mark.parametrize("name", SEEDED_FROM_DATA)
def test_too_few_vectors_refuse_to_seed_and_say_both_numbers(name: str) -> None:
    """R5: vector-quantize-pytorch 1.32 fills up with duplicates, 30 distinct codes of 64."""
    q = CASES[name](seed=2, seeding=random_rows)
    before = bits(q)
    with pytest.raises(ValueError, match=r"\b3\b.*\d+ codes"):
        q.seed([VectorBatch(batch(1, 3))])
    assert not q.seeded
    assert bits(q) == before
