"""Items with text (films, products, articles) as sentence embeddings, and the log of who took which when."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipelines.corpora import Bad, Corpus, Filtered, Row, SideTable, Slice, Survey
from pipelines.corpora import _item_files as files
from pipelines.corpora import _item_log as logs
from pipelines.corpora import _language_models as models
from pipelines.corpora._model_settings import ModelSettings
from pipelines.errors import Refused

# What the survey knows of each item of a slice, one letter an item.
OPEN, DUPLICATE, RARE = ".", "d", "c"
SPLIT_LETTERS = {"train": "t", "valid": "v", "test": "e"}
SPLIT_OF = {letter: split for split, letter in SPLIT_LETTERS.items()}


class ItemSettings(ModelSettings):
    width: int | None = Field(None, ge=1, description="D; follows from the model")
    normalise: bool | None = Field(None, description="embeddings to length 1; none does as the model's folder says")
    batch_tokens: int = Field(models.BATCH_TOKENS, ge=1, le=2**22, description="of one batch; changes bits")
    text: tuple[str, ...] = Field((), description="columns an item's text is joined from; by default all but its id")
    # What columns are called differs between logs of one preparation.
    item: str | None = Field(None, exclude=True, description="column of item ids; none finds it by its name")
    user: str | None = Field(None, exclude=True, description="column of users in the log; none finds it by its name")
    time: str | None = Field(None, exclude=True, description="column of times in the log; none finds it by its name")
    rating: str | None = Field(
        None, exclude=True, description="column of ratings in the log; none finds it by its name"
    )
    core: int = Field(
        0, ge=0, description="leave out users and items with fewer events until all have as many; 5 is usual"
    )
    log_split: logs.LogSplit = Field(
        "auto", description="auto: files named train, valid, test; else by time; else each user's last event is test"
    )
    log_holdout: float = Field(0.1, ge=0, lt=0.5, description="share of events for test by time, and for valid again")
    cold_items: float = Field(0.0, ge=0, lt=1, description="share of items of which the log keeps test events alone")

    @field_validator("text", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def survey(sources: list[str], settings: ItemSettings) -> Survey:
    """What items there are and which split each belongs to, known from the log: items are read once for their ids,
    the log is read whole.

    Raises:
        Refused: no items, no model, or columns that are not there.
    """
    shape, digest = settings.inspect()
    if settings.width not in (None, shape.width):
        raise Refused(f"width={settings.width} was given; this model has {shape.width}. It follows from the model.")
    found = files.find(sources, settings)
    ids = [[_id(item) for _, item, _ in files.read_items(piece, lambda _: True)] for piece in found.items]
    log = _log(found, {item for some in ids for item in some if item}, settings)
    seen: set[str] = set()
    first = logs.first_splits(log)
    slices = []
    for piece, some in zip(found.items, ids, strict=True):
        letters = [_letter(item, seen, first, settings, bool(found.logs)) for item in some]
        slices.append(
            Slice(
                piece.uri, piece.name, piece.start, piece.stop, piece.bytes, {**piece.meta, "states": "".join(letters)}
            )
        )
    context = {"log": [[log.prefix + log.entry.name, log.entry.bytes] for log in found.logs]}
    return Survey(slices, context, dict(found.ignored), {"width": shape.width, "model_digest": digest})


def _id(item: files.Item | Bad) -> str | None:
    return item.item if isinstance(item, files.Item) else None


def _letter(item: str | None, seen: set[str], first: Mapping[str, str], settings: ItemSettings, has_log: bool) -> str:
    """What is known of one item: that its id came before, that it is too rare, or its split."""
    if item is None:
        return OPEN
    if item in seen:
        return DUPLICATE
    seen.add(item)
    if settings.core > 1 and has_log and item not in first:
        return RARE
    if settings.cold_items and logs.is_cold(item, settings.cold_items):
        return SPLIT_LETTERS["test"]
    return SPLIT_LETTERS[first[item]] if item in first else OPEN


def _log(found: files.Files, catalog: set[str], settings: ItemSettings) -> logs.Log:
    return logs.build(
        found.logs,
        catalog,
        core=settings.core,
        split=settings.log_split,
        holdout=settings.log_holdout,
        cold_items=settings.cold_items,
    )


def tables(sources: list[str], settings: ItemSettings) -> Iterator[SideTable]:
    """The log, where there is one: user, item, time, rating, position, split, in the order of time."""
    found = files.find(sources, settings)
    if found.logs:
        items = (item for piece in found.items for _, item, _ in files.read_items(piece, lambda _: True))
        log = _log(found, {item.item for item in items if isinstance(item, files.Item)}, settings)
        yield SideTable("log", logs.table(log), log.bad, dict(log.filtered))


def setup(settings: ItemSettings) -> models.LanguageModel:
    return settings.open_model()


def gpus(settings: ItemSettings) -> float:
    return settings.gpus


def read(
    piece: Slice,
    context: Mapping[str, Any],
    settings: ItemSettings,
    wanted: Callable[[int], bool],
    model: models.LanguageModel,
) -> Iterator[tuple[int, Row | Bad | Filtered, bytes]]:
    """Every wanted item of a slice with its embedding, or why it has none. Texts of a slice are batched together."""
    states = piece.meta["states"]
    units = [(unit, _unless(found, states[unit]), digest) for unit, found, digest in files.read_items(piece, wanted)]
    good = [found for _, found, _ in units if isinstance(found, files.Item)]
    embeddings = iter(
        model.embed([item.text for item in good], normalise=settings.normalise, batch_tokens=settings.batch_tokens)
    )
    for unit, found, digest in units:
        if not isinstance(found, files.Item):
            yield unit, found, digest
            continue
        embedding = next(embeddings)
        if not np.isfinite(embedding).all():
            yield unit, Bad(found.name, "its embedding is not finite"), digest
            continue
        values = {"embedding": embedding, "item": found.item, "text": found.text}
        yield unit, Row(values, group=found.item, split=SPLIT_OF.get(states[unit])), digest


def _unless(found: files.Item | Bad, state: str) -> files.Item | Bad | Filtered:
    if isinstance(found, Bad):
        return found
    if state == DUPLICATE:
        return Bad(found.name, "an item of this id came before")
    return Filtered("core") if state == RARE else found


def schema(settings: ItemSettings) -> pa.Schema:
    embedding = pa.fixed_shape_tensor(pa.float32(), [_width(settings)])
    return pa.schema([("embedding", embedding), ("item", pa.string()), ("text", pa.string())])


def shapes(settings: ItemSettings) -> dict[str, list[int] | None]:
    return {"embedding": [_width(settings)]}


def _width(settings: ItemSettings) -> int:
    if settings.width is None:
        raise Refused("the width of items follows from a model, and no survey has seen one yet: ingest first.")
    return settings.width


def tensors(stored: dict[str, Any], settings: ItemSettings) -> dict[str, Tensor]:
    """embedding [B, D] float32."""
    return {"embedding": torch.from_numpy(stored["embedding"])}


def write_files(columns: dict[str, Tensor], stems: list[str], directory: str, settings: ItemSettings) -> None:
    """
    Raises:
        Refused: always.
    """
    raise Refused("an embedding is no text, so items have no files; decode with --format shards.")


corpus = Corpus(
    Settings=ItemSettings,
    survey=survey,
    read=read,
    schema=schema,
    shapes=shapes,
    tensors=tensors,
    write_files=write_files,
    setup=setup,
    gpus=gpus,
    tables=tables,
)
