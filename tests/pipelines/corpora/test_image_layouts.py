"""The layouts images come in: labels, official splits, slices, and archives that are cut off or hostile."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from pipelines import storage
from pipelines.corpora import NOT_TEST, Bad, Row, Survey, _image_tables, _tars, images
from pipelines.corpora.images import ImageSettings
from pipelines.errors import Refused

SETTINGS = ImageSettings(size=4)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), shade).save(file, "PNG")
    return file.getvalue()


def put(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(shade))


def surveyed(*sources: Path) -> Survey:
    survey = images.survey([str(source) for source in sources], SETTINGS)
    json.dumps([survey.context, survey.ignored, [piece.meta for piece in survey.slices]])
    return survey


def everything(survey: Survey) -> list[Row | Bad]:
    found = []
    for piece in survey.slices:
        units = list(images.read(piece, survey.context, SETTINGS, lambda _: True))
        assert [unit for unit, _, _ in units] == list(range(piece.stop - piece.start))
        found += [one for _, one, _ in units]
    return found


def rows(survey: Survey) -> list[Row]:
    found = everything(survey)
    assert all(isinstance(one, Row) for one in found), found
    return [one for one in found if isinstance(one, Row)]


def shades(found: list[Row]) -> list[int]:
    return [int(row.values["image"][0, 0, 0]) for row in found]


def labels(found: list[Row]) -> dict[str, int]:
    return {row.values["name"]: row.values["label"] for row in found}


# Folders


def test_the_class_is_the_folder_also_a_nested_one(tmp_path: Path) -> None:
    for name in ("cat/b.png", "cat/a.png", "dog/big/c.png", "ant/d.PNG"):
        put(tmp_path / name)
    survey = surveyed(tmp_path)
    assert survey.context["classes"] == ["ant", "cat", "dog/big"]
    assert labels(rows(survey)) == {"ant/d.PNG": 0, "cat/a.png": 1, "cat/b.png": 1, "dog/big/c.png": 2}
    assert [piece.name for piece in survey.slices] == sorted(piece.name for piece in survey.slices)


def test_a_flat_folder_and_a_single_file_have_no_labels(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "b.jpg.png")
    assert labels(rows(surveyed(tmp_path))) == {"a.png": -1, "b.jpg.png": -1}
    assert labels(rows(surveyed(tmp_path / "a.png"))) == {"a.png": -1}


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "valid", "test"), ("train", "valid", "test")),
        (("train", "val"), ("train", "valid")),
        (("Train", "validation"), ("train", "valid")),
        (("train", "test"), (NOT_TEST, "test")),
        (("train",), (None,)),
        (("test",), ("test",)),
    ],
)
def test_split_folders_on_top_are_the_official_splits(
    tmp_path: Path, folders: tuple[str, ...], splits: tuple[str | None, ...]
) -> None:
    for folder in folders:
        put(tmp_path / folder / "cat" / "1.png")
        put(tmp_path / folder / "dog" / "1.png")
    survey = surveyed(tmp_path)
    assert survey.context["classes"] == ["cat", "dog"]
    assert {row.values["name"].split("/")[0]: row.split for row in rows(survey)} == dict(
        zip(folders, splits, strict=True)
    )


def test_one_other_folder_on_top_makes_them_plain_classes(tmp_path: Path) -> None:
    for name in ("train/a.png", "test/b.png", "extra/c.png"):
        put(tmp_path / name)
    survey = surveyed(tmp_path)
    assert survey.context["classes"] == ["extra", "test", "train"]
    assert {row.split for row in rows(survey)} == {None}


def test_several_sources_share_class_numbers_and_keep_names_apart(tmp_path: Path) -> None:
    for name in ("one/x/cat/a.png", "two/x/cat/a.png", "two/x/ant/b.png", "y/dog/a.png"):
        put(tmp_path / name)
    survey = surveyed(tmp_path / "one/x", tmp_path / "two/x", tmp_path / "y")
    assert survey.context["classes"] == ["ant", "cat", "dog"]
    assert labels(rows(survey)) == {"0-x/cat/a.png": 1, "1-x/ant/b.png": 0, "1-x/cat/a.png": 1, "y/dog/a.png": 2}


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(600 << 20)
    [bad] = everything(surveyed(tmp_path))
    assert isinstance(bad, Bad)
    assert "629,145,600 bytes" in bad.reason


# Oxford-102


def oxford(root: Path, count: int = 6) -> None:
    for number in range(1, count + 1):
        put(root / f"jpg/image_{number:05d}.jpg", number)
    scipy.io.savemat(root / "imagelabels.mat", {"labels": np.array([[77, 1, 2, 2, 102, 77]])})
    sets = {"trnid": np.array([[2, 3]]), "valid": np.array([[1]]), "tstid": np.array([[4, 5, 6]])}
    scipy.io.savemat(root / "setid.mat", sets)


def test_oxford_labels_and_splits(tmp_path: Path) -> None:
    oxford(tmp_path)
    (tmp_path / "jpg/notes.txt").write_text("x")
    survey = surveyed(tmp_path)
    found = rows(survey)
    assert [row.split for row in found] == ["valid", "train", "train", "test", "test", "test"]
    classes = survey.context["classes"]
    assert [classes[row.values["label"]] for row in found] == ["077", "001", "002", "002", "102", "077"]
    assert shades(found) == [1, 2, 3, 4, 5, 6]
    assert survey.ignored == {"not an image file (.txt)": 1}


def test_oxford_with_an_image_too_many_or_broken_tables_is_refused(tmp_path: Path) -> None:
    oxford(tmp_path, count=7)
    with pytest.raises(Refused, match=r"image_00007\.jpg .*has no label.*holds 6"):
        surveyed(tmp_path)
    (tmp_path / "setid.mat").write_bytes(b"not matlab")
    with pytest.raises(Refused, match=r"not as Oxford-102 has them"):
        surveyed(tmp_path)


# WebDataset tars


def tar_of(path: Path, members: list[tuple[str, bytes] | tarfile.TarInfo], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


def webdataset(count: int = 5) -> list[tuple[str, bytes] | tarfile.TarInfo]:
    members: list[tuple[str, bytes] | tarfile.TarInfo] = []
    for n in range(count):
        members += [(f"set/{n:03d}.png", png(10 * n)), (f"set/{n:03d}.cls", str(n % 3).encode())]
    return members


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
def test_members_of_one_key_are_one_example(tmp_path: Path, name: str, mode: str) -> None:
    tar_of(tmp_path / name, webdataset(), mode)
    found = rows(surveyed(tmp_path))
    assert labels(found) == {f"{name}/set/{n:03d}.png": n % 3 for n in range(5)}
    assert shades(found) == [0, 10, 20, 30, 40]
    assert found[0].group == f"{name}/set/000"


def test_json_labels_and_labels_before_their_image(tmp_path: Path) -> None:
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [
        ("a.json", b'{"label": 7}'),
        ("a.png", png(1)),
        ("b.png", png(2)),
        ("b.json", b'{"caption": "x"}'),
        ("c.png", png(3)),
        ("c.cls", b"cat"),
        ("d.txt", b"x"),
        ("._a.png", b"x"),
    ]
    tar_of(tmp_path / "x.tar", members)
    survey = surveyed(tmp_path / "x.tar")
    assert labels(rows(survey)) == {"x.tar/a.png": 7, "x.tar/b.png": -1, "x.tar/c.png": -1}
    assert survey.ignored == {"not an image file (.txt)": 1, "hidden file": 1}


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_large_tars_are_cut_into_slices_that_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    tar_of(tmp_path / name, webdataset(), mode)
    two = 2 * max(len(png(10 * n)) for n in range(5))
    monkeypatch.setattr(_tars, "SLICE_BYTES", two)
    monkeypatch.setattr(_tars, "COMPRESSED_SLICE_BYTES", two)
    survey = surveyed(tmp_path)
    assert [piece.stop - piece.start for piece in survey.slices] == [2, 2, 1]
    assert shades(rows(survey)) == [0, 10, 20, 30, 40]


def test_of_a_large_tar_the_survey_reads_little_more_than_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, count = 2**20, 40
    with (tmp_path / "x.tar").open("wb") as file:
        for n in range(count):
            info = tarfile.TarInfo(f"{n}.png")
            info.size = size
            file.seek(n * (size + 512))
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(count * (size + 512) + 1024)
    read: list[int] = []

    class Counting(io.FileIO):
        def readinto(self, buffer: memoryview) -> int:
            read.append(super().readinto(buffer))
            return read[-1]

    monkeypatch.setattr(_tars.storage, "open_read", lambda uri: io.BufferedReader(Counting(uri), 2**13))
    slices, _ = images.tars.of_tar(storage.list_files(str(tmp_path))[0], "")
    assert sum(piece.stop - piece.start for piece in slices) == count
    assert sum(read) < count * size / 16


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def test_hostile_members_are_reported_and_the_others_read(tmp_path: Path) -> None:
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [
        ("../climbs.png", png(1)),
        ("/absolute.png", png(2)),
        link("soft.png", tarfile.SYMTYPE),
        link("hard.png", tarfile.LNKTYPE),
        link("device.png", tarfile.CHRTYPE),
        link("pipe.png", tarfile.FIFOTYPE),
        ("good.png", png(9)),
    ]
    tar_of(tmp_path / "x.tar", members)
    found = everything(surveyed(tmp_path))
    assert [bad.reason for bad in found if isinstance(bad, Bad)] == ["its path climbs out of the archive"] * 2 + [
        "it is a link, a device or a sparse file, not plain data"
    ] * 4
    assert shades([row for row in found if isinstance(row, Row)]) == [9]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.55, 0.9])
def test_a_cut_off_tar_keeps_what_came_before_and_says_so(tmp_path: Path, keep: float, packed: bool) -> None:
    whole = tmp_path / "whole.tar"
    tar_of(whole, [(f"{n}.png", png(n)) for n in range(8)])
    data = whole.read_bytes()[: 8 * 1024]  # eight members of two blocks each, without the end mark
    cut = gzip.compress(data)[: int(keep * len(gzip.compress(data)))] if packed else data[: int(keep * len(data))]
    whole.unlink()
    (tmp_path / ("x.tar.gz" if packed else "x.tar")).write_bytes(cut)
    found = everything(surveyed(tmp_path))
    good = [row for row in found if isinstance(row, Row)]
    assert shades(good) == list(range(len(good)))
    last = found[-1]
    assert isinstance(last, Bad)
    assert "cut off" in last.reason


def test_a_tar_cut_between_two_members_is_noticed(tmp_path: Path) -> None:
    """tarfile itself ends there without a word."""
    tar_of(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(4)])
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: 2 * 1024])
    found = everything(surveyed(tmp_path))
    assert [type(one) for one in found] == [Row, Row, Bad]


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(4)])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[2 * 1024 + 150] ^= 0xFF
    (tmp_path / "x.tar").write_bytes(data)
    found = everything(surveyed(tmp_path))
    assert [type(one) for one in found] == [Row, Row, Bad]
    assert isinstance(found[-1], Bad)
    assert "damaged" in found[-1].reason


def test_a_label_that_fits_no_int32_is_dirt(tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", [("a.png", png(1)), ("a.cls", b"4294967296")])
    [bad] = everything(surveyed(tmp_path))
    assert isinstance(bad, Bad)
    assert "label 4294967296" in bad.reason


# IDX


def idx(path: Path, kind: str, arrays: np.ndarray, packed: bool = True) -> None:
    magic = 0x803 if arrays.ndim == 3 else 0x801
    data = struct.pack(f">{1 + arrays.ndim}I", magic, *arrays.shape) + arrays.astype(np.uint8).tobytes()
    (path / f"{kind}-ubyte{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)


def pictures(count: int) -> np.ndarray:
    return np.arange(count)[:, None, None] * np.ones((1, 4, 4), int)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_images_labels_and_the_official_test(tmp_path: Path, packed: bool) -> None:
    idx(tmp_path, "train-images-idx3", pictures(7), packed)
    idx(tmp_path, "train-labels-idx1", np.arange(7) + 1, packed)
    idx(tmp_path, "t10k-images-idx3", pictures(3), packed)
    idx(tmp_path, "t10k-labels-idx1", np.arange(3) + 5, packed)
    survey = surveyed(tmp_path)
    found = rows(survey)
    assert [row.split for row in found] == ["test"] * 3 + [NOT_TEST] * 7
    assert [row.values["label"] for row in found] == [5, 6, 7, 1, 2, 3, 4, 5, 6, 7]
    assert shades(found) == [0, 1, 2, *range(7)]
    assert survey.ignored == {}
    assert found[-1].values["name"].endswith("/6")


def test_a_single_idx_file_has_no_official_split(tmp_path: Path) -> None:
    idx(tmp_path, "t10k-images-idx3", pictures(2))
    assert [(row.split, row.values["label"]) for row in rows(surveyed(tmp_path))] == [(None, -1)] * 2


def test_idx_slices_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx(tmp_path, "train-images-idx3", pictures(7))
    idx(tmp_path, "train-labels-idx1", np.arange(7))
    monkeypatch.setattr(_image_tables, "IDX_ROWS", 3)
    survey = surveyed(tmp_path)
    assert [(piece.start, piece.stop) for piece in survey.slices] == [(0, 3), (3, 6), (6, 7)]
    found = rows(survey)
    assert shades(found) == [row.values["label"] for row in found] == list(range(7))


@pytest.mark.parametrize("packed", [True, False])
def test_a_cut_off_idx_keeps_what_came_before(tmp_path: Path, packed: bool) -> None:
    random = np.random.default_rng(0).integers(0, 256, (50, 4, 4))
    idx(tmp_path, "train-images-idx3", random, packed)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = everything(surveyed(tmp_path))
    kept = sum(isinstance(one, Row) for one in found)
    assert len(found) == 50
    assert 5 < kept < 30
    assert all(isinstance(one, Bad) and "cut off" in one.reason for one in found[kept:])


def test_cut_off_labels_cost_their_images(tmp_path: Path) -> None:
    idx(tmp_path, "train-images-idx3", pictures(6), packed=False)
    idx(tmp_path, "train-labels-idx1", np.arange(6), packed=False)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-2])
    found = everything(surveyed(tmp_path))
    assert [type(one) for one in found] == [Row] * 4 + [Bad] * 2


def test_labels_of_another_count_are_refused(tmp_path: Path) -> None:
    idx(tmp_path, "train-images-idx3", pictures(6))
    idx(tmp_path, "train-labels-idx1", np.arange(5))
    with pytest.raises(Refused, match=r"5 labels.*0x801 and 6"):
        surveyed(tmp_path)


def test_an_idx_header_that_lies_is_one_bad_unit(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 4_000_000_000, 28, 28))
    [bad] = everything(surveyed(tmp_path))
    assert isinstance(bad, Bad)
    assert "4,000,000,000 images" in bad.reason


# Parquet


@pytest.mark.parametrize("hub", [True, False], ids=["struct of bytes and path", "binary"])
def test_parquet_image_and_label_columns(tmp_path: Path, hub: bool) -> None:
    column: list[Any] = [{"bytes": png(n), "path": "x"} if hub else png(n) for n in range(10)]
    column[4] = {"bytes": None, "path": "x"} if hub else None
    pq.write_table(pa.table({"image": column, "label": range(10), "text": ["x"] * 10}), tmp_path / "a.parquet", 3)
    survey = surveyed(tmp_path)
    assert [(piece.start, piece.stop) for piece in survey.slices] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    found = everything(survey)
    assert isinstance(found[4], Bad)
    good = [row for row in found if isinstance(row, Row)]
    assert shades(good) == [row.values["label"] for row in good] == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_large_row_groups_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": [png(n) for n in range(200)]}), tmp_path / "a.parquet", use_dictionary=False)
    size = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).total_byte_size
    monkeypatch.setattr(_image_tables, "SLICE_BYTES", size // 3 + 1)
    survey = surveyed(tmp_path)
    assert [(piece.start, piece.stop) for piece in survey.slices] == [(0, 66), (66, 133), (133, 200)]
    assert shades(rows(survey)) == list(range(200))


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(n) for n in range(8)]}), path, 4, use_dictionary=False, compression="zstd")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = everything(surveyed(tmp_path))
    assert shades([row for row in found[:4] if isinstance(row, Row)]) == [0, 1, 2, 3]
    assert all(isinstance(one, Bad) for one in found[4:])
    assert len(found) == 8


def test_a_parquet_without_its_end_is_one_bad_unit(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(1)]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    put(tmp_path / "good.png")
    found = everything(surveyed(tmp_path))
    assert [type(one) for one in found] == [Row, Bad]


def test_parquet_without_images_is_counted_and_an_ambiguous_one_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    put(tmp_path / "good.png")
    assert surveyed(tmp_path).ignored == {"Parquet file without images": 1}
    pq.write_table(pa.table({"left": [b"x"], "right": [b"y"]}), tmp_path / "b.parquet")
    with pytest.raises(Refused, match="left, right"):
        surveyed(tmp_path)
