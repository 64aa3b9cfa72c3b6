"""What a training run may be asked for, and where it goes when it was not said where."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.train import workers_of
from pipelines.errors import Refused
from pipelines.recipe import load
from pipelines.request import Request, prepare
from tests.pipelines.loops import TINY, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def request_(shards, tmp_path, monkeypatch) -> Request:
    monkeypatch.setenv("VQRAY_RUNS", str(tmp_path / "runs"))
    return Request("plain_vq", shards, preset="small", overrides={**TINY["plain_vq"], "steps": 4})


def place(request: Request) -> Path:
    return Path(prepare(request).spec.out)


def test_without_out_a_run_is_named_after_what_its_result_depends_on(request_, tmp_path, shards):
    home = place(request_)
    assert home.parent == tmp_path / "runs"
    assert home.name.startswith("plain_vq-")
    same = [
        {"workers": 8}, {"workers": 4, "at_least": 2}, {"micro_batches": 2}, {"checkpoint_every": 7},
        {"patience": 1.0}, {"hang_after": 5.0}, {"restarts": 0},
    ]  # fmt: skip
    assert {place(replace(request_, **changes)) for changes in same} == {home}
    other = [
        {"seed": 1}, {"precision": "bf16"}, {"overrides": {**request_.overrides, "num_codes": 13}},
        {"overrides": {**request_.overrides, "steps": 5}}, {"preset": "paper"}, {"recipe": "rotation_trick",
        "overrides": {**TINY["rotation_trick"], "steps": 4}}, {"shards": make_shards(tmp_path / "other", rows=46)},
    ]  # fmt: skip
    places = {place(replace(request_, **changes)) for changes in other}
    assert len(places) == len(other)
    assert home not in places


def test_the_same_shards_elsewhere_are_the_same_run(request_, tmp_path):
    assert place(replace(request_, shards=make_shards(tmp_path / "elsewhere"))) == place(request_)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": 4, "at_least": 5}, r"--workers 5\.\.4 was given; write the fewest first"),
        ({"workers": 4, "at_least": 0}, r"--workers 0\.\.4 was given"),
        ({"precision": "fp16"}, r"--precision 'fp16' was given; allowed: float32, bf16"),
        ({"micro_batches": 0}, r"--micro-batches 0.*at least 1 micro-batch"),
        ({"hang_after": 0.0}, r"more than 0 seconds until a worker counts as hung"),
        ({"workers": 9}, r"batch of 8 rows cannot be shared by 9 workers"),
    ],
)
def test_mistakes_are_refused_with_what_is_allowed(request_, changes, said):
    with pytest.raises(Refused, match=said):
        prepare(replace(request_, **changes))


def test_micro_batches_are_refused_for_a_quantizer_that_updates_at_every_forward(request_, monkeypatch):
    found = load("plain_vq")
    (stage,) = found.stages(prepare(request_).spec.settings and found.Settings(**prepare(request_).spec.settings))

    def build(settings, previous):
        model = stage.build(settings, previous)
        model.quantizer.accumulates = False
        return model

    changed = replace(found, stages=lambda settings: (replace(stage, build=build),))
    monkeypatch.setattr("pipelines.recipe.load", lambda _: changed)
    with pytest.raises(Refused, match=r"--micro-batches 2 was given, and quantizer of recipe 'plain_vq' updates at"):
        prepare(replace(request_, micro_batches=2))
    prepare(request_)


@pytest.mark.parametrize(("words", "meant"), [("3", (3, None)), ("2..8", (8, 2))])
def test_workers_are_a_number_or_the_fewest_and_the_most(words, meant):
    assert workers_of(words) == meant


@pytest.mark.parametrize("words", ["two", "2..", "..8", "2-8", "-1", "2..8..9"])
def test_other_words_for_workers_are_refused(words):
    with pytest.raises(Refused, match=r"write a number, or the fewest and the most: 2\.\.8"):
        workers_of(words)
