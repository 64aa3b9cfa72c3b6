"""The end of a search, without Ray: trials are made by the plain loop, and the champion is measured in this process."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from pipelines import champion, evaluate, front, pictures, registry, search_report, storage, tracking, trials, tune
from pipelines.errors import Failed, Refused
from pipelines.evaluate import Evaluation
from pipelines.importance import importance
from pipelines.search_plan import Plan
from pipelines.shards import ShardReader
from tests.pipelines.loops import make_shards
from tests.pipelines.test_front import BOTH, repeated, trial
from tests.pipelines.test_search_session import asked, opened, run_all

WORDS = ("num_codes=choice:4,8,16", "patch=choice:2,4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"), rows=90)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """A search whose trials have all ended, one of them in an error."""
    out = tmp_path_factory.mktemp("search") / "s"
    stray = out / "trials/00001/run/stray.txt"
    stray.parent.mkdir(parents=True)
    stray.write_text("not a run")
    session = opened(asked(shards, out, *WORDS))
    storage.write_json_atomic(str(out / "search.json"), session.plan.about)
    run_all(session)
    return out


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, str]]:
    """(bundle's run, split) of every evaluation, which happens in this process."""
    seen: list[tuple[str, str]] = []

    def here(bundle: str, shards: str, out: str, split: str) -> Evaluation:
        seen.append((bundle, split))
        model = champion.evaluate.trained.open_trained(registry.local_bundle(bundle))
        found = evaluate.measure(model, ShardReader(shards), split)
        return Evaluation(out, model.digest, int(found["rows"]), found, [], skipped=False)

    monkeypatch.setattr(champion.evaluate, "evaluate", here)
    return seen


def test_a_finished_search_is_reported_and_only_its_champion_sees_test(shards, finished, measured, capsys):
    made = tune.search(asked(shards, finished, *WORDS))
    ended = {trial.number: trial for trial in trials.read_trials(str(finished))}
    chosen = made.conclusion.champion
    best, why = front.knee(front.pareto(front.points_of(list(ended.values())), BOTH), BOTH)
    assert (chosen["trial"], chosen["why"]) == (best.number, why)
    assert measured == [(ended[best.number].out, "test")]
    assert chosen["test"]["rows"] == 10
    assert chosen["test"]["distortion"] == chosen["test"]["mse"] != chosen["valid"]["distortion"]
    assert chosen["bundle_digest"] == ended[best.number].bundle_digest

    table = parquet.read_table(finished / "trials.parquet").to_pylist()
    assert [row["number"] for row in table] == [0, 1, 2, 3, 4, 5]
    assert table[1]["state"] == "failed"
    assert "holds other files" in table[1]["error"]
    assert table[1]["valid/distortion"] is None
    on_front = {point["trials"][0] for point in made.conclusion.front}
    for row in table:
        assert row["setting/num_codes"] == ended[row["number"]].settings["num_codes"]
        assert row["valid/distortion"] == ended[row["number"]].metrics.get("distortion")
        assert row["on_front"] == (row["number"] in on_front)
    assert (finished / "front.png").stat().st_size > 10_000
    said = capsys.readouterr().err
    assert "5 trials finished, 1 failed" in said
    assert "the spread is unknown, so no difference between points is known to be real" in said
    assert "what matters for distortion: too few finished trials to tell: 5, and 8 are needed" in said
    assert f"champion: trial {best.number} (" in said


def test_another_pick_or_name_needs_no_training_and_a_rerun_does_nothing(shards, finished, measured, monkeypatch):
    monkeypatch.setattr(tune, "_schedule", lambda *_: pytest.fail("something was trained"))

    def searched(**changes):
        return tune.search(asked(shards, finished, *WORDS, **changes))

    first = searched(pick="min:distortion")
    assert first.conclusion.champion["trial"] == min(first.trials, key=lambda t: t.metrics.get("mse", 9)).number
    assert not first.skipped
    again = searched(pick="min:distortion")
    assert (again.skipped, again.conclusion.champion) == (True, first.conclusion.champion)
    assert len(measured) == 1, "what was measured is not measured again"

    named = searched(pick="min:distortion", register="books")
    assert (named.skipped, named.conclusion.registered) == (False, "books@v1")
    assert searched(pick="min:distortion", register="books").skipped
    entry = registry.find("books@champion")
    assert (entry.version, entry.digest) == (1, first.conclusion.champion["bundle_digest"])
    tags = tracking.client().get_model_version("books", "1").tags
    assert tags["search"] == str(finished)
    assert tags["search_trial"] == str(first.conclusion.champion["trial"])
    assert tags["search_digest"] == first.digest
    assert tags["parent_shards"] == tags["shards_digest"] == ShardReader(shards).manifest.digest

    other = searched(pick="min:bits@distortion<=1", register="books")
    assert other.conclusion.registered == "books@v2"
    assert registry.find("books@champion").version == 2
    back = searched(pick="min:distortion", register="books")
    assert back.conclusion.registered == "books@v1"
    assert registry.find("books@champion").version == 1


def test_a_limit_that_nobody_keeps_names_the_closest_and_changes_no_earlier_conclusion(shards, finished, measured):
    asks = asked(shards, finished, *WORDS, pick="min:distortion@bits<=1")
    said = r"within bits_per_row<=1: the closest is trial \d .*with a --pick"
    for name in ("front.json", "trials.parquet", "front.png"):
        (finished / name).unlink(missing_ok=True)
    with pytest.raises(Failed, match=said):
        tune.search(asks)
    assert (finished / "trials.parquet").exists()
    assert not (finished / "front.json").exists()
    assert measured == []
    without = (finished / "front.png").read_bytes()
    tune.search(asked(shards, finished, *WORDS, pick="max:bits"))
    drawn = (finished / "front.png").read_bytes()
    assert drawn != without
    with pytest.raises(Failed, match=said):
        tune.search(asks)
    assert (finished / "front.png").read_bytes() == drawn
    assert tune.search(asked(shards, finished, *WORDS, pick="max:bits")).skipped


def test_an_empty_front_says_what_to_change(shards, tmp_path):
    plan = Plan(asked(shards, tmp_path / "s", *WORDS))
    bad = replace(trial(0, {}, "failed"), error="Traceback\nValueError: it diverged")
    with pytest.raises(Failed, match=r"none finished, 1 failed. Trial 0: ValueError: it diverged.*--retry-failed"):
        champion.conclude(plan, [bad], "digest")
    with pytest.raises(Failed, match=r"all 1 trials were stopped early. Search without --asha"):
        champion.conclude(plan, [trial(0, {"distortion": 1.0, "bits_per_row": 3.0}, "pruned")], "digest")
    assert len(parquet.read_table(tmp_path / "s/trials.parquet")) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pick": "min:psmr"}, r"--pick min:psmr: trials have no metric 'psmr'; did you mean 'psnr'"),
        ({"pick": "best"}, r"--pick best is no rule"),
        ({"objectives": ["min:msee"]}, r"--objective min:msee: trials have no metric 'msee'; did you mean 'mse'"),
        ({"register": "a/b"}, r"'a/b' cannot be a registry name"),
    ],
)
def test_a_wrong_rule_metric_or_name_is_refused_before_any_work(shards, tmp_path, changes, said):
    with pytest.raises(Refused, match=said):
        Plan(asked(shards, tmp_path / "s", *WORDS, **changes))
    assert not (tmp_path / "s").exists()


def test_with_one_objective_the_best_of_it_is_the_champion(shards, tmp_path):
    assert str(Plan(asked(shards, tmp_path / "s", *WORDS, objectives=["max:psnr"])).rule) == "max:psnr"
    assert str(Plan(asked(shards, tmp_path / "s", *WORDS)).rule) == "knee"


def lines_for(many: list[trials.Trial]) -> str:
    points = front.points_of(many)
    best = front.pareto(points, BOTH)
    found = champion.search_report.lines_of(many, points, best, best[0], "so", BOTH, {"distortion": {"k": 1.0}}, None)
    return "\n".join(found)


def test_sentences_call_real_only_what_is_beyond_the_spread():
    inside = [*repeated(0, [1.0, 1.2, 1.4], bits=4), *repeated(10, [0.9, 1.1, 1.3], bits=8)]
    said = lines_for(inside)
    assert "0 -> 10: distortion 1.2 -> 1.1, inside the spread, no difference; bits_per_row 4 -> 8, real" in said
    beyond = [*repeated(0, [1.0, 1.2, 1.4], bits=4), *repeated(10, [0.1, 0.3, 0.5], bits=8)]
    assert "0 -> 10: distortion 1.2 -> 0.3, real" in lines_for(beyond)
    assert "1.2 ±0.2" in said
    near = [*inside, *repeated(20, [1.05, 1.15, 1.25], bits=8)]
    assert "off the front by less than the spread, so as good as it for all that is known: trials 20" in lines_for(near)


def test_importance_finds_the_setting_that_matters_and_is_silent_on_too_few():
    many = [
        trial(4 * a + b, {"distortion": 2.0**-a + b / 1000}, a=2**a, b=["x", "y", "z", "w"][b])
        for a in range(4)
        for b in range(4)
    ]
    shares = importance(many, BOTH[0])
    assert list(shares) == ["a", "b"]
    assert shares["a"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert importance(many, BOTH[0]) == shares
    assert "too few finished trials to tell: 7, and 8" in importance(many[:7], BOTH[0])
    assert "same in all" in importance([replace(t, metrics={"distortion": 1.0}) for t in many], BOTH[0])


def test_settings_of_mixed_kinds_are_kept_in_the_table(tmp_path):
    many = [trial(0, {"m": 1.0}, a=None, b=[1, 2], c=1), trial(1, {"m": 2.0}, a=0.5, b=[3], c="x")]
    champion.search_report.write_table(str(tmp_path), many, {1})
    table = parquet.read_table(tmp_path / "trials.parquet")
    assert table["setting/a"].to_pylist() == [None, 0.5]
    assert table["setting/b"].to_pylist() == [[1, 2], [3]]
    assert [json.loads(text) for text in table["setting/c"].to_pylist()] == [1, "x"]


def test_three_objectives_are_drawn_as_the_first_over_each_other(finished, tmp_path, monkeypatch):
    drawn = []

    def keep(panels, title):
        drawn.extend(panels)
        return pictures.front_plot(panels, title)

    monkeypatch.setattr(search_report, "front_plot", keep)
    ended = trials.read_trials(str(finished))
    objectives = [("distortion", "min"), ("bits_per_row", "min"), ("usage", "max")]
    best = front.pareto(front.points_of(ended), objectives)
    search_report.write_plot(str(tmp_path), ended, best, best[0], objectives, "three", {"usage": "share used"})
    assert [panel.names for panel in drawn] == [("bits_per_row", "distortion"), ("share used", "distortion")]
    for panel, name in zip(drawn, ("bits_per_row", "usage"), strict=True):
        good = [trial for trial in ended if trial.state == "finished"]
        assert panel.placed == {"finished": [(t.values()[name], t.metrics["distortion"]) for t in good]}
        assert dict(panel.missing) == {"failed": 1}
        assert panel.step is None
        assert panel.champion == (best[0].values[name], best[0].values["distortion"])
    figure = pictures.front_plot(drawn, "three")
    assert [axis.get_ylabel() for axis in figure.axes] == ["distortion", "distortion"]
