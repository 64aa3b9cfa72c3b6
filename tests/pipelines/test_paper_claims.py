"""The claims runner: what is called different, what is left to do, and that a rerun does only that."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipelines import paper_claims, recipe
from pipelines.errors import Refused
from pipelines.paper_claims import Row, contrasted, table
from pipelines.recipe import SOURCE, Claims, Contrast, Line, Run

RUNS = (Run("a", {"steps": 1}, 2.0), Run("b", {}, 5.0, headline=False))
LINES = (
    Line("alone", "3", "a", "x", lambda mean: mean > 2),
    Line("plain", "", "a", "x"),
    Contrast("above", "yes", "a", "b", "x"),
    Contrast("inside", "yes", "a", "a", "x", larger=False, against_metric="y"),
)


@pytest.mark.parametrize(
    ("values", "others", "larger", "said"),
    [
        ([3.0, 3.2], [1.0, 1.2], True, "yes"),
        ([3.0, 3.2], [1.0, 1.2], False, "no, the other way round"),
        ([3.0, 1.0], [1.9, 1.0], True, "no difference beyond the spread"),
        ([3.0], [1.0], True, "one seed: no spread is known"),
        ([1.0, 1.0], [1.0, 1.0], True, "no difference beyond the spread"),
    ],
)
def test_a_difference_inside_the_spread_is_none(values, others, larger, said):
    assert contrasted(values, others, larger) == said


def test_the_table_shows_means_and_ranges_in_columns():
    lines = table([Row("claim one", "93 %", [0.5, 0.7], [], "yes"), Row("c", "", [2.0], [1.0], "")])
    assert "0.6 (0.5 to 0.7)" in lines[1]
    assert "2 against 1" in lines[2]
    assert [line.index(cell) for line, cell in zip(lines, ("paper", "93 %"), strict=False)] == [11, 11]


class Made(list):
    """Stands for training: writes what a run would leave."""

    def __call__(self, name, run, seed, out, shards, places, told):
        self.append((run.name, seed))
        home = paper_claims._home(out, run, seed)
        home.mkdir(parents=True)
        values = {"a": 3.0, "b": 1.0}[run.name]
        (home / paper_claims.MEASURED).write_text(json.dumps({"metrics": {"x": values + seed / 10, "y": values + 0.1}}))


@pytest.fixture
def made(monkeypatch, tmp_path) -> Made:
    """A recipe with claims whose runs cost nothing."""
    from tests.pipelines.loops import make_shards

    shards = make_shards(tmp_path / "shards")
    told = Claims((), 1.0, lambda places: ([], {}), RUNS, LINES)
    fake = recipe.Recipe(**{**recipe.load("plain_vq").__dict__, "claims": told})
    monkeypatch.setattr(recipe, "load", lambda name: fake)
    monkeypatch.setattr(paper_claims, "_data", lambda *_: (shards, {}))
    monkeypatch.setattr(paper_claims.cluster, "connect", lambda: None)
    making = Made()
    monkeypatch.setattr(paper_claims, "_make", making)
    return making


def test_the_headline_makes_its_own_runs_and_the_rest_adds_what_is_missing(made, tmp_path, capsys):
    found = paper_claims.claims("x", tmp_path, headline=True)
    assert made == [("a", 0), ("a", 1), ("a", 2)]
    assert "3 runs to make, about 6 minutes" in capsys.readouterr().err
    assert [(row["what"], row["verdict"]) for row in found.claims] == [
        ("alone", "as in the paper"),
        ("plain", ""),
        ("inside", "no difference beyond the spread"),
    ]
    made.clear()
    found = paper_claims.claims("x", tmp_path)
    assert made == [("b", 0), ("b", 1), ("b", 2)]
    assert {row["what"]: row["verdict"] for row in found.claims}["above"] == "yes"
    made.clear()
    again = paper_claims.claims("x", tmp_path)
    assert (made, again.skipped, again.claims) == ([], True, found.claims)
    assert json.loads((tmp_path / "claims.json").read_text())["claims"] == found.claims
    assert (tmp_path / "claims.txt").read_text().splitlines() == found.table


def test_recipes_without_claims_are_refused_with_those_that_have_them(tmp_path):
    with pytest.raises(Refused, match="names no claims; these do: "):
        paper_claims.claims("plain_vq", tmp_path)


def test_data_to_bring_is_asked_for_and_no_other_is_taken(tmp_path, monkeypatch):
    with pytest.raises(Refused, match="leave --source out"):
        paper_claims.claims("clvq_vae", tmp_path, source=tmp_path)
    told = dataclasses.replace(recipe.load("clvq_vae").claims, packages=(), wants="complexes as x has them")
    wanting = recipe.Recipe(**{**recipe.load("clvq_vae").__dict__, "claims": told})
    monkeypatch.setattr(paper_claims.recipe, "load", lambda name: wanting)
    with pytest.raises(Refused, match="need --source: a folder of complexes as x has them"):
        paper_claims.claims("x", tmp_path)
    with pytest.raises(Refused, match="nowhere is no folder"):
        paper_claims.claims("x", tmp_path, source=tmp_path / "nowhere")


@pytest.mark.parametrize("name", paper_claims.able())
def test_claims_name_runs_and_settings_that_exist(name, tmp_path):
    """Every claim's run is made; every run's settings are the recipe's own; every report setting exists."""
    told = recipe.load(name).claims
    runs = {run.name: run for run in told.runs}
    for run in told.runs:
        found = recipe.load(run.recipe or name)
        found.Settings(**{**found.presets["small"], **run.overrides})
    for line in told.lines:
        assert line.run in runs
        assert not isinstance(line, Contrast) or line.against in runs
    places = {name: Path("/x") for name in (SOURCE, *(package.package for package in told.packages))}
    if told.report is not None:
        found = recipe.load(name)
        found.report.Settings(**told.report(places, tmp_path))
    assert sum(run.minutes for run in told.runs if run.headline) * len(paper_claims.SEEDS) + told.minutes <= 45
