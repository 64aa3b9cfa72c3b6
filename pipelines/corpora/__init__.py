"""What a corpus kind is, and how one is found: by the name of its module here. Bytes -> rows, plain Python, no Ray."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipelines.errors import Refused, nearest_names

NOT_TEST = "not test"
"""A row's split where the data has an official test split but no valid one: train or valid, by the group's hash."""


class CorpusSettings(BaseModel):
    """How raw files become rows; all of it is kept in the manifest and in the card of what is trained on it.

    But for fields with `exclude=True`: they say where something lies (a model's folder) whose digest is kept instead.
    They may be given beside `--bundle`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Slice:
    """Units [start, stop) of one source, in the source's own order."""

    uri: str
    name: str
    """Path relative to the source URI the user gave: what manifests and quarantine rows say."""
    start: int
    stop: int
    bytes: int
    """About how many bytes reading it takes: what parts are cut by."""
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON values the corpus needs to read it (label, official split, member offsets ...)."""


@dataclass(frozen=True)
class Survey:
    """What there is to read, found without reading it all."""

    slices: list[Slice]
    """In a fixed order (sorted names), each at most about 256 MiB, so that a part is a run of slices."""
    context: dict[str, Any] = field(default_factory=dict)
    """JSON values shared by all slices: class names, the layout that was recognised."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Reason -> number of files that are not units of this corpus (counted as filtered)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that follow from the data (the length of vectors): the ingest goes on with them, and keeps them."""


@dataclass(frozen=True)
class Row:
    """One record: a value for each column of the corpus's schema."""

    values: dict[str, Any]
    group: str
    """What the split hashes, so that what belongs together stays together."""
    split: str | None = None
    """`train`, `valid`, `test` or NOT_TEST where the data has official splits; they win over the hash."""


@dataclass(frozen=True)
class Bad:
    """A unit that could not be read: its source and the reason, for the quarantine."""

    source: str
    reason: str


@dataclass(frozen=True)
class Filtered:
    """A unit that was read and left out because a named setting says so (`max_atoms`, `min_length`)."""

    setting: str


@dataclass(frozen=True)
class Joined:
    """A unit that is kept in the row of another unit of its slice, as a streamline is in that of its chunk."""


@dataclass(frozen=True)
class SideTable:
    """A further table of a corpus, such as the log beside its items. Its units are not those of the rows."""

    name: str
    """Lower-case letters, digits and `_`: it is kept as `<name>.arrow`."""
    table: pa.Table
    """What was kept of it, one row a unit, in an order of its own that two runs agree on."""
    bad: list[tuple[int, Bad]] = field(default_factory=list)
    """(unit, why) of what could not be read."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Named setting or reason -> units left out because of it."""


def no_gpus(settings: Any) -> float:
    """`gpus` of a corpus that computes on the CPU."""
    return 0


@dataclass(frozen=True)
class Corpus:
    """One corpus kind. All callables are module-level functions."""

    Settings: type[CorpusSettings]
    survey: Callable[[list[str], Any], Survey]
    """(source URIs, settings) -> Survey; Refused where a URI is missing or holds nothing of this kind."""
    read: Callable[..., Iterator[tuple[int, Row | list[Row] | Bad | Filtered | Joined, bytes]]]
    """(slice, survey context, settings, wanted) -> (unit, row or reason, fingerprint of its bytes) for wanted units.

    A unit of many rows (a document: its tokens) gives the list of them; it is kept or quarantined as a whole, so they
    have to fit into memory together. One without a row is Bad or Filtered, never an empty list; one that is in the row
    of another unit is Joined.
    `unit` counts from slice.start; `wanted(unit)` is False for units left out by --limit: they are not decoded.
    Every wanted unit is yielded once, in rising order: an ingest fails where one is missing.
    Where there is a `setup`, what it made is the fifth argument."""
    schema: Callable[[Any], pa.Schema]
    """settings -> Arrow fields of the rows, without the platform's own row_id and split.

    Ragged columns and bfloat16 as `pipelines.columns` has them (`ragged_field`, `bfloat16_field`)."""
    shapes: Callable[[Any], dict[str, list[int] | None]]
    """settings -> tensor column a recipe sees -> shape of one row; None where rows differ in shape."""
    tensors: Callable[[dict[str, Any], Any], dict[str, Tensor]]
    """Columns as `pipelines.columns.values_of` gives them -> columns a recipe sees.

    Images kept in their encoding are decoded; ragged columns are filled up with zeros to the longest row, [B, L, ...],
    beside a bool column `<something>_mask` [B, L] that is True where a value is real (`pipelines.columns.padded`)."""
    write_files: Callable[[dict[str, Tensor], list[str], str, Any], None]
    """(columns, file stems, directory URI, settings) -> files people open: what `decode --format files` writes."""
    prepare: Callable[[Survey, Any, Callable[[int], bool], Callable[[str, str | None], str]], Survey] | None = None
    """(survey, settings, wanted, split_of) -> the survey with what one slice cannot know of all the others, such as how
    often words occur: called once, before the parts. `wanted` counts units over all slices; `split_of(group, official
    split)` gives train, valid or test, for whatever is fitted sees train alone."""
    setup: Callable[[Any], Any] | None = None
    """settings -> what all slices of a worker process share, made once in it: a language model."""
    gpus: Callable[[Any], float] = no_gpus
    """settings -> CUDA devices that a worker with a `setup` takes."""
    tables: Callable[[list[str], Any], Iterator[SideTable]] | None = None
    """(source URIs, settings) -> further tables. The survey's context names what they are read from, with sizes, so
    that an --out is not begun with one log and completed with another."""


def names() -> list[str]:
    """Every corpus kind there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(kind: str) -> Corpus:
    """The corpus kind in pipelines/corpora/<kind>.py.

    Raises:
        Refused: no such kind; the message names the nearest ones.
    """
    if kind not in names():
        raise Refused(f"there is no corpus kind {kind!r}; {nearest_names(kind, names())}")
    corpus: Corpus = importlib.import_module(f"pipelines.corpora.{kind}").corpus
    return corpus
