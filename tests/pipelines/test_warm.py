"""Warm starts without Ray: what a run takes over, and a search whose larger codebooks grow from smaller ones."""

from pathlib import Path

import pytest
import torch

from pipelines import loop, recipe, trained, trial_run, trials, warm
from pipelines.champion import search_report
from pipelines.errors import Failed, Refused
from pipelines.feed import Feed
from pipelines.search_plan import Plan
from pipelines.shards import ShardReader
from tests.pipelines.loops import make_shards, spec_of
from tests.pipelines.test_search_session import STEPS, asked, essence, opened, run_all, run_one
from vqcore.bundle import read_bundle
from vqcore.growth import grow

SIZES = ("num_codes=choice:16,4,8", "patch=choice:2,4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"), rows=90)


@pytest.fixture(scope="module")
def grown(shards, tmp_path_factory) -> dict[int, trials.Trial]:
    return run_all(opened(asked(shards, tmp_path_factory.mktemp("grown") / "s", *SIZES, grow=0.5)))


@pytest.mark.parametrize("name", ["plain_vq", "rotation_trick"])
def test_a_run_takes_over_the_network_and_grows_the_codebook(shards, tmp_path, name):
    spec = spec_of(name, shards, tmp_path / "run", num_codes=6, steps=4)
    model, _ = loop.train(spec, Feed(ShardReader(shards)), torch.device("cpu"), lambda _: None)
    trained.write_trained(spec.out, model, {"recipe": name, "settings": spec.settings})
    found = recipe.load(name)
    larger = spec_of(name, shards, tmp_path / "larger", num_codes=10).settings
    fresh = trained.rebuild(found, found.Settings(**larger))
    said = warm.start(fresh, spec.out)
    assert said == "codebook grown from 6 to 10 codes, the network taken over"
    before, after = model.state_dict(), fresh.state_dict()
    vectors = "quantizer.codebook.vectors"
    assert after[vectors].equal(grow(before[vectors], before["quantizer.codebook.counts"], 10))
    assert after[vectors][:6].equal(before[vectors])
    others = [key for key in before if not key.startswith("quantizer.codebook.")]
    assert all(after[key].equal(before[key]) for key in others)
    with pytest.raises(Failed, match="has another shape, and only codebooks grow"):
        warm.start(trained.rebuild(found, found.Settings(**{**larger, "num_codes": 5})), spec.out)


def test_larger_codebooks_of_a_grid_start_from_the_next_smaller_of_the_same_repeat(grown):
    by_settings = {(t.settings["num_codes"], t.settings["patch"]): t for t in grown.values()}
    for (size, patch), trial in by_settings.items():
        assert trial.state == "finished", trial.error
        if size == 4:
            assert (trial.grown_from, trial.steps) == (None, STEPS)
            continue
        parent = by_settings[size // 2, patch]
        assert (trial.grown_from, trial.steps) == (parent.number, STEPS // 2)
        card = read_bundle(Path(trial.out) / "bundle").card
        assert card["parents"]["grown_from"] == parent.bundle_digest
    best = [by_settings[size, 2].metrics["distortion"] for size in (4, 8, 16)]
    assert best == sorted(best, reverse=True), "more codes lose less"
    (said,) = search_report._said_of_growth(list(grown.values()))
    assert said.startswith("4 trials grew from the next smaller codebook in 6 steps instead of 12: 33% of")


def test_killed_sessions_grow_to_the_same_bits(shards, tmp_path, grown):
    out = tmp_path / "s"
    for ended in (1, 2, 6):
        session = opened(asked(shards, out, *SIZES, grow=0.5))
        while len(session.records) < ended:
            number = session.next()
            run_one(session, number)
            session.end(number, None)
        session.next()
    assert essence(session.records) == essence(grown)


def test_what_waits_for_a_smaller_one_is_not_handed_out_before_it(shards, tmp_path):
    session = opened(asked(shards, tmp_path / "s", *SIZES, grow=0.5))
    first, second = session.next(), session.next()
    assert {session.proposals[number].settings["num_codes"] for number in (first, second)} == {4}
    assert session.next() is None
    run_one(session, first)
    session.end(first, None)
    third = session.next()
    assert session.proposals[third].grown_from == first


def test_a_trial_whose_smaller_one_failed_starts_cold(shards, tmp_path):
    session = opened(asked(shards, tmp_path / "s", "num_codes=choice:4,8", grow=0.5))
    first = session.next()
    trials.write(
        trial_run.home_of(session.plan.out, first), trial_run.failed(session.plan.out, session.proposals[first], "no")
    )
    session.end(first, None)
    ended = run_one(session, session.next())
    assert (ended.state, ended.grown_from, ended.steps) == ("finished", None, STEPS)


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (SIZES, {"grow": 0.0}, r"--grow 0 was given; it takes the share of steps"),
        (SIZES, {"grow": 0.5, "sampler": "random"}, r"--grow needs all sizes at all steps"),
        (("patch=choice:2,4",), {"grow": 0.5}, r"search num_codes freely"),
        (("num_codes=choice:4,8", "patch=2"), {"grow": 0.5, "bits": 48.0}, r"search num_codes freely"),
        (("num_codes=choice:8",), {"grow": 0.5}, r"no two points of the grid differ in num_codes alone"),
    ],
)
def test_growth_that_cannot_be_is_refused(shards, tmp_path, words, changes, said):
    with pytest.raises(Refused, match=said):
        Plan(asked(shards, tmp_path / "s", *words, **changes)).check()
