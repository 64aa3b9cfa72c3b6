"""Images in tables: IDX (MNIST's format) and Parquet with an image column."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.corpora import NOT_TEST, Bad, Slice
from pipelines.corpora._image_units import SLICE_BYTES, Found, Units, Wanted, unreadable
from pipelines.errors import Refused
from pipelines.storage import Entry

MOST_GZIP_RATIO = 1032
"""What deflate can reach; a header that promises more is a lie."""
IDX_ROWS = 10_000
PARQUET_ROWS_AT_ONCE = 64
PARQUET_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
DAMAGE = (struct.error, OSError, EOFError, zlib.error)


def is_idx(name: str) -> bool:
    return name.lower().endswith(("-idx3-ubyte.gz", "-idx3-ubyte"))


def is_idx_labels(name: str) -> bool:
    return name.lower().endswith(("-labels-idx1-ubyte.gz", "-labels-idx1-ubyte"))


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def of_idx(entry: Entry, entries: list[Entry], prefix: str) -> list[Slice]:
    """Grey images of one size, with the labels file of the same stem. Beside a train file, t10k is the official test.

    Raises:
        Refused: labels that cannot belong to these images.
    """
    try:
        magic, count, height, width = _head(entry, ">IIII")
    except DAMAGE as trouble:
        return unreadable(entry, prefix, f"not an IDX file of images: {trouble}")
    pixels = height * width
    if magic != 0x803 or not pixels or count * pixels > MOST_GZIP_RATIO * entry.bytes:
        given = f"{magic:#x}, {count:,} images of {height} x {width}"
        return unreadable(entry, prefix, f"not an IDX file of images: its header says {given}")
    name, stems = _base(entry.name), [_base(e.name) for e in entries if is_idx(e.name)]
    official = any(s.startswith("t10k") for s in stems) and any(s.startswith("train") for s in stems)
    split = ("test" if name.startswith("t10k") else NOT_TEST) if official else None
    meta = {"layout": "idx", "shape": [height, width], "labels": _labels_of(entry, entries, count), "split": split}
    step = max(1, min(IDX_ROWS, SLICE_BYTES // pixels))
    return [
        Slice(entry.uri, prefix + entry.name, low, min(low + step, count), min(step, count - low) * pixels, meta)
        for low in range(0, count, step)
    ]


def read_idx(piece: Slice, wanted: Wanted) -> Units:
    height, width = piece.meta["shape"]
    count, size = piece.stop - piece.start, height * width
    labels = _bytes_of(piece.meta["labels"], 8 + piece.start, 1, count) if piece.meta["labels"] else None
    pixels = _bytes_of(piece.uri, 16 + piece.start * size, size, count)
    for unit in range(count):
        name = f"{piece.name}/{piece.start + unit}"
        data, label = next(pixels, b""), next(labels, b"") if labels else None
        if not wanted(unit):
            continue
        if len(data) < size:
            yield unit, Bad(name, "the file is cut off before the end of this image")
        elif label == b"":
            yield unit, Bad(name, "the file of labels is cut off before this one")
        else:
            yield unit, Found(name, data, label[0] if label else None, piece.meta["split"], (height, width))


def of_parquet(entry: Entry, prefix: str) -> list[Slice]:
    """Row groups, or pieces of large ones. Nothing where no column can hold images.

    Raises:
        Refused: several columns could be the image.
    """
    try:
        with storage.open_read(entry.uri) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            groups = [parquet.metadata.row_group(n) for n in range(parquet.num_row_groups)]
    except PARQUET_DAMAGE as trouble:
        return unreadable(entry, prefix, f"not a Parquet file that can be read: {_first_line(trouble)}")
    image = _image_column(schema, entry.uri)
    if image is None:
        return []
    read = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
    label = "label" if "label" in schema.names and pa.types.is_integer(schema.field("label").type) else None
    slices, first = [], 0
    for number, group in enumerate(groups):
        pieces = max(1, min(group.num_rows, -(-group.total_byte_size // SLICE_BYTES)))
        cuts = [group.num_rows * n // pieces for n in range(pieces + 1)]
        for low, high in pairwise(cuts):
            meta = {"layout": "parquet", "image": image, "read": read, "label": label, "group": number, "skip": low}
            size = group.total_byte_size // pieces
            slices.append(Slice(entry.uri, prefix + entry.name, first + low, first + high, size, meta))
        first += group.num_rows
    return [piece for piece in slices if piece.stop > piece.start]


def read_parquet(piece: Slice, wanted: Wanted) -> Units:
    unit, count = 0, piece.stop - piece.start
    reason = "the row group ends before this row"
    try:
        for value, label in islice(_values(piece), piece.meta["skip"], piece.meta["skip"] + count):
            if wanted(unit):
                data = value.get("bytes") if isinstance(value, dict) else value
                name = f"{piece.name}/{piece.start + unit}"
                yield unit, Bad(name, "the image column is empty here") if data is None else Found(name, data, label)
            unit += 1
    except PARQUET_DAMAGE as damage:
        reason = f"the row group cannot be read from here on: {_first_line(damage)}"
    for lost in range(unit, count):
        if wanted(lost):
            yield lost, Bad(f"{piece.name}/{piece.start + lost}", reason)


def _values(piece: Slice) -> Iterator[tuple[Any, int | None]]:
    """(image, label) of a row group's rows, a few decoded at a time."""
    # Of a struct its `bytes` alone: a path beside them that is no UTF-8 must not cost the image.
    columns = [piece.meta["read"], *([piece.meta["label"]] if piece.meta["label"] else [])]
    with storage.open_read(piece.uri) as file:
        batches = pq.ParquetFile(file).iter_batches(PARQUET_ROWS_AT_ONCE, [piece.meta["group"]], columns)
        for batch in batches:
            labels = batch.column(piece.meta["label"]) if piece.meta["label"] else None
            for row, image in enumerate(batch.column(piece.meta["image"])):
                yield image.as_py(), None if labels is None else labels[row].as_py()


def _image_column(schema: pa.Schema, uri: str) -> str | None:
    """The column of bytes, or of structs with `bytes` as Hugging Face writes them; by name where there are several."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and holds_bytes(kind.field(place).type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    able = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in able if name in ("image", "img", "jpg", "png")] or able
    if len(named) > 1:
        raise Refused(
            f"{uri} has several columns that could be the image: {', '.join(named)}. "
            "Rename the right one to `image` and the others to something else."
        )
    return named[0] if named else None


def _labels_of(entry: Entry, entries: list[Entry], count: int) -> str | None:
    wanted = _base(entry.name).lower().replace("images-idx3", "labels-idx1").removesuffix(".gz")
    folder = entry.name.rpartition("/")[0]
    for other in entries:
        same = other.name.rpartition("/")[0] == folder and _base(other.name).lower().removesuffix(".gz") == wanted
        if not (same and is_idx_labels(other.name)):
            continue
        try:
            magic, labels = _head(other, ">II")
        except DAMAGE as trouble:
            raise Refused(
                f"{other.uri} is not an IDX file of labels ({trouble}). Mend it, or remove it to read without labels."
            ) from None
        if magic != 0x801 or labels != count:
            raise Refused(
                f"{other.uri} does not belong to {entry.uri}: its header says {magic:#x} and {labels:,} labels, "
                f"where 0x801 and {count:,} are needed. Mend it, or remove it to read without labels."
            )
        return other.uri
    return None


def _head(entry: Entry, layout: str) -> tuple[int, ...]:
    with storage.open_read(entry.uri) as raw:
        return struct.unpack(layout, _unpacked(raw, entry.name).read(struct.calcsize(layout)))


def _bytes_of(uri: str, offset: int, size: int, count: int) -> Iterator[bytes]:
    """`count` pieces of `size` bytes, fewer where the file is cut off or damaged."""
    with storage.open_read(uri) as raw:
        file = _unpacked(raw, uri)
        try:
            file.seek(offset)
            for _ in range(count):
                yield file.read(size)
        except DAMAGE:
            return


def _unpacked(file: Any, name: str) -> Any:
    return gzip.GzipFile(fileobj=file) if name.lower().endswith(".gz") else file


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _first_line(trouble: Exception) -> str:
    return str(trouble).strip().partition("\n")[0][:120] or type(trouble).__name__
