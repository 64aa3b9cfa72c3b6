"""Formats of streamlines: what nibabel and trx-python read is what comes out; damage costs what it damaged, no more."""

import gc
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import trx.trx_file_memmap as trx_python
from nibabel.streamlines import Tractogram
from nibabel.streamlines.tck import TckFile
from nibabel.streamlines.tractogram_file import HeaderWarning
from nibabel.streamlines.trk import TrkFile

from pipelines.corpora import Bad, streamlines
from pipelines.corpora import _streamline_files as files
from pipelines.corpora import _streamline_tck as tck
from pipelines.corpora import _streamline_trk as trk
from pipelines.corpora import _streamline_trx as trx
from pipelines.corpora.streamlines import StreamlineSettings
from pipelines.errors import Refused

SETTINGS = StreamlineSettings(split_by="row")
OBLIQUE = np.array([[-1.9, 0.2, 0, 90], [0.3, 2.1, 0.1, -126], [0, -0.1, 1.5, -72], [0, 0, 0, 1]], np.float32)


def lines(count: int = 12, seed: int = 0) -> list[np.ndarray]:
    """Streamlines of 2 to 40 points in RAS mm, on a grid of 1/8 mm so that sums of them are exact."""
    drawn = np.random.default_rng(seed)
    return [(drawn.integers(-400, 400, (drawn.integers(2, 41), 3)) / 8).astype(np.float32) for _ in range(count)]


def as_trk(points: list[np.ndarray], header: dict[str, Any] | None = None, **data: Any) -> bytes:
    file = io.BytesIO()
    TrkFile(Tractogram(points, affine_to_rasmm=np.eye(4), **data), header).save(file)
    return file.getvalue()


def as_tck(points: list[np.ndarray], **header: str) -> bytes:
    file = io.BytesIO()
    TckFile(Tractogram(points, affine_to_rasmm=np.eye(4)), {**TckFile.create_empty_header(), **header}).save(file)
    return file.getvalue()


def as_trx(points: list[np.ndarray], kind: str = "float32", compressed: bool = False) -> bytes:
    header = {
        "DIMENSIONS": [4, 5, 6],
        "VOXEL_TO_RASMM": OBLIQUE.tolist(),
        "NB_VERTICES": sum(map(len, points)),
        "NB_STREAMLINES": len(points),
    }
    offsets = np.cumsum([0, *map(len, points)]).astype("<u4")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        archive.writestr("header.json", json.dumps(header))
        archive.writestr("dps/weight.float32", np.ones(len(points), "<f4").tobytes())
        archive.writestr(f"positions.3.{kind}", np.concatenate(points).astype(kind).tobytes())
        archive.writestr("offsets.uint32", offsets.tobytes())
    return file.getvalue()


def changed(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


def found_in(source: Path, settings: StreamlineSettings = SETTINGS) -> list[np.ndarray | Bad]:
    """Points of every unit as stored, or why there are none."""
    survey = streamlines.survey([str(source)], settings)
    found: list[np.ndarray | Bad] = []
    for piece in survey.slices:
        units = list(streamlines._points(piece, lambda _: True))
        assert [unit for unit, _ in units] == list(range(piece.stop - piece.start))
        found += [Bad(piece.name, points) if isinstance(points, str) else points for _, points in units]
    return found


def reasons(found: list[np.ndarray | Bad]) -> list[str]:
    return [one.reason for one in found if isinstance(one, Bad)]


def check(found: list[np.ndarray | Bad], expected: Any, atol: float = 0) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, np.ndarray), one
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few hundred bytes are cut as ones of many gigabytes are."""
    monkeypatch.setattr(trk, "WALK_ABOVE", 0)
    monkeypatch.setattr(trk, "BLOCK", 50)
    monkeypatch.setattr(tck, "BLOCK_POINTS", 7)
    monkeypatch.setattr(files, "SLICE_BYTES", 700)
    monkeypatch.setattr(files, "COMPRESSED_SLICE_BYTES", 900)


@pytest.mark.parametrize("order", [b"RAS", b"LPS", b"AIL", b""])
@pytest.mark.parametrize("affine", [np.eye(4, dtype=np.float32), OBLIQUE])
@pytest.mark.filterwarnings("ignore:Voxel order is not specified")
def test_trk_is_moved_to_ras_mm_as_nibabel_moves_it(tmp_path: Path, order: bytes, affine: np.ndarray) -> None:
    header = {"dimensions": (91, 109, 91), "voxel_sizes": (2, 2.125, 1.5), "voxel_to_rasmm": affine}
    data = as_trk(lines(), {**header, "voxel_order": b"LPS"})
    data = changed(data, 948, order.ljust(4, b"\0"))
    (tmp_path / "a.trk").write_bytes(data)
    expected = nib.streamlines.load(tmp_path / "a.trk").streamlines
    # nibabel sums in float32, whose last bit depends on the machine.
    check(found_in(tmp_path), expected, atol=1e-4)
    if order == b"LPS":
        check(found_in(tmp_path), lines(), atol=1e-4)


def test_files_of_other_spaces_end_in_the_same_millimetres(tmp_path: Path) -> None:
    spaces = [
        {"dimensions": (91, 109, 91), "voxel_sizes": (2, 2.125, 1.5), "voxel_to_rasmm": OBLIQUE, "voxel_order": b"LPS"},
        {"dimensions": (60, 70, 80), "voxel_sizes": (1, 1, 3), "voxel_to_rasmm": np.diag([1, 1, 3, 1])},
        {"dimensions": (60, 70, 80), "voxel_to_rasmm": np.eye(4), "voxel_order": b"AIL"},
    ]
    for name, header in zip("abc", spaces, strict=True):
        (tmp_path / f"{name}.trk").write_bytes(as_trk(lines(), header))
    (tmp_path / "d.tck").write_bytes(as_tck(lines()))
    check(found_in(tmp_path), 4 * lines(), atol=1e-4)


def test_trk_of_whole_millimetres_is_bit_for_bit_what_nibabel_reads(tmp_path: Path) -> None:
    (tmp_path / "a.trk").write_bytes(as_trk(lines()))
    check(found_in(tmp_path), nib.streamlines.load(tmp_path / "a.trk").streamlines)
    check(found_in(tmp_path), lines())


def test_scalars_and_properties_of_trk_are_passed_over(tmp_path: Path) -> None:
    points = lines()
    data = {
        "data_per_point": {"fa": [np.full((len(one), 2), 9.0) for one in points]},
        "data_per_streamline": {"weight": np.ones((len(points), 3))},
    }
    (tmp_path / "a.trk").write_bytes(as_trk(points, **data))
    check(found_in(tmp_path), points)


def swapped(data: bytes) -> bytes:
    """A little-endian .trk as a big-endian machine writes it."""
    kind = trk_header(data).dtype
    head = np.frombuffer(data[:1000], kind).astype(kind.newbyteorder(">")).tobytes()
    return head + np.frombuffer(data[1000:], "<u4").astype(">u4").tobytes()


def trk_header(data: bytes) -> np.ndarray:
    from nibabel.streamlines.trk import header_2_dtype

    return np.frombuffer(data[:1000], header_2_dtype)[0]


def test_big_endian_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.trk").write_bytes(swapped(as_trk(lines())))
    (tmp_path / "b.tck").write_bytes(big_endian_tck(lines()))
    for name in ("a.trk", "b.tck"):
        check(list(nib.streamlines.load(tmp_path / name).streamlines), lines())
    check(found_in(tmp_path), lines() + lines())


def big_endian_tck(points: list[np.ndarray]) -> bytes:
    data = as_tck(points)
    start = data.index(b"END\n") + 4
    return data[:start].replace(b"Float32LE", b"Float32BE") + np.frombuffer(data[start:], "<u4").astype(">u4").tobytes()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("count", [True, False])
def test_a_large_trk_is_walked_from_count_to_count_and_cut(tmp_path: Path, count: bool) -> None:
    data = as_trk(lines(40))
    (tmp_path / "a.trk").write_bytes(data if count else changed(data, 988, b"\0\0\0\0"))
    survey = streamlines.survey([str(tmp_path)], SETTINGS)
    assert len(survey.slices) > 10
    assert [piece.start for piece in survey.slices[1:]] == [piece.stop for piece in survey.slices[:-1]]
    assert all(piece.bytes <= 700 for piece in survey.slices)
    check(found_in(tmp_path), lines(40))


@pytest.mark.parametrize("walked", [True, False])
def test_many_short_streamlines_are_cut_by_their_number_too(tmp_path: Path, monkeypatch, walked: bool) -> None:
    """A worker holds the streamlines of a slice, so there must not be a million of three points in one."""
    for module in (files, trk, trx):
        monkeypatch.setattr(module, "MOST_UNITS", 8)
    if walked:
        monkeypatch.setattr(trk, "WALK_ABOVE", 0)
    for suffix, make in ((".trk", as_trk), (".tck", as_tck), (".trx", as_trx)):
        (tmp_path / suffix[1:]).mkdir()
        (tmp_path / suffix[1:] / f"a{suffix}").write_bytes(make(lines(20)))
        survey = streamlines.survey([str(tmp_path / suffix[1:])], SETTINGS)
        assert [piece.stop - piece.start for piece in survey.slices] == [8, 8, 4]
        check(found_in(tmp_path / suffix[1:]), lines(20))


@pytest.mark.usefixtures("small_blocks")
def test_a_large_tck_is_cut_where_streamlines_end(tmp_path: Path) -> None:
    (tmp_path / "a.tck").write_bytes(as_tck(lines(40)))
    survey = streamlines.survey([str(tmp_path)], SETTINGS)
    assert len(survey.slices) > 10
    assert all(piece.bytes <= 700 for piece in survey.slices)
    check(found_in(tmp_path), lines(40))


def test_tck_is_what_nibabel_reads_and_its_count_is_not_believed(tmp_path: Path) -> None:
    data = as_tck(lines(), mrtrix_version="3.0.4", command_history="tckgen in.mif out.tck")
    data = changed(data, data.index(b"count: ") + len(b"count: "), b"0000000003")
    # Two ends of streamlines one after the other, and one before the first: streamlines without points.
    behind = data.index(b"END\n") + 4 + 12 * len(lines()[0])
    data = data[:behind] + data[behind : behind + 12] + data[behind:]
    data = data[: data.index(b"END\n") + 4] + data[behind : behind + 12] + data[data.index(b"END\n") + 4 :]
    (tmp_path / "a.tck").write_bytes(data)
    check(found_in(tmp_path), nib.streamlines.load(tmp_path / "a.tck").streamlines)
    check(found_in(tmp_path), lines())


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("cut", [False, True])
def test_trx_is_what_trx_python_reads(tmp_path, monkeypatch, kind: str, compressed: bool, cut: bool) -> None:
    if cut:
        monkeypatch.setattr(files, "SLICE_BYTES", 700)
    (tmp_path / "a.trx").write_bytes(as_trx(lines(), kind, compressed))
    loaded = trx_python.load(str(tmp_path / "a.trx"))
    expected = [np.array(one, np.float32) for one in loaded.streamlines]
    loaded.close()
    check(found_in(tmp_path), expected)
    check(found_in(tmp_path), [one.astype(kind).astype(np.float32) for one in lines()])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_trx_is_read_as_trx_python_writes_it(tmp_path: Path) -> None:
    reference = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), OBLIQUE)
    dtypes = {"positions": np.dtype("float32"), "offsets": np.dtype("uint64"), "dpv": {}, "dps": {}}
    made = trx_python.TrxFile.from_tractogram(Tractogram(lines(), affine_to_rasmm=np.eye(4)), reference, dtypes)
    trx_python.save(made, str(tmp_path / "a.trx"))
    made.close()
    check(found_in(tmp_path), lines())
    # It leaves its temporary directories to the garbage collector, which warns.
    del made
    gc.collect()


def test_trx_is_read_without_writing_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.trx"
    path.write_bytes(as_trx(lines(), compressed=True))
    path.chmod(0o444)
    monkeypatch.setattr(zipfile.ZipFile, "extract", lambda *_: pytest.fail("extracted"))
    monkeypatch.setattr(zipfile.ZipFile, "extractall", lambda *_: pytest.fail("extracted"))
    check(found_in(tmp_path), lines())
    assert [one.name for one in tmp_path.iterdir()] == ["a.trx"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("blocks", ["large", "small"])
def test_members_of_a_zip_are_read_in_place(tmp_path: Path, request, compression: int, blocks: str) -> None:
    members = {
        "sub_1/": b"",
        "sub_1/AF.trk": as_trk(lines(9, 1)),
        "sub_1/CST.tck": as_tck(lines(9, 2)),
        "sub_2/AF.trx": as_trx(lines(9, 3), compressed=True),
        "__MACOSX/sub_1/._AF.trk": b"\0\5\x16\7",
        "LICENSE.txt": b"x",
    }
    with zipfile.ZipFile(tmp_path / "all.zip", "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    survey = streamlines.survey([str(tmp_path)], SETTINGS)
    assert survey.ignored == {"hidden file": 1, "not a streamline file (.txt)": 1}
    names = dict.fromkeys(piece.name for piece in survey.slices)
    assert list(names) == ["all.zip/sub_1/AF.trk", "all.zip/sub_1/CST.tck", "all.zip/sub_2/AF.trx"]
    check(found_in(tmp_path), lines(9, 1) + lines(9, 2) + lines(9, 3))


def with_entry(data: bytes, place: int, value: bytes) -> bytes:
    """A zip with bytes of its last directory entry replaced."""
    return changed(data, data.rindex(b"PK\1\2") + place, value)


def zipped(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "climbs": (lambda: zipped("../../AF.trk", as_trk(lines())), "its path climbs out of the archive"),
    "absolute": (lambda: zipped("/AF.trk", as_trk(lines())), "its path climbs out of the archive"),
    "backslash": (lambda: zipped("..\\AF.trk", as_trk(lines())), "its path climbs out of the archive"),
    "bomb": (lambda: zipped("AF.trk", as_trk(lines()) + bytes(20 << 20)), "as bombs do: pack it uncompressed"),
    "empty": (lambda: zipped("AF.trk", b""), "the file is empty"),
    "encrypted": (lambda: with_entry(zipped("AF.trk", as_trk(lines())), 8, b"\1\0"), "it is encrypted"),
    "cut": (lambda: zipped("AF.trk", as_trk(lines()))[:-40], "the archive is cut off or damaged"),
    "text": (lambda: b"no archive at all", "the archive is cut off or damaged"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_damaged_or_mean_harm_are_one_bad_unit(tmp_path: Path, name: str) -> None:
    make, reason = ARCHIVES[name]
    (tmp_path / "a.zip").write_bytes(make())
    (tmp_path / "b.trk").write_bytes(as_trk(lines()))
    found = found_in(tmp_path)
    assert len(reasons(found)) == 1
    assert reason in reasons(found)[0]
    check(found[1:], lines())


TRK = as_trk(lines())
FILES: dict[str, tuple[bytes, str]] = {
    "empty.trk": (b"", "the file is empty"),
    "empty.trx": (b"", "the file is empty"),
    "wrong_magic.trk": (b"TRICK" + TRK[5:], "it does not begin as a .trk file does"),
    "really_tck.trk": (as_tck(lines()), "it does not begin as a .trk file does"),
    "really_trk.tck": (TRK, "it does not begin as a .tck file does"),
    "really_trk.trx": (TRK, "the archive is cut off or damaged"),
    "cut_header.trk": (TRK[:700], "the file is cut off inside its header"),
    "version.trk": (changed(TRK, 992, b"\7\0\0\0"), "its header is of no known version"),
    "header_size.trk": (changed(TRK, 996, b"\7\0\0\0"), "its header is of no known version"),
    "singular.trk": (changed(TRK, 440, np.diag([1, 1, 0, 1]).astype("<f4").tobytes()), "singular"),
    "rank_1.trk": (changed(TRK, 440, (np.ones((4, 4)) + np.diag([0, 0, 0, 1])).astype("<f4").tobytes()), "singular"),
    "nan_affine.trk": (changed(TRK, 440, np.full((4, 4), np.nan, "<f4").tobytes()), "singular"),
    "no_voxels.trk": (changed(TRK, 12, bytes(12)), "voxel_size is 0 or not finite: three sizes in mm are needed"),
    "scalars.trk": (changed(TRK, 36, b"\xff\xff"), "the header says -1 scalars"),
    "negative.trk": (changed(TRK, 988, b"\xff\xff\xff\xff"), "-1 streamlines: none may be negative"),
    "no_end.tck": (b"mrtrix tracks\ndatatype: Float32LE\n", "the file is cut off inside its header"),
    "double.tck": (as_tck(lines()).replace(b"Float32LE", b"Float64LE"), "its numbers are not float32"),
    "binary.tck": (b"mrtrix tracks\n" + bytes(range(256)) * 8, "the file is cut off inside its header"),
    "other_file.tck": (b"mrtrix tracks\nfile: data.bin 0\nEND\n", "the header points outside the file"),
    "order.trk": (changed(TRK, 948, b"XYZ\0"), "voxel_order is 'XYZ': three letters such as RAS or LPS"),
    "elsewhere.tck": (b"mrtrix tracks\ndatatype: Float32LE\nfile: . 99\nEND\n", "cut off inside its header"),
    "before.tck": (b"mrtrix tracks\ndatatype: Float32LE\nfile: . -9\nEND\n", "points outside the file"),
    "no_arrays.trx": (zipped("header.json", b'{"NB_STREAMLINES": 3, "NB_VERTICES": 9}'), "it holds no positions"),
    "list.trx": (zipped("header.json", b"[1, 2]"), "the header is not that of a .trx file"),
    "deep.trx": (zipped("header.json", b"[" * 100_000), "the header is not that of a .trx file"),
    "negative.trx": (zipped("header.json", b'{"NB_STREAMLINES": -3, "NB_VERTICES": 9}'), "not that of a .trx file"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_one_bad_unit_with_its_reason(tmp_path: Path, name: str) -> None:
    data, reason = FILES[name]
    (tmp_path / name).write_bytes(data)
    [bad] = found_in(tmp_path)
    assert isinstance(bad, Bad)
    assert bad.source == name
    assert reason in bad.reason


@pytest.mark.parametrize("blocks", ["large", "small"])
@pytest.mark.parametrize("counted", [True, False])
def test_a_trk_cut_off_anywhere_keeps_what_is_whole_and_counts_what_is_lost(tmp_path, request, blocks, counted) -> None:
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    points = [one[:5] for one in lines(5)]
    data = as_trk(points)
    data = data if counted else changed(data, 988, b"\0\0\0\0")
    ends = 1000 + np.cumsum([4 + 12 * len(one) for one in points])
    for length in range(1001, len(data)):
        (tmp_path / "a.trk").write_bytes(data[:length])
        whole = int((ends <= length).sum())
        found = found_in(tmp_path)
        check(found[:whole], points[:whole])
        lost = found[whole:]
        assert len(reasons(lost)) == len(lost)
        if counted and (length - 1000) // 28 >= 5:
            assert set(reasons(lost)) == {trk.CUT_OFF}
            assert len(lost) == 5 - whole
        elif counted:
            assert reasons(lost) == [trk.NO_ROOM]
        else:
            # Without a promise, a file that ends where a streamline does is whole.
            assert len(lost) == (length not in ends)


@pytest.mark.parametrize("block", range(1, 14))
def test_where_blocks_end_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(tck, "BLOCK_POINTS", block)
    monkeypatch.setattr(trk, "WALK_ABOVE", 0)
    monkeypatch.setattr(trk, "BLOCK", 4 * block)
    (tmp_path / "a.trk").write_bytes(TRK)
    (tmp_path / "b.tck").write_bytes(as_tck(lines()))
    check(found_in(tmp_path), lines() + lines())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("block", [7, 1000])
def test_a_streamline_of_more_points_than_any_has_ends_what_can_be_read(tmp_path, monkeypatch, block: int) -> None:
    """Else one of a billion points would be read into memory whole."""
    monkeypatch.setattr(tck, "BLOCK_POINTS", block)
    for kind in (trk, tck):
        monkeypatch.setattr(kind, "MOST_POINTS", 50)
    points = [*lines(3), np.ones((51, 3), np.float32), *lines(2)]
    (tmp_path / "a.trk").write_bytes(as_trk(points))
    (tmp_path / "b.tck").write_bytes(as_tck(points))
    found = found_in(tmp_path)
    check(found[:3] + found[6:9], lines(3) + lines(3))
    assert reasons(found) == ["damaged: a streamline of more than 1,000,000 points; copy or write the file again"] * 4


@pytest.mark.usefixtures("small_blocks")
def test_very_many_lost_streamlines_are_one_unit_that_says_how_many(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trk, "MOST_LISTED", 8)
    for whole, expected in ((3, " (8 more behind it are lost too)"), (4, "")):
        end = 1000 + sum(4 + 12 * len(one) for one in lines()[:whole])
        (tmp_path / "a.trk").write_bytes(TRK[: end + 8])
        found = found_in(tmp_path)
        check(found[:whole], lines()[:whole])
        assert reasons(found) == [f"{trk.CUT_OFF}{expected}"] * len(found[whole:])
        assert len(found[whole:]) == {3: 1, 4: 8}[whole]


def test_a_promise_of_two_billion_streamlines_is_one_bad_unit(tmp_path: Path) -> None:
    (tmp_path / "a.trk").write_bytes(changed(TRK, 988, struct.pack("<i", 2**31 - 1)))
    found = found_in(tmp_path)
    check(found[:-1], lines())
    assert reasons(found) == [trk.NO_ROOM]


@pytest.mark.usefixtures("small_blocks")
def test_a_tck_cut_off_anywhere_keeps_what_is_whole_and_says_so(tmp_path: Path) -> None:
    points = [one[:5] for one in lines(5)]
    data = as_tck(points)
    start = data.index(b"END\n") + 4
    ends = start + np.cumsum([12 * len(one) + 12 for one in points])
    for length in range(start, len(data)):
        (tmp_path / "a.tck").write_bytes(data[:length])
        found = found_in(tmp_path)
        whole = int((ends <= length).sum())
        check(found[:whole], points[:whole])
        assert reasons(found[whole:]) == [tck.CUT_OFF]


@pytest.mark.parametrize("name", ["a.trk", "a.tck", "a.zip", "stored.trx", "deflated.trx"])
@pytest.mark.parametrize("blocks", ["large", "small"])
def test_random_damage_never_escapes_as_an_error_or_a_warning(tmp_path: Path, request, name: str, blocks: str) -> None:
    """Headers may come out as anything; every unit that the survey saw is still accounted for."""
    made = {
        "a.trk": lambda: as_trk(lines(4)),
        "a.tck": lambda: as_tck(lines(4)),
        "a.zip": lambda: zipped("a.trk", as_trk(lines(4))),
        "stored.trx": lambda: as_trx(lines(4)),
        "deflated.trx": lambda: as_trx(lines(4), compressed=True),
    }[name]()
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    drawn = np.random.default_rng(7)
    hurt = 0
    for turn in range(120):
        data = bytearray(made)
        for place in drawn.integers(0, len(data), 1 + turn % 5):
            data[place] = drawn.integers(256)
        (tmp_path / name).write_bytes(bytes(data))
        try:
            survey = streamlines.survey([str(tmp_path / name)], SETTINGS)
        except Refused:
            continue  # the damage lay in a member's name
        for piece in survey.slices:
            units = [unit for unit, *_ in streamlines.read(piece, survey.context, SETTINGS, lambda _: True)]
            assert units == list(range(piece.stop - piece.start))
        hurt += bool(reasons(found_in(tmp_path / name)))
    assert hurt > 3


def test_a_file_that_vanished_or_shrank_after_the_survey_is_dirt(tmp_path: Path) -> None:
    (tmp_path / "a.trk").write_bytes(TRK)
    (tmp_path / "b.tck").write_bytes(as_tck(lines()))
    survey = streamlines.survey([str(tmp_path)], SETTINGS)
    (tmp_path / "a.trk").unlink()
    (tmp_path / "b.tck").write_bytes(as_tck(lines(3)))
    gone, shrunk = ([found for _, found in streamlines._points(piece, lambda _: True)] for piece in survey.slices)
    why = "could not be read: No such file or directory; it must be there and readable, so look at it and ingest again"
    assert gone == [why] * 12
    check(shrunk[:3], lines(3))
    assert shrunk[3:] == ["the file has changed since it was looked at: ingest again into a new folder"] * 9


def test_a_dangling_link_and_a_loop_of_links_do_not_stop_a_survey(tmp_path: Path) -> None:
    (tmp_path / "a.trk").write_bytes(TRK)
    (tmp_path / "gone.trk").symlink_to(tmp_path / "nowhere.trk")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = found_in(tmp_path)
    check(found[:12], lines())
    assert reasons(found) == [files.EMPTY]


@pytest.mark.filterwarnings("ignore:Field 'vox_to_ras'")
def test_what_a_header_leaves_out_is_taken_as_nibabel_takes_it_and_said_once(tmp_path: Path, recwarn, capsys) -> None:
    data = changed(changed(TRK, 440, bytes(64)), 948, b"\0\0\0\0")
    (tmp_path / "a.trk").write_bytes(data)
    (tmp_path / "b.trk").write_bytes(TRK)
    found = found_in(tmp_path)[:12]
    assert list(recwarn) == []
    [said] = [line for line in capsys.readouterr().err.splitlines() if "do not say where they lie" in line]
    assert said.startswith("1 of 2 files do not say where they lie, such as 'a.trk' (its header has no vox_to_ras and")
    assert "Write them again with their image as reference" in said
    with pytest.warns(HeaderWarning):
        expected = nib.streamlines.load(tmp_path / "a.trk").streamlines
    check(found, expected, atol=1e-4)
