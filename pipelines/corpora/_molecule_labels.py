"""Which columns of molecules are labels and which is the official split, and what they hold."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pipelines.corpora import NOT_TEST
from pipelines.corpora import _molecule_files as files
from pipelines.corpora._molecule_features import UnreadableMolecule
from pipelines.corpora._molecule_files import Source
from pipelines.errors import Refused, nearest_names

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("valid", "validation", "val", "dev"), "valid"
)
MISSING = ("", "nan", "na", "n/a", "none", "null")
MOST_CLASSES = 1000
MOST_LABEL = float(np.finfo(np.float32).max)


def split_of(found: Sequence[Source], asked: str | None) -> tuple[str | None, list[str]]:
    """The column of official splits, and which splits it holds."""
    columns = list(dict.fromkeys(name for source in found for name in source.columns))
    named = [asked] if asked else [name for name in columns if name.lower() == "split"]
    if asked is not None and asked not in columns:
        raise Refused(f"no file has a column {asked!r} of splits; {nearest_names(asked, columns)}.")
    for column in named:
        given = {value.lower() for source in found if column in source.columns for value in distinct(source, column)}
        official = sorted({SPLITS[value] for value in given & SPLITS.keys()})
        if official and (asked or given <= SPLITS.keys()):
            return column, official
        if asked:
            raise Refused(
                f"column {asked!r} holds {', '.join(sorted(given)[:5])}, which are no splits; "
                f"allowed: {', '.join(sorted(SPLITS))}."
            )
    return None, []


def labels_of(
    found: Sequence[Source], asked: tuple[str, ...] | None, split: str | None
) -> tuple[list[str], dict[str, list[str]]]:
    """The labels in their order, and of those that are text their sorted classes: a class's place is its label."""
    numeric = [[name for name in numeric_columns(source) if name != split] for source in found]
    if asked is None or not asked:
        return ([] if asked is None else list(dict.fromkeys(name for some in numeric for name in some))), {}
    columns = list(dict.fromkeys(name for source in found for name in source.columns))
    classes = {}
    for name in asked:
        if name not in columns:
            raise Refused(f"no file has a column {name!r} of labels; {nearest_names(name, columns)}.")
        holders = [source for source in found if name in source.columns]
        if not all(is_numeric(source, name) for source in holders):
            classes[name] = sorted({value for source in holders for value in distinct(source, name)})
    return list(asked), classes


def label_values(given: Mapping[str, Any], context: Mapping[str, Any]) -> np.ndarray:
    """[T] float32; NaN where a label is missing."""
    labels = []
    for name in context["labels"]:
        value = given.get(name)
        if is_missing(value):
            labels.append(math.nan)
            continue
        classes = context["classes"].get(name)
        number = as_number(value) if classes is None else float(classes.index(str(value).strip()))
        if number is None:
            raise UnreadableMolecule("a label is no number")
        if not abs(number) <= MOST_LABEL:
            raise UnreadableMolecule("a label is not finite")
        labels.append(number)
    return np.array(labels, np.float32)


def official_split(given: Mapping[str, Any], column: str | None, official: Sequence[str]) -> str | None:
    """A row's official split. Where there is no official valid split, train is cut by the hash."""
    if column is None:
        return None
    split = SPLITS.get(str(given.get(column)).strip().lower())
    if split is None:
        raise UnreadableMolecule("its official split is none of train, valid and test")
    if split == "train" and "valid" not in official:
        return NOT_TEST if "test" in official else None
    return split


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in MISSING) or value != value


def as_number(value: Any) -> float | None:
    """None where it is none."""
    if isinstance(value, bytes | list | dict):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def numeric_columns(source: Source) -> list[str]:
    """Columns that hold numbers, apart from those that only count the rows."""
    return [
        name
        for name in source.columns
        if name and name != source.smiles and is_numeric(source, name) and not _counts(_numbers(source, name))
    ]


def is_numeric(source: Source, column: str) -> bool:
    """Whether what the sample has of a column are numbers; False where it has nothing."""
    numbers = _numbers(source, column)
    return bool(numbers) and None not in numbers


def distinct(source: Source, column: str) -> list[str]:
    """The values of a column that are not missing, sorted. All of the file is read for it.

    Raises:
        Refused: so many that they are no classes.
    """
    values: Counter[str] = Counter()
    for piece in files.with_columns(source, [column], None):
        for _, found, _ in files.read(piece, lambda _: True):
            if isinstance(found, files.Found):
                value = found.values.get(column)
                values.update([] if is_missing(value) else [str(value).strip()])
        if len(values) > MOST_CLASSES:
            raise Refused(
                f"column {column!r} of {source.entry.uri} is text with more than {MOST_CLASSES:,} different values, "
                "so it is no label; name columns of numbers or of classes with labels=..."
            )
    return sorted(values)


def _numbers(source: Source, column: str) -> list[float | None]:
    return [as_number(row[column]) for row in source.sample if not is_missing(row.get(column))]


def _counts(numbers: Sequence[float | None]) -> bool:
    """Whether whole numbers only rise: an index, not a label."""
    whole = [number for number in numbers if number is not None and number == int(number if abs(number) < 1e18 else 0)]
    rising = all(low < high for low, high in pairwise(whole))
    return len(whole) == len(numbers) > 2 and rising
