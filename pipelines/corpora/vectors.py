"""Vectors: .npy, .npz, .pt, safetensors and lists in Parquet; or samples drawn from a generator network."""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipelines import storage
from pipelines.columns import bfloat16_bits, bfloat16_field, bfloat16_of
from pipelines.corpora import Bad, Corpus, Row, Slice, Survey
from pipelines.corpora import _vector_cuts as cuts
from pipelines.corpora import _vector_files as files
from pipelines.corpora._sources import prefixes
from pipelines.corpora._vector_arrays import Array, Block, Blocks, Found, Needed, Unreadable
from pipelines.corpora._vector_draws import Networks, read_draws, survey_draws
from pipelines.corpora._vector_raw import read_raw
from pipelines.corpora._vector_settings import VectorSettings
from pipelines.corpora._vector_tables import read_parquet
from pipelines.corpora._vector_torch import read_pt
from pipelines.corpora._vector_zips import read_zipped
from pipelines.errors import Failed, Refused

READERS: dict[str, Callable[[str, Found, int, int, Needed], Blocks]] = {
    "raw": read_raw,
    "zipped": read_zipped,
    "pt": read_pt,
    "parquet": read_parquet,
}


def survey(sources: list[str], settings: VectorSettings) -> Survey:
    """What vectors there are under the sources, from the heads of the files alone.

    Raises:
        Refused: a source that does not exist or holds no vectors, or arrays that do not agree.
    """
    if settings.generator:
        return survey_draws(sources, settings)
    ignored: Counter[str] = Counter()
    looked = [
        file
        for source, prefix in zip(sources, prefixes(sources), strict=True)
        for file in files.looked_into(source, prefix, ignored)
    ]
    found = files.sort_out(looked, settings)
    ignored.update(found.ignored)
    broken = [(file, file.trouble or "") for file in found.broken]
    forms = []
    for chosen in found.chosen:
        form = cuts.form_of(chosen.array, chosen.file.name, settings)
        if reason := cuts.broken_by_shape(chosen, form):
            broken.append((chosen.file, reason))
        elif form.samples:
            cuts.check_labels(chosen, form)
            forms.append((chosen, form))
        else:
            ignored["array without rows"] += 1
    if not forms:
        reasons = [f"{file.name}: {reason}" for file, reason in broken[:3]]
        held = [f"{count:,} x {reason}" for reason, count in ignored.most_common(3)]
        raise Refused(
            f"there are no vectors in {', '.join(sources)}; found: {'; '.join(reasons + held) or 'nothing'}. "
            f"Allowed are {files.ALLOWED}."
        )
    slices = cuts.slices_of(forms) + [cuts.unreadable(file, reason) for file, reason in broken]
    slices.sort(key=lambda piece: (piece.name, piece.start))
    return Survey(slices, {}, dict(ignored), cuts.agreed(forms, settings))


def setup(settings: VectorSettings) -> Networks:
    """Where a generator is kept once the first slice of a process has loaded it."""
    return Networks()


def gpus(settings: VectorSettings) -> float:
    return 1.0 if settings.generator and settings.device == "cuda" else 0.0


def read(
    piece: Slice,
    context: Mapping[str, Any],
    settings: VectorSettings,
    wanted: Callable[[int], bool],
    networks: Networks | None = None,
) -> Iterator[tuple[int, Row | Bad, bytes]]:
    """Every wanted vector of a slice as a row, or the reason why it is none, with its own bytes as fingerprint."""
    count = piece.stop - piece.start
    taken = np.fromiter((wanted(unit) for unit in range(count)), bool, count)
    done, reason = 0, "the file ends before this vector"
    try:
        if "lost" in piece.meta:
            raise Unreadable(piece.meta["lost"])
        each = piece.meta["each"]
        labels = _labels(piece)
        for block in _blocks(piece, settings, taken, networks or Networks()):
            first = block.first * each - piece.start
            rows = cuts.vectors_in(block.values, settings)
            done = first + len(rows)
            yield from _rows(piece, settings, first, rows, block, labels, taken)
    except Unreadable as damage:
        reason = str(damage)
    except (OSError, Refused, Failed) as trouble:
        # One file that is gone or unreadable is dirt; the message without the path, which the source names already.
        said = trouble.strerror if isinstance(trouble, OSError) else None
        reason = f"could not be read: {said or type(trouble).__name__}"
    for unit in np.flatnonzero(taken[done:]) + done:
        yield int(unit), Bad(f"{piece.name}/{piece.start + unit}", reason), reason.encode()


def _blocks(piece: Slice, settings: VectorSettings, taken: npt.NDArray[np.bool_], networks: Networks) -> Blocks:
    each = piece.meta["each"]
    start, stop = piece.start // each, piece.stop // each

    def needed(low: int, high: int) -> bool:
        return bool(taken[(low - start) * each : (high - start) * each].any())

    if "draws" in piece.meta:
        return read_draws(piece.uri, start, stop, settings, networks, needed)
    array = Found.of_json(piece.meta["array"])
    return READERS[array.layout](piece.uri, array, start, stop, needed)


def _labels(piece: Slice) -> Array | None:
    """The label of each row of a slice, where they are an array of their own."""
    if not (meta := piece.meta.get("label")):
        return None
    array = Found.of_json(meta["array"])
    uri = storage.join(piece.uri.rpartition("/")[0], meta["file"]) if meta["file"] else piece.uri
    each = piece.meta["each"]
    start, stop = piece.start // each, piece.stop // each
    read = [block.values for block in READERS[array.layout](uri, array, start, stop, lambda low, high: True)]
    flat = np.concatenate(read).reshape(-1)
    return np.repeat(flat, (piece.stop - piece.start) // len(flat))


def _rows(
    piece: Slice,
    settings: VectorSettings,
    first: int,
    rows: Array,
    block: Block,
    labels: Array | None,
    taken: npt.NDArray[np.bool_],
) -> Iterator[tuple[int, Row | Bad, bytes]]:
    stored, finite = _stored(rows, settings.dtype)
    each, split = piece.meta["each"], piece.meta.get("split")
    here = labels[first : first + len(rows)] if labels is not None else block.labels
    numbers, whole = _whole(here, len(rows))
    for place in np.flatnonzero(taken[first : first + len(rows)]).tolist():
        unit, row = first + place, rows[place]
        reason = block.reasons[place // each] if block.reasons else None
        if not finite[place]:
            reason = reason or _why_not_finite(row, settings.dtype)
        if not whole[place]:
            reason = reason or "its label is no whole number that int32 holds"
        if reason:
            yield unit, Bad(f"{piece.name}/{piece.start + unit}", reason), row.tobytes()
        else:
            values = {"vector": stored[place], "label": numbers[place]}
            yield unit, Row(values, f"{piece.name}/{(piece.start + unit) // each}", split), row.tobytes()


def _why_not_finite(row: Array, dtype: str) -> str:
    return f"a value is too large for {dtype}" if np.isfinite(row).all() else "a value is NaN or infinite"


def _whole(labels: Array | None, count: int) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """(label of each of `count` rows, -1 where there is none; whether it is one)."""
    if labels is None:
        return [-1] * count, np.ones(count, bool)
    given = np.repeat(labels, count // len(labels)).astype(np.float64)
    given[np.isnan(given)] = -1
    whole = (given == np.trunc(given)) & (given >= -(2**31)) & (given < 2**31)
    return np.where(whole, given, -1).astype(np.int64).tolist(), whole


def _stored(rows: Array, dtype: str) -> tuple[Array, npt.NDArray[np.bool_]]:
    """(rows as they are stored, whether all values of each are finite in that type)."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(rows, np.float16 if dtype == "float16" else np.float32)
    if dtype == "bfloat16":
        rounded = torch.from_numpy(values).bfloat16()
        return bfloat16_bits(rounded), rounded.isfinite().flatten(1).all(1).numpy()
    return values, np.isfinite(values).reshape(len(values), -1).all(1)


def schema(settings: VectorSettings) -> pa.Schema:
    if settings.dtype == "bfloat16":
        vector = bfloat16_field("vector", settings.shape)
    else:
        vector = pa.field("vector", pa.fixed_shape_tensor(pa.from_numpy_dtype(settings.stored), settings.shape))
    return pa.schema([vector, pa.field("label", pa.int32())])


def shapes(settings: VectorSettings) -> dict[str, list[int] | None]:
    return {"vector": list(settings.shape)}


def tensors(stored: dict[str, Any], settings: VectorSettings) -> dict[str, Tensor]:
    """Vectors [B, D] (or [B, L, D]) in the type they are kept in, and their labels (-1: none)."""
    vectors = stored["vector"]
    made = bfloat16_of(vectors) if settings.dtype == "bfloat16" else torch.from_numpy(vectors)
    return {"vector": made, "label": torch.from_numpy(stored["label"])}


def write_files(columns: dict[str, Tensor], stems: list[str], directory: str, settings: VectorSettings) -> None:
    """One .npy file a row; bfloat16, which NumPy does not know, as float32."""
    vectors = columns["vector"].cpu()
    vectors = vectors.float() if vectors.dtype == torch.bfloat16 else vectors
    for stem, vector in zip(stems, vectors.numpy(), strict=True):
        file = io.BytesIO()
        np.save(file, vector, allow_pickle=False)
        storage.write_atomic(storage.join(directory, f"{stem}.npy"), file.getvalue())


corpus = Corpus(
    Settings=VectorSettings,
    survey=survey,
    read=read,
    schema=schema,
    shapes=shapes,
    tensors=tensors,
    write_files=write_files,
    setup=setup,
    gpus=gpus,
)
