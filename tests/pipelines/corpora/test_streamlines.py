"""Streamlines to rows: resampled as numpy.interp does it, in chunks that hold each once, split by subject."""

import itertools
import json
import warnings
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import cli
from pipelines import corpora, ingest, storage
from pipelines.columns import batch_of, values_of
from pipelines.corpora import NOT_TEST, Bad, Filtered, Joined, Row, streamlines
from pipelines.corpora._streamline_shapes import FEW_POINTS, NO_LENGTH, NOT_FINITE, TOO_FAR, along, resampled
from pipelines.corpora.streamlines import StreamlineSettings
from pipelines.errors import Failed, Refused
from pipelines.options import validated
from pipelines.reading import Selection
from pipelines.shards import ShardReader
from tests.pipelines.corpora.test_streamline_formats import as_tck, as_trk, lines

SINGLE = StreamlineSettings(num_points=8)
CHUNKS = StreamlineSettings(rows="chunks", num_points=8, chunk=5)
Outcome = Row | Bad | Filtered | Joined


def read_all(source: Path, settings: StreamlineSettings = SINGLE, wanted=lambda unit: True) -> list[Outcome]:
    survey = streamlines.survey([str(source)], settings)
    found = []
    for piece in survey.slices:
        units = list(streamlines.read(piece, survey.context, settings, wanted))
        assert [unit for unit, *_ in units] == [unit for unit in range(piece.stop - piece.start) if wanted(unit)]
        found += [outcome for _, outcome, _ in units]
    return found


def rows_of(found: list[Outcome]) -> list[Row]:
    return [one for one in found if isinstance(one, Row)]


def write(home: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data)
    return home


def by_interp(points: np.ndarray, n: int) -> tuple[np.ndarray, float]:
    """The same with NumPy's own interpolation over arc length."""
    steps = np.linalg.norm(np.diff(points.astype(np.float64), axis=0), axis=1)
    way = np.concatenate([[0], np.cumsum(steps)])
    places = np.linspace(0, way[-1], n)
    return np.stack([np.interp(places, way, points[:, axis]) for axis in range(3)], 1), way[-1]


@pytest.mark.parametrize("n", [2, 3, 20, 64, 500])
def test_resampling_is_linear_interpolation_over_arc_length_and_keeps_the_ends(n: int) -> None:
    drawn = np.random.default_rng(0)
    for count in (2, 3, 10, 300):
        points = drawn.normal(0, 30, (count, 3)).astype(np.float32).cumsum(0)
        points[count // 2 :] = np.concatenate([points[count // 2 : count // 2 + 1], points[count // 2 : -1]])
        if count == 2:
            points[1] = points[0] + 1
        expected, length = by_interp(points, n)
        [way] = along([points])
        [found] = resampled([points], [way], n)
        assert way[-1] == pytest.approx(length, rel=1e-12)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-5)
        assert np.array_equal(found[[0, -1]], points[[0, -1]])


def test_lines_that_are_resampled_together_are_those_resampled_alone_bit_for_bit() -> None:
    """What lies in a block depends on the machine's settings; rows and digests must not."""
    drawn = np.random.default_rng(1)
    several = [drawn.normal(0, 9, (count, 3)).astype(np.float32).cumsum(0) for count in (2, 40, 3, 200, 17)]
    several[1][7:9] = several[1][6]
    ways = along(several)
    together = resampled(several, ways, 12)
    for points, way, found in zip(several, ways, together, strict=True):
        [alone] = along([points])
        assert way.tobytes() == alone.tobytes()
        assert found.tobytes() == resampled([points], [alone], 12)[0].tobytes()
    assert resampled([], [], 12).shape == (0, 12, 3)


def test_the_last_point_is_kept_where_its_step_is_lost_in_the_sum() -> None:
    points = np.array([[1e5, 0, 0], [0, 0, 0], [1e-12, 0, 0]], np.float32)
    [way] = along([points])
    assert way[1] == way[2]
    assert np.array_equal(resampled([points], [way], 5)[0][[0, -1]], points[[0, -1]])


def test_points_of_a_resampled_line_lie_at_equal_distances_whatever_it_was_made_of() -> None:
    places = np.array([0, 1e-6, 1e-6, 3, 3.5, 40, 90, 90])
    line = (np.array([1, 2, 3]) + places[:, None] * np.array([0.36, 0.48, 0.8])).astype(np.float32)
    [found] = resampled([line], along([line]), 10)
    np.testing.assert_allclose(np.linalg.norm(np.diff(found, axis=0), axis=1), 10, rtol=1e-6)


def test_one_row_a_streamline_with_its_bundle_subject_length_and_name(tmp_path: Path) -> None:
    write(tmp_path, {"sub_2/AF_L.trk": as_trk(lines(3)), "sub_1/CST.tck": as_tck(lines(2, 1))})
    found = rows_of(read_all(tmp_path))
    schema = streamlines.schema(SINGLE)
    assert all(schema.names == list(row.values) for row in found)
    about = [[row.values[name] for name in ("name", "bundle", "subject", "label", "group")] for row in found]
    assert about == [
        ["sub_1/CST.tck#0", "CST", "sub_1", 1, 0],
        ["sub_1/CST.tck#1", "CST", "sub_1", 1, 0],
        ["sub_2/AF_L.trk#0", "AF_L", "sub_2", 0, 1],
        ["sub_2/AF_L.trk#1", "AF_L", "sub_2", 0, 1],
        ["sub_2/AF_L.trk#2", "AF_L", "sub_2", 0, 1],
    ]
    for row, points in zip(found, lines(2, 1) + lines(3), strict=True):
        expected, length = by_interp(points, 8)
        np.testing.assert_allclose(row.values["points"], expected, rtol=2e-7, atol=1e-5)
        assert row.values["length"] == pytest.approx(length)
    batch = batch_of([row.values for row in found], schema)
    assert batch.schema.field("points").type == pa.fixed_shape_tensor(pa.float32(), (8, 3))
    assert streamlines.shapes(SINGLE) == {"points": [8, 3]}
    seen = streamlines.tensors(values_of(batch), SINGLE)
    assert {name: (column.dtype, tuple(column.shape)) for name, column in seen.items()} == {
        "points": (torch.float32, (5, 8, 3)),
        "length": (torch.float32, (5,)),
        "label": (torch.int32, (5,)),
        "group": (torch.int32, (5,)),
    }


NAN, FAR = np.float32("nan"), np.float32("3e38")
DIRT = {
    "one point": (np.ones((1, 3), np.float32), FEW_POINTS),
    "nowhere to go": (np.ones((4, 3), np.float32), NO_LENGTH),
    "NaN": (np.array([[0, 0, 0], [1, NAN, 1], [2, 2, 2]], np.float32), NOT_FINITE),
    "infinite": (np.array([[0, 0, 0], [1, np.inf, 1]], np.float32), NOT_FINITE),
    "far": (np.array([[-FAR, 0, 0], [FAR, 0, 0]], np.float32), TOO_FAR),
}


@pytest.mark.parametrize("settings", [SINGLE, CHUNKS])
@pytest.mark.parametrize("format", ["trk", "tck"])
def test_each_bad_streamline_is_set_aside_with_its_reason_and_the_rest_are_rows(tmp_path, settings, format) -> None:
    good = lines(4)
    mixed = [points for pair in zip(good, (points for points, _ in DIRT.values()), strict=False) for points in pair]
    mixed.append(DIRT["far"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel's own, while writing
        data = (as_trk if format == "trk" else as_tck)(mixed)
    write(tmp_path, {f"a.{format}": data})
    found = read_all(tmp_path, settings)
    bad = {unit: one.reason for unit, one in enumerate(found) if isinstance(one, Bad)}
    reasons = [reason for _, reason in DIRT.values()]
    assert bad == dict(zip([1, 3, 5, 7, 8], reasons, strict=True))
    if settings is SINGLE:
        assert [row.values["name"] for row in rows_of(found)] == [f"a.{format}#{unit}" for unit in (0, 2, 4, 6)]
    else:
        [row] = rows_of(found)
        assert sorted(row.values["index"][row.values["real"] == 1]) == [0, 2, 4, 6]
        assert [type(one) for one in found] == [Joined, Bad, Joined, Bad, Joined, Bad, Row, Bad, Bad]


def test_lengths_out_of_bounds_are_filtered_by_the_setting_that_says_so(tmp_path: Path) -> None:
    line = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    write(tmp_path, {"a.tck": as_tck([line * length for length in (5, 10, 20, 21)])})
    settings = validated(StreamlineSettings, {"min_length": "10", "max_length": "20"}, "corpus")
    found = read_all(tmp_path, settings)
    assert [one.setting if isinstance(one, Filtered) else "row" for one in found] == [
        "min_length",
        "row",
        "row",
        "max_length",
    ]


@pytest.mark.parametrize("order", ["shuffled", "file"])
@pytest.mark.parametrize("count", [1, 3, 5, 6, 10, 13, 50])
def test_chunks_hold_every_streamline_once_and_fill_up_with_marked_repeats(tmp_path, count: int, order: str) -> None:
    settings = CHUNKS.model_copy(update={"order": order})
    write(tmp_path, {"sub/AF.trk": as_trk(lines(count))})
    found = read_all(tmp_path, settings)
    rows = rows_of(found)
    assert len(rows) == -(-count // 5)
    assert sum(isinstance(one, Joined) for one in found) == count - len(rows)
    singles = [row.values for row in rows_of(read_all(tmp_path))]
    real = []
    for row in rows:
        values = row.values
        assert values["points"].shape == (5, 8, 3)
        for points, length, index in zip(values["points"], values["length"], values["index"], strict=True):
            assert np.array_equal(points, singles[index]["points"])
            assert length == np.float32(singles[index]["length"])
        assert len(set(values["index"])) == min(5, count)
        real += values["index"][values["real"] == 1].tolist()
    assert sorted(real) == list(range(count))
    if order == "file":
        assert real == list(range(count))
    elif count == 50:
        # In chunks of neighbours this would be 40.
        assert sum(abs(one - other) == 1 for one, other in itertools.pairwise(real)) < 20
    batch = batch_of([row.values for row in rows], streamlines.schema(settings))
    seen = streamlines.tensors(values_of(batch), settings)
    assert seen["real"].dtype == torch.bool
    assert int(seen["real"].sum()) == count
    assert {name: list(seen[name].shape[1:]) for name in ("points", "real")} == streamlines.shapes(settings)


def test_chunks_of_a_file_in_many_slices_are_full_but_for_the_last(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.corpora._streamline_files.SLICE_BYTES", 3000)
    write(tmp_path, {"AF.tck": as_tck(lines(48))})
    survey = streamlines.survey([str(tmp_path)], CHUNKS)
    assert len(survey.slices) > 2
    rows = rows_of(read_all(tmp_path, CHUNKS))
    assert [int(row.values["real"].sum()) for row in rows] == [5] * 9 + [3]
    real = np.concatenate([row.values["index"][row.values["real"] == 1] for row in rows])
    assert np.array_equal(np.sort(real), np.arange(48))
    assert len({row.values["name"] for row in rows}) == 10


def test_which_streamlines_share_a_chunk_depends_on_the_file_alone(tmp_path: Path) -> None:
    write(tmp_path / "one", {"a/AF.trk": as_trk(lines(20)), "b/AF.trk": as_trk(lines(20))})
    write(tmp_path / "two", {"b/AF.trk": as_trk(lines(20))})
    a, b, again = (
        [row.values["index"].tolist() for row in rows_of(read_all(home, CHUNKS)) if row.values["subject"] == subject]
        for home, subject in ((tmp_path / "one", "a"), (tmp_path / "one", "b"), (tmp_path / "two", "b"))
    )
    assert b == again
    assert a != b


@pytest.mark.parametrize("settings", [SINGLE, CHUNKS])
def test_units_that_are_not_wanted_are_left_out_and_change_no_row(tmp_path: Path, settings) -> None:
    write(tmp_path, {"a.trk": as_trk(lines(20)), "b.tck": as_tck(lines(9)), "c.trk": as_trk(lines(7))[:1100]})
    every = {row.values["name"]: row.values for row in rows_of(read_all(tmp_path))}
    taken = {name for name in every if int(name.partition("#")[2]) % 3 == 1}
    assert 7 + 3 <= len(taken) < 13
    seen = []
    for row in rows_of(read_all(tmp_path, settings, wanted=lambda unit: unit % 3 == 1)):
        many = settings is CHUNKS
        units = row.values["index"] if many else [int(row.values["name"].partition("#")[2])]
        real = row.values["real"] if many else [1]
        for points, unit, yes in zip(
            row.values["points"] if many else [row.values["points"]], units, real, strict=True
        ):
            name = f"{row.values['name'].partition('#')[0]}#{unit}"
            assert np.array_equal(points, every[name]["points"])
            seen += [name] * int(yes)
    assert sorted(seen) == sorted(taken)
    assert read_all(tmp_path, settings, wanted=lambda unit: False) == []


@pytest.mark.parametrize(
    ("split_by", "groups"),
    [
        ("auto", ["s1", "s1", "s2"]),
        ("subject", ["s1", "s1", "s2"]),
        ("file", ["s1/AF.trk", "s1/AF.trk", "s2/AF.trk"]),
        ("row", ["s1/AF.trk#0", "s1/AF.trk#1", "s2/AF.trk#0"]),
    ],
)
def test_subjects_stay_on_one_side_of_the_split_unless_told(tmp_path, capsys, split_by, groups) -> None:
    write(tmp_path, {"s1/AF.trk": as_trk(lines(2)), "s2/AF.trk": as_trk(lines(1))})
    found = rows_of(read_all(tmp_path, SINGLE.model_copy(update={"split_by": split_by})))
    assert [row.group for row in found] == groups
    assert capsys.readouterr().err == ""


def test_one_subject_is_split_by_streamline_and_that_is_said(tmp_path: Path, capsys) -> None:
    write(tmp_path, {"AF.trk": as_trk(lines(2)), "CST.trk": as_trk(lines(7))})
    assert [row.group for row in rows_of(read_all(tmp_path))][:2] == ["AF.trk#0", "AF.trk#1"]
    said = capsys.readouterr().err
    assert "all streamlines are of one subject: the split is by streamline" in said
    assert "--set split_by=file" in said


def test_whole_chunks_are_split_where_asked_for_and_that_is_said(tmp_path: Path, capsys) -> None:
    write(tmp_path, {"AF.trk": as_trk(lines(2)), "CST.trk": as_trk(lines(7))})
    chunks = rows_of(read_all(tmp_path, CHUNKS.model_copy(update={"split_by": "row"})))
    assert [row.group for row in chunks] == [row.values["name"] for row in chunks]
    assert "repeats of streamlines whose own chunk may be in another split" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["shuffled", "file"])
@pytest.mark.parametrize("slice_bytes", [1500, 1 << 20])
def test_no_streamline_is_in_chunks_of_two_splits(tmp_path, monkeypatch, slice_bytes, order) -> None:
    """The splits are those of the single streamlines, and repeats come from the chunk's own split."""
    monkeypatch.setattr("pipelines.corpora._streamline_files.SLICE_BYTES", slice_bytes)
    write(tmp_path, {"AF.tck": as_tck(lines(60)), "CST.tck": as_tck(lines(3))})
    settings = CHUNKS.model_copy(update={"order": order})
    selection = Selection(63, None, 0.4)
    survey = streamlines.survey([str(tmp_path)], settings)
    survey = streamlines.prepare(survey, settings, selection.wanted, selection.split_of)
    seen: dict[str, set[str]] = {"train": set(), "valid": set(), "test": set()}
    count = 0
    for piece in survey.slices:
        for _, row, _ in streamlines.read(piece, survey.context, settings, lambda _: True):
            if isinstance(row, Row):
                seen[row.split] |= {f"{piece.name}#{index}" for index in row.values["index"]}
                count += int(row.values["real"].sum())
    assert count == 63
    assert sum(map(len, seen.values())) == 63
    for split, names in seen.items():
        assert names
        assert {selection.split_of(name, None) for name in names} == {split}


def test_official_splits_stay_those_of_chunks(tmp_path: Path) -> None:
    write(tmp_path, {"trainset/x.trk": as_trk(lines(20)), "testset/y.trk": as_trk(lines(6))})
    settings = CHUNKS.model_copy(update={"split_by": "streamline"})
    selection = Selection(26, None, 0.3)
    survey = streamlines.survey([str(tmp_path)], settings)
    survey = streamlines.prepare(survey, settings, selection.wanted, selection.split_of)
    found = {
        (piece.name, row.split)
        for piece in survey.slices
        for _, row, _ in streamlines.read(piece, survey.context, settings, lambda _: True)
        if isinstance(row, Row)
    }
    assert found == {("testset/y.trk", "test"), ("trainset/x.trk", "train"), ("trainset/x.trk", "valid")}


def test_official_splits_win(tmp_path: Path, capsys) -> None:
    names = ["trainset/a/x.trk", "testset/b/x.trk", "validset/c/x.trk"]
    write(tmp_path, {name: as_trk(lines(1)) for name in names})
    assert [row.split for row in rows_of(read_all(tmp_path))] == ["test", "train", "valid"]
    (tmp_path / "validset/c/x.trk").unlink()
    assert [row.split for row in rows_of(read_all(tmp_path))] == ["test", NOT_TEST]
    (tmp_path / "testset/b/x.trk").unlink()
    assert [row.split for row in rows_of(read_all(tmp_path))] == [None]


def test_a_pattern_tells_subject_and_bundle_by_name_and_what_it_leaves_out_is_counted(tmp_path: Path) -> None:
    names = ["t/sub-1175__AF_L.trk", "t/sub-1175__MCP.trk", "t/sub-9__MCP.trk", "t/whole_brain.trk"]
    write(tmp_path, {name: as_trk(lines(1)) for name in names})
    settings = StreamlineSettings(num_points=8, pattern=r"(?P<subject>sub-\d+)__(?P<bundle>\w+)")
    found = rows_of(read_all(tmp_path, settings))
    assert [(row.values["subject"], row.values["bundle"], row.group) for row in found] == [
        ("sub-1175", "AF_L", "sub-1175"),
        ("sub-1175", "MCP", "sub-1175"),
        ("sub-9", "MCP", "sub-9"),
    ]
    survey = streamlines.survey([str(tmp_path)], settings)
    assert survey.ignored == {"name does not fit `pattern`": 1}
    assert survey.context["bundles"] == ["AF_L", "MCP"]
    with pytest.raises(Refused, match=r"is found in no name, such as 't/sub-1175__AF_L.trk'"):
        streamlines.survey([str(tmp_path)], StreamlineSettings(pattern="(?P<subject>nobody)"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pattern": "(unclosed"}, "no regular expression"),
        ({"pattern": r"sub-\d+"}, "needs a group"),
        ({"pattern": "(?P<who>x)"}, "needs a group"),
        ({"num_points": 1}, "greater than or equal to 2"),
        ({"chunks": 1}, "did you mean 'chunk'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, words: str) -> None:
    with pytest.raises(Refused, match=words):
        validated(StreamlineSettings, values, "corpus 'streamlines'")


def test_several_sources_are_told_apart_and_a_zip_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path, {"x/AF.trk": as_trk(lines(1)), "y/AF.trk": as_trk(lines(1))})
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("AF.trk", as_trk(lines(1)))
    survey = streamlines.survey([str(tmp_path / name) for name in ("x", "y", "z.zip")], SINGLE)
    names = [(piece.name, piece.meta["subject"]) for piece in survey.slices]
    assert names == [("x/AF.trk", "x"), ("y/AF.trk", "y"), ("z.zip/z.zip/AF.trk", "z")]


def test_nothing_to_read_is_refused_and_what_is_no_streamline_is_counted(tmp_path: Path) -> None:
    write(tmp_path, {"notes.txt": b"x", "._AF.trk": b"x"})
    with pytest.raises(Refused, match=r"holds 1 x hidden file, 1 x not a streamline file \(.txt\)"):
        streamlines.survey([str(tmp_path)], SINGLE)
    write(tmp_path, {"empty.trk": as_trk([]), "empty.tck": as_tck([]), "AF.trk": as_trk(lines(1))})
    ignored = streamlines.survey([str(tmp_path)], SINGLE).ignored
    assert ignored == {"hidden file": 1, "not a streamline file (.txt)": 1, "no streamline in it": 2}


def test_a_bucket_is_read_as_a_folder_is(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.corpora._streamline_trk.WALK_ABOVE", 0)
    files = {"s1/AF.trk": as_trk(lines(9)), "s2/AF.tck": as_tck(lines(9))}
    for name, data in files.items():
        storage.write_atomic(f"{bucket}/raw/{name}", data)
    survey = streamlines.survey([f"{bucket}/raw"], SINGLE)
    there = [
        outcome.values
        for piece in survey.slices
        for _, outcome, _ in streamlines.read(piece, survey.context, SINGLE, lambda _: True)
        if isinstance(outcome, Row)
    ]
    here = [row.values for row in rows_of(read_all(write(tmp_path, files)))]
    assert [row["name"] for row in there] == [row["name"] for row in here]
    assert np.array_equal([row["points"] for row in there], [row["points"] for row in here])


def test_without_nibabel_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nibabel.streamlines", None)
    with pytest.raises(Refused, match=r"pip install 'vqray\[streamlines\]'"):
        streamlines.survey([str(tmp_path)], SINGLE)


def test_files_that_are_written_are_read_back(tmp_path: Path) -> None:
    drawn = torch.from_numpy(np.random.default_rng(0).normal(0, 50, (2, 5, 8, 3)).astype(np.float32))
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    streamlines.write_files({"points": drawn, "real": real}, ["7", "9"], str(tmp_path), CHUNKS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7.tck", "9.tck"]
    for name, expected in (("7.tck", drawn[0]), ("9.tck", drawn[1, :2])):
        assert np.array_equal(np.stack(list(nib.streamlines.load(tmp_path / name).streamlines)), expected.numpy())
    streamlines.write_files({"points": drawn}, ["7", "9"], str(tmp_path / "all"), CHUNKS)
    assert len(nib.streamlines.load(tmp_path / "all/9.tck").streamlines) == 5
    streamlines.write_files({"points": drawn[0]}, list("34567"), str(tmp_path / "single"), SINGLE)
    [path] = (tmp_path / "single").iterdir()
    assert path.name == "3-7.tck"
    assert np.array_equal(np.stack(list(nib.streamlines.load(path).streamlines)), drawn[0].numpy())
    drawn[0, 0, 0] = torch.nan
    with pytest.raises(Failed, match="not finite"):
        streamlines.write_files({"points": drawn}, ["7", "9"], str(tmp_path), CHUNKS)


@pytest.mark.usefixtures("ray_instance")
def test_a_dirty_folder_is_ingested_to_one_digest_and_every_streamline_is_accounted_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ingest, "LEAST_PART_BYTES", 1)
    source = write(
        tmp_path / "source",
        {
            "s1/AF.trk": as_trk(lines(30)),
            "s1/CST.tck": as_tck([*lines(20), np.ones((1, 3), np.float32)]),
            "s2/AF.trk": as_trk(lines(20))[:-100],
            "s2/text.trk": b"no streamlines",
            "s2/notes.txt": b"x",
        },
    )
    made = {}
    for out in ("one", "two"):
        words = ["ingest", "--corpus", "streamlines", "--source", source, "--out", tmp_path / out, "--set"]
        words += ["rows=chunks", "chunk=8", "num_points=16", "order=shuffled"]
        assert cli.main([*map(str, words), "--max-bad-fraction", "0.1"]) == 0
        said = capsys.readouterr()
        made[out] = json.loads(said.out.splitlines()[-1])
    assert made["one"]["digest"] == made["two"]["digest"]
    reader = ShardReader(str(tmp_path / "one"))
    units = reader.manifest.units
    lost = made["one"]["quarantined"]
    assert (units.read, units.quarantined, units.filtered) == (73, lost, {"not a streamline file (.txt)": 1})
    quarantined = pa.ipc.open_file(str(tmp_path / "one/quarantine.arrow")).read_all().to_pylist()
    counts = {row["source"]: sum(other["source"] == row["source"] for other in quarantined) for row in quarantined}
    assert counts == {"s1/CST.tck": 1, "s2/AF.trk": lost - 2, "s2/text.trk": 1}
    assert made["one"]["rows"] == reader.rows() == 4 + 3 + -(-(20 - lost + 2) // 8)
    assert f"{73 - 1 - lost} kept in {reader.rows()} rows" in said.err
    seen = streamlines.tensors(values_of(reader.take("all", np.arange(reader.rows()))), CHUNKS)
    assert int(seen["real"].sum()) == units.kept == 73 - 1 - lost
    assert corpora.names().count("streamlines") == 1
