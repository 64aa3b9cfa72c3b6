"""Shards: what is written is what is read, by any ordinals; damage is found and named; bytes repeat."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines import shards, storage
from pipelines.columns import batch_of, to_tensor, values_of
from pipelines.errors import Failed, Refused
from pipelines.manifest import SPLITS, Manifest, Units, describe, save_manifest
from pipelines.shards import ROWS_PER_PART, ShardReader, ShardWriter, split_of

SCHEMA = pa.schema(
    {
        "vector": pa.fixed_shape_tensor(pa.float16(), (2, 3)),
        "label": pa.int32(),
        "score": pa.float64(),
        "text": pa.string(),
        "ragged": pa.list_(pa.float32()),
    }
)


def row(n: int) -> dict:
    return {
        "vector": np.arange(6, dtype=np.float16).reshape(2, 3) + n,
        "label": n,
        "score": None if n % 5 == 0 else n / 2,
        "text": f"row {n}",
        "ragged": np.full(n % 4, n, np.float32),
    }


def write(uri: str, parts: Sequence[Sequence[int]], target_bytes: int = 600) -> Manifest:
    """Row n of the test's data at every place; splits by n % 10."""
    records = []
    for part, numbers in enumerate(parts):
        with ShardWriter(uri, part, SCHEMA, target_bytes) as writer:
            for first in range(0, len(numbers), 4):
                some = numbers[first : first + 4]
                splits = np.array([1 if n % 10 == 1 else 2 if n % 10 == 2 else 0 for n in some], np.int8)
                writer.write(batch_of([row(n) for n in some], SCHEMA), splits)
        records += writer.records
    rows = sum(record.rows for record in records)
    manifest = Manifest("test", {}, {}, describe(SCHEMA), tuple(records), Units(rows, rows, 0, {}), sources="")
    save_manifest(manifest, uri)
    return manifest


def labels_of(split: str, parts: Sequence[Sequence[int]]) -> list[int]:
    wanted = {"train": lambda n: n % 10 not in (1, 2), "valid": lambda n: n % 10 == 1, "test": lambda n: n % 10 == 2}
    return [n for part in parts for n in part if split == "all" or wanted[split](n)]


PARTS = [range(37), range(100, 101), range(40, 90)]


@pytest.mark.parametrize("split", [*SPLITS, "all"])
def test_any_rows_of_a_split_are_read_in_the_order_asked_for(split: str, tmp_path: Path) -> None:
    manifest = write(str(tmp_path), PARTS)
    assert len(manifest.shards) > 5
    reader = ShardReader(str(tmp_path))
    labels = labels_of(split, PARTS)
    assert reader.rows(split) == len(labels)
    ordinals = np.random.default_rng(0).integers(0, len(labels), 200)
    for asked in (ordinals, np.sort(ordinals), np.arange(len(labels)), ordinals[:1], ordinals[:0]):
        taken = reader.take(split, asked)
        expected = [row(labels[n]) for n in asked]
        assert taken.schema.names == ["row_id", "split", *SCHEMA.names]
        assert taken.column("label").to_pylist() == [item["label"] for item in expected]
        assert taken.column("text").to_pylist() == [item["text"] for item in expected]
        assert taken.column("score").to_pylist() == [item["score"] for item in expected]
        assert taken.column("ragged").to_pylist() == [item["ragged"].tolist() for item in expected]
        vectors = to_tensor(taken.column("vector")).numpy()
        assert vectors.dtype == np.float16
        assert np.array_equal(vectors, np.array([item["vector"] for item in expected], np.float16).reshape(-1, 2, 3))
        stored, direct = values_of(taken), reader.values(split, asked)
        assert list(stored) == list(direct)
        for name, column in stored.items():
            assert type(column) is type(direct[name])
            assert pa.array(list(column)).equals(pa.array(list(direct[name]))) if name != "vector" else True
        assert np.array_equal(stored["vector"], direct["vector"])
        assert stored["vector"].dtype == direct["vector"].dtype
        if split != "all":
            assert set(taken.column("split").to_pylist()) <= {SPLITS.index(split)}


def test_row_ids_are_part_times_2_to_28_plus_index(tmp_path: Path) -> None:
    write(str(tmp_path), PARTS)
    ids = ShardReader(str(tmp_path)).take("all", np.arange(88)).column("row_id").to_pylist()
    assert ids == [part * 2**28 + index for part, numbers in enumerate(PARTS) for index in range(len(numbers))]


def test_row_ids_of_rows_made_from_rows_are_kept(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), 3, SCHEMA) as writer:
        writer.write(batch_of([row(1), row(2)], SCHEMA), np.zeros(2, np.int8), np.array([77, 5]))
    with pa.ipc.open_file(str(tmp_path / writer.records[0].name)) as file:
        assert file.get_batch(0).column("row_id").to_pylist() == [77, 5]


def test_a_part_with_too_many_rows_is_refused_before_ids_collide(tmp_path: Path) -> None:
    writer = ShardWriter(str(tmp_path), 3, SCHEMA)
    writer.rows = ROWS_PER_PART - 1
    writer.write(batch_of([row(1)], SCHEMA), np.zeros(1, np.int8))
    with pytest.raises(Failed, match="part 3 has more than 268435456 rows"):
        writer.write(batch_of([row(1)], SCHEMA), np.zeros(1, np.int8))


def test_the_same_rows_make_the_same_bytes_and_records_tell_the_truth(tmp_path: Path) -> None:
    one, two = (write(str(tmp_path / name), PARTS) for name in ("one", "two"))
    assert one == two
    for record in one.shards:
        data = (tmp_path / "one" / record.name).read_bytes()
        assert (record.bytes, record.sha256) == (len(data), storage.sha256_of_bytes(data))
        assert record.rows == sum(record.splits.values())
        assert record.bytes < 600 + 3000


def test_shards_can_be_read_without_this_project(tmp_path: Path) -> None:
    write(str(tmp_path), PARTS, target_bytes=10**9)
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard-00000-000.arrow"))).read_all()
    assert table.column("vector").combine_chunks().to_numpy_ndarray().shape == (37, 2, 3)


def test_batches_walk_a_shard_in_order(tmp_path: Path) -> None:
    manifest = write(str(tmp_path), PARTS)
    reader = ShardReader(str(tmp_path))
    for split in ("all", "train", "valid"):
        batches = [batch for shard in range(len(manifest.shards)) for batch in reader.batches(shard, 3, split)]
        assert max(batch.num_rows for batch in batches) == (3 if split != "valid" else 1)
        assert [n for batch in batches for n in batch.column("label").to_pylist()] == labels_of(split, PARTS)


def test_columns_can_be_chosen_and_results_may_be_written_to(tmp_path: Path) -> None:
    write(str(tmp_path), PARTS)
    reader = ShardReader(str(tmp_path))
    taken = reader.take("train", np.array([0, 1]), columns=["row_id", "vector"])
    assert taken.schema.names == ["row_id", "vector"]
    to_tensor(taken.column("vector")).zero_()
    assert to_tensor(reader.take("train", np.array([1])).column("vector")).sum() == torch.tensor(15 + 6 * 3)


@pytest.mark.parametrize("ordinals", [[-1], [0, 10_000]])
def test_ordinals_outside_the_split_are_an_error(ordinals: list[int], tmp_path: Path) -> None:
    write(str(tmp_path), PARTS)
    with pytest.raises(IndexError, match="of 88 rows in 'all'"):
        ShardReader(str(tmp_path)).take("all", np.array(ordinals))


def test_missing_and_cut_shards_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    manifest = write(str(tmp_path), PARTS)
    last = tmp_path / manifest.shards[-1].name
    data = last.read_bytes()
    last.write_bytes(data[:-1])
    with pytest.raises(Refused, match=f"{last.name} of {tmp_path} has {len(data) - 1} bytes instead of {len(data)}"):
        ShardReader(str(tmp_path))
    last.unlink()
    with pytest.raises(Refused, match=f"{last.name} of {tmp_path} is missing"):
        ShardReader(str(tmp_path))


def test_a_flipped_byte_is_found_at_the_first_touch_and_only_there(tmp_path: Path) -> None:
    manifest = write(str(tmp_path), PARTS)
    victim = tmp_path / manifest.shards[1].name
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    reader = ShardReader(str(tmp_path))
    reader.take("all", np.arange(manifest.shards[0].rows))
    with pytest.raises(Failed, match=f"{victim}.*it is damaged"):
        reader.take("all", np.array([manifest.shards[0].rows]))


def test_each_shard_is_hashed_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(str(tmp_path), PARTS)
    hashed = []
    hash_file = storage.sha256_of_file
    monkeypatch.setattr(storage, "sha256_of_file", lambda path: hashed.append(str(path)) or hash_file(path))
    for _ in range(2):
        ShardReader(str(tmp_path)).take("all", np.arange(88))
    assert sorted(hashed) == sorted(str(tmp_path / shard.name) for shard in manifest.shards)


def test_an_interrupted_shard_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(str(tmp_path), 0, SCHEMA)
    writer.write(batch_of([row(1)], SCHEMA), np.zeros(1, np.int8))
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(Failed, match=r"shard-00000-000\.arrow: disk full"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("vector", np.zeros((3, 2)), r"'vector'.*shape \(3, 2\), not \(2, 3\)"),
        ("vector", np.full((2, 3), 1e9), "'vector'.*overflow"),
        ("vector", [["a"] * 3] * 2, "'vector'"),
        ("label", 2**40, "'label'"),
        ("label", "seven", "'label'"),
        ("text", 7, "'text'"),
    ],
)
def test_a_value_that_does_not_fit_is_named_by_its_column(name: str, value: object, words: str) -> None:
    with pytest.raises(Failed, match=words):
        batch_of([row(1), {**row(1), name: value}], SCHEMA)


def test_whole_numbers_are_never_changed_by_storing_them() -> None:
    schema = pa.schema({"x": pa.fixed_shape_tensor(pa.uint8(), (2,))})
    assert to_tensor(batch_of([{"x": np.array([0.0, 255.0])}], schema).column("x")).tolist() == [[0, 255]]
    for value in ([0, 256], [-1, 0], [0.5, 0]):
        with pytest.raises(Failed, match="'x'"):
            batch_of([{"x": np.array(value)}], schema)


def test_corpora_may_not_take_the_platforms_columns(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"\['row_id'\] are the platform's own"):
        ShardWriter(str(tmp_path), 0, pa.schema({"row_id": pa.int64()}))


def test_splits_are_a_function_of_the_group_in_the_right_shares() -> None:
    splits = [split_of(f"group {n}", 0.1) for n in range(20_000)]
    assert splits == [split_of(f"group {n}", 0.1) for n in range(20_000)]
    shares = [splits.count(split) / 20_000 for split in SPLITS]
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.01)  # 5 standard deviations
    assert {split_of(f"group {n}", 0.0) for n in range(1000)} == {"train"}
    # A larger holdout only takes rows from train.
    assert all(split_of(f"group {n}", 0.2) == "valid" for n in range(2000) if splits[n] == "valid")
    for holdout in (-0.1, 0.5, 1.0):
        with pytest.raises(Refused, match=r"0 <= holdout < 0\.5"):
            shards.check_holdout(holdout)


def test_shards_on_s3_are_written_listed_and_read(bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/deep/shards"
    assert write(uri, PARTS) == write(str(tmp_path), PARTS)
    taken = ShardReader(uri).take("train", np.arange(70)[::-1])
    assert taken.equals(ShardReader(str(tmp_path)).take("train", np.arange(70)[::-1]))
    storage.remove(storage.join(uri, "shard-00001-000.arrow"))
    with pytest.raises(Refused, match=r"shard-00001-000\.arrow of s3://.*is missing"):
        ShardReader(uri)
