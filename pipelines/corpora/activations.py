"""Activations: texts through a language model; a row is one token (or word) with its vector at each chosen layer.

A unit is a document, and its rows are those of its tokens, in order. What a layer number means: `_language_models`.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from pipelines import storage
from pipelines.columns import bfloat16_field, bfloat16_of
from pipelines.corpora import Bad, Corpus, Filtered, Row, Slice, Survey
from pipelines.corpora import _activation_rows as rows
from pipelines.corpora import _language_models as models
from pipelines.corpora import _text_documents as documents
from pipelines.corpora import _text_words as frequencies
from pipelines.corpora._model_settings import ModelSettings
from pipelines.errors import Refused

TEXT_BYTES_A_TOKEN = 4
MOST_SLICE_BYTES = 64 << 20
LEAST_SLICE_BYTES = 8 << 20
"""Of rows. Small enough that a few thousand documents keep all cores busy."""
CHUNK_BYTES = 64 << 20
"""Of the rows that are held while they are computed."""


class ActivationSettings(ModelSettings, documents.TextSettings):
    layers: tuple[int, ...] | None = Field(
        None, description="0 embeddings, l the residual stream after block l; each is a column; default the last"
    )
    dtype: Literal["float16", "bfloat16"] = Field("float16", description="of the stored vectors")
    words: Literal["off", "mean", "first", "last"] = Field(
        "off", description="one row a word: the mean of its tokens, or one of them (NeuroX takes the last)"
    )
    split_words: frequencies.SplitAt = Field(
        "punctuation", description="where words end; space: at white space only, for texts cut into words before"
    )
    special: Literal["first", "all", "none"] = Field(
        "first", description="special tokens kept: the one before the text ([CLS], <s>), all, none"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="longest sequence, special tokens included; default the model's window"
    )
    longer: Literal["split", "truncate", "quarantine", "drop"] = Field(
        "split", description="a longer document: goes in pieces, loses its end, is quarantined, or is left out"
    )
    batch_tokens: int | None = Field(
        None, ge=1, le=2**22, description="most tokens of one batch; default 1,024, on a GPU 16,384 (changes bits)"
    )
    min_word_count: int = Field(1, ge=1, description="train documents keep words that occur so often in them")
    max_word_occurrences: int | None = Field(
        None, ge=1, description="train documents keep so many first occurrences of a word"
    )
    width: int | None = Field(None, ge=1, description="D; follows from the model")

    @field_validator("layers", mode="before")
    @classmethod
    def _one_layer(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | str) else value

    @model_validator(mode="after")
    def _layers_differ(self) -> "ActivationSettings":
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"layers={','.join(map(str, self.layers))} names none or one twice: each is a column")
        return self

    @property
    def filters(self) -> bool:
        return self.min_word_count > 1 or self.max_word_occurrences is not None

    @property
    def batch(self) -> int:
        """`batch_tokens` where it is known: on a CPU more is slower, as activations fall out of its cache."""
        return self.batch_tokens or (16_384 if self.gpus else models.BATCH_TOKENS)

    @property
    def row_bytes(self) -> int:
        """About what one row takes in a shard."""
        return 2 * len(self.layers or ()) * (self.width or 0) + 64


def survey(sources: list[str], settings: ActivationSettings) -> Survey:
    """What documents there are, and the model's layers, width and window; its weights are not loaded.

    Raises:
        Refused: no text, no such column, a model that cannot be read safely, a layer or a window it does not have.
    """
    found, digest = settings.inspect()
    completed = _completed(settings, found, digest)
    settings = settings.model_copy(update=completed)
    growth = settings.row_bytes / TEXT_BYTES_A_TOKEN

    def slice_bytes(text: int) -> int:
        made = min(MOST_SLICE_BYTES, max(LEAST_SLICE_BYTES, int(text * growth) // 256))
        return max(1, int(made / growth))

    slices, ignored = documents.survey(sources, settings, slice_bytes)
    # Parts are cut by what comes out, which is a hundred times what goes in.
    slices = [replace(piece, bytes=int(piece.bytes * growth)) for piece in slices]
    context = {"model": {"layers": found.layers, "width": found.width, "window": found.window}}
    return Survey(slices, context, dict(ignored), completed)


def _completed(settings: ActivationSettings, found: models.ModelShape, digest: str) -> dict[str, Any]:
    layers = (found.layers,) if settings.layers is None else settings.layers
    if beyond := [layer for layer in layers if not 0 <= layer <= found.layers]:
        raise Refused(
            f"layers={','.join(map(str, beyond))} was given; this model has 0 (embeddings) to {found.layers}."
        )
    most = settings.max_tokens or found.window
    if most is None:
        raise Refused("this model's positions have no end, so say where a sequence has to: --set max_tokens=1024")
    if found.window is not None and most > found.window:
        raise Refused(f"max_tokens={most} was given; the window of this model is {found.window} tokens.")
    if settings.width not in (None, found.width):
        raise Refused(f"width={settings.width} was given; this model has {found.width}. It follows from the model.")
    return {
        "layers": layers,
        "width": found.width,
        "max_tokens": most,
        "batch_tokens": settings.batch,
        "model_digest": digest,
    }


def prepare(
    found: Survey,
    settings: ActivationSettings,
    wanted: Callable[[int], bool],
    split_of: Callable[[str, str | None], str],
) -> Survey:
    """With a frequency filter, each slice is told how many occurrences of its words the train documents may keep.

    Two passes of the tokenizer over all wanted text, without the model: counts first, then the places.
    """
    if not settings.filters:
        return found
    tokenizer = settings.open_tokenizer()
    counted = frequencies.Frequencies(settings.min_word_count, settings.max_word_occurrences)

    def train_words(piece: Slice, first: int) -> tuple[list[str], list[int]]:
        """(words of the train documents of a slice, units of the others)."""
        words: list[str] = []
        others: list[int] = []
        for unit, cut, _ in rows.cut(piece, settings, lambda unit: wanted(first + unit), tokenizer):
            if isinstance(cut, rows.Cut):
                if split_of(cut.document.name, cut.document.split) == "train":
                    words += [cut.tokens.words[word] for word in cut.words_seen()]
                else:
                    others.append(unit)
        return words, others

    firsts = np.cumsum([0, *(piece.stop - piece.start for piece in found.slices)]).tolist()
    pieces = list(zip(found.slices, firsts[:-1], strict=True))
    for piece, first in pieces:
        counted.count(train_words(piece, first)[0])
    slices = []
    for piece, first in pieces:
        words, others = train_words(piece, first)
        slices.append(replace(piece, meta={**piece.meta, "words": counted.allowance(words), "unfiltered": others}))
    return replace(found, slices=slices)


def read(
    piece: Slice,
    context: Mapping[str, Any],
    settings: ActivationSettings,
    wanted: Callable[[int], bool],
    model: models.LanguageModel,
) -> Iterator[tuple[int, list[Row] | Bad | Filtered, bytes]]:
    """Every wanted document of a slice as the rows of its tokens or words, or why it has none."""
    planned = rows.planned(rows.cut(piece, settings, wanted, model.tokenizer), piece, settings)
    # Batches are made of the documents of one chunk. Where chunks end follows from the slice and `wanted` alone.
    most = max(settings.batch, min(16 * settings.batch, CHUNK_BYTES // settings.row_bytes))
    chunk: list[tuple[int, rows.Plan | Bad | Filtered, bytes]] = []
    tokens = 0
    for unit, found, digest in planned:
        chunk.append((unit, found, digest))
        tokens += len(found.cut.tokens.ids) if isinstance(found, rows.Plan) else 0
        if tokens >= most:
            yield from _computed(chunk, settings, model)
            chunk, tokens = [], 0
    yield from _computed(chunk, settings, model)


def _computed(
    chunk: list[tuple[int, rows.Plan | Bad | Filtered, bytes]],
    settings: ActivationSettings,
    model: models.LanguageModel,
) -> Iterator[tuple[int, list[Row] | Bad | Filtered, bytes]]:
    plans = [found for _, found, _ in chunk if isinstance(found, rows.Plan)]
    vectors = iter(rows.activations(plans, settings, model))
    for unit, found, digest in chunk:
        if not isinstance(found, rows.Plan):
            yield unit, found, digest
            continue
        made = next(vectors)
        name = found.cut.document.name
        yield unit, Bad(name, made) if isinstance(made, str) else _rows(found, made, settings), digest


def _rows(plan: rows.Plan, vectors: list[np.ndarray], settings: ActivationSettings) -> list[Row]:
    document = plan.cut.document
    columns = [f"layer_{layer}" for layer in settings.layers or ()]
    found = []
    for place, entry in enumerate(plan.entries):
        values: dict[str, Any] = {column: stored[place] for column, stored in zip(columns, vectors, strict=True)}
        values["token"], values["word"], values["position"] = entry.token, entry.word, entry.position
        values["document"], values["label"] = document.name, document.label
        found.append(Row(values, document.name, document.split))
    return found


def setup(settings: ActivationSettings) -> models.LanguageModel:
    """The model itself, loaded once by each worker process."""
    return settings.open_model()


def gpus(settings: ActivationSettings) -> float:
    return settings.gpus


def schema(settings: ActivationSettings) -> pa.Schema:
    width = _width(settings)
    names = [f"layer_{layer}" for layer in settings.layers or ()]
    if settings.dtype == "bfloat16":
        layers = [bfloat16_field(name, [width]) for name in names]
    else:
        layers = [pa.field(name, pa.fixed_shape_tensor(pa.float16(), [width])) for name in names]
    text = [pa.field(name, pa.string()) for name in ("token", "word", "document", "label")]
    return pa.schema([*layers, *text[:2], pa.field("position", pa.int32()), *text[2:]])


def shapes(settings: ActivationSettings) -> dict[str, list[int] | None]:
    width = _width(settings)
    return {f"layer_{layer}": [width] for layer in settings.layers or ()}


def _width(settings: ActivationSettings) -> int:
    if settings.width is None or settings.layers is None:
        raise ValueError("the width of the model is not known: take the settings that the survey completed")
    return settings.width


def tensors(stored: dict[str, Any], settings: ActivationSettings) -> dict[str, Tensor]:
    """Vectors [B, D] of every layer as stored (float16 or bfloat16), and int32 positions [B]."""
    read_as = bfloat16_of if settings.dtype == "bfloat16" else torch.from_numpy
    found = {name: read_as(stored[name]) for name in shapes(settings)}
    return {**found, "position": torch.from_numpy(stored["position"])}


def write_files(columns: dict[str, Tensor], stems: list[str], directory: str, settings: ActivationSettings) -> None:
    """One .npy of float32 a row and layer: what a decoder makes of a code, for NumPy."""
    for name, vectors in columns.items():
        for stem, vector in zip(stems, vectors.float().cpu().numpy(), strict=True):
            file = io.BytesIO()
            np.save(file, vector, allow_pickle=False)
            storage.write_atomic(storage.join(directory, f"{stem}-{name}.npy"), file.getvalue())


corpus = Corpus(
    Settings=ActivationSettings,
    survey=survey,
    prepare=prepare,
    read=read,
    schema=schema,
    shapes=shapes,
    tensors=tensors,
    write_files=write_files,
    setup=setup,
    gpus=gpus,
)
