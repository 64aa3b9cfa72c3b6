"""Decoded bundles as files: nibabel and trx-python read them back, in the space of the files they came from."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import trx.trx_file_memmap as trx_python
from nibabel.streamlines import Tractogram, TrkFile

from pipelines.columns import batch_of
from pipelines.corpora import Row, streamlines
from pipelines.errors import Failed, Refused
from pipelines.manifest import SPLITS, Manifest, Units, describe, save_manifest
from pipelines.reading import Selection
from pipelines.recipes import _bundle_files as bundle_files
from pipelines.shards import ShardReader, ShardWriter
from tests.pipelines.corpora.test_streamline_formats import as_tck, as_trx, lines

POINTS, CHUNK = 8, 4
AFFINE = np.array([[-1.5, 0, 0, 90], [0, 0, 2, -126], [0, 2.5, 0, -72], [0, 0, 0, 1]])


def as_trk_in(space: np.ndarray, points: list[np.ndarray], path: Path) -> None:
    header = TrkFile.create_empty_header()
    header["voxel_to_rasmm"], header["voxel_sizes"], header["dimensions"] = space, (1.5, 2.5, 2), (121, 145, 121)
    header["voxel_order"] = b"".join(c.encode() for c in nibabel.aff2axcodes(space))
    nibabel.streamlines.save(Tractogram(points, affine_to_rasmm=np.eye(4)), str(path), header=header)


@pytest.fixture
def home(tmp_path) -> Path:
    folder = tmp_path / "bundles"
    (folder / "sub").mkdir(parents=True)
    as_trk_in(AFFINE, lines(11), folder / "sub" / "AF.trk")
    (folder / "CST.tck").write_bytes(as_tck(lines(3, 1)))
    (folder / "CC.trx").write_bytes(as_trx(lines(6, 2)))
    return folder


def shards_of(home: Path, out: Path) -> ShardReader:
    """What an ingest makes of the files; half of the streamlines for the test split."""
    settings = streamlines.StreamlineSettings(rows="chunks", num_points=POINTS, chunk=CHUNK, split_by="streamline")
    selection = Selection(20, None, 0.5)
    survey = streamlines.survey([str(home)], settings)
    survey = streamlines.prepare(survey, settings, selection.wanted, selection.split_of)
    rows = [
        row
        for piece in survey.slices
        for _, row, _ in streamlines.read(piece, survey.context, settings, lambda _: True)
        if isinstance(row, Row)
    ]
    schema = streamlines.schema(settings)
    with ShardWriter(str(out), 0, schema) as writer:
        splits = np.array([SPLITS.index(row.split) for row in rows], np.int8)
        writer.write(batch_of([row.values for row in rows], schema), splits)
    units, selected = Units(20, 20, 0, {}), {"limit": None, "holdout": 0.5}
    found = Manifest(
        "streamlines", settings.model_dump(mode="json"), selected, describe(schema), tuple(writer.records), units, ""
    )
    save_manifest(found, str(out))
    return ShardReader(str(out))


def itself(batch):
    """A decoder that loses nothing."""
    yield from enumerate(batch.columns["points"])


def read_back(path: Path) -> list[np.ndarray]:
    if path.suffix == ".trx":
        return [np.array(line) for line in trx_python.load(str(path)).streamlines]
    return list(nibabel.streamlines.load(str(path)).streamlines)


def test_a_file_is_written_when_its_last_row_is_decoded(home, tmp_path):
    reader, out = shards_of(home, tmp_path / "shards"), tmp_path / "out"
    there = []

    def decoded(batch):
        for pair in itself(batch):
            yield pair
            there.append(sum(path.is_file() for path in out.rglob("*")))

    bundle_files.write_decoded(reader, "test", (str(home),), decoded, str(out))
    assert there == sorted(there)
    assert set(there) >= {1, 2, 3}, "one after the other, not all at the end"


def test_a_row_that_is_not_decoded_costs_its_own_file_and_is_said(home, tmp_path):
    reader, out = shards_of(home, tmp_path / "shards"), tmp_path / "out"
    left_out = iter([True])

    def decoded(batch):
        yield from (pair for pair in itself(batch) if not next(left_out, False))

    with pytest.raises(Failed, match=r"1 of 3 files, such as '.*', have rows that were not decoded"):
        bundle_files.write_decoded(reader, "test", (str(home),), decoded, str(out))
    assert sum(path.is_file() for path in out.rglob("*")) == 2


def test_files_hold_the_streamlines_of_the_split_in_their_order_and_space(home, tmp_path):
    reader, out = shards_of(home, tmp_path / "shards"), tmp_path / "out"
    assert bundle_files.write_decoded(reader, "test", (str(home),), itself, str(out)) == 3
    seen = 0
    for name in ("sub/AF.trk", "CST.tck", "CC.trx"):
        single = streamlines.StreamlineSettings(num_points=POINTS)
        survey = streamlines.survey([str(home)], single)
        [piece] = [one for one in survey.slices if one.name == name]
        expected = [
            row.values["points"]
            for unit, row, _ in streamlines.read(piece, survey.context, single, lambda _: True)
            if Selection(20, None, 0.5).split_of(f"{name}#{unit}", None) == "test"
        ]
        found = read_back(out / "decoded" / name)
        assert len(found) == len(expected) > 0
        for line, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(line, other, atol=2e-5)
        seen += len(found)
    rows = reader.take("test", np.arange(reader.rows("test")), ("real",))
    assert seen == int(np.sum(rows.column("real").to_numpy_ndarray()))
    before, after = (nibabel.streamlines.load(str(root / "sub/AF.trk")).header for root in (home, out / "decoded"))
    for key in ("voxel_to_rasmm", "voxel_sizes", "dimensions", "voxel_order"):
        np.testing.assert_array_equal(after[key], before[key])
    spaces = [trx_python.load(str(root / "CC.trx")).header for root in (home, out / "decoded")]
    for key in ("VOXEL_TO_RASMM", "DIMENSIONS"):
        np.testing.assert_array_equal(spaces[1][key], spaces[0][key])


def test_a_source_without_the_files_is_refused_before_work(home, tmp_path):
    reader = shards_of(home, tmp_path / "shards")
    bundle_files.check_sources(reader, "test", (str(home),))
    (home / "CC.trx").unlink()
    with pytest.raises(Refused, match=r"1 of the 3 files of these shards, such as 'CC\.trx'"):
        bundle_files.check_sources(reader, "test", (str(home),))


def test_decoded_streamlines_are_those_of_the_decoder(home, tmp_path):
    reader, out = shards_of(home, tmp_path / "shards"), tmp_path / "out"

    def moved(batch):
        for row, points in enumerate(batch.columns["points"]):
            yield row, points + torch.tensor([1.0, 2.0, 3.0])

    bundle_files.write_decoded(reader, "test", (str(home),), moved, str(out))
    bundle_files.write_decoded(reader, "test", (str(home),), itself, str(tmp_path / "plain"))
    for one, other in zip(*(read_back(p / "decoded/CST.tck") for p in (out, tmp_path / "plain")), strict=True):
        np.testing.assert_allclose(one - other, np.tile([1, 2, 3], (POINTS, 1)), atol=1e-4)
