"""Documents: rows of CSV, TSV and Parquet, lines, and folders of .txt, each with its label and official split."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator

from pipelines import storage
from pipelines.corpora import NOT_TEST, Bad, CorpusSettings, Slice, _sources
from pipelines.corpora import _text_tables as tables
from pipelines.errors import Refused
from pipelines.storage import Entry

Wanted = Callable[[int], bool]
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid", "test": "test"}
READ = ".csv, .tsv, .parquet and .txt (text also as .gz)"
MOST_FILES = 4096
"""In one slice."""


class TextSettings(CorpusSettings):
    text: tuple[str, ...] = Field(("text",), description="columns of text; several are joined by a line break")
    label: str | None = Field(None, description="column kept as each row's label; of .txt files it is their folder")
    split: str | None = Field(None, description="column of official splits: train, valid (val, dev), test")
    header: bool = Field(True, description="false: CSV and TSV begin with a record; columns are column_1, column_2 ...")
    txt: Literal["auto", "lines", "documents"] = Field(
        "auto", description="a .txt is a document a line or one document; auto: lines where it is the source itself"
    )

    @field_validator("text", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Document:
    """One text before a model has seen it."""

    name: str
    text: str
    label: str | None
    split: str | None
    """Official."""


Documents = Iterator[tuple[int, Document | Bad, bytes]]


def survey(
    sources: list[str], settings: TextSettings, slice_bytes: Callable[[int], int]
) -> tuple[list[Slice], Counter]:
    """(slices, ignored files) of all documents under the sources.

    Args:
        slice_bytes: bytes of all files -> bytes of text in a slice.

    Raises:
        Refused: a source without text, a column that is not there, a split column without official splits.
    """
    listed = [storage.list_files(source) for source in sources]
    most = slice_bytes(sum(entry.bytes for entries in listed for entry in entries if tables.layout_of(entry.name)))
    slices: list[Slice] = []
    ignored: Counter[str] = Counter()
    for source, prefix, entries in zip(sources, _sources.prefixes(sources), listed, strict=True):
        found = _of_source(source, prefix, entries, settings, most, ignored)
        if not found:
            held = ", ".join(f"{count:,} x {reason}" for reason, count in ignored.most_common(3)) or "nothing"
            raise Refused(f"there is no text in {source!r}; it holds {held}. Allowed are {READ}.")
        slices += found
    return (_with_splits(slices, settings.split) if settings.split else slices), ignored


def read(piece: Slice, wanted: Wanted) -> Documents:
    """Every wanted document of a slice, or why it is none, with the digest of its record or file."""
    if piece.meta["layout"] == "files":
        for unit, (name, size, label, split) in enumerate(piece.meta["files"]):
            if wanted(unit):
                uri = storage.join(piece.uri, name) if name else piece.uri
                shown = piece.meta["prefix"] + name if name else piece.name
                file = Slice(uri, shown, 0, 1, size, {"layout": "document"})
                for _, found, digest in tables.read_table(file, lambda _: True):
                    text = found if isinstance(found, Bad) else Document(shown, found[tables.TEXT], label, split)
                    yield unit, text, digest
        return
    meta = piece.meta
    for unit, found, digest in tables.read_table(piece, wanted):
        if isinstance(found, Bad):
            yield unit, found, digest
        else:
            name = tables.unit_name(piece, unit)
            yield unit, _of_record(name, found, meta["text"], meta["label"], meta["split"], meta["official"]), digest


def _of_source(
    source: str, prefix: str, entries: list[Entry], settings: TextSettings, most: int, ignored: Counter[str]
) -> list[Slice]:
    single = len(entries) == 1 and storage.normalise(source) == storage.normalise(entries[0].uri)
    lines = settings.txt == "lines" or (settings.txt == "auto" and single)
    slices, files = [], []
    for entry in entries:
        layout = None if _sources.is_hidden(entry.name) else tables.layout_of(entry.name)
        if layout is None:
            ignored[_sources.why_ignored(entry.name, "a file of text")] += 1
        elif layout == "lines" and not lines:
            files.append(entry)
        else:
            text = [tables.TEXT] if layout == "lines" else list(settings.text)
            label, split = (None, None) if layout == "lines" else (settings.label, settings.split)
            columns = [*text, *(name for name in (label, split) if name)]
            meta = {"text": text, "label": label, "split": split, "official": []}
            found = tables.of_table(entry, prefix, layout, columns, header=settings.header, slice_bytes=most)
            slices += [replace(piece, meta={**piece.meta, **meta}) for piece in found]
            ignored.update({} if found else {"a file without records": 1})
    return [*_of_files(source, prefix, files, most), *slices]


def _of_files(source: str, prefix: str, entries: list[Entry], most: int) -> list[Slice]:
    """Runs of files, so that small documents share the batches of a model."""
    tops = {PurePosixPath(entry.name).parts[0].lower() for entry in entries}
    official = tops <= SPLITS.keys()
    there = sorted({SPLITS[top] for top in tops}) if official else []
    slices: list[Slice] = []
    run: list[list[Any]] = []
    size = 0

    def cut() -> None:
        if run:
            first = prefix + run[0][0]
            slices.append(
                Slice(source, first, 0, len(run), size, {"layout": "files", "prefix": prefix, "files": [*run]})
            )
            run.clear()

    for entry in entries:
        parts = PurePosixPath(entry.name).parts
        split = cut_by_hash(SPLITS[parts[0].lower()], there) if official else None
        label = "/".join(parts[1:-1] if official else parts[:-1]) or None
        if entry.uri != _below(source, entry.name):
            # Its name is no UTF-8 or it is the source itself, so that it is found by its own URI only.
            cut()
            alone = {"layout": "files", "prefix": prefix, "files": [["", entry.bytes, label, split]]}
            slices.append(Slice(entry.uri, prefix + entry.name, 0, 1, entry.bytes, alone))
            size = 0
            continue
        if run and (size + entry.bytes > most or len(run) == MOST_FILES):
            cut()
            size = 0
        run.append([entry.name, entry.bytes, label, split])
        size += entry.bytes
    cut()
    return slices


def _below(source: str, name: str) -> str | None:
    try:
        return storage.join(source, name)
    except Refused:
        return None


def _with_splits(slices: list[Slice], column: str) -> list[Slice]:
    """Slices that know which official splits there are in all of them: that column of every table is read for it."""
    tabled = [piece for piece in slices if piece.meta.get("split") == column]
    given: set[str] = set()
    for piece in tabled:
        for _, found, _ in tables.read_table(piece, lambda _: True):
            if not isinstance(found, Bad):
                given.add(_plain(found[column]))
    official = sorted({SPLITS[value] for value in given & SPLITS.keys()})
    if not official:
        held = ", ".join(repr(value) for value in sorted(given)[:5]) or "nothing"
        raise Refused(f"split={column} names no official splits: it holds {held}; needed are {', '.join(SPLITS)}.")
    return [
        replace(piece, meta={**piece.meta, "official": official}) if piece.meta.get("split") == column else piece
        for piece in slices
    ]


def _of_record(
    name: str,
    values: dict[str, Any],
    text: list[str],
    label: str | None,
    split: str | None,
    official: list[str],
) -> Document | Bad:
    parts = [values[column] for column in text]
    if any(part is not None and not isinstance(part, str) for part in parts):
        return Bad(name, "its text column holds no text")
    known = SPLITS.get(_plain(values[split])) if split else None
    if split and known is None:
        return Bad(name, "its official split is none of train, valid and test")
    shown = None if label is None or values[label] is None else str(values[label])
    joined = "\n".join(part for part in parts if part)
    return Document(name, joined, shown, cut_by_hash(known, official) if known else None)


def cut_by_hash(split: str, official: list[str]) -> str | None:
    """A row's official split; train is cut by the hash where the data has no valid one."""
    if split == "train" and "valid" not in official:
        return NOT_TEST if "test" in official else None
    return split


def _plain(value: Any) -> str:
    return str(value).strip().lower()
