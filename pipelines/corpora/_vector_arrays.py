"""What the formats of vectors share: an array that was found in a file, and what its name says."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.corpora import NOT_TEST

SLICE_BYTES = 64 << 20
"""Where large arrays are cut: well under the 256 MiB of a part, so that parts come out even."""
WHOLE_BYTES = 256 << 20
"""What is read as a whole, or read through to reach a slice, is cut as coarsely as a part allows."""
CHUNK_BYTES = 4 << 20
"""What is in memory at once of an array, beside the rows that wait to be written."""
MOST_NUMBERS = 1 << 22
"""A sample with more is no vector, and would not fit beside the rest of a worker."""

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
}
LABEL_WORDS = frozenset({"label", "labels", "y", "target", "targets"})
VECTOR_WORDS = frozenset(
    {"x", "data", "vector", "vectors", "feature", "features", "embedding", "embeddings", "latents"}
)

Array = npt.NDArray[Any]
Needed = Callable[[int, int], bool]
"""Whether any of the samples [low, high) of an array is wanted."""


class Block(NamedTuple):
    """A few samples of an array."""

    first: int
    """Number of the first one in the array."""
    values: Array
    """[n, *shape of a sample]."""
    reasons: list[str | None] | None = None
    """Of each sample, why it is none, where that can be."""
    labels: Array | None = None
    """[n], where labels lie beside the vectors."""


Blocks = Iterator[Block]


class Unreadable(ValueError):
    """Why a file, or the rest of it, cannot become rows; in few distinct wordings."""


class NoNumbers(Unreadable):
    """The elements of an array are something else."""


@dataclass(frozen=True)
class Found:
    """One array of numbers in a file, before it is read. The first axis numbers samples."""

    key: str
    """Its name in the file; empty where the file is the array."""
    shape: tuple[int, ...]
    dtype: str
    """As NumPy spells it, with the byte order (`<f4`), or `bfloat16`."""
    layout: str
    """Which reader reads it."""
    place: dict[str, Any]
    """JSON values that reader needs."""
    there: int
    """Samples that are really there; fewer than the shape says where the file is cut off."""
    coarse: bool = False
    """Whether reaching a range of samples means reading what lies around it, so that slices had better be few."""

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> "Found":
        """What `asdict` gave, after a journey through JSON."""
        return cls(**{**value, "shape": tuple(value["shape"])})

    @property
    def sample_bytes(self) -> int:
        return math.prod(self.shape[1:]) * item_bytes(self.dtype)

    @property
    def is_floating(self) -> bool:
        return self.dtype == "bfloat16" or np.dtype(self.dtype).kind == "f"


def item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def check_numbers(dtype: np.dtype[Any]) -> None:
    """
    Raises:
        NoNumbers: elements that are no numbers of at most 64 bits.
    """
    if dtype.hasobject:
        raise NoNumbers("it holds pickled Python objects, which are never loaded")
    if dtype.names is not None:
        raise NoNumbers("it holds records with named fields, not plain numbers")
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise NoNumbers(f"its elements are {dtype}, not floats or whole numbers of at most 64 bits")


def viewed(data: bytes | memoryview, dtype: str, shape: tuple[int, ...], order: str = "C") -> Array:
    """Raw bytes as numbers. bfloat16, which NumPy does not know, becomes the float32 of the same value."""
    if dtype != "bfloat16":
        return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload]
    return floats_of(np.frombuffer(data, "<u2").reshape(shape, order=order))  # type: ignore[call-overload]


def floats_of(bits: Array) -> Array:
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def words(name: str) -> list[str]:
    """`x_train-00` -> [x, train, 00]; also at a change to an upper-case letter: xTrain -> [x, train]."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)]


def split_word(name: str, key: str) -> str | None:
    """The split that the key, the file's name or one of its folders says, in this order."""
    path = PurePosixPath(name)
    said = [
        SPLIT_WORDS[word] for text in (key, path.name.partition(".")[0]) for word in words(text) if word in SPLIT_WORDS
    ]
    said += [SPLIT_WORDS[part.lower()] for part in reversed(path.parts[:-1]) if part.lower() in SPLIT_WORDS]
    return said[0] if said else None


def official(said: Iterable[str | None]) -> dict[str | None, str | None]:
    """What each file says of its split -> the split of its rows. They are official where every file says one.

    Where no file says valid, train is cut by the hash: into train and valid, and test too if that is missing.
    """
    splits = set(said)
    if None in splits:
        return dict.fromkeys(splits)
    given: dict[str | None, str | None] = {split: split for split in splits}
    if "train" in splits and "valid" not in splits:
        given["train"] = NOT_TEST if "test" in splits else None
    return given


def is_label(found: Found, name: str, label: str | None) -> bool:
    """Whether an array of this name holds one number a sample (or a position) that its name calls a label."""
    if label is None:
        return False
    if label != "auto":
        called = name == label or label.lower() in words(name)
        return called and len(found.shape) <= 2
    flat = len(found.shape) == 1 or (len(found.shape) == 2 and found.shape[1] == 1)
    return flat and not found.is_floating and bool(LABEL_WORDS & set(words(name)))


def paired(vectors: list[str], labels: list[str], label: str) -> dict[str, str]:
    """Names of vectors -> names of their labels: x_train and y_train, a and a_labels; or each the only one."""
    if len(vectors) == len(labels) == 1:
        return {vectors[0]: labels[0]}
    marks = LABEL_WORDS | set(words(label))
    by_rest: dict[tuple[str, ...], list[str]] = {}
    for name in labels:
        by_rest.setdefault(_without(name, marks), []).append(name)
    alike = {name: by_rest.get(_without(name, VECTOR_WORDS), []) for name in vectors} if labels else {}
    return {name: found[0] for name, found in alike.items() if len(found) == 1}


def _without(name: str, drop: frozenset[str]) -> tuple[str, ...]:
    return tuple(word for word in words(name) if word not in drop)
