"""Faithfulness of a report: a document's most salient concept is found and taken out, and probes are asked again.

`saliency.json` is left beside; another report of the same shards can take it over, as what tokens a prediction rests on
does not depend on the codebook.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from pipelines import storage
from pipelines.corpora import activations
from pipelines.errors import Refused
from pipelines.feed import finite_rows, read_columns
from pipelines.recipe import ReportJob
from pipelines.recipes import _activations as layers
from pipelines.recipes import _faithfulness as faithfulness
from pipelines.recipes import _saliency as saliency
from pipelines.recipes._concepts import ConceptModel, Directions
from pipelines.recipes._faithfulness import Sentences
from vqcore import noise, seeding

BASELINE_ROWS = 65_536
"""Train rows that k-means is fitted to."""


def faithful(job: ReportJob, model: ConceptModel) -> dict[str, Any]:
    """Probe accuracies with each concept taken out, as JSON values; `saliency.json` is left beside."""
    low, high = model.layer_in, layers.layers_of(job.reader.manifest.columns)[-1]
    special = faithfulness.first_is_special(job.reader, job.split)
    first = sentence_of(job, special) == "first"
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


def sentence_of(job: ReportJob, special: bool) -> str:
    """Which vector stands for a document: as asked for, as an earlier report took it, or as the model's folder says."""
    s = job.settings
    earlier = saliency.kept(job.out if s.saliency is None else storage.normalise(s.saliency))
    if s.sentence is not None:
        chosen = s.sentence
    elif earlier is not None:
        chosen = earlier.sentence
    else:
        chosen = "first" if special and not saliency.pools_by_mean(s.model) else "mean"
    if earlier is not None:
        _check_same(job, earlier, chosen)
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


def _check_same(job: ReportJob, earlier: saliency.Kept, sentence: str) -> None:
    """Raise Refused for attributions of other shards, other layers, or another sentence vector."""
    low, high = job.trained.settings.layer_in, layers.layers_of(job.reader.manifest.columns)[-1]
    if earlier.shards != job.reader.manifest.digest:
        raise Refused(
            f"the attributions given are of shards {earlier.shards[:12]}, this report is of"
            f" {job.reader.manifest.digest[:12]}: give model= and source= instead."
        )
    if (earlier.sentence, earlier.layer, earlier.upto) != (sentence, low, high):
        raise Refused(
            f"the attributions given are of layers {earlier.layer} to {earlier.upto} and sentence={earlier.sentence};"
            f" this report is of layers {low} to {high} and sentence={sentence}: give model= and source= instead."
        )


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
        settings = corpus_settings(job)
        texts = saliency.texts_of(list(s.source), settings, chosen)
        found = saliency.salience(
            [texts[name] for name in chosen if name in texts], predicted, readout, settings,
            layer=low, upto=high, first=first, steps=s.steps, out=storage.join(job.out, "saliency"),
        )  # fmt: skip
        record = saliency.Kept(job.reader.manifest.digest, low, high, s.steps, "first" if first else "mean", found)
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
    data = columns[f"{layers.LAYER}{model.layer_in}"][finite_rows(columns)].float()
    count = min(len(model.vectors), len(data))
    shuffled = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(job.settings.seed))]
    centres = seeding.kmeans_plus_plus(shuffled, count, metric="euclidean", seed=job.settings.seed, iterations=30)
    return layers.nearest_directions(centres)


def corpus_settings(job: ReportJob) -> activations.ActivationSettings:
    s = job.settings
    given = {**job.reader.manifest.settings, "model": s.model, "gguf_file": s.gguf_file}
    return activations.ActivationSettings.model_validate(given)
