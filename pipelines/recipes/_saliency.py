"""Which token of a document a prediction rests on: integrated gradients from a layer to a linear classifier behind.

Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017, by captum. The classifier is one that is fitted to
sentence vectors of the later layer; the model's own blocks lie between. A token's attribution is the sum over the
layer's dimensions, and a word's the sum over its tokens.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from pipelines import storage
from pipelines.corpora import _activation_rows as rows
from pipelines.corpora import _language_models as models
from pipelines.corpora import _text_documents as documents
from pipelines.corpora import activations
from pipelines.errors import Refused
from pipelines.parts import Part, run_parts

DOCUMENTS_AT_ONCE = 8
"""Of one part, which is what is done again after a kill."""


@dataclass(frozen=True)
class Readout:
    """A linear classifier over a sentence vector: logits = weights h + bias."""

    weights: npt.NDArray[np.float64]
    """[C, D]"""
    bias: npt.NDArray[np.float64]
    """[C]"""

    def classes(self, vectors: Float[np.ndarray, "N D"]) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = (vectors @ self.weights.T + self.bias).argmax(1)
        return found


@dataclass(frozen=True)
class Text:
    """One document as the model reads it: its first window."""

    name: str
    ids: list[int]
    positions: list[int]
    """Of its rows in the shards."""
    places: list[list[int]]
    """For each row, the tokens it is made of."""


@dataclass(frozen=True)
class Salience:
    """What integrated gradients say of one document."""

    name: str
    positions: list[int]
    attributions: list[float]
    """One a row: how much it adds to the predicted class's logit, against the baseline."""
    change: float
    """The logit less that of the baseline: what attributions of all tokens add up to."""
    gap: float
    """How far they miss it: the error of the integral."""


def texts_of(sources: list[str], settings: activations.ActivationSettings, wanted: Iterable[str]) -> dict[str, Text]:
    """The wanted documents of the sources, read as the ingest read them. `settings` name the model.

    Raises:
        Refused: as the corpus's survey.
    """
    names = set(wanted)
    # Train documents may have lost words to a filter; rows that are not in the shards are left out by who looks.
    whole = settings.model_copy(update={"min_word_count": 1, "max_word_occurrences": None})
    found = activations.survey(sources, whole)
    tokenizer = whole.open_tokenizer()
    return {text.name: text for piece in found.slices for text in _texts(piece, whole, tokenizer, names)}


def check_texts(sources: list[str], settings: activations.ActivationSettings, wanted: Collection[str]) -> None:
    """Raise Refused unless one of the wanted documents is in the sources. Neither the model nor its tokenizer reads."""
    found = activations.survey(sources, settings)
    for piece in found.slices:
        for _, document, _ in documents.read(piece, lambda _: True):
            if isinstance(document, documents.Document) and document.name in wanted:
                return
    raise Refused(
        f"none of the {len(wanted):,} documents of these shards (such as {min(wanted)!r}) is in {', '.join(sources)};"
        " give the source that was ingested, from the same folder on."
    )


def _texts(piece: Any, settings: activations.ActivationSettings, tokenizer: Any, names: set[str]) -> Iterator[Text]:
    for _, plan, _ in rows.planned(rows.cut(piece, settings, lambda _: True, tokenizer), piece, settings):
        if isinstance(plan, rows.Plan) and plan.cut.document.name in names:
            ids = plan.sequence(plan.cut.windows[0])
            # As in the source, what stands behind the text ([SEP], </s>) is nobody's concept.
            end = len(ids) - len(plan.cut.tokens.after)
            entries = [entry for entry in plan.entries if entry.window == 0 and max(entry.places) < end]
            yield Text(
                plan.cut.document.name,
                ids,
                [entry.position for entry in entries],
                [entry.places for entry in entries],
            )


def salience(
    texts: list[Text],
    classes: Mapping[str, int],
    readout: Readout,
    settings: activations.ActivationSettings,
    *,
    layer: int,
    upto: int,
    first: bool,
    steps: int,
    out: str,
) -> list[Salience]:
    """Attributions of every document's rows to its predicted class, in parts below `out`: a rerun does what is missing.

    Args:
        classes: document -> the class whose logit is explained.
        layer: where attributions are taken. upto: where sentence vectors are read.
        first: sentence vectors are the first token's, else the mean over tokens.
        steps: points of the integral.
    """
    pieces = [texts[low : low + DOCUMENTS_AT_ONCE] for low in range(0, len(texts), DOCUMENTS_AT_ONCE)]
    parts = [
        Part(len(piece), [{**vars(text), "target": int(classes[text.name])} for text in piece], piece[0].name)
        for piece in pieces
    ]
    given = {**settings.model_dump(mode="json"), "model": settings.model, "gguf_file": settings.gguf_file}
    head = {"weights": readout.weights.tolist(), "bias": readout.bias.tolist()}
    work = partial(_explain, {"layer": layer, "upto": upto, "first": first, "steps": steps, "head": head})
    setup = partial(_open, given)
    records = run_parts(parts, work, out, label="saliency", unit="documents", setup=setup, actors=True)
    return [Salience(**found) for record in records for found in record["found"]]


def _open(settings: dict[str, Any]) -> models.LanguageModel:
    return activations.setup(activations.ActivationSettings.model_validate(settings))


def _explain(how: dict[str, Any], part: int, payload: list[dict[str, Any]], model: models.LanguageModel) -> Any:
    head = Readout(np.array(how["head"]["weights"]), np.array(how["head"]["bias"]))
    found = []
    for text in payload:
        target = text.pop("target")
        found.append(vars(explain(model, Text(**text), head, target, how)))
    return {"found": found}


def explain(model: models.LanguageModel, text: Text, head: Readout, target: int, how: Mapping[str, Any]) -> Salience:
    """One document. The baseline is the same number of tokens with id 0, as captum takes where none is given."""
    attribution = _captum()
    states, carry = model.onward(text.ids, how["layer"], how["upto"])
    baseline, _ = model.onward([0] * len(text.ids), how["layer"], how["upto"])
    weights = torch.from_numpy(head.weights[target]).to(states)
    bias = float(head.bias[target])

    shares = _shares(text, how["first"]).to(states)

    def logit(stream: Float[Tensor, "S T D"]) -> Float[Tensor, " S"]:
        return torch.einsum("std,t->sd", carry(stream), shares) @ weights + bias

    with torch.enable_grad():
        found = attribution.IntegratedGradients(logit).attribute(
            states, baselines=baseline, n_steps=how["steps"], internal_batch_size=how["steps"]
        )
    with torch.no_grad():
        change = float(logit(states) - logit(baseline))
    per_token = found[0].double().sum(-1)
    of_rows = [float(per_token[torch.tensor(places)].sum()) for places in text.places]
    return Salience(text.name, text.positions, of_rows, change, abs(float(per_token.sum()) - change))


def _shares(text: Text, first: bool) -> Float[Tensor, " T"]:
    """How much each token counts in the sentence vector: the first alone, or a mean over rows of means over tokens."""
    shares = torch.zeros(len(text.ids), dtype=torch.float64)
    for places in [[0]] if first else text.places:
        shares[torch.tensor(places)] += 1 / len(places)
    return shares / shares.sum()


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError:
        raise Refused("integrated gradients need captum: pip install 'vqray[activations]'.") from None
    return attr


@dataclass(frozen=True)
class Kept:
    """What a report leaves for others."""

    shards: str
    """Digest of the manifest: whose documents these are, and whose labels the explained classifier was fitted to."""
    layer: int
    upto: int
    steps: int
    sentence: str
    """`first` or `mean`."""
    documents: list[Salience]


def kept(home: str) -> Kept | None:
    """What an earlier report found, from its directory."""
    uri = storage.join(home, "saliency.json")
    if not storage.exists(uri):
        return None
    record = storage.read_json(uri)
    if record.keys() != {field.name for field in fields(Kept)}:
        raise Refused(
            f"{uri} was written by another version of vqray, and does not say of which shards it is: make it"
            " anew with model= and source=."
        )
    return Kept(**{**record, "documents": [Salience(**found) for found in record["documents"]]})


def pools_by_mean(model: str | None) -> bool:
    """Whether a sentence-transformers folder says that its sentence vectors are means over tokens."""
    return model is not None and models.pooling_modes(Path(model)) == ["pooling_mode_mean_tokens"]
