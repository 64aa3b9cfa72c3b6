"""Arrays of vectors to slices: what a row of each is, whether all agree, and where they are cut."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipelines.corpora import Slice
from pipelines.corpora import _vector_tables as tables
from pipelines.corpora._vector_arrays import MOST_NUMBERS, SLICE_BYTES, WHOLE_BYTES, Array, Found, official, split_word
from pipelines.corpora._vector_files import Chosen, File
from pipelines.corpora._vector_settings import VectorSettings
from pipelines.errors import Refused


@dataclass(frozen=True)
class Form:
    """How an array of some shape becomes rows."""

    samples: int
    each: int
    """Rows of one sample."""
    dim: int
    positions: int | None
    """L where a row is [L, D]."""


def form_of(array: Found, name: str, settings: VectorSettings) -> Form:
    """
    Raises:
        Refused: the axis or the position that is set does not exist in this array.
    """
    shape, axes = array.shape, len(array.shape)
    axis = settings.axis + axes if settings.axis < 0 else settings.axis
    if not 1 <= axis < axes:
        raise Refused(
            f"axis={settings.axis} was given, but {name} holds {list(shape)}: allowed are 1 to {axes - 1} or, from the "
            f"end, -1 to -{axes - 1}."
        )
    places = math.prod(shape[1:]) // max(1, shape[axis])
    if settings.position is not None:
        if settings.position >= places:
            raise Refused(
                f"position={settings.position} was given, but {name} holds {list(shape)}: {places} vectors a sample, "
                f"numbered 0 to {places - 1}."
            )
        return Form(shape[0], 1, shape[axis], None)
    if settings.rows == "samples":
        return Form(shape[0], 1, shape[axis], places if axes > 2 else None)
    return Form(shape[0], places, shape[axis], None)


def check_labels(chosen: Chosen, form: Form) -> None:
    """
    Raises:
        Refused: labels in an array of their own, neither one a sample nor one a row.
    """
    if not isinstance(chosen.label, tuple):
        return
    beside, labels = chosen.label
    count = math.prod(labels.shape)
    if labels.shape[:1] != (form.samples,) or count not in (form.samples, form.samples * form.each):
        raise Refused(
            f"the labels in {beside or 'the array ' + labels.key} do not belong to {_called(chosen)}: they are "
            f"{list(labels.shape)} for {list(chosen.array.shape)}. Mend them, or set label=none to read without."
        )


def vectors_in(values: Array, settings: VectorSettings) -> Array:
    """Samples [n, ...] as an array holds them -> rows [n x each, D], or [n, L, D] of rows=samples."""
    if values.ndim > 2:
        values = np.moveaxis(values, settings.axis, -1)
        values = values.reshape(len(values), -1, values.shape[-1])
        if settings.position is not None:
            return values[:, settings.position]
        if settings.rows == "samples":
            return values
    return values.reshape(-1, values.shape[-1])


def broken_by_shape(chosen: Chosen, form: Form) -> str | None:
    """Why an array of numbers holds no vectors all the same."""
    if not form.dim or not math.prod(chosen.array.shape[1:]):
        return "its vectors have no numbers (D is 0)"
    if form.dim * (form.positions or 1) > MOST_NUMBERS or math.prod(chosen.array.shape[1:]) > MOST_NUMBERS:
        return f"a sample of it has more than {MOST_NUMBERS:,} numbers"
    return None


def agreed(forms: Sequence[tuple[Chosen, Form]], settings: VectorSettings) -> dict[str, Any]:
    """dim and positions, which all arrays share.

    Raises:
        Refused: two arrays differ, naming both; or all differ from what was asked for.
    """
    first, form = forms[0]
    for other, its in forms:
        if (its.dim, its.positions) != (form.dim, form.positions):
            raise Refused(
                f"{_called(first)} holds vectors of {_size(form)} and {_called(other)} of {_size(its)}; one corpus "
                "has one size. Ingest them apart, or set key=, axis= or position= so that they agree."
            )
    if settings.dim is not None and (settings.dim, settings.positions) != (form.dim, form.positions):
        asked = Form(0, 0, settings.dim, settings.positions)
        raise Refused(
            f"{_called(first)} holds vectors of {_size(form)}, but {_size(asked)} was asked for (by dim= "
            "and positions=, or by the bundle whose preparation is used)."
        )
    return {"dim": form.dim, "positions": form.positions}


def slices_of(forms: Sequence[tuple[Chosen, Form]]) -> list[Slice]:
    said = [split_word(chosen.file.name, chosen.array.key) for chosen, _ in forms]
    splits = official(said)
    return [
        piece for (chosen, form), word in zip(forms, said, strict=True) for piece in _slices(chosen, form, splits[word])
    ]


def unreadable(file: File, reason: str) -> Slice:
    """A whole file as one unit that goes to the quarantine."""
    return Slice(file.entry.uri, file.name, 0, 1, 0, {"lost": reason})


def _slices(chosen: Chosen, form: Form, split: str | None) -> Iterator[Slice]:
    array, name = chosen.array, _called(chosen)
    meta = {"split": split, "each": form.each, "label": _label_meta(chosen)}
    for low, high, size, place in _cuts(array, form):
        if array.layout == "parquet" and isinstance(chosen.label, str):
            place = {**place, "label": chosen.label}
        if low >= array.there:
            said: dict[str, Any] = {"lost": "the file is cut off before this vector"}
        else:
            said = {**meta, "array": asdict(replace(array, place=place))}
        yield Slice(chosen.file.entry.uri, name, low * form.each, high * form.each, size, said)


def _cuts(array: Found, form: Form) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    if array.layout == "parquet":
        yield from tables.cuts(array)
        return
    size = array.sample_bytes
    step = max(1, (WHOLE_BYTES if array.coarse else SLICE_BYTES) // size)
    for first, last in ((0, array.there), (array.there, form.samples)):
        for low in range(first, last, step):
            high = min(low + step, last)
            yield low, high, (high - low) * size, array.place


def _label_meta(chosen: Chosen) -> dict[str, Any] | None:
    if not isinstance(chosen.label, tuple):
        return None
    file, found = chosen.label
    return {"file": file, "array": asdict(found)}


def _called(chosen: Chosen) -> str:
    return chosen.file.name if chosen.alone else f"{chosen.file.name}/{chosen.array.key}"


def _size(form: Form) -> str:
    return f"{form.dim}" if form.positions is None else f"{form.positions} x {form.dim}"
