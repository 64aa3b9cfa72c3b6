"""Columns: what is put in comes out, ragged, missing or bfloat16, and what does not fit is named."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from pipelines.columns import (
    batch_of,
    bfloat16_bits,
    bfloat16_field,
    bfloat16_of,
    padded,
    ragged_field,
    tail_of,
    values_of,
)
from pipelines.errors import Failed
from pipelines.manifest import describe

DRAWN = np.random.default_rng(0)
LENGTHS = (3, 0, 5, 1)
BACKBONES = [DRAWN.normal(size=(length, 4, 3)).astype(np.float32) for length in LENGTHS]


def test_ragged_tensors_come_back_flat_in_row_major_order_and_are_padded_with_a_mask() -> None:
    schema = pa.schema([ragged_field("backbone", pa.float32(), (4, 3)), ragged_field("kind", pa.int8())])
    kinds = [list(range(length)) for length in LENGTHS]
    rows = [{"backbone": b, "kind": k} for b, k in zip(BACKBONES, kinds, strict=True)]
    stored = values_of(batch_of(rows, schema))
    assert [array.dtype for array in stored["backbone"] + stored["kind"]] == [np.float32] * 4 + [np.int8] * 4
    for array, backbone in zip(stored["backbone"], BACKBONES, strict=True):
        assert np.array_equal(array, backbone.ravel())
    values, mask = padded(stored["backbone"], (4, 3))
    assert values.shape == (4, 5, 4, 3)
    assert mask.sum(1).tolist() == list(LENGTHS)
    for row, (backbone, length) in enumerate(zip(BACKBONES, LENGTHS, strict=True)):
        assert np.array_equal(values[row, :length].numpy(), backbone)
        assert values[row, length:].abs().sum() == 0
        assert mask[row].tolist() == [n < length for n in range(5)]
    flat, mask = padded(stored["kind"])
    assert flat.dtype == torch.int8
    assert [row[here].tolist() for row, here in zip(flat, mask, strict=True)] == kinds


def test_values_may_be_flat_already_and_slices_of_a_batch_are_read_right() -> None:
    schema = pa.schema([ragged_field("backbone", pa.float32(), (4, 3))])
    whole = batch_of([{"backbone": backbone} for backbone in BACKBONES], schema)
    assert whole.equals(batch_of([{"backbone": backbone.ravel().tolist()} for backbone in BACKBONES], schema))
    middle = values_of(whole.slice(1, 2))["backbone"]
    assert [array.tolist() for array in middle] == [[], BACKBONES[2].ravel().tolist()]


def test_missing_values_stay_missing() -> None:
    schema = pa.schema([pa.field("label", pa.int8()), ragged_field("score", pa.float32()), pa.field("ok", pa.bool_())])
    rows = [{"label": 3, "score": None, "ok": True}, {"label": None, "score": [1.0, 2.0], "ok": False}]
    batch = batch_of(rows, schema)
    stored = values_of(batch)
    assert stored["label"] == [3, None]
    assert stored["score"][0] is None
    assert stored["score"][1].tolist() == [1.0, 2.0]
    assert stored["ok"].tolist() == [True, False]
    assert batch.column("score").to_pylist() == [None, [1.0, 2.0]]
    values, mask = padded(stored["score"])
    assert values.tolist() == [[0, 0], [1, 2]]
    assert mask.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("rows", [[], [None], [[]], [None, np.empty(0, np.float32)]])
def test_nothing_is_padded_to_nothing(rows: list) -> None:
    values, mask = padded(rows, (4, 3))
    assert values.shape == (len(rows), 0, 4, 3)
    assert mask.shape == (len(rows), 0)


def test_bfloat16_is_kept_as_its_bits_and_comes_back_to_the_bit(tmp_path) -> None:
    values = torch.tensor([[1.0, -2.5, 3e38], [float("inf"), 1e-40, 0.0]]).to(torch.bfloat16)
    field = bfloat16_field("hidden", (3,))
    batch = batch_of([{"hidden": bits} for bits in bfloat16_bits(values)], pa.schema([field]))
    assert torch.equal(bfloat16_of(values_of(batch)["hidden"]), values)
    column = describe(batch.schema)["hidden"]
    assert (column.type, column.shape) == ("bfloat16", (3,))
    parquet.write_table(pa.Table.from_batches([batch]), tmp_path / "x.parquet")
    read = parquet.read_table(tmp_path / "x.parquet")
    assert read.schema.field("hidden").metadata[b"dtype"] == b"bfloat16"
    assert read.column("hidden").to_pylist() == bfloat16_bits(values).tolist()


def test_the_shape_of_a_ragged_column_is_in_its_metadata() -> None:
    for tail in ((), (3,), (4, 3)):
        assert tail_of(ragged_field("x", pa.float32(), tail)) == tail
    assert ragged_field("x", pa.float32(), (4, 3)).metadata == {b"shape": b"[L, 4, 3]"}
    assert tail_of(pa.field("x", pa.list_(pa.float32()))) == ()
    assert tail_of(pa.field("x", pa.list_(pa.string()))) is None
    for said in ("[4, 3]", "[L, 0]", "L", "[L, L]"):
        with pytest.raises(ValueError, match="ragged"):
            tail_of(pa.field("x", pa.list_(pa.float32()), metadata={"shape": said}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\), not \('L', 4, 3\)"),
        (np.zeros(13), r"shape \(13,\)"),
        (np.float32(1), r"shape \(\)"),
        (np.full((1, 4, 3), 1e300), "overflow"),
        ([["a"]], "no numbers"),
        ("text", "no numbers"),
        ([1, None], "no numbers"),
    ],
)
def test_what_does_not_fit_a_ragged_column_is_named(value: object, words: str) -> None:
    schema = pa.schema([ragged_field("backbone", pa.float32(), (4, 3))])
    with pytest.raises(Failed, match=rf"column 'backbone'.*{words}"):
        batch_of([{"backbone": value}], schema)


def test_whole_numbers_in_lists_are_never_changed_by_storing_them() -> None:
    schema = pa.schema([ragged_field("x", pa.uint8())])
    assert batch_of([{"x": [0.0, 255]}], schema).column("x").to_pylist() == [[0, 255]]
    for value in ([256], [-1], [0.5], [np.nan]):
        with pytest.raises(Failed, match="'x'"):
            batch_of([{"x": value}], schema)
