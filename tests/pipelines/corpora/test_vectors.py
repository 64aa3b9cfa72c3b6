"""Vectors: every format gives the numbers that its own library reads, whatever the order of bytes, axes and slices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from pipelines import ingest, storage
from pipelines.corpora import _vector_cuts, _vector_raw, _vector_tables, _vector_torch, _vector_zips, vectors
from pipelines.corpora.vectors import VectorSettings
from pipelines.errors import Refused
from pipelines.shards import ShardReader
from tests.pipelines.corpora.vector_rows import read

RANDOM = np.random.default_rng(5)
DATA = RANDOM.standard_normal((23, 6)).astype(np.float32)


def save_npy(path: Path, x: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), x)
    return path.with_suffix(".npy")


def save_npz(path: Path, x: np.ndarray) -> Path:
    np.savez(path.with_suffix(".npz"), x=x)
    return path.with_suffix(".npz")


def save_deflated(path: Path, x: np.ndarray) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), x=x)
    return path.with_suffix(".npz")


def save_pt(path: Path, x: np.ndarray) -> Path:
    torch.save(torch.from_numpy(x.copy()), path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def save_pt_dict(path: Path, x: np.ndarray) -> Path:
    torch.save({"run": {"latents": torch.from_numpy(x.copy())}, "step": 3}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def save_safetensors(path: Path, x: np.ndarray) -> Path:
    other = {"a_bias": torch.zeros(7), "x": torch.from_numpy(x.copy()), "z_ids": torch.arange(9)}
    safetensors.torch.save_file(other, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def save_lists(path: Path, x: np.ndarray) -> Path:
    table = pa.table({"id": pa.array(np.arange(len(x))), "x": pa.array(list(x))})
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=7)
    return path.with_suffix(".parquet")


def save_fixed_lists(path: Path, x: np.ndarray) -> Path:
    flat = pa.array(x.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    pq.write_table(pa.table({"x": lists}), path.with_suffix(".parquet"), row_group_size=5)
    return path.with_suffix(".parquet")


SAVERS = [save_npy, save_npz, save_deflated, save_pt, save_pt_dict, save_safetensors, save_lists, save_fixed_lists]
Saver = Callable[[Path, np.ndarray], Path]


@pytest.fixture(params=["one slice", "many slices"])
def slicing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits small enough that these tiny arrays are cut, and read a few samples at a time."""
    if request.param == "many slices":
        for module in (_vector_cuts, _vector_raw, _vector_tables, _vector_torch, _vector_zips):
            for name in ("SLICE_BYTES", "WHOLE_BYTES", "CHUNK_BYTES"):
                monkeypatch.setattr(module, name, {"CHUNK_BYTES": 64}.get(name, 256), raising=False)


@pytest.mark.usefixtures("slicing")
@pytest.mark.parametrize("save", SAVERS)
def test_every_format_gives_its_numbers_in_order(save: Saver, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = read(save(tmp_path / "a", DATA))
    assert np.array_equal(found.values, DATA)
    assert (len(found.survey.slices) > 1) == ("many" in request.node.name or "lists" in request.node.name)
    assert found.settings.dim == 6
    assert found.labels == [-1] * len(DATA)
    assert found.fingerprints == [row.tobytes() for row in DATA]
    assert len({row.group for row in found.rows}) == len(DATA)


@pytest.mark.usefixtures("slicing")
@pytest.mark.parametrize("save", SAVERS)
def test_units_left_out_change_nothing_in_the_others(save: Saver, tmp_path: Path) -> None:
    source = save(tmp_path / "a", DATA)
    some = read(source, wanted=lambda unit: unit % 5 == 3)
    survey = vectors.survey([str(source)], VectorSettings())
    taken = [piece.start + unit for piece in survey.slices for unit in range(3, piece.stop - piece.start, 5)]
    assert np.array_equal(some.values, DATA[taken]) if taken else not some.rows
    assert read(source, wanted=lambda unit: False).units == []


@pytest.mark.usefixtures("slicing")
@pytest.mark.parametrize("save", [save_npy, save_npz, save_deflated])
def test_fortran_order_is_no_other_array(save: Saver, tmp_path: Path) -> None:
    cube = RANDOM.standard_normal((11, 3, 4))
    flat = read(save(tmp_path / "a", np.asfortranarray(DATA)))
    assert np.array_equal(flat.values, DATA)
    deep = read(save(tmp_path / "b", np.asfortranarray(cube)), rows="samples")
    assert np.array_equal(deep.values, cube.astype(np.float32))


@pytest.mark.parametrize("dtype", [">f8", "<f8", ">f4", ">f2", "<f2", ">i4", "<i8", "<u2", "|i1", "|b1"])
def test_any_number_type_becomes_the_float_of_the_same_value(dtype: str, tmp_path: Path) -> None:
    values = (RANDOM.standard_normal((9, 4)) * 50).astype(dtype)
    expected = values.astype(np.float64).astype(np.float32)
    assert np.array_equal(read(save_npy(tmp_path / "a", values)).values, expected)
    assert np.array_equal(read(save_deflated(tmp_path / "a", values)).values, expected)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int16, torch.uint8, torch.bool])
def test_tensors_of_any_number_type(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    values = (torch.randn(9, 4, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    if kind == "pt":
        torch.save(values, tmp_path / "a.pt")
    else:
        safetensors.torch.save_file({"x": values}, tmp_path / "a.safetensors")
    assert np.array_equal(read(tmp_path / f"a.{kind}").values, values.to(torch.float32).numpy())


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_stored_types_round_as_torch_does_and_come_back_as_tensors(stored: str, tmp_path: Path) -> None:
    wide = RANDOM.standard_normal((40, 5)) * 1000
    found = read(save_npy(tmp_path / "a", wide), dtype=stored)
    expected = torch.from_numpy(wide.astype(np.float32)).to(getattr(torch, stored))
    columns = {"vector": found.values, "label": np.array(found.labels, np.int32)}
    seen = vectors.tensors(columns, found.settings)
    assert seen["vector"].dtype == getattr(torch, stored)
    assert torch.equal(seen["vector"], expected)
    assert seen["label"].tolist() == [-1] * 40
    assert vectors.shapes(found.settings) == {"vector": [5]}
    field = vectors.schema(found.settings).field("vector")
    assert (field.metadata == {b"dtype": b"bfloat16"}) == (stored == "bfloat16")


def test_a_slice_of_a_tensor_that_is_no_run_of_bytes(tmp_path: Path) -> None:
    """Transposed and expanded tensors keep their strides in the file."""
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    torch.save(whole.T, tmp_path / "t.pt")
    assert np.array_equal(read(tmp_path / "t.pt").values, whole.T.numpy())
    torch.save(whole[:, None].expand(6, 3, 8), tmp_path / "t.pt")
    assert np.array_equal(read(tmp_path / "t.pt").values, whole.repeat_interleave(3, 0).numpy())


def test_every_format_from_a_store(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for n, save in enumerate([*SAVERS, lambda path, x: save_npy(path, np.asfortranarray(x))]):
        save(tmp_path / f"files/{n}", DATA)
    np.save(tmp_path / "files/8_labels.npy", np.arange(len(DATA)))
    for path in (tmp_path / "files").iterdir():
        storage.upload(path, f"{bucket}/raw/{path.name}")
    found = read(f"{bucket}/raw")
    assert np.array_equal(found.values, np.tile(DATA, (9, 1)))
    assert found.labels == [-1] * 8 * len(DATA) + [*range(len(DATA))]


# What a row is


CUBE = RANDOM.standard_normal((5, 3, 4)).astype(np.float32)


def test_vectors_of_one_sample_are_rows_of_one_group(tmp_path: Path) -> None:
    """All L vectors of a sample go to the same split, or a test row would have its like in train."""
    found = read(save_npy(tmp_path / "w", CUBE))
    assert np.array_equal(found.values, CUBE.reshape(15, 4))
    assert [row.group for row in found.rows] == [f"w.npy/{n}" for n in range(5) for _ in range(3)]


def test_samples_as_rows_keep_their_positions(tmp_path: Path) -> None:
    found = read(save_npy(tmp_path / "w", CUBE), rows="samples")
    assert np.array_equal(found.values, CUBE)
    assert vectors.shapes(found.settings) == {"vector": [3, 4]}
    flat = read(save_npy(tmp_path / "flat", DATA), rows="samples")
    assert flat.values.shape == DATA.shape


def test_one_position_of_each_sample(tmp_path: Path) -> None:
    source = save_npy(tmp_path / "w", CUBE)
    assert np.array_equal(read(source, position=1).values, CUBE[:, 1])
    assert np.array_equal(read(source, position=1, rows="samples").values, CUBE[:, 1])
    with pytest.raises(Refused, match=r"position=3 .* \[5, 3, 4\]: 3 vectors a sample, numbered 0 to 2"):
        read(source, position=3)


@pytest.mark.parametrize("axis", [1, -3])
def test_maps_with_channels_first(axis: int, tmp_path: Path) -> None:
    maps = RANDOM.standard_normal((4, 5, 2, 3)).astype(np.float32)
    found = read(save_npy(tmp_path / "m", maps), axis=axis)
    assert np.array_equal(found.values, maps.transpose(0, 2, 3, 1).reshape(24, 5))
    with pytest.raises(Refused, match=r"axis=4 .* \[4, 5, 2, 3\]: allowed are 1 to 3"):
        read(tmp_path / "m.npy", axis=4)


def test_one_vector_a_file(tmp_path: Path) -> None:
    for n in range(4):
        np.save(tmp_path / f"{n}.npy", DATA[n])
        torch.save(torch.from_numpy(DATA[n + 4]), tmp_path / f"{n + 4}.pt")
    assert np.array_equal(read(tmp_path).values, DATA[:8])


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"axis": 0},
        {"dtype": "float8"},
        {"generator": "dcgan"},
        {"samples": 5},
        {"generator": "biggan", "samples": 5},
        {"position": -1},
        {"colour": "grey"},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        VectorSettings(**wrong)


def test_the_size_of_a_bundle_holds_for_new_data(tmp_path: Path) -> None:
    source = save_npy(tmp_path / "a", DATA)
    assert read(source, dim=6).values.shape == DATA.shape
    with pytest.raises(Refused, match=r"a\.npy holds vectors of 6, but 7 was asked for"):
        read(source, dim=7)
    with pytest.raises(ValueError, match="not known"):
        vectors.schema(VectorSettings())


def test_written_files_hold_the_vectors(tmp_path: Path) -> None:
    rows = torch.randn(2, 3)
    vectors.write_files({"vector": rows}, ["a", "b"], str(tmp_path), VectorSettings())
    assert np.array_equal(np.load(tmp_path / "b.npy"), rows[1].numpy())
    vectors.write_files({"vector": rows.bfloat16()}, ["c", "d"], str(tmp_path), VectorSettings(dtype="bfloat16"))
    assert np.array_equal(np.load(tmp_path / "d.npy"), rows[1].bfloat16().float().numpy())


# Through Ray


@pytest.mark.usefixtures("ray_instance")
def test_an_ingest_of_five_formats_keeps_what_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "LEAST_PART_BYTES", 1)
    source = tmp_path / "source"
    source.mkdir()
    for n, save in enumerate([save_npy, save_deflated, save_pt, save_safetensors, save_lists]):
        save(source / f"{n}", DATA)
    (source / "bad.npy").write_bytes(b"")
    done = ingest.ingest("vectors", [str(source)], str(tmp_path / "out"), settings=VectorSettings(dtype="float16"))
    assert (done.rows, done.quarantined, done.filtered) == (5 * len(DATA), 1, {})
    reader = ShardReader(str(tmp_path / "out"))
    assert reader.manifest.settings["dim"] == 6
    taken = reader.take("all", np.arange(done.rows))
    values = taken.column("vector").to_numpy_ndarray()
    assert np.array_equal(values, np.tile(DATA, (5, 1)).astype(np.float16))
    again = ingest.ingest("vectors", [str(source)], str(tmp_path / "out"), settings=VectorSettings(dtype="float16"))
    assert (again.skipped, again.digest) == (True, done.digest)
    other = ingest.ingest("vectors", [str(source)], str(tmp_path / "other"), settings=VectorSettings(dtype="float16"))
    assert other.digest == done.digest
