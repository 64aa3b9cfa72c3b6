"""Which vector stands for a document, and which of its rows is the salient one."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.errors import Refused
from pipelines.recipes import _concept_ablation as ablation
from pipelines.recipes import _concept_report as reports
from pipelines.recipes._saliency import Kept, Salience

SHARDS = "d1" * 32


def job_of(
    out: Path, filtered: bool = False, layer: int = 1, shards: str = SHARDS, upto: int = 2, **settings
) -> SimpleNamespace:
    corpus = {"min_word_count": 5 if filtered else 1, "max_word_occurrences": None}
    columns = dict.fromkeys(f"layer_{n}" for n in (1, upto))
    reader = SimpleNamespace(manifest=SimpleNamespace(settings=corpus, digest=shards, columns=columns))
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
    assert ablation.sentence_of(job_of(out), special=True) == "first"
    assert ablation.sentence_of(job_of(out), special=False) == "mean"
    assert ablation.sentence_of(job_of(out, model=pooling(tmp_path, "mean_tokens")), special=True) == "mean"
    assert ablation.sentence_of(job_of(out, model=pooling(tmp_path, "cls_token")), special=True) == "first"
    assert ablation.sentence_of(job_of(out, model=str(tmp_path), sentence="first"), special=True) == "first"


def test_a_first_token_that_is_a_word_and_filtered_means_are_refused(tmp_path):
    with pytest.raises(Refused, match="use sentence=mean"):
        ablation.sentence_of(job_of(tmp_path, sentence="first"), special=False)
    with pytest.raises(Refused, match="lost words to min_word_count"):
        ablation.sentence_of(job_of(tmp_path, filtered=True, sentence="mean"), special=True)
    assert ablation.sentence_of(job_of(tmp_path, filtered=True), special=True) == "first"


def test_attributions_of_another_layer_or_sentence_vector_are_refused(tmp_path):
    kept = Kept(SHARDS, 1, 2, 8, "mean", [])
    (tmp_path / "saliency.json").write_text(json.dumps(asdict(kept)))
    out = tmp_path / "out"
    assert ablation.sentence_of(job_of(out, saliency=str(tmp_path)), special=True) == "mean"
    with pytest.raises(
        Refused, match="of layers 1 to 2 and sentence=mean; this report is of layers 1 to 2 and sentence=first"
    ):
        ablation.sentence_of(job_of(out, saliency=str(tmp_path), sentence="first"), special=True)
    with pytest.raises(Refused, match="this report is of layers 3 to 2"):
        ablation.sentence_of(job_of(out, layer=3, saliency=str(tmp_path)), special=True)


def test_attributions_of_other_shards_or_another_last_layer_are_refused(tmp_path):
    (tmp_path / "saliency.json").write_text(json.dumps(asdict(Kept(SHARDS, 1, 2, 8, "mean", []))))
    out, given = tmp_path / "out", str(tmp_path)
    with pytest.raises(Refused, match="of shards d1d1d1d1d1d1, this report is of 7e7e7e7e7e7e"):
        ablation.sentence_of(job_of(out, shards="7e" * 32, saliency=given), special=True)
    with pytest.raises(Refused, match="layers 1 to 2 and sentence=mean; this report is of layers 1 to 5"):
        ablation.sentence_of(job_of(out, upto=5, saliency=given), special=True)


def test_attributions_that_do_not_say_of_which_shards_are_refused(tmp_path):
    record = asdict(Kept(SHARDS, 1, 2, 8, "mean", []))
    del record["shards"]
    (tmp_path / "saliency.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match=r"saliency\.json was written by another version"):
        ablation.sentence_of(job_of(tmp_path / "out", saliency=str(tmp_path)), special=True)


@pytest.mark.parametrize("split", ["train", "all"])
def test_documents_that_probes_were_fitted_on_are_refused(split, tmp_path):
    job = job_of(tmp_path)
    (tmp_path / "saliency.json").write_text(json.dumps(asdict(Kept(SHARDS, 1, 2, 8, "mean", []))))
    asked = SimpleNamespace(
        **{**vars(job), "split": split, "settings": job_of(tmp_path, saliency=str(tmp_path)).settings}
    )
    with pytest.raises(Refused, match=f"split={split} was given; probes are fitted on train"):
        reports.refuse(asked)


def test_other_numbers_than_those_of_attributions_taken_over_are_refused(tmp_path):
    one = Salience("d", [0], [1.0], 1.0, 0.0)
    (tmp_path / "saliency.json").write_text(json.dumps(asdict(Kept(SHARDS, 1, 2, 8, "mean", [one]))))
    taken = {"saliency": str(tmp_path)}
    with pytest.raises(Refused, match=r"steps=50 \(there: 8\)"):
        ablation.sentence_of(job_of(tmp_path / "out", **taken, steps=50), special=False)
    with pytest.raises(Refused, match=r"documents=3 \(there: 1\)"):
        ablation.sentence_of(job_of(tmp_path / "out", **taken, documents=3), special=False)
    assert ablation.sentence_of(job_of(tmp_path / "out", **taken, steps=8), special=False) == "mean"


def test_the_salient_row_is_the_one_with_the_largest_attribution_among_those_in_the_shards():
    one = Salience("d", [0, 1, 2, 3], [5.0, -9.0, 2.0, 4.0], 2.0, 0.0)
    places = {"d": {0: 10, 1: 11, 2: 12}}
    found = [ablation._salient(["d"], {"d": one}, places, skipped) for skipped in (None, 0)]
    assert [ordinals.tolist() for ordinals, _ in found] == [[10], [12]]
    assert found[1][1] == [{"document": "d", "position": 2, "attribution": 2.0}]
