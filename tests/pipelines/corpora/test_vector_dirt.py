"""Bad files of vectors: what they hold is never run, never believed unread, and never costs the good ones."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from pipelines.corpora import Bad, Slice, _vector_cuts, _vector_raw, vectors
from pipelines.corpora.vectors import VectorSettings
from pipelines.errors import Refused
from tests.pipelines.corpora.vector_rows import read

RANDOM = np.random.default_rng(7)
GOOD = RANDOM.standard_normal((8, 4)).astype(np.float32)


class Trap:
    """What runs when a pickle is loaded."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("sprung",)


@pytest.fixture(autouse=True)
def _traps_lie_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not (tmp_path / "here/sprung").exists()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with one good file, and room for bad ones."""
    (tmp_path / "source").mkdir()
    np.save(tmp_path / "source/good.npy", GOOD)
    return tmp_path / "source"


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text: str, version: bytes = b"\1\0") -> bytes:
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(padded)) + padded.encode()


BAD_NPY = {
    "the file is empty": b"",
    "not a .npy file": b"PK\3\4 something else",
    "its .npy header cannot be read": header("{'descr': '<f4', 'fortran_order': 1e999"),
    "its .npy header cannot be read (ValueError)": header("__import__('os').mkdir('sprung')"),
    "its elements are complex64": npy(GOOD.astype(np.complex64)),
    "its elements are <U1": npy(np.array([["a", "b"]])),
    "it holds records with named fields": npy(np.zeros(3, [("x", "f4"), ("y", "f4")])),
    "its vectors have no numbers (D is 0)": npy(np.zeros((5, 0), np.float32)),
    "a sample of it has more than": npy(np.zeros((1, 5_000_000), np.uint8)),
    "the file is cut off: its header promises 32,000,000,000 bytes": header(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2000000000, 4), }"
    )
    + GOOD.tobytes(),
    "the file is cut off: its header promises 128 bytes of numbers, 100": npy(np.asfortranarray(GOOD))[:-28],
}


@pytest.mark.parametrize("reason", BAD_NPY)
def test_a_bad_npy_is_one_bad_unit_beside_the_good_ones(reason: str, source: Path) -> None:
    (source / "bad.npy").write_bytes(BAD_NPY[reason])
    found = read(source)
    assert np.array_equal(found.values, GOOD)
    assert [found.startswith(reason.removesuffix(" (ValueError)")) for found in found.reasons] == [True]
    with pytest.raises(Refused, match=r"there are no vectors in .*bad\.npy: "):
        read(source / "bad.npy")


def test_pickled_objects_are_never_loaded(source: Path) -> None:
    np.save(source / "a.npy", np.array([Trap()], dtype=object))
    np.savez(source / "b.npz", x=np.array([Trap()], dtype=object))
    torch.save({"x": torch.zeros(2, 4), "more": Trap()}, source / "c.pt")
    torch.save(torch.nn.Linear(4, 4), source / "d.pt")
    (source / "e.pt").write_bytes(pickle.dumps(Trap()))
    found = read(source)
    assert np.array_equal(found.values, GOOD)
    assert [reason.split(";")[0] for reason in found.reasons] == [
        "it holds pickled Python objects, which are never loaded",
        "it holds pickled Python objects, which are never loaded",
        f"it holds a pickled {os.mkdir.__module__}.mkdir",
        "it holds a pickled torch.nn.modules.linear.Linear",
        "not a file of torch.save, cut off, or in its old format: load it where it was made and save it again",
    ]


def test_objects_beside_numbers_are_no_harm(source: Path) -> None:
    np.savez(source / "b.npz", x=GOOD, names=np.array([Trap()], dtype=object))
    assert len(read(source).rows) == 16


def test_a_cut_off_array_gives_what_is_there_and_counts_what_is_not(source: Path) -> None:
    (source / "cut.npy").write_bytes(npy(GOOD)[:-40])
    found = read(source)
    assert np.array_equal(found.values, np.concatenate([GOOD[:5], GOOD]))
    assert found.reasons == ["the file is cut off before this vector"] * 3
    assert [unit.source for unit in found.units if isinstance(unit, Bad)] == [f"cut.npy/{n}" for n in (5, 6, 7)]


def test_a_file_that_shrinks_or_goes_between_survey_and_reading_is_dirt(source: Path) -> None:
    settings = VectorSettings()
    survey = vectors.survey([str(source)], settings)
    (source / "good.npy").write_bytes(npy(GOOD)[:-1])
    for reason in ("the file became shorter while it was read", "could not be read: "):
        came = list(vectors.read(survey.slices[0], {}, settings, lambda unit: unit % 2 == 0))
        assert [unit for unit, _, _ in came] == [0, 2, 4, 6]
        assert all(isinstance(found, Bad) and found.reason.startswith(reason) for _, found, _ in came)
        (source / "good.npy").unlink(missing_ok=True)


@pytest.mark.parametrize("hurt", ["npz", "deflated", "pt", "safetensors", "parquet"])
def test_cut_off_files_of_every_format(hurt: str, source: Path) -> None:
    path = source / f"bad.{'npz' if hurt == 'deflated' else hurt}"
    if hurt == "npz":
        np.savez(path, x=GOOD)
    elif hurt == "deflated":
        np.savez_compressed(path, x=GOOD)
    elif hurt == "pt":
        torch.save(torch.from_numpy(GOOD), path)
    elif hurt == "safetensors":
        safetensors.torch.save_file({"x": torch.from_numpy(GOOD)}, path)
    else:
        pq.write_table(pa.table({"x": pa.array(list(GOOD))}), path)
    whole = path.read_bytes()
    for length in (len(whole) - 8, len(whole) // 2, 6):
        path.write_bytes(whole[:length])
        found = read(source)
        assert np.array_equal(found.values, GOOD)
        assert len(found.reasons) == 1, length
        assert (
            "cut off" in found.reasons[0] or "cannot be read" in found.reasons[0] or "can be read" in found.reasons[0]
        )


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".pth", ".safetensors", ".parquet"])
def test_files_of_another_kind_whatever_their_name(suffix: str, source: Path) -> None:
    (source / f"bad{suffix}").write_text("these are no vectors at all, but a line of text\n")
    (source / f"none{suffix}").write_bytes(b"")
    found = read(source)
    assert np.array_equal(found.values, GOOD)
    assert len(found.reasons) == 2
    assert found.reasons[1] == "the file is empty"


def test_rows_that_are_not_finite_are_set_aside_one_by_one(source: Path) -> None:
    rows = np.arange(24.0).reshape(6, 4)
    rows[1, 2], rows[3, 0], rows[4, 3] = np.nan, -np.inf, 1e39
    np.save(source / "good.npy", rows)
    found = read(source)
    assert np.array_equal(found.values, rows[[0, 2, 5]].astype(np.float32))
    assert found.reasons == ["a value is NaN or infinite"] * 2 + ["a value is too large for float32"]
    rows[4, 3] = 65_520
    np.save(source / "good.npy", rows)
    assert read(source, dtype="float16").reasons[-1] == "a value is too large for float16"
    rows[4, 3] = 3.4e38
    np.save(source / "good.npy", rows)
    assert read(source, dtype="bfloat16").reasons[-1] == "a value is too large for bfloat16"
    assert len(read(source).reasons) == 2


def test_lists_of_other_lengths_and_gaps_in_parquet(source: Path) -> None:
    lists = [[1.0, 2, 3, 4], None, [1.0, 2, 3], [5.0, None, 7, 8], [], [5.0, 6, 7, 8]]
    pq.write_table(pa.table({"x": pa.array(lists, pa.list_(pa.float32()))}), source / "p.parquet")
    found = read(source)
    assert found.values[8:].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert found.reasons == [
        "it has no vector here",
        "it has 3 numbers instead of 4",
        "a value is NaN or infinite",
        "it has 0 numbers instead of 4",
    ]


def test_two_sizes_are_refused_before_work_naming_both(source: Path) -> None:
    torch.save(torch.zeros(3, 5), source / "other.pt")
    with pytest.raises(Refused, match=r"good\.npy holds vectors of 4 and other\.pt of 5; one corpus has one size"):
        read(source)


# Archives and headers that lie


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_bomb_in_an_archive_is_not_inflated(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (70_000_000, 1)
    bomb = header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}") + bytes(70_000_000)
    zipped(source / "bomb.npz", {"x.npy": bomb})
    assert (source / "bomb.npz").stat().st_size < 100_000
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, *_: pytest.fail("it was inflated"))
    found = read(source)
    assert np.array_equal(found.values, GOOD)
    assert [reason.startswith("a member would inflate to ") for reason in found.reasons] == [True]


def test_members_that_overlap_are_a_bomb(source: Path) -> None:
    """One kernel of compressed bytes that many members of the directory point to (D. Fifield, 2019)."""
    zipped(source / "b.npz", {f"x{n}.npy": npy(RANDOM.standard_normal((40, 40))) for n in range(3)})
    data = bytearray((source / "b.npz").read_bytes())
    first = data.index(b"PK\1\2")
    size = data[first + 20 : first + 28]
    for place in range(first + 1, len(data)):
        if data[place : place + 4] == b"PK\1\2":
            data[place + 20 : place + 24] = struct.pack("<I", struct.unpack("<II", size)[0] * 3)
    (source / "b.npz").write_bytes(data)
    assert read(source).reasons == ["its members overlap: the archive is a bomb or damaged"]


def test_a_member_that_is_shorter_than_its_header_says(source: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        zipped(source / "b.npz", {"x.npy": npy(GOOD)[:-16]}, method)
        assert read(source).reasons == ["a member is shorter than its own header promises"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("seed", range(4))
def test_damage_that_only_a_checksum_tells(save: Callable[..., None], seed: int, source: Path) -> None:
    """Of these seeds, damaged bytes inflate to an error for some and to numbers like any others for the rest."""
    rows = np.random.default_rng(seed).standard_normal((20_000, 4))
    save(source / "b.npz", x=rows)
    data = bytearray((source / "b.npz").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    (source / "b.npz").write_bytes(data)
    found = read(source, wanted=lambda unit: unit % 100 == 0)
    assert np.array_equal(found.values, GOOD[:1])
    assert len(found.reasons) == 200
    assert found.reasons[0].startswith("its member of the archive is damaged (")


def test_names_in_an_archive_are_keys_and_never_paths(source: Path) -> None:
    zipped(source / "b.npz", {"../../climbs.npy": npy(GOOD), "/etc/x.npy": npy(GOOD[:, :2].astype(int))})
    assert len(read(source, key="../../climbs").rows) == 16
    assert sorted(path.name for path in source.rglob("*")) == ["b.npz", "good.npy"]


def test_a_tensor_of_any_size_from_a_few_bytes(source: Path) -> None:
    torch.save(torch.zeros(1).expand(10**12, 4), source / "b.pt")
    assert [reason.split(" (")[0] for reason in read(source).reasons] == [
        "a tensor in it repeats a few stored numbers without end"
    ]


def test_a_tensor_that_reaches_beyond_its_file(source: Path) -> None:
    torch.save(torch.zeros(100, 4), source / "b.pt")
    with zipfile.ZipFile(source / "b.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = members[name].replace(b"K\x64K\x04\x86", b"K\xffK\xff\x86")
    zipped(source / "b.pt", members, zipfile.ZIP_STORED)
    assert [reason.split(" (")[0] for reason in read(source).reasons] == ["torch.load refused it"]
    zipped(source / "b.pt", members, zipfile.ZIP_DEFLATED)
    assert read(source).reasons == ["not a file of torch.save: its members are compressed"]


@pytest.mark.parametrize("make", [lambda x: x.to_sparse(), lambda x: x.to("meta"), lambda x: x.to(torch.complex64)])
def test_tensors_without_plain_numbers(make: object, source: Path) -> None:
    torch.save(make(torch.ones(3, 4)), source / "b.pt")  # type: ignore[operator]
    [reason] = read(source).reasons
    assert reason.startswith(("a tensor in it is sparse", "its elements are torch.complex64", "it holds a pickled"))


@pytest.mark.parametrize(
    "said",
    [
        {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [-8, 4], "data_offsets": [0, -128]},
        {"dtype": "F32", "shape": [8, 4], "data_offsets": [-128, 0]},
        {"dtype": "F32", "shape": [8000, 4], "data_offsets": [0, 128_000]},
        {"dtype": "F32", "shape": "many", "data_offsets": [0, 1]},
        {"dtype": "F32"},
        ["a"],
    ],
)
def test_safetensors_headers_that_lie(said: object, source: Path) -> None:
    text = json.dumps({"x": said}).encode()
    (source / "b.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + GOOD.tobytes())
    [reason] = read(source).reasons
    assert "header" in reason
    (source / "b.safetensors").write_bytes(struct.pack("<Q", 2**62) + text)
    assert read(source).reasons == ["not a safetensors file, or cut off inside its header"]


def test_damage_inside_a_row_group_costs_its_rest(source: Path) -> None:
    rows = RANDOM.standard_normal((3000, 4)).astype(np.float32)
    table = pa.table({"x": pa.array(list(rows))})
    pq.write_table(table, source / "p.parquet", row_group_size=1000, use_dictionary=False, write_page_checksum=True)
    group = pq.ParquetFile(source / "p.parquet").metadata.row_group(1).column(0)
    data = bytearray((source / "p.parquet").read_bytes())
    data[group.data_page_offset + 300 : group.data_page_offset + 900] = bytes(600)
    (source / "p.parquet").write_bytes(data)
    found = read(source / "p.parquet")
    assert np.array_equal(found.values, rows[[*range(1000), *range(2000, 3000)]])
    assert len(found.reasons) == 1000
    assert len(set(found.reasons)) == 1


def test_links_in_a_loop_are_survived(source: Path) -> None:
    (source / "loop").symlink_to(source)
    (source / "gone.npy").symlink_to(source / "nowhere.npy")
    found = read(source)
    assert len(found.rows) == 8
    assert found.reasons == ["the file is empty"]


def test_a_gigabyte_is_many_slices_and_never_in_memory(tmp_path: Path) -> None:
    """A sparse file: 1 GiB of zeros that take no disk."""
    rows = 1 << 19
    with open(tmp_path / "big.npy", "wb") as file:
        file.write(header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 512), }}"))
        file.truncate(128 + rows * 2048)
    settings = VectorSettings()
    survey = vectors.survey([str(tmp_path)], settings)
    assert len(survey.slices) == 16
    assert {piece.bytes for piece in survey.slices} == {_vector_cuts.SLICE_BYTES}
    assert [piece.start for piece in survey.slices] == list(range(0, rows, rows // 16))
    largest = 0
    piece: Slice = survey.slices[-1]
    for block in _vector_raw.read_raw(
        piece.uri, vectors.Found.of_json(piece.meta["array"]), rows - 4096, rows, lambda low, high: True
    ):
        largest = max(largest, block.values.nbytes)
    assert largest == _vector_raw.CHUNK_BYTES
