"""From documents to the rows of their tokens: what goes through the model, what is kept of it, and the vectors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.columns import bfloat16_bits
from pipelines.corpora import Bad, Filtered, Slice
from pipelines.corpora import _language_models as models
from pipelines.corpora import _text_documents as documents
from pipelines.corpora import _text_words as text_words

if TYPE_CHECKING:
    from pipelines.corpora.activations import ActivationSettings

TEXTS_AT_ONCE = 64
MOST_TOKENS = 2**20
"""Of one document: its rows are held together, so a library in one file has to be cut into documents first."""


@dataclass(frozen=True)
class Cut:
    """A document that has tokens, and the windows of them that go through the model."""

    document: documents.Document
    tokens: text_words.Encoded
    windows: list[text_words.Window]

    def words_seen(self) -> list[int]:
        """The words of which a token goes through the model, in order."""
        tokens = self.tokens
        seen = {word for start, stop in self.windows for word in tokens.word_of[start:stop]}
        return sorted(word for word in seen if word >= 0)


class Entry(NamedTuple):
    """One row before its vectors."""

    window: int
    places: list[int]
    """In that window's sequence, special tokens included: whose activations make the row."""
    token: str
    word: str
    position: int


@dataclass(frozen=True)
class Plan:
    """A document with the rows it gives."""

    cut: Cut
    entries: list[Entry]
    """At least one, in the order of their windows."""

    def sequence(self, window: text_words.Window) -> list[int]:
        tokens = self.cut.tokens
        return [*tokens.before, *tokens.ids[window.start : window.stop], *tokens.after]


def cut(
    piece: Slice, settings: "ActivationSettings", wanted: Callable[[int], bool], tokenizer: Any
) -> Iterator[tuple[int, Cut | Bad | Filtered, bytes]]:
    """Every wanted document of a slice as tokens and windows, or why it has none."""
    found = documents.read(piece, wanted)
    while some := list(islice(found, TEXTS_AT_ONCE)):
        texts = [text.text for _, text, _ in some if isinstance(text, documents.Document)]
        encoded = iter(text_words.encoded(tokenizer, texts, settings.split_words))
        for unit, text, digest in some:
            yield unit, text if isinstance(text, Bad) else _cut(text, next(encoded), settings), digest


def _cut(
    document: documents.Document, tokens: text_words.Encoded, settings: "ActivationSettings"
) -> Cut | Bad | Filtered:
    if not document.text.strip():
        return Bad(document.name, "the document is empty")
    count, special = len(tokens.ids), len(tokens.before) + len(tokens.after)
    most = settings.max_tokens or MOST_TOKENS
    if not count:
        return Bad(document.name, "the tokenizer leaves nothing of its text")
    if count > MOST_TOKENS:
        return Bad(document.name, f"more than {MOST_TOKENS:,} tokens: cut it into several documents")
    if special >= most:
        return Bad(document.name, "max_tokens leaves no room beside the special tokens")
    if count + special <= most:
        return Cut(document, tokens, [text_words.Window(0, count)])
    if settings.longer == "quarantine":
        return Bad(document.name, f"more than max_tokens={most} tokens")
    if settings.longer == "drop":
        return Filtered("max_tokens")
    if settings.longer == "truncate":
        return Cut(document, tokens, [text_words.Window(0, most - special)])
    return Cut(document, tokens, list(text_words.windows(tokens, most)))


def planned(
    found: Iterable[tuple[int, Cut | Bad | Filtered, bytes]], piece: Slice, settings: "ActivationSettings"
) -> Iterator[tuple[int, Plan | Bad | Filtered, bytes]]:
    """The rows that each document gives, after the frequency filter."""
    allowance = text_words.Allowance(piece.meta.get("words", {}))
    unfiltered = set(piece.meta.get("unfiltered", ()))
    for unit, one, digest in found:
        if not isinstance(one, Cut):
            yield unit, one, digest
            continue
        filtered = settings.filters and unit not in unfiltered
        entries = _entries(one, settings, allowance if filtered else None)
        yield unit, Plan(one, entries) if entries else Filtered(_emptied_by(filtered, settings)), digest


def _emptied_by(filtered: bool, settings: "ActivationSettings") -> str:
    """The setting that left a document without a row."""
    if filtered:
        return "min_word_count" if settings.min_word_count > 1 else "max_word_occurrences"
    return "words"


def _entries(one: Cut, settings: "ActivationSettings", allowance: text_words.Allowance | None) -> list[Entry]:
    """Rows in the order of the text. Positions count what the document has, kept or not, special tokens included."""
    tokens, before = one.tokens, len(one.tokens.before)
    kept = None if allowance is None else _kept(one, allowance)
    entries = []
    if settings.special != "none":
        entries += [Entry(0, [place], tokens.shown[place], tokens.shown[place], place) for place in range(before)]
    last = -1
    for number, (start, stop) in enumerate(one.windows):
        for word, group in groupby(range(start, stop), key=tokens.word_of.__getitem__):
            white = word < 0 and (settings.words != "off" or kept is not None)
            # Of a word that is longer than a window, words takes what lies in the first.
            again = word == last and settings.words != "off"
            if white or again or (kept is not None and word not in kept):
                continue
            last = word
            places = list(group)
            text = tokens.words[word] if word >= 0 else ""
            if settings.words == "off":
                for place in places:
                    shown = tokens.shown[before + place]
                    entries.append(Entry(number, [before + place - start], shown, text, before + place))
            else:
                shown = "".join(tokens.shown[before + place] for place in places)
                inside = [before + place - start for place in places]
                entries.append(Entry(number, inside, shown, text, before + word))
    if settings.special == "all":
        entries += _behind(one, settings)
    return entries


def _behind(one: Cut, settings: "ActivationSettings") -> list[Entry]:
    """Rows of the special tokens behind the text, as the last window has them."""
    tokens, before, number = one.tokens, len(one.tokens.before), len(one.windows) - 1
    start, stop = one.windows[number]
    count = len(tokens.ids) if settings.words == "off" else len(tokens.words)
    shown = tokens.shown[len(tokens.shown) - len(tokens.after) :]
    return [
        Entry(number, [before + stop - start + place], name, name, before + count + place)
        for place, name in enumerate(shown)
    ]


def _kept(one: Cut, allowance: text_words.Allowance) -> set[int]:
    """The words of which the filter keeps this occurrence."""
    seen = one.words_seen()
    keep = allowance.spend([one.tokens.words[word] for word in seen])
    return {word for word, yes in zip(seen, keep, strict=True) if yes}


@dataclass(frozen=True)
class _Part:
    """One window of a document that gives rows."""

    plan: int
    first: int
    """Of the document's rows, this window's first."""
    entries: list[Entry]
    ids: list[int]


def activations(
    plans: Sequence[Plan], settings: "ActivationSettings", model: models.LanguageModel
) -> list[list[np.ndarray] | str]:
    """For each document its vectors [rows, D] at every layer, as they are stored, or why it has none.

    All windows of all documents go through the model in batches by length.
    """
    layers = settings.layers or ()
    parts = [part for number, plan in enumerate(plans) for part in _parts(number, plan)]
    dtype = np.uint16 if settings.dtype == "bfloat16" else np.float16
    found = [[np.empty((len(plan.entries), model.shape.width), dtype) for _ in layers] for plan in plans]
    wrong: dict[int, str] = {}
    for batch in models.batched([len(part.ids) for part in parts], settings.batch):
        together = [parts[place] for place in batch]
        states = model.hidden_states([part.ids for part in together], layers)
        for layer, state in enumerate(states):
            with torch.inference_mode(), models.one_thread():
                vectors = _vectors(state, together, settings)
            kept = vectors.to(torch.bfloat16 if settings.dtype == "bfloat16" else torch.float16)
            wrong.update(_not_finite(vectors, kept, together, settings.dtype))
            stored = bfloat16_bits(kept) if settings.dtype == "bfloat16" else kept.cpu().numpy()
            ends = np.cumsum([len(part.entries) for part in together])
            for part, rows in zip(together, np.split(stored, ends[:-1]), strict=True):
                found[part.plan][layer][part.first : part.first + len(rows)] = rows
    return [wrong.get(place, vectors) for place, vectors in enumerate(found)]


def _parts(number: int, plan: Plan) -> Iterator[_Part]:
    first = 0
    for window, group in groupby(plan.entries, key=lambda entry: entry.window):
        entries = list(group)
        yield _Part(number, first, entries, plan.sequence(plan.cut.windows[window]))
        first += len(entries)


def _vectors(state: Float[Tensor, "B T D"], parts: list[_Part], settings: "ActivationSettings") -> Float[Tensor, "N D"]:
    """The vectors of all entries of a batch, one after the other."""
    flat = state.flatten(0, 1)
    taken = [
        [row * state.shape[1] + place for place in entry.places]
        for row, part in enumerate(parts)
        for entry in part.entries
    ]
    if settings.words == "mean":
        places = torch.tensor([place for places in taken for place in places], device=flat.device)
        counts = torch.tensor([len(places) for places in taken], device=flat.device)
        entry_of = torch.repeat_interleave(torch.arange(len(taken), device=flat.device), counts)
        sums = torch.zeros(len(taken), flat.shape[1], device=flat.device).index_add_(0, entry_of, flat[places].float())
        return sums / counts[:, None]
    one = 0 if settings.words == "first" else -1
    return flat[torch.tensor([places[one] for places in taken], device=flat.device)]


def _not_finite(
    vectors: Float[Tensor, "N D"], kept: Float[Tensor, "N D"], parts: list[_Part], dtype: str
) -> dict[int, str]:
    """Document -> what is wrong with its activations."""
    good = kept.isfinite().all(1).tolist()
    if all(good):
        return {}
    reasons = [f"an activation is too large for {dtype}", "an activation is NaN or infinite"]
    which = (~vectors.isfinite().all(1)).tolist()
    plans = [part.plan for part in parts for _ in part.entries]
    return {plan: reasons[bad] for plan, fine, bad in zip(plans, good, which, strict=True) if not fine}
