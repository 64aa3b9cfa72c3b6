"""From a model folder and texts to a page of concepts, one verb a step; and what is refused on the way."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from pipelines import report as reporting
from pipelines.errors import Refused
from pipelines.recipes import clvq_vae
from pipelines.report import report
from pipelines.request import Request
from pipelines.shards import ShardReader
from pipelines.train import train
from tests.pipelines.corpora import tiny_language_models as tiny
from tests.pipelines.loops import TINY

pytestmark = [pytest.mark.usefixtures("ray_instance"), pytest.mark.slow]
NAME = "clvq_vae"


def write_texts(home: Path) -> Path:
    """Documents about cats and about dogs, told apart by one word; one empty and one longer than the window."""
    drawn = np.random.default_rng(0)
    for number in range(120):
        label, word = (("cats", "cat"), ("dogs", "dog"))[number % 2]
        words = [word, *drawn.choice(["the", "sat", "on", "mat", "good", "film"], size=6)]
        file = home / label / f"{number:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(drawn.permutation(words)))
    (home / "cats" / "empty.txt").write_text(" \n")
    (home / "dogs" / "long.txt").write_text("the dog sat on the mat . " * 20)
    return home


class Story:
    """What the module's tests share."""

    def __init__(self, home: Path) -> None:
        self.model = tiny.save(home / "model")
        self.other = tiny.save(home / "other", seed=1)
        self.texts = write_texts(home / "texts")
        self.shards, self.run, self.out = str(home / "shards"), str(home / "run"), str(home / "concepts")

    def given(self, **more: object) -> dict[str, object]:
        return {"model": str(self.model), "source": str(self.texts), "steps": 8, "documents": 12, **more}


@pytest.fixture(scope="module")
def story(tmp_path_factory, ray_instance) -> Story:
    made = Story(tmp_path_factory.mktemp("story"))
    words = ["ingest", "--corpus", "activations", "--source", str(made.texts), "--out", made.shards, "--holdout", "0.2"]
    assert cli.main([*words, "--set", f"model={made.model}", "layers=1,2", "words=mean"]) == 0
    train(Request(NAME, made.shards, made.run, overrides={**TINY[NAME], "steps": 30}, preset="small"))
    return made


def test_one_command_makes_the_page_and_again_does_nothing(story, capsys):
    words = ["report", "--bundle", story.run, "--shards", story.shards, "--out", story.out]
    settings = [f"{key}={value}" for key, value in story.given().items()]
    assert cli.main([*words, "--set", *settings]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["skipped"] is False
    assert [Path(file).name for file in found["files"]] == [
        "concepts.html", "concepts.json", "faithfulness.json", "saliency.json",
    ]  # fmt: skip
    described = json.loads((Path(story.out) / "concepts.json").read_text())
    assert sum(one["rows"] for one in described["concepts"]) == ShardReader(story.shards).rows("test")
    assert {entry["label"] for one in described["concepts"] for entry in one["labels"]} == {"cats", "dogs"}
    measured = json.loads((Path(story.out) / "faithfulness.json").read_text())
    assert measured["documents"] == 12
    assert measured["classes"] == ["cats", "dogs"]
    whole = measured["accuracy"]["whole"]["accuracy"]
    for one in measured["accuracy"].values():
        assert one["drop"] == pytest.approx((whole - one["accuracy"]) / whole)
    assert found["metrics"]["drop_random"] == measured["accuracy"]["random"]["drop"]
    assert cli.main([*words, "--set", *settings]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"] is True


def test_a_report_that_was_stopped_goes_on_and_attributions_can_be_taken_over(story, tmp_path, monkeypatch):
    from pipelines.recipes import _concept_ablation as ablation
    from pipelines.recipes import _saliency as saliency

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablation.faithfulness, "ask", stop)
        with pytest.raises(KeyboardInterrupt):
            report(story.run, story.shards, str(tmp_path / "a"), overrides=story.given())
    monkeypatch.setattr(saliency, "salience", stop)
    first = report(story.run, story.shards, str(tmp_path / "a"), overrides=story.given())
    again = {"saliency": str(tmp_path / "a"), "steps": 8, "documents": 12}
    second = report(story.run, story.shards, str(tmp_path / "b"), overrides=again)
    assert first.metrics == second.metrics
    assert not first.skipped


def test_a_report_of_other_contents_under_the_same_paths_is_another_report(story, tmp_path, monkeypatch):
    contents = {"tokens": "1"}
    told = replace(clvq_vae.recipe.report, given=lambda job: dict(contents))
    monkeypatch.setattr(clvq_vae, "recipe", replace(clvq_vae.recipe, report=told))
    report(story.run, story.shards, str(tmp_path / "out"))
    assert report(story.run, story.shards, str(tmp_path / "out")).skipped
    contents["tokens"] = "2"
    with pytest.raises(Refused, match=r"given.*tokens.*Give another --out"):
        report(story.run, story.shards, str(tmp_path / "out"))


def test_without_a_model_there_are_concepts_alone(story, tmp_path):
    told = report(story.run, story.shards, str(tmp_path / "plain"))
    assert [Path(file).name for file in told.files] == ["concepts.html", "concepts.json"]
    assert set(told.metrics) == {"active_codes", "label_purity"}


def test_another_models_tokenizer_and_a_folder_without_weights_are_refused(story, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(Refused, match="is another model than these settings were made with"):
        report(story.run, story.shards, out, overrides=story.given(model=str(story.other)))
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "config.json").write_text((story.model / "config.json").read_text())
    with pytest.raises(Refused, match="safetensors"):
        report(story.run, story.shards, out, overrides=story.given(model=str(hollow)))
    with pytest.raises(Refused, match="both the model and the texts"):
        report(story.run, story.shards, out, overrides={"model": str(story.model)})
    with pytest.raises(Refused, match=r"no saliency\.json"):
        report(story.run, story.shards, out, overrides={"saliency": str(tmp_path)})
    with pytest.raises(Refused, match="did you mean 'documents'"):
        report(story.run, story.shards, out, overrides={"document": 3})
    assert not Path(out).exists(), "nothing was begun"


def test_texts_of_one_class_are_refused_with_what_to_do(story, tmp_path):
    only = tmp_path / "only"
    for number in range(40):
        (only / "cats").mkdir(parents=True, exist_ok=True)
        (only / "cats" / f"{number}.txt").write_text("the cat sat on the mat")
    shards = str(tmp_path / "shards")
    words = ["ingest", "--bundle", story.run, "--source", str(only), "--out", shards, "--holdout", "0.2"]
    assert cli.main([*words, "--set", f"model={story.model}"]) == 0
    out = tmp_path / "out"
    with pytest.raises(Refused, match="only the label 'cats'"):
        report(story.run, shards, str(out), overrides=story.given(source=str(only)))
    assert not out.exists(), "nothing was begun"


def test_other_texts_than_those_of_the_shards_are_refused_before_any_work(story, tmp_path):
    others, out = tmp_path / "others", tmp_path / "out"
    (others / "elsewhere").mkdir(parents=True)
    (others / "elsewhere" / "0.txt").write_text("the cat sat on the mat")
    with pytest.raises(Refused, match=r"none of the \d+ documents of these shards .* is in .*others"):
        report(story.run, story.shards, str(out), overrides=story.given(source=str(others)))
    assert not out.exists(), "nothing was begun"


def test_a_recipe_without_a_report_names_those_with_one(story, tmp_path, monkeypatch):
    found = reporting.able()
    assert NAME in found
    opened = reporting.opened_for(Path(story.run) / "bundle", story.shards, "test")
    bare = type(opened[0])(
        type(opened[0].recipe)(**{**opened[0].recipe.__dict__, "report": None}), *list(vars(opened[0]).values())[1:]
    )
    monkeypatch.setattr(reporting, "opened_for", lambda *_: (bare, opened[1]))
    with pytest.raises(Refused, match=NAME):
        report(story.run, story.shards, str(tmp_path / "none"))
