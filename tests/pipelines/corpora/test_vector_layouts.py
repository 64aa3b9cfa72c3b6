"""Which arrays are the vectors, which their labels, and which split a file's name says."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch

from pipelines.corpora import NOT_TEST
from pipelines.errors import Refused
from tests.pipelines.corpora.vector_rows import read

RANDOM = np.random.default_rng(6)


def rows(count: int, dim: int = 4) -> np.ndarray:
    return RANDOM.standard_normal((count, dim)).astype(np.float32)


def put(folder: Path, **arrays: Any) -> None:
    """Each array as a .npy file; `__` in a name is a folder."""
    for name, array in arrays.items():
        path = folder / f"{name.replace('__', '/')}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)


# Labels


@pytest.mark.parametrize(
    ("vectors", "labels"),
    [("x", "y"), ("embeddings", "labels"), ("digits", "digits_labels"), ("digits", "labels"), ("X_train", "y_train")],
)
def test_labels_beside_a_file(vectors: str, labels: str, tmp_path: Path) -> None:
    put(tmp_path, **{vectors: rows(6), labels: np.arange(6)})
    found = read(tmp_path)
    assert found.labels == [0, 1, 2, 3, 4, 5]
    assert found.survey.ignored == {}
    assert read(tmp_path, label=None).labels == [-1] * 6


def test_each_file_of_a_folder_has_its_own_labels(tmp_path: Path) -> None:
    put(tmp_path, a=rows(2), b=rows(3), a_labels=[5, 6], b_labels=[7, 8, 9], c__x=rows(1), c__y=[4])
    assert read(tmp_path).labels == [5, 6, 7, 8, 9, 4]


def test_labels_that_could_belong_to_any_are_left_and_said(tmp_path: Path) -> None:
    put(tmp_path, a=rows(2), b=rows(3), labels=[1, 2])
    found = read(tmp_path)
    assert found.labels == [-1] * 5
    assert found.survey.ignored == {"labels that belong to no one file of vectors": 1}


def test_labels_of_samples_and_of_positions(tmp_path: Path) -> None:
    put(tmp_path, x=RANDOM.standard_normal((2, 3, 4)), y=[7, 8])
    assert read(tmp_path).labels == [7, 7, 7, 8, 8, 8]
    assert read(tmp_path, rows="samples").labels == [7, 8]
    put(tmp_path, y=np.arange(6).reshape(2, 3))
    assert read(tmp_path, label="y").labels == [0, 1, 2, 3, 4, 5]
    with pytest.raises(Refused, match=r"labels in y\.npy do not belong to x\.npy"):
        read(tmp_path, label="y", rows="samples")


@pytest.mark.parametrize("kind", ["npz", "deflated", "pt", "safetensors"])
def test_labels_in_the_same_file(kind: str, tmp_path: Path) -> None:
    x, y = rows(5), np.arange(5)
    if kind == "npz":
        np.savez(tmp_path / "a.npz", features=x, labels=y)
    elif kind == "deflated":
        np.savez_compressed(tmp_path / "a.npz", features=x, labels=y)
    elif kind == "pt":
        torch.save({"features": torch.from_numpy(x), "labels": torch.from_numpy(y)}, tmp_path / "a.pt")
    else:
        safetensors.numpy.save_file({"features": x, "labels": y}, tmp_path / "a.safetensors")
    found = read(tmp_path)
    assert np.array_equal(found.values, x)
    assert found.labels == [0, 1, 2, 3, 4]


def test_a_label_column_of_parquet_may_have_gaps(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array(list(rows(4))), "label": pa.array([3, None, 0, 1]), "name": ["a", "b", "c", "d"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert read(tmp_path).labels == [3, -1, 0, 1]


def test_a_label_by_name(tmp_path: Path) -> None:
    put(tmp_path, x=rows(3), speaker=[4.0, 5.0, 6.0])
    assert read(tmp_path, label="speaker").labels == [4, 5, 6]
    with pytest.raises(Refused, match=r"label=singer was given, but no file of vectors has"):
        read(tmp_path, label="singer")


def test_labels_that_are_not_as_many_are_refused_naming_both(tmp_path: Path) -> None:
    put(tmp_path, x=rows(3), y=[1, 2])
    with pytest.raises(Refused, match=r"labels in y\.npy do not belong to x\.npy: they are \[2\] for \[3, 4\]"):
        read(tmp_path)


def test_labels_that_are_no_class_numbers_cost_their_rows_only(tmp_path: Path) -> None:
    put(tmp_path, x=rows(5), score=[1.0, 0.5, np.nan, np.inf, 2.0**31])
    found = read(tmp_path, label="score")
    assert found.labels == [1, -1]
    assert found.reasons == ["its label is no whole number that int32 holds"] * 3


# Splits


def test_files_named_after_splits_are_official(tmp_path: Path) -> None:
    put(tmp_path, train=rows(2), val_embeddings=rows(1), xTest=rows(3))
    assert read(tmp_path).splits == ["train", "train", "valid", "test", "test", "test"]


def test_folders_named_after_splits_are_official(tmp_path: Path) -> None:
    put(tmp_path, Train__a=rows(1), validation__a=rows(1), test__a=rows(1))
    assert read(tmp_path).splits == ["train", "test", "valid"]


def test_keys_named_after_splits_are_one_corpus(tmp_path: Path) -> None:
    """As Keras writes mnist.npz."""
    x, more = rows(3), rows(2)
    np.savez(tmp_path / "digits.npz", x_train=x, y_train=[1, 2, 3], x_test=more, y_test=[4, 5])
    found = read(tmp_path)
    assert np.array_equal(found.values, np.concatenate([more, x]))
    assert found.labels == [4, 5, 1, 2, 3]
    assert found.splits == ["test", "test", NOT_TEST, NOT_TEST, NOT_TEST]
    assert found.rows[0].group == "digits.npz/x_test/0"


def test_a_lone_train_file_is_cut_by_the_hash(tmp_path: Path) -> None:
    put(tmp_path, train=rows(2))
    assert read(tmp_path).splits == [None, None]


def test_one_file_without_a_split_makes_none_official(tmp_path: Path) -> None:
    put(tmp_path, train=rows(1), test=rows(1), more=rows(1), contest_trainer=rows(1))
    assert read(tmp_path).splits == [None] * 4


# Which array


def test_the_only_floats_of_several_axes_are_the_vectors(tmp_path: Path) -> None:
    w = rows(3)
    np.savez(tmp_path / "a.npz", w=w, w_avg=np.zeros(4), tokens=np.zeros((3, 9), int), names=np.array(["a", "b", "c"]))
    assert np.array_equal(read(tmp_path).values, w)


def test_several_that_could_be_it_are_refused_with_what_there_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", z=rows(3), w=rows(3, 6))
    with pytest.raises(Refused, match=r"a\.npz could be the vectors: z \[3, 4\] <f4, w \[3, 6\] <f4\. Set key="):
        read(tmp_path)
    assert read(tmp_path, key="w").settings.dim == 6
    with pytest.raises(Refused, match=r"a\.npz has no array 'v'; there are: z .*, w "):
        read(tmp_path, key="v")


def test_splits_of_different_things_are_not_one_corpus(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", z_train=rows(3), w_test=rows(2))
    with pytest.raises(Refused, match="could be the vectors"):
        read(tmp_path)


def test_a_key_of_nested_dicts_and_of_columns(tmp_path: Path) -> None:
    torch.save({"g": {"w": torch.ones(2, 3), "z": torch.zeros(2, 5)}}, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt", key="g.w").values.sum() == 6
    table = pa.table({"a": pa.array([[1.0, 2.0]]), "b": pa.array([[3.0, 4.0]])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", key="b").values.tolist() == [[3, 4]]


def test_arrow_tensors_in_parquet_keep_their_shape(tmp_path: Path) -> None:
    cube = RANDOM.standard_normal((5, 2, 3)).astype(np.float32)
    column = pa.ExtensionArray.from_storage(
        kind := pa.fixed_shape_tensor(pa.float32(), (2, 3)),
        pa.FixedSizeListArray.from_arrays(pa.array(cube.reshape(-1)), type=kind.storage_type),
    )
    pq.write_table(pa.table({"w": column, "label": np.arange(5)}), tmp_path / "a.parquet", row_group_size=2)
    found = read(tmp_path)
    assert np.array_equal(found.values, cube.reshape(10, 3))
    assert found.labels == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert np.array_equal(read(tmp_path, rows="samples").values, cube)


def test_other_files_are_left_and_said(tmp_path: Path) -> None:
    put(tmp_path, x=rows(2), ids=[8, 9], none=rows(0))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".cache.npy").write_bytes(b"x")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "ids.parquet")
    np.savez(tmp_path / "names.npz", names=np.float32(1))
    found = read(tmp_path)
    assert len(found.rows) == 2
    assert found.survey.ignored == {
        "not a file of vectors (.txt)": 1,
        "hidden file": 1,
        ".parquet file without vectors": 1,
        ".npz file without vectors": 1,
        "array of one axis beside arrays of vectors": 1,
        "array without rows": 1,
    }


def test_several_sources_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path, one__x=rows(2), two__x=rows(1))
    names = [row.group for row in read(tmp_path / "two", tmp_path / "one").rows]
    assert names == ["one/x.npy/0", "one/x.npy/1", "two/x.npy/0"]
