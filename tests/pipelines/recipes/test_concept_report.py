"""Which vector stands for a document, and which of its rows is the salient one."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.errors import Refused
from pipelines.recipes import _concept_report as reports
from pipelines.recipes._saliency import Kept, Salience


def job_of(out: Path, filtered: bool = False, layer: int = 1, **settings) -> SimpleNamespace:
    corpus = {"min_word_count": 5 if filtered else 1, "max_word_occurrences": None}
    reader = SimpleNamespace(manifest=SimpleNamespace(settings=corpus))
    opened = SimpleNamespace(settings=SimpleNamespace(layer_in=layer))
    given = reports.ConceptReportSettings(**settings)
    return SimpleNamespace(reader=reader, trained=opened, settings=given, out=str(out))


def pooling(home: Path, mode: str) -> str:
    modes = {f"pooling_mode_{one}": one == mode for one in ("cls_token", "mean_tokens")}
    (home / mode / "1_Pooling").mkdir(parents=True)
    (home / mode / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return str(home / mode)


def test_the_sentence_vector_is_as_asked_for_or_as_the_model_pools(tmp_path):
    out = tmp_path / "out"
    assert reports._sentence(job_of(out), special=True) == "first"
    assert reports._sentence(job_of(out), special=False) == "mean"
    assert reports._sentence(job_of(out, model=pooling(tmp_path, "mean_tokens")), special=True) == "mean"
    assert reports._sentence(job_of(out, model=pooling(tmp_path, "cls_token")), special=True) == "first"
    assert reports._sentence(job_of(out, model=str(tmp_path), sentence="first"), special=True) == "first"


def test_a_first_token_that_is_a_word_and_filtered_means_are_refused(tmp_path):
    with pytest.raises(Refused, match="use sentence=mean"):
        reports._sentence(job_of(tmp_path, sentence="first"), special=False)
    with pytest.raises(Refused, match="lost words to min_word_count"):
        reports._sentence(job_of(tmp_path, filtered=True, sentence="mean"), special=True)
    assert reports._sentence(job_of(tmp_path, filtered=True), special=True) == "first"


def test_attributions_of_another_layer_or_sentence_vector_are_refused(tmp_path):
    kept = Kept(1, 2, 8, "mean", [])
    (tmp_path / "saliency.json").write_text(json.dumps(asdict(kept)))
    out = tmp_path / "out"
    assert reports._sentence(job_of(out, saliency=str(tmp_path)), special=True) == "mean"
    with pytest.raises(Refused, match="of layer 1 and sentence=mean; this report is of layer 1 and sentence=first"):
        reports._sentence(job_of(out, saliency=str(tmp_path), sentence="first"), special=True)
    with pytest.raises(Refused, match="this report is of layer 3"):
        reports._sentence(job_of(out, layer=3, saliency=str(tmp_path)), special=True)


@pytest.mark.parametrize("split", ["train", "all"])
def test_documents_that_probes_were_fitted_on_are_refused(split, tmp_path):
    job = job_of(tmp_path)
    (tmp_path / "saliency.json").write_text(json.dumps(asdict(Kept(1, 2, 8, "mean", []))))
    asked = SimpleNamespace(
        **{**vars(job), "split": split, "settings": job_of(tmp_path, saliency=str(tmp_path)).settings}
    )
    with pytest.raises(Refused, match=f"split={split} was given; probes are fitted on train"):
        reports.refuse(asked)


def test_other_numbers_than_those_of_attributions_taken_over_are_refused(tmp_path):
    one = Salience("d", [0], [1.0], 1.0, 0.0)
    (tmp_path / "saliency.json").write_text(json.dumps(asdict(Kept(1, 2, 8, "mean", [one]))))
    taken = {"saliency": str(tmp_path)}
    with pytest.raises(Refused, match=r"steps=50 \(there: 8\)"):
        reports._sentence(job_of(tmp_path / "out", **taken, steps=50), special=False)
    with pytest.raises(Refused, match=r"documents=3 \(there: 1\)"):
        reports._sentence(job_of(tmp_path / "out", **taken, documents=3), special=False)
    assert reports._sentence(job_of(tmp_path / "out", **taken, steps=8), special=False) == "mean"


def test_the_salient_row_is_the_one_with_the_largest_attribution_among_those_in_the_shards():
    one = Salience("d", [0, 1, 2, 3], [5.0, -9.0, 2.0, 4.0], 2.0, 0.0)
    places = {"d": {0: 10, 1: 11, 2: 12}}
    found = [reports._salient(["d"], {"d": one}, places, skipped) for skipped in (None, 0)]
    assert [ordinals.tolist() for ordinals, _ in found] == [[10], [12]]
    assert found[1][1] == [{"document": "d", "position": 2, "attribution": 2.0}]
