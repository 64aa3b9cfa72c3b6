"""The report of a recipe whose codes are concepts of a language model: their page, and if predictions rest on them.

Two files for people and programs, `concepts.html` and `concepts.json`. Where the language model and the texts are at
hand (`model=`, `source=`), also `faithfulness.json` and `saliency.json`, which another report of the same shards can
take over (`saliency=ITS DIRECTORY`): what tokens a prediction rests on does not depend on the codebook.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipelines import storage
from pipelines.errors import Failed, Refused
from pipelines.recipe import ReportJob
from pipelines.recipes import _activations as layers
from pipelines.recipes import _concept_ablation as ablation
from pipelines.recipes import _concept_page as pages
from pipelines.recipes import _concepts as concepts
from pipelines.recipes import _faithfulness as faithfulness
from pipelines.recipes import _saliency as saliency

FILES = ("concepts.html", "concepts.json", "faithfulness.json", "saliency.json")


class ConceptReportSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, exclude=True, description="folder of the language model the shards were made with")
    source: tuple[str, ...] = Field((), exclude=True, description="the texts the shards were made from")
    gguf_file: str | None = Field(None, exclude=True)
    saliency: str | None = Field(None, exclude=True, description="an earlier report to take attributions from")
    sentence: Literal["first", "mean"] | None = Field(
        None, description="a document's vector; default the first token where it is special, but as the model pools"
    )
    salient: Literal["any", "words"] = Field(
        "any", description="rows whose concept may be taken out: words leaves the special first token out"
    )
    documents: int = Field(300, ge=2, description="of the split that faithfulness is measured on, at most")
    steps: int = Field(20, ge=1, description="points of the integral of gradients (source: 500)")
    kmeans: bool = Field(True, description="compare with k-means of the lower layer, K as the codebook's")
    seed: int = Field(42, ge=0, description="of random directions, folds and k-means")

    @field_validator("source", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def refuse(job: ReportJob) -> None:
    """Raise Refused, before any work, for what cannot end well."""
    s = job.settings
    if s.saliency is not None and saliency.kept(storage.normalise(s.saliency)) is None:
        raise Refused(f"saliency={s.saliency} holds no saliency.json; give the directory of a finished report.")
    if (s.model is None) != (not s.source):
        raise Refused("faithfulness needs both the model and the texts: --set model=FOLDER source=URI (or neither).")
    if s.model is not None:
        ablation.corpus_settings(job).inspect()
    if s.model is not None or s.saliency is not None:
        if job.split in ("train", "all"):
            raise Refused(
                f"split={job.split} was given; probes are fitted on train documents, so faithfulness needs valid"
                " or test. Leave model=, source= and saliency= out for the concepts alone."
            )
        if job.reader.rows("train") == 0:
            raise Refused("the shards have no train rows, and probes are fitted on train documents.")
        _check_documents(job)
        low, held = job.trained.settings.layer_in, layers.layers_of(job.reader.manifest.columns)
        if low == held[-1]:
            raise Refused(
                f"layer {low} is the last of these shards; faithfulness looks to a later one: ingest one too."
            )
        ablation.sentence_of(job, faithfulness.first_is_special(job.reader, job.split))


def _check_documents(job: ReportJob) -> None:
    """Raise Refused where probes cannot be fitted, or the texts are others."""
    s, labels = job.settings, faithfulness.labels_of(job.reader, "train")
    classes = faithfulness.classes_of(list(labels.values()))
    known = [classes.index(label) for label in labels.values() if label is not None]
    faithfulness.folds_of(np.array(known, np.int64), classes)
    here = {name for name, label in faithfulness.labels_of(job.reader, job.split).items() if label in classes}
    if not here:
        raise Refused(
            f"no document of split {job.split!r} has a label that train documents have ({', '.join(classes)})."
        )
    if s.source:
        saliency.check_texts(list(s.source), ablation.corpus_settings(job), here)


def write(job: ReportJob, model: concepts.ConceptModel) -> dict[str, float]:
    """Make the report's files; its metrics."""
    found = concepts.described(concepts.gather(job.directory, job.reader, job.split, job.out), model.vectors)
    if not found:
        raise Failed(f"no row of split {job.split!r} has a code: every one holds a value that is not finite.")
    measured = None
    if job.settings.saliency is not None or job.settings.model is not None:
        measured = ablation.faithful(job, model)
        storage.write_json_atomic(storage.join(job.out, "faithfulness.json"), measured)
    head = {"format": concepts.FORMAT, "version": concepts.VERSION, "bundle": job.trained.digest}
    about = {
        "shards": job.reader.manifest.digest, "split": job.split, "recipe": job.trained.recipe.name,
        "rows_without_code": _without_code(job, found),
    }  # fmt: skip
    storage.write_json_atomic(storage.join(job.out, "concepts.json"), {**head, **about, "concepts": found})
    page = _page(job, model, found, measured)
    storage.write_atomic(storage.join(job.out, "concepts.html"), page.encode("utf-8"))
    metrics = {"active_codes": float(len(found)), "label_purity": _purity(found)}
    return {**metrics, **(_metrics(measured) if measured else {})}


def _without_code(job: ReportJob, found: Sequence[Mapping[str, Any]]) -> int:
    """Rows of the split that hold a value that is not finite, and so belong to no concept."""
    return job.reader.rows(job.split) - sum(one["rows"] for one in found)


def _purity(found: Sequence[Mapping[str, Any]]) -> float:
    """The share of rows whose label is the most frequent one of their concept."""
    return sum(one["labels"][0]["count"] for one in found) / sum(one["rows"] for one in found)


def _metrics(measured: Mapping[str, Any]) -> dict[str, float]:
    """The headline numbers of faithfulness, with names for tables."""
    found = {"documents": float(measured["documents"]), "chance": measured["chance"]}
    for name, one in measured["accuracy"].items():
        key = name.replace(",", "").replace("-", "").replace(" ", "_")
        found[f"accuracy_{key}"] = one["accuracy"]
        if name != "whole":
            found[f"drop_{key}"] = one["drop"]
    return found


def _page(
    job: ReportJob, model: concepts.ConceptModel, found: Sequence[Mapping[str, Any]], measured: Mapping[str, Any] | None
) -> str:
    rows = sum(one["rows"] for one in found)
    facts = {
        "concepts in use": f"{len(found)} of {len(model.vectors)}",
        "rows": f"{rows:,}",
        "split": job.split,
        "of their main label": f"{_purity(found):.0%}",
    }
    if lost := _without_code(job, found):
        facts["rows that are not finite, and have no concept"] = f"{lost:,}"
    about = (
        f"{model.what}; bundle {job.trained.digest[:12]}. Each card is one code: the words that get it (large: often;"
        " first: more often than elsewhere), the labels of their documents, and places where they stand. Its title is"
        " its first three words, not a judgement."
    )
    tables = []
    if measured is not None:
        classes = measured["classes"]
        lines = [_accuracy_row(name, one, classes) for name, one in measured["accuracy"].items()]
        caption = (
            f"A probe on the {measured['sentence']} of layer {model.layer_in}, with one direction taken out"
            f" ({measured['documents']} documents; chance {measured['chance']:.0%})"
        )
        tables.append(pages.table(caption, ["taken out", "accuracy", "± probes", "lost", *classes], lines))
    return pages.page("Concepts", about, facts, found, tables)


def _accuracy_row(name: str, one: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    per_class = [f"{one['per_class'][label]:.0%}" if label in one["per_class"] else "" for label in classes]
    lost = "" if name == "whole" else f"{one['drop']:.1%}"
    what = "nothing" if name == "whole" else name
    return [what, f"{one['accuracy']:.3f}", f"{one['spread']:.3f}", lost, *per_class]
