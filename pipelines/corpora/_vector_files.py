"""Which arrays of which files are vectors, which are their labels, and how they are cut into slices."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from pipelines import storage
from pipelines.corpora import _vector_tables as tables
from pipelines.corpora._sources import is_hidden, why_ignored
from pipelines.corpora._vector_arrays import (
    SPLIT_WORDS,
    Found,
    Unreadable,
    is_label,
    paired,
    split_word,
    words,
)
from pipelines.corpora._vector_raw import of_npy, of_safetensors
from pipelines.corpora._vector_settings import VectorSettings
from pipelines.corpora._vector_torch import of_pt
from pipelines.corpora._vector_zips import of_npz
from pipelines.errors import Refused
from pipelines.storage import Entry

OPENERS: dict[str, Callable[[Entry], list[Found]]] = {
    ".npy": of_npy,
    ".npz": of_npz,
    ".parquet": tables.of_parquet,
    ".pt": of_pt,
    ".pth": of_pt,
    ".safetensors": of_safetensors,
}
ALLOWED = ", ".join(OPENERS)
MOST_TOLD = 12
"""Arrays of a file that a message lists; a network's weights can be a thousand."""


@dataclass(frozen=True)
class File:
    """One file that has been looked into."""

    entry: Entry
    name: str
    """Below the sources, as manifests have it."""
    arrays: list[Found]
    trouble: str | None = None
    """Why it cannot be read."""


@dataclass(frozen=True)
class Chosen:
    """One array of vectors, and where its labels are."""

    file: File
    array: Found
    label: tuple[str, Found] | str | None = None
    """(name of the file beside, or "" for the same one, array); for Parquet the column."""
    alone: bool = True
    """Whether it is the only one taken from its file."""


@dataclass
class Sorted:
    """What was found under all sources."""

    chosen: list[Chosen] = field(default_factory=list)
    broken: list[File] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def looked_into(source: str, prefix: str, ignored: Counter[str]) -> Iterator[File]:
    """The files of a source that can hold vectors, with what their heads say."""
    for entry in storage.list_files(source):
        suffix = PurePosixPath(entry.name).suffix.lower()
        if is_hidden(entry.name) or suffix not in OPENERS:
            ignored[why_ignored(entry.name, "a file of vectors")] += 1
        else:
            yield _looked(entry, prefix, suffix)


def _looked(entry: Entry, prefix: str, suffix: str) -> File:
    if not entry.bytes:
        return File(entry, prefix + entry.name, [], "the file is empty")
    try:
        return File(entry, prefix + entry.name, OPENERS[suffix](entry))
    except Unreadable as reason:
        return File(entry, prefix + entry.name, [], str(reason))


def sort_out(files: list[File], settings: VectorSettings) -> Sorted:
    """Vectors, labels and the rest.

    Raises:
        Refused: several arrays of a file could be the vectors, or none has the name that is set.
    """
    out = Sorted(broken=[file for file in files if file.trouble])
    whole = [file for file in files if not file.trouble]
    _sort_plain([file for file in whole if _is_plain(file)], settings, out)
    for file in whole:
        if not _is_plain(file):
            _sort_container(file, settings, out)
    out.chosen = [replace(chosen, array=_lifted(chosen.array)) for chosen in out.chosen]
    out.chosen.sort(key=lambda chosen: (chosen.file.name, chosen.array.key))
    if settings.label not in (None, "auto") and not any(chosen.label for chosen in out.chosen):
        raise Refused(
            f"label={settings.label} was given, but no file of vectors has an array, a column or a file beside it "
            "of that name. Name one that is there, or leave label out."
        )
    return out


def _lifted(array: Found) -> Found:
    """An array of one axis is one vector."""
    return replace(array, shape=(1, *array.shape), there=1) if len(array.shape) == 1 else array


def _is_plain(file: File) -> bool:
    return file.name.lower().endswith(".npy")


def _sort_plain(files: list[File], settings: VectorSettings, out: Sorted) -> None:
    """.npy files: their labels are files beside them."""
    labels: list[File] = []
    vectors: list[File] = []
    for file in files:
        (labels if is_label(file.arrays[0], _stem(file), settings.label) else vectors).append(file)
    if any(len(file.arrays[0].shape) > 1 for file in vectors):
        # One vector a file, or N of them in one: where there are both, a flat array is something else.
        if flat := sum(len(file.arrays[0].shape) < 2 for file in vectors):
            out.ignored["array of one axis beside arrays of vectors"] += flat
        vectors = [file for file in vectors if len(file.arrays[0].shape) > 1]
    beside = _by_folder(labels)
    used = 0
    for folder, some in _by_folder(vectors).items():
        near = {_stem(file): file for file in beside.get(folder, [])}
        pairs = paired([_stem(file) for file in some], list(near), settings.label or "auto")
        for file in some:
            label = near.get(pairs.get(_stem(file), ""))
            pair = (PurePosixPath(label.entry.name).name, label.arrays[0]) if label else None
            out.chosen.append(Chosen(file, file.arrays[0], pair))
        used += len(set(pairs.values()))
    if len(labels) > used:
        out.ignored["labels that belong to no one file of vectors"] += len(labels) - used


def _by_folder(files: list[File]) -> dict[str, list[File]]:
    folders: dict[str, list[File]] = {}
    for file in files:
        folders.setdefault(file.name.rpartition("/")[0], []).append(file)
    return folders


def _sort_container(file: File, settings: VectorSettings, out: Sorted) -> None:
    parquet = file.name.lower().endswith(".parquet")
    labels = {} if parquet else {f.key: f for f in file.arrays if is_label(f, f.key, settings.label)}
    vectors = _vectors_of(file, [found for found in file.arrays if found.key not in labels], settings.key)
    if not vectors:
        out.ignored[f"{PurePosixPath(file.name).suffix.lower()} file without vectors"] += 1
        return
    columns = tables.label_columns(file.entry, settings.label) if parquet and settings.label else []
    pairs = paired([found.key for found in vectors], list(labels), settings.label or "auto")
    for found in vectors:
        label: tuple[str, Found] | str | None = columns[0] if len(columns) == 1 else None
        if found.key in pairs:
            label = ("", labels[pairs[found.key]])
        out.chosen.append(Chosen(file, found, label, len(vectors) == 1))


def _vectors_of(file: File, arrays: list[Found], key: str | None) -> list[Found]:
    """The array with that key; else the only one of several axes, of floats where others are not; else one a split."""
    listed = _listed(arrays)
    if key is not None and [found.key for found in arrays] != [""]:
        if not (named := [found for found in arrays if found.key == key]):
            raise Refused(f"{file.name} has no array {key!r}; there are: {listed}. Set key= to one of them.")
        return named
    many = [found for found in arrays if len(found.shape) > 1] or [found for found in arrays if found.shape]
    able = [found for found in many if found.is_floating] or many
    parts = {tuple(word for word in words(found.key) if word not in SPLIT_WORDS) for found in able}
    if len(able) > 1 and not (len(parts) == 1 and all(split_word("", found.key) for found in able)):
        raise Refused(f"several arrays of {file.name} could be the vectors: {listed}. Set key= to one of them.")
    return able


def _listed(arrays: list[Found]) -> str:
    told = [f"{found.key or '(unnamed)'} {list(found.shape)} {found.dtype}" for found in arrays[:MOST_TOLD]]
    more = [f"{len(arrays) - MOST_TOLD:,} more"] if len(arrays) > MOST_TOLD else []
    return ", ".join(told + more) or "none"


def _stem(file: File) -> str:
    return PurePosixPath(file.name).name.partition(".")[0]
