"""Laws of the plan: every row once an epoch, the same batches for any number of workers, resume by arithmetic."""

import numpy as np
import pytest

from pipelines.errors import Refused
from pipelines.plan import BLOCK, Plan, lanes_for

SIZES = [(1, 1, 1), (1, 4, 2), (5, 4, 4), (7, 1, 1), (63, 64, 64), (64, 64, 64), (65, 64, 64), (1000, 24, 8)]
SIZES += [
    (BLOCK, 10, 2),
    (BLOCK + 1, 10, 1),
    (3 * BLOCK - 1, 7, 1),
    (5 * BLOCK, 6, 3),
    (4097, 6, 2),
    (2 * BLOCK, 4096, 1),
]


def epoch_of(plan: Plan, epoch: int, world: int = 1) -> list[np.ndarray]:
    """Valid ordinals of every step, worker after worker."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    shares = [[plan.at(step, rank, world) for rank in range(world)] for step in steps]
    return [np.concatenate([ordinals[mask] for ordinals, mask in step]) for step in shares]


@pytest.mark.parametrize("row_order", ["shuffled", "sequential"])
@pytest.mark.parametrize(("rows", "batch", "lanes"), SIZES)
def test_every_row_is_read_exactly_once_an_epoch(rows: int, batch: int, lanes: int, row_order: str) -> None:
    plan = Plan(rows, batch, lanes, 3, row_order)
    for epoch in (0, 1):
        for world in {1, min(2, lanes), min(3, lanes), lanes}:
            read = np.concatenate(epoch_of(plan, epoch, world))
            assert np.array_equal(np.sort(read), np.arange(rows))


@pytest.mark.parametrize(("rows", "batch", "lanes"), SIZES)
def test_global_batches_and_their_fillers_are_the_same_for_every_number_of_workers(rows, batch, lanes) -> None:
    plan = Plan(rows, batch, lanes, 3)
    for step in range(min(plan.steps_per_epoch, 50)):
        whole, valid = plan.at(step)
        assert whole.shape == valid.shape == (batch,)
        by_lane = whole.reshape(lanes, -1), valid.reshape(lanes, -1)
        for world in range(1, min(lanes, 5) + 1):
            for rank in range(world):
                ordinals, mask = plan.at(step, rank, world)
                assert np.array_equal(ordinals, by_lane[0][rank::world].ravel())
                assert np.array_equal(mask, by_lane[1][rank::world].ravel())


@pytest.mark.parametrize(("rows", "batch", "lanes"), SIZES)
def test_a_step_does_not_depend_on_the_steps_before_it(rows, batch, lanes) -> None:
    plan = Plan(rows, batch, lanes, 3)
    steps = np.random.default_rng(0).permutation(2 * plan.steps_per_epoch)[:20]
    for step in steps.tolist():
        for one, other in zip(plan.at(step), Plan(rows, batch, lanes, 3).at(step), strict=True):
            assert np.array_equal(one, other)


def test_epochs_seeds_and_lanes_are_shuffled_differently_and_blocks_stay_together() -> None:
    plan = Plan(8 * BLOCK, 8, 2, 0)
    orders = [np.concatenate(epoch_of(p, e)) for p, e in ((plan, 0), (plan, 1), (Plan(8 * BLOCK, 8, 2, 1), 0))]
    for one in range(3):
        for other in range(one):
            # Two random orders agree in about one place.
            assert (orders[one] == orders[other]).sum() < 20
    first, second = (np.concatenate([plan.at(step)[0].reshape(2, -1)[lane] for step in range(1024)]) for lane in (0, 1))
    assert (first == second - 4 * BLOCK).sum() < 20
    blocks = first.reshape(-1, BLOCK) // BLOCK
    assert (blocks == blocks[:, :1]).all()
    assert sorted(blocks[:, 0]) == [0, 1, 2, 3]


def test_sequential_lanes_walk_their_own_rows_in_order() -> None:
    plan = Plan(10, 4, 2, 0, "sequential")
    assert plan.at(0)[0].tolist() == [0, 1, 5, 6]
    assert plan.at(1)[0].tolist() == [2, 3, 7, 8]
    ordinals, mask = plan.at(2)
    assert ordinals[mask].tolist() == [4, 9]
    assert np.array_equal(plan.at(3)[0], plan.at(0)[0])


def test_the_order_is_pinned_so_a_run_resumes_under_a_later_version() -> None:
    assert Plan(12, 4, 2, 5).at(1)[0].tolist() == PINNED


PINNED = [5, 4, 10, 8]


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 24, 64, 96, 100, 128, 250])
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 65])
def test_lanes_are_the_smallest_divisor_that_serves_all_workers(batch: int, workers: int) -> None:
    least = max(np.gcd(batch, 64), workers)
    divisors = [lanes for lanes in range(1, batch + 1) if batch % lanes == 0 and lanes >= least]
    if divisors:
        assert lanes_for(batch, workers) == min(divisors)
    else:
        with pytest.raises(Refused, match=f"nearest batch sizes are {workers} "):
            lanes_for(batch, workers)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Plan(0, 4, 2, 0), "no rows"),
        (lambda: Plan(9, 4, 3, 0), "3 lanes do not divide"),
        (lambda: Plan(9, 4, 2, 0, "random"), "allowed: shuffled, sequential"),  # type: ignore[arg-type]
        (lambda: Plan(9, 4, 2, -1), "seed=-1"),
        (lambda: Plan(9, 4, 2, 0).at(0, 2, 3), "worker 2 of 3"),
        (lambda: Plan(9, 4, 2, 0).at(-1), "step -1"),
        (lambda: lanes_for(0, 1), "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words: str) -> None:
    with pytest.raises(Refused, match=words):
        make()
