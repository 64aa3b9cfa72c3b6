"""Vectors in Parquet: columns of lists of numbers, of one length or of any; cut by row groups."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.corpora._vector_arrays import (
    CHUNK_BYTES,
    LABEL_WORDS,
    WHOLE_BYTES,
    Array,
    Block,
    Blocks,
    Found,
    Needed,
    Unreadable,
)
from pipelines.storage import Entry

DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError, ValueError)


def of_parquet(entry: Entry) -> list[Found]:
    """The columns that can hold vectors. The footer is read, and the first row of columns whose lists vary in length.

    Raises:
        Unreadable: another kind of file, or cut off.
    """
    try:
        with storage.open_read(entry.uri) as file:
            parquet = pq.ParquetFile(file)
            groups = [parquet.metadata.row_group(n) for n in range(parquet.num_row_groups)]
            rows = [group.num_rows for group in groups]
            place = {"rows": rows, "bytes": [group.total_byte_size for group in groups]}
            return [
                Found(
                    item.name, (sum(rows), *shape), np.dtype(numbers.to_pandas_dtype()).str, "parquet", place, sum(rows)
                )
                for item in parquet.schema_arrow
                if (numbers := numbers_of(item.type)) is not None
                and (shape := _shape(parquet, item.name, item.type)) is not None
            ]
    except DAMAGE as trouble:
        raise Unreadable(f"not a Parquet file that can be read: {first_line(trouble)}") from None


def label_columns(entry: Entry, label: str) -> list[str]:
    """Columns of whole numbers that can be the label."""
    with storage.open_read(entry.uri) as file:
        schema = pq.read_schema(file)
    whole = [item.name for item in schema if pa.types.is_integer(item.type) or pa.types.is_boolean(item.type)]
    return [name for name in whole if (name.lower() in LABEL_WORDS if label == "auto" else name == label)]


def numbers_of(kind: pa.DataType) -> pa.DataType | None:
    """The type of the numbers in a column of vectors; None where it holds something else."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return kind.value_type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return None
    value = kind.value_type
    return value if pa.types.is_integer(value) or pa.types.is_floating(value) else None


def _shape(parquet: pq.ParquetFile, name: str, kind: pa.DataType) -> tuple[int, ...] | None:
    """Shape of one row; of lists of any length, that of the first row that has one."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return tuple(kind.shape)
    if pa.types.is_fixed_size_list(kind):
        return (kind.list_size,)
    for batch in parquet.iter_batches(64, columns=[name]):
        for value in batch.column(0):
            if value.is_valid:
                return (len(value.values),)
    return None


def cuts(found: Found) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """(first row, last row, bytes, place) of each slice: a row group, or a piece of a very large one."""
    first = 0
    for number, (rows, size) in enumerate(zip(found.place["rows"], found.place["bytes"], strict=True)):
        pieces = max(1, min(rows, -(-size // WHOLE_BYTES)))
        for low, high in pairwise([rows * n // pieces for n in range(pieces + 1)]):
            if high > low:
                yield first + low, first + high, size // pieces, {"group": number, "first": first}
        first += rows


def read_parquet(uri: str, found: Found, start: int, stop: int, needed: Needed) -> Blocks:
    """Rows [start, stop), which lie in one row group, with their labels; zeros where a row is none.

    Raises:
        Unreadable: the row group is damaged from here on.
    """
    label = found.place.get("label")
    columns = [found.key, *([label] if label else [])]
    step = max(1, min(4096, CHUNK_BYTES // max(1, found.sample_bytes)))
    low = found.place["first"]
    try:
        with storage.open_read(uri) as file:
            # Buffered, so that a column chunk of a gigabyte is not in memory as a whole.
            parquet = pq.ParquetFile(file, buffer_size=CHUNK_BYTES, page_checksum_verification=True)
            for batch in parquet.iter_batches(step, [found.place["group"]], columns):
                high = min(low + batch.num_rows, stop)
                first = max(low, start)
                if first < high and needed(first, high):
                    yield _block(batch.slice(first - low, high - first), found, label, first)
                low += batch.num_rows
                if low >= stop:
                    return
    except DAMAGE as damage:
        raise Unreadable(f"the row group cannot be read from here on: {first_line(damage)}") from None


def _block(rows: pa.RecordBatch, found: Found, label: str | None, first: int) -> Block:
    # NaN where there is none.
    labels = rows.column(label).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) if label else None
    return Block(first, *_values(rows.column(found.key), found.shape[1:]), labels)


def _values(column: pa.Array, shape: tuple[int, ...]) -> tuple[Array, list[str | None]]:
    lists = column.storage if isinstance(column, pa.ExtensionArray) else column
    here = lists.is_valid().to_numpy(zero_copy_only=False)
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    wanted = int(np.prod(shape))
    good = here & (lengths == wanted)
    reasons: list[str | None] = [None] * len(column)
    for row in np.flatnonzero(~good):
        reasons[row] = f"it has {lengths[row]} numbers instead of {wanted}" if here[row] else "it has no vector here"
    numbers = (lists if good.all() else lists.filter(pa.array(good))).flatten()
    if numbers.null_count:
        # A number that is missing makes its row non-finite, and so it is told.
        numbers = numbers.cast(pa.float64())
    flat = numbers.to_numpy(zero_copy_only=False)
    values = np.zeros((len(column), *shape), flat.dtype)
    values[good] = flat.reshape(-1, *shape)
    return values, reasons


def first_line(trouble: Exception) -> str:
    return str(trouble).strip().partition("\n")[0][:120] or type(trouble).__name__
