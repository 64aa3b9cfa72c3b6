"""Values of rows as Arrow columns and back: numbers, tensors of one shape, ragged ones, bfloat16.

A ragged column is an Arrow list of numbers, row-major. Its field says the shape in metadata, `{"shape": "[L, 4, 3]"}`;
only the first size differs between rows. bfloat16 is stored as its bits, uint16, in a field that says
`{"dtype": "bfloat16"}`: Arrow has no such type.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipelines.errors import Failed

RAGGED_SHAPE = re.compile(r"\[L((?:, *[1-9]\d*)*)\]")
"""What the metadata `shape` of a ragged column may say."""


def ragged_field(name: str, kind: pa.DataType, tail: Sequence[int] = ()) -> pa.Field:
    """A column of tensors [L, *tail] of numbers of that Arrow type, with an L of its own for every row."""
    shape = json.dumps(["L", *tail]).replace('"', "")
    return pa.field(name, pa.list_(kind), metadata={"shape": shape})


def bfloat16_field(name: str, shape: Sequence[int]) -> pa.Field:
    """A column of bfloat16 tensors of one shape."""
    return pa.field(name, pa.fixed_shape_tensor(pa.uint16(), list(shape)), metadata={"dtype": "bfloat16"})


def bfloat16_bits(values: torch.Tensor) -> npt.NDArray[np.uint16]:
    """bfloat16 tensor -> what its column stores, of the same shape."""
    bits: npt.NDArray[np.uint16] = values.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return bits


def bfloat16_of(bits: npt.NDArray[np.uint16]) -> torch.Tensor:
    """What `values_of` gives for a bfloat16 column -> bfloat16 tensor, without a copy."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def tail_of(item: pa.Field) -> tuple[int, ...] | None:
    """(4, 3) for a ragged column whose metadata says `[L, 4, 3]`, () for one that says nothing, None for all others.

    Raises:
        ValueError: the metadata says something else.
    """
    if not (pa.types.is_list(item.type) and is_number(item.type.value_type)):
        return None
    said = (item.metadata or {}).get(b"shape", b"[L]").decode()
    if not (match := RAGGED_SHAPE.fullmatch(said)):
        raise ValueError(f"the shape {said!r} of a ragged column is not of the form '[L, 4, 3]'")
    return tuple(int(size) for size in match[1].split(",") if size.strip())


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def batch_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Values -> one record batch; None where a value is missing. Only floats are rounded.

    Tensor columns take arrays of exactly their shape; ragged ones arrays [L, *tail], flat ones of L x tail numbers, or
    lists of numbers.

    Raises:
        Failed: a value does not fit its column; the message names the column.
    """
    columns = []
    for item in schema:
        values = [row[item.name] for row in rows]
        try:
            if isinstance(item.type, pa.FixedShapeTensorType):
                columns.append(tensor_array(_stacked(values, item.type), item.type))
            elif (tail := tail_of(item)) is not None:
                columns.append(ragged_array(values, item.type, tail))
            else:
                columns.append(pa.array(values, item.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError, ArithmeticError) as error:
            raise Failed(f"column {item.name!r} ({item.type}) got a value that does not fit: {error}") from error
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def tensor_array(values: npt.NDArray[Any], kind: pa.FixedShapeTensorType) -> pa.ExtensionArray:
    """[N, *shape] -> N tensors of that Arrow type, without a copy where `values` is contiguous."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.value_type)
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, type=kind.storage_type))


def ragged_array(values: Sequence[Any], kind: pa.ListType, tail: tuple[int, ...] = ()) -> pa.ListArray:
    """N arrays [L, *tail] (flat, or None where missing) -> N lists of that Arrow type."""
    flat = [np.empty(0) if value is None else _flat(np.asarray(value), tail) for value in values]
    offsets = np.cumsum([0, *(len(array) for array in flat)])
    filled = [array for array in flat if len(array)]
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    numbers = np.concatenate([_cast(array, dtype) for array in filled]) if filled else np.empty(0, dtype)
    missing = pa.array([value is None for value in values]) if any(value is None for value in values) else None
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(numbers, kind.value_type), type=kind, mask=missing
    )


def to_tensor(column: pa.Array) -> torch.Tensor:
    """A tensor or number column of a batch from `ShardReader` as [N, *shape], without a copy."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        return torch.from_dlpack(column.storage.flatten()).view(len(column), *column.type.shape)
    return torch.from_dlpack(column)


def values_of(batch: pa.RecordBatch) -> dict[str, Any]:
    """Column -> array [N, *shape] for tensors, numbers and booleans; a list of flat arrays for lists of numbers;
    a list of Python values for all others. Where a value is missing the column is a list with None.

    Arrays are made without a copy, but for booleans. bfloat16 comes as its bits (`bfloat16_of`).
    """
    return {name: plain(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def padded(
    rows: Sequence[npt.ArrayLike | None], tail: Sequence[int] = (), fill: float = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ragged column as `values_of` gives it -> (values [B, L, *tail], mask [B, L]), L the most of any row.

    The mask is True where a value is real; what is filled up holds `fill`. A missing row has no real value.
    """
    flat = [None if row is None else _flat(np.asarray(row), tuple(tail)) for row in rows]
    lengths = np.array([0 if row is None else len(row) for row in flat], np.int64) // math.prod(tail)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    real = [row for row in flat if row is not None]
    numbers = np.concatenate(real) if real else np.empty(0, np.float32)
    values = np.full((*mask.shape, *tail), fill, numbers.dtype)
    values[mask] = numbers.reshape(-1, *tail)
    return torch.from_numpy(values), torch.from_numpy(mask)


def batch_from(tensors: Mapping[str, torch.Tensor], lengths: Mapping[str, torch.Tensor]) -> pa.RecordBatch:
    """Tensors [B, ...] -> one record batch, its types those of the tensors.

    Args:
        lengths: column -> how many of its L are real, [B], for the columns [B, L, ...] that are ragged.
    """
    fields, columns = [], []
    for name, tensor in tensors.items():
        bits = tensor.dtype == torch.bfloat16
        array = bfloat16_bits(tensor) if bits else tensor.detach().cpu().numpy()
        kind = pa.from_numpy_dtype(array.dtype)
        if name in lengths:
            field = ragged_field(name, kind, array.shape[2:])
            ends = [int(end) for end in lengths[name]]
            columns.append(
                ragged_array([row[:end] for row, end in zip(array, ends, strict=True)], field.type, array.shape[2:])
            )
        else:
            field = pa.field(name, pa.fixed_shape_tensor(kind, list(array.shape[1:])))
            columns.append(tensor_array(array, field.type))
        fields.append(field.with_metadata({**(field.metadata or {}), b"dtype": b"bfloat16"}) if bits else field)
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def stored_as(values: torch.Tensor, item: pa.Field) -> torch.Tensor:
    """Floating point values in the type of a tensor column of such, masks in that of one of integers; all else as it
    is."""
    if not isinstance(item.type, pa.FixedShapeTensorType):
        return values
    if values.dtype == torch.bool and pa.types.is_integer(item.type.value_type):
        return values.to(torch.from_numpy(np.empty(0, item.type.value_type.to_pandas_dtype())).dtype)
    if not values.is_floating_point():
        return values
    if (item.metadata or {}).get(b"dtype") == b"bfloat16":
        return values.to(torch.bfloat16)
    if not pa.types.is_floating(item.type.value_type):
        return values
    return values.to(torch.from_numpy(np.empty(0, item.type.value_type.to_pandas_dtype())).dtype)


def plain(column: pa.Array) -> Any:
    """One column as `values_of` gives it."""
    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        return to_tensor(column).numpy()
    if pa.types.is_list(kind) and is_number(kind.value_type):
        numbers, offsets = to_tensor(column.values).numpy(), column.offsets.to_numpy()
        here = column.is_valid().to_numpy(zero_copy_only=False)
        bounds = zip(offsets[:-1], offsets[1:], here, strict=True)
        return [numbers[start:stop] if valid else None for start, stop, valid in bounds]
    if column.null_count:
        return column.to_pylist()
    if is_number(kind):
        return to_tensor(column).numpy()
    if pa.types.is_boolean(kind):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


def _stacked(values: list[Any], kind: pa.FixedShapeTensorType) -> npt.NDArray[Any]:
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    shape = tuple(kind.shape)
    arrays = [np.asarray(value) for value in values]
    for array in arrays:
        if array.shape != shape:
            raise ValueError(f"shape {array.shape}, not {shape}")
    return _cast(np.stack(arrays) if arrays else np.empty((0, *shape), dtype), dtype)


def _flat(array: npt.NDArray[Any], tail: tuple[int, ...]) -> npt.NDArray[Any]:
    """[L, *tail] or [L x tail] -> [L x tail]."""
    if array.dtype.kind not in "biuf" and array.size:
        raise ValueError(f"{array.dtype} values are no numbers")
    whole = array.ndim > 0 and array.shape[1:] == tail
    if not whole and not (array.ndim == 1 and len(array) % math.prod(tail) == 0):
        raise ValueError(f"shape {array.shape}, not {('L', *tail)}")
    return array.reshape(-1)


def _cast(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if values.dtype == dtype:
        return values
    with np.errstate(over="raise", invalid="raise"):
        cast = values.astype(dtype, copy=False)
    if dtype.kind != "f" and not np.array_equal(cast, values):
        raise ValueError(f"{values.dtype} values that {dtype} cannot hold")
    return cast
