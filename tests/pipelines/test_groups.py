"""Laws of the plan over groups: every row once an epoch, groups of one value, the same for any number of workers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

from pipelines import loop, recipe
from pipelines.errors import Refused
from pipelines.feed import Feed, to_batch
from pipelines.groups import GroupPlan
from pipelines.recipe import Batch, Grouping
from pipelines.shards import ShardReader
from pipelines.step import _micro_batches
from tests.pipelines.loops import make_shards, spec_of

CPU = torch.device("cpu")


@st.composite
def plans(draw) -> tuple[GroupPlan, np.ndarray]:
    """Few rows of few values, in any order; any sizes that fit together."""
    values = np.array(draw(st.lists(st.integers(0, 6), min_size=1, max_size=120)))
    lanes, per_lane = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    order = draw(st.sampled_from(["shuffled", "sequential"]))
    size, seed = draw(st.integers(1, 9)), draw(st.integers(0, 2**40))
    return GroupPlan(values, size, lanes * per_lane, lanes, seed, order), values


def epoch_of(plan: GroupPlan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(ordinals, mask), [groups, size] each, of all groups of an epoch that hold a real row."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    ordinals, mask = (np.concatenate(found) for found in zip(*[plan.at(step) for step in steps], strict=True))
    ordinals, mask = ordinals.reshape(-1, plan.group_size), mask.reshape(-1, plan.group_size)
    return ordinals[mask.any(1)], mask[mask.any(1)]


@with_settings(deadline=None)
@given(plans(), st.integers(0, 3))
def test_every_row_is_real_exactly_once_an_epoch(made, epoch: int) -> None:
    plan, values = made
    ordinals, mask = epoch_of(plan, epoch)
    assert np.array_equal(np.sort(ordinals[mask]), np.arange(len(values)))


@with_settings(deadline=None)
@given(plans(), st.integers(0, 3))
def test_a_group_is_of_one_value_and_only_a_values_last_group_is_filled_up(made, epoch: int) -> None:
    plan, values = made
    ordinals, mask = epoch_of(plan, epoch)
    its = values[ordinals]
    assert (its == its[:, :1]).all()
    for value in np.unique(values):
        real = np.sort(mask[its[:, 0] == value].sum(1))[::-1]
        rows = int((values == value).sum())
        # As few groups as can be: all full but one.
        assert len(real) == -(-rows // plan.group_size)
        assert (real[:-1] == plan.group_size).all()
    # Real rows come first, filler behind them.
    assert (np.sort(mask, 1)[:, ::-1] == mask).all()


@with_settings(deadline=None)
@given(plans(), st.data())
def test_filler_repeats_as_seldom_as_it_can(made, data) -> None:
    """A group holds different rows as long as its value has them: filler is no copy of one streamline."""
    plan, values = made
    ordinals, _ = epoch_of(plan, data.draw(st.integers(0, 2)))
    for group in ordinals:
        rows = int((values == values[group[0]]).sum())
        assert len(np.unique(group)) == min(rows, plan.group_size)


@with_settings(deadline=None)
@given(plans(), st.integers(0, 20))
def test_global_batches_are_the_same_for_every_number_of_workers(made, step: int) -> None:
    plan, _ = made
    lanes = plan.groups.lanes
    whole = [found.reshape(lanes, -1) for found in plan.at(step)]
    for world in range(1, lanes + 1):
        for rank in range(world):
            for mine, all_lanes in zip(plan.at(step, rank, world), whole, strict=True):
                assert np.array_equal(mine, all_lanes[rank::world].ravel())


@with_settings(deadline=None)
@given(plans(), st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_a_step_does_not_depend_on_the_steps_before_it(made, steps: list[int]) -> None:
    plan, values = made
    for step in steps:
        anew = GroupPlan(values, plan.group_size, plan.groups.batch, plan.groups.lanes, plan.seed, plan.row_order)  # type: ignore[arg-type]
        for one, other in zip(plan.at(step), anew.at(step), strict=True):
            assert np.array_equal(one, other)


def test_nor_on_how_many_orders_are_kept(monkeypatch) -> None:
    values = np.repeat(np.arange(9), 20)
    expected = [GroupPlan(values, 4, 6, 3, 1).at(step) for step in range(30)]
    monkeypatch.setattr("pipelines.groups.KEPT_ROWS", 45)
    plan = GroupPlan(values, 4, 6, 3, 1)
    for step, (ordinals, mask) in enumerate(expected):
        assert np.array_equal(plan.at(step)[0], ordinals)
        assert np.array_equal(plan.at(step)[1], mask)
        assert sum(len(order) for order in plan._orders.values()) <= 45


def test_who_shares_a_group_changes_with_the_epoch_the_seed_and_the_value() -> None:
    values = np.repeat([0, 1], 400)

    def pairs(plan: GroupPlan, epoch: int) -> set[frozenset[int]]:
        return {frozenset(group) for group in epoch_of(plan, epoch)[0].tolist()}

    plan, other = GroupPlan(values, 2, 8, 2, 0), GroupPlan(values, 2, 8, 2, 1)
    # Of 400 random pairs among 2 x 400 rows, about one recurs.
    assert len(pairs(plan, 0) & pairs(plan, 1)) < 8
    assert len(pairs(plan, 0) & pairs(other, 0)) < 8
    low = {pair for pair in pairs(plan, 0) if max(pair) < 400}
    high = {frozenset(row - 400 for row in pair) for pair in pairs(plan, 0) if min(pair) >= 400}
    assert len(low & high) < 8


def test_sequential_groups_are_dealt_out_in_order() -> None:
    plan = GroupPlan(np.array([5, 9, 5, 5, 9]), 2, 3, 1, 0, "sequential")
    assert plan.steps_per_epoch == 1
    ordinals, mask = plan.at(7)
    assert ordinals.tolist() == [0, 2, 3, 0, 1, 4]
    assert mask.tolist() == [True, True, True, False, True, True]


def test_the_order_is_pinned_so_a_run_resumes_under_a_later_version() -> None:
    ordinals, mask = GroupPlan(np.repeat([0, 1, 2], [5, 3, 6]), 4, 2, 1, 5).at(4)
    assert (ordinals.tolist(), mask.astype(int).tolist()) == PINNED


PINNED = ([12, 9, 8, 11, 0, 1, 3, 4], [1, 1, 1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GroupPlan(np.zeros(0, int), 4, 2, 1, 0), "no rows"),
        (lambda: GroupPlan(np.zeros(3, int), 0, 2, 1, 0), "groups of 0 rows"),
        (lambda: GroupPlan(np.zeros(3, int), 4, 3, 2, 0), "2 lanes do not divide"),
        (lambda: GroupPlan(np.zeros(3, int), 4, 2, 1, 0, "random"), "allowed: shuffled, sequential"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused(make, words: str) -> None:
    with pytest.raises(Refused, match=words):
        make()


def test_a_groups_filler_keeps_its_values_and_a_group_of_filler_does_not() -> None:
    values = torch.arange(1.0, 7.0)
    values[1] = torch.nan
    mask = np.array([True, True, False, False, False, False])
    batch, lost = to_batch({"x": values, "n": torch.arange(1, 7)}, np.arange(6), mask, group_size=3)
    assert batch.columns["x"].tolist() == [1, 0, 3, 0, 0, 0]
    assert batch.columns["n"].tolist() == [1, 0, 3, 0, 0, 0]
    assert (batch.mask.tolist(), lost) == ([True, False, False, False, False, False], 1)
    alone, _ = to_batch({"x": values}, np.arange(6), mask)
    assert alone.columns["x"].tolist() == [1, 0, 0, 0, 0, 0]


def test_micro_batches_do_not_cut_groups() -> None:
    batch = Batch({"x": torch.arange(21)}, torch.ones(21, dtype=torch.bool), torch.arange(21))
    for count in range(1, 9):
        pieces = [piece.columns["x"] for piece in _micro_batches(batch, count, 3)]
        assert len(pieces) <= count
        assert all(len(piece) % 3 == 0 for piece in pieces)
        assert torch.cat(pieces).tolist() == list(range(21))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("images"), rows=45)


class Stopped(Exception):
    """Stands for a process that ends without a word."""


def test_a_stage_that_asks_for_groups_trains_on_them_and_resumes_to_the_same_bits(
    shards: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny shards have labels 0, 1, 2; this stage reads four images of one label at a time."""
    found = recipe.load("plain_vq")
    seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def watching(model, batch, share):
        labels, real = batch.columns["label"].view(-1, 4), batch.mask.view(-1, 4)
        filled = real.any(1)
        assert (labels[filled] == labels[filled, :1]).all()
        assert batch.columns["image"].flatten(1).any(1).view(-1, 4)[filled].all()
        seen.append((batch.keys.view(-1, 4).tolist(), real.tolist()))
        return found.stages(found.Settings(**spec.settings))[0].losses(model, batch, share)

    def stages(settings):
        return tuple(replace(stage, grouping=Grouping("label", 4), losses=watching) for stage in found.stages(settings))

    spec = spec_of("plain_vq", shards, tmp_path / "whole", steps=9)
    monkeypatch.setattr(recipe, "load", lambda name: replace(found, stages=stages))
    feed = Feed(ShardReader(shards))
    whole, _ = loop.train(spec, feed, CPU, lambda _: None)
    rows = feed.reader.rows("train")
    plan = feed.open(spec, found.Settings(**spec.settings), stages(found.Settings(**spec.settings))[0], CPU).rows
    first = seen[: plan.steps_per_epoch]
    ids = [key for keys, real in first for key, yes in zip(np.ravel(keys), np.ravel(real), strict=True) if yes]
    assert len(ids) == len(set(ids)) == rows
    assert any(any(its) and not all(its) for _, real in first for its in real)

    def stop(event: loop.Event) -> None:
        if event["kind"] == "progress" and event["step"] == 6:
            raise Stopped

    before, seen = seen, []
    again = replace(spec, out=str(tmp_path / "stopped"))
    with pytest.raises(Stopped):
        loop.train(again, feed, CPU, stop)
    seen = []
    resumed, _ = loop.train(again, feed, CPU, lambda _: None)
    assert seen == before[4:]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_grouping_by_a_column_that_is_not_there_is_refused_with_those_that_are(shards: str, tmp_path) -> None:
    found = recipe.load("plain_vq")
    spec = spec_of("plain_vq", shards, tmp_path)
    settings = found.Settings(**spec.settings)
    stage = replace(found.stages(settings)[0], grouping=Grouping("bundle", 4))
    with pytest.raises(Refused, match=r"column 'bundle', which .* it has row_id, split, image, label, name"):
        Feed(ShardReader(shards)).open(spec, settings, stage, CPU)


def test_text_groups_as_numbers_do(shards: str, tmp_path) -> None:
    found = recipe.load("plain_vq")
    spec = spec_of("plain_vq", shards, tmp_path)
    settings = found.Settings(**spec.settings)
    stage = replace(found.stages(settings)[0], grouping=Grouping("name", 2))
    plan = Feed(ShardReader(shards)).open(spec, settings, stage, CPU).rows
    ordinals, mask = epoch_of(plan, 0)  # type: ignore[arg-type]
    # Names differ from row to row, so every group is one image and its repeat.
    assert (ordinals[:, 0] == ordinals[:, 1]).all()
    assert mask.sum() == len(ordinals) == ShardReader(shards).rows("train")
