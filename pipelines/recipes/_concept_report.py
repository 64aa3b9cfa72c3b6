"""The report of a recipe whose codes are concepts of a language model: their page, and if predictions rest on them.

Two files for people and programs, `concepts.html` and `concepts.json`. Where the language model and the texts are at
hand (`model=`, `source=`), also `faithfulness.json` and `saliency.json`, which another report of the same shards can
take over (`saliency=ITS DIRECTORY`): what tokens a prediction rests on does not depend on the codebook.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from pipelines import storage
from pipelines.corpora import activations
from pipelines.errors import Refused
from pipelines.feed import read_columns
from pipelines.recipe import ReportJob
from pipelines.recipes import _activations as layers
from pipelines.recipes import _concept_page as pages
from pipelines.recipes import _concepts as concepts
from pipelines.recipes import _faithfulness as faithfulness
from pipelines.recipes import _saliency as saliency
from pipelines.recipes._faithfulness import Sentences
from vqcore import noise, seeding

Directions = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N R D"]]
"""Rows of the lower layer -> the directions of their concepts, in that layer's space."""
FILES = ("concepts.html", "concepts.json", "faithfulness.json", "saliency.json")
BASELINE_ROWS = 65_536
"""Train rows that k-means is fitted to."""


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


@dataclass(frozen=True)
class ConceptModel:
    """What a recipe says of a trained model for its report."""

    vectors: Float[Tensor, "K D"]
    """What says which codes are near."""
    directions: Directions
    layer_in: int
    what: str
    """In a few words: `CLVQ-VAE, layers 3 to 6`."""


def refuse(job: ReportJob) -> None:
    """Raise Refused, before any work, for what cannot end well."""
    s = job.settings
    if s.saliency is not None and saliency.kept(storage.normalise(s.saliency)) is None:
        raise Refused(f"saliency={s.saliency} holds no saliency.json; give the directory of a finished report.")
    if (s.model is None) != (not s.source):
        raise Refused("faithfulness needs both the model and the texts: --set model=FOLDER source=URI (or neither).")
    if s.model is not None:
        _corpus_settings(job).inspect()
    if s.model is not None or s.saliency is not None:
        if job.split in ("train", "all"):
            raise Refused(
                f"split={job.split} was given; probes are fitted on train documents, so faithfulness needs valid"
                " or test. Leave model=, source= and saliency= out for the concepts alone."
            )
        if job.reader.rows("train") == 0:
            raise Refused("the shards have no train rows, and probes are fitted on train documents.")
        low, held = job.trained.settings.layer_in, layers.layers_of(job.reader.manifest.columns)
        if low == held[-1]:
            raise Refused(
                f"layer {low} is the last of these shards; faithfulness looks to a later one: ingest one too."
            )
        _sentence(job, faithfulness.first_is_special(job.reader, job.split))


def write(job: ReportJob, model: ConceptModel) -> dict[str, float]:
    """Make the report's files; its metrics."""
    found = concepts.described(concepts.gather(job.directory, job.reader, job.split, job.out), model.vectors)
    measured = None
    if job.settings.saliency is not None or job.settings.model is not None:
        measured = faithful(job, model)
        storage.write_json_atomic(storage.join(job.out, "faithfulness.json"), measured)
    head = {"format": concepts.FORMAT, "version": concepts.VERSION, "bundle": job.trained.digest}
    about = {"shards": job.reader.manifest.digest, "split": job.split, "recipe": job.trained.recipe.name}
    storage.write_json_atomic(storage.join(job.out, "concepts.json"), {**head, **about, "concepts": found})
    page = _page(job, model, found, measured)
    storage.write_atomic(storage.join(job.out, "concepts.html"), page.encode("utf-8"))
    metrics = {"active_codes": float(len(found)), "label_purity": _purity(found)}
    return {**metrics, **(_metrics(measured) if measured else {})}


def _purity(found: Sequence[Mapping[str, Any]]) -> float:
    """The share of rows whose label is the most frequent one of their concept."""
    return sum(one["labels"][0]["count"] for one in found) / sum(one["rows"] for one in found)


def faithful(job: ReportJob, model: ConceptModel) -> dict[str, Any]:
    """Probe accuracies with each concept taken out, as JSON values; `saliency.json` is left beside."""
    low, high = model.layer_in, layers.layers_of(job.reader.manifest.columns)[-1]
    special = faithfulness.first_is_special(job.reader, job.split)
    first = _sentence(job, special) == "first"
    train, test = (
        faithfulness.sentences(job.reader, split, {low, high}, first=first) for split in ("train", job.split)
    )
    classes = faithfulness.classes_of(train.labels)
    train, test = _labelled(train, classes), _labelled(test, classes)
    targets = [np.array([classes.index(str(label)) for label in one.labels], np.int64) for one in (train, test)]
    readout = faithfulness.readout(train.vectors[high], targets[0])
    predicted = dict(zip(test.names, readout.classes(test.vectors[high]).tolist(), strict=True))
    explained = _explained(job, test, predicted, readout, low, high, first)
    kept = [n for n, name in enumerate(test.names) if name in explained]
    test, goal = test.only(kept), targets[1][kept]
    places = faithfulness.places_of(job.reader, job.split, explained)
    skipped = 0 if special and job.settings.salient == "words" else None
    ordinals, salient = _salient(test.names, explained, places, skipped)
    columns, _ = read_columns(job.reader, job.split, ordinals)
    rows = columns[f"{layers.LAYER}{low}"].float()
    kinds = {"concept": model.directions(rows)}
    if job.settings.kmeans:
        kinds["k-means"] = _kmeans(job, model)(rows)
    forms = faithfulness.ablations(test.vectors[low], kinds, train.mean[low], seed=job.settings.seed)
    asked = faithfulness.ask(train.vectors[low], targets[0], forms, goal, classes, seed=job.settings.seed)
    right = [predicted[name] == target for name, target in zip(test.names, goal, strict=True)]
    gaps = [explained[name].gap / max(abs(explained[name].change), 1e-9) for name in test.names]
    return {
        "documents": len(kept),
        "classes": classes,
        "sentence": "first token" if first else "mean over rows",
        "chance": float(np.bincount(goal).max() / len(goal)),
        "read_from_last_layer": float(np.mean(right)),
        "completeness_gap": float(np.median(gaps)),
        "accuracy": {name: {**asdict(one), "drop": one.drop(asked["whole"])} for name, one in asked.items()},
        "salient": salient,
    }


def _sentence(job: ReportJob, special: bool) -> str:
    """Which vector stands for a document: as asked for, as an earlier report took it, or as the model's folder says."""
    s = job.settings
    earlier = saliency.kept(job.out if s.saliency is None else storage.normalise(s.saliency))
    if s.sentence is not None:
        chosen = s.sentence
    elif earlier is not None:
        chosen = earlier.sentence
    else:
        chosen = "first" if special and not saliency.pools_by_mean(s.model) else "mean"
    if earlier is not None and (earlier.sentence, earlier.layer) != (chosen, job.trained.settings.layer_in):
        raise Refused(
            f"the attributions given are of layer {earlier.layer} and sentence={earlier.sentence}; this report is of"
            f" layer {job.trained.settings.layer_in} and sentence={chosen}: give model= and source= instead."
        )
    given = {"steps": s.steps, "documents": s.documents} if s.saliency is not None and earlier is not None else {}
    taken = {} if earlier is None else {"steps": earlier.steps, "documents": len(earlier.documents)}
    differ = [name for name in given if name in s.model_fields_set and given[name] != taken[name]]
    if differ:
        told = ", ".join(f"{name}={given[name]} (there: {taken[name]})" for name in differ)
        raise Refused(f"saliency= takes attributions over as they are, and {told} was given: leave it out.")
    if chosen == "first" and not special:
        raise Refused("sentence=first needs documents that begin with one same token ([CLS], <s>): use sentence=mean.")
    settings = job.reader.manifest.settings
    if chosen == "mean" and (settings["min_word_count"] > 1 or settings["max_word_occurrences"] is not None):
        raise Refused(
            "the train documents of these shards lost words to min_word_count or max_word_occurrences, and those of"
            " other splits did not: their means differ. Ingest without that filter, or say --set sentence=first."
        )
    return str(chosen)


def _labelled(found: Sentences, classes: Sequence[str]) -> Sentences:
    kept = [n for n, label in enumerate(found.labels) if label in classes]
    if not kept:
        raise Refused("no document of this split has a label that train documents have.")
    return found.only(kept)


def _explained(
    job: ReportJob,
    test: Sentences,
    predicted: Mapping[str, int],
    readout: saliency.Readout,
    low: int,
    high: int,
    first: bool,
) -> dict[str, saliency.Salience]:
    """Attributions of the split's documents: of an earlier report, or made now."""
    s = job.settings
    home = job.out if s.saliency is None else storage.normalise(s.saliency)
    earlier = saliency.kept(home)
    if earlier is not None:
        found = earlier.documents
    else:
        chosen = [test.names[n] for n in np.unique(np.linspace(0, len(test.names) - 1, s.documents).astype(int))]
        settings = _corpus_settings(job)
        texts = saliency.texts_of(list(s.source), settings, chosen)
        found = saliency.salience(
            [texts[name] for name in chosen if name in texts], predicted, readout, settings,
            layer=low, upto=high, first=first, steps=s.steps, out=storage.join(job.out, "saliency"),
        )  # fmt: skip
        record = saliency.Kept(low, high, s.steps, "first" if first else "mean", found)
        storage.write_json_atomic(storage.join(job.out, "saliency.json"), asdict(record))
    here = {one.name: one for one in found if one.name in predicted}
    if not here:
        raise Refused(
            f"the attributions in {home} are of none of the documents in split {job.split!r} of these shards."
        )
    return here


def _salient(
    names: Sequence[str],
    explained: Mapping[str, saliency.Salience],
    places: Mapping[str, Mapping[int, int]],
    skipped: int | None,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(ordinal of each document's most salient row, what it was). A row at position `skipped` is no candidate."""
    ordinals, shown = [], []
    for name in names:
        one = explained[name]
        candidates = [
            (attribution, position)
            for position, attribution in zip(one.positions, one.attributions, strict=True)
            if position in places[name] and position != skipped
        ]
        attribution, position = max(candidates) if candidates else (0.0, min(places[name]))
        ordinals.append(places[name][position])
        shown.append({"document": name, "position": position, "attribution": attribution})
    return np.array(ordinals, np.int64), shown


def _kmeans(job: ReportJob, model: ConceptModel) -> Directions:
    """The baseline of clusters: k-means of one layer, the same K, fitted on train rows."""
    rows = job.reader.rows("train")
    ordinals = np.arange(rows)
    if rows > BASELINE_ROWS:
        races = noise.race(job.settings.seed, 0, torch.arange(rows), stream=seeding.SAMPLE)
        ordinals = races.argsort(stable=True)[:BASELINE_ROWS].sort().values.numpy()
    columns, _ = read_columns(job.reader, "train", ordinals)
    data = columns[f"{layers.LAYER}{model.layer_in}"].float()
    count = min(len(model.vectors), len(data))
    shuffled = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(job.settings.seed))]
    centres = seeding.kmeans_plus_plus(shuffled, count, metric="euclidean", seed=job.settings.seed, iterations=30)
    return layers.nearest_directions(centres)


def _corpus_settings(job: ReportJob) -> activations.ActivationSettings:
    s = job.settings
    given = {**job.reader.manifest.settings, "model": s.model, "gguf_file": s.gguf_file}
    return activations.ActivationSettings.model_validate(given)


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
    job: ReportJob, model: ConceptModel, found: Sequence[Mapping[str, Any]], measured: Mapping[str, Any] | None
) -> str:
    rows = sum(one["rows"] for one in found)
    facts = {
        "concepts in use": f"{len(found)} of {len(model.vectors)}",
        "rows": f"{rows:,}",
        "split": job.split,
        "of their main label": f"{_purity(found):.0%}",
    }
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
