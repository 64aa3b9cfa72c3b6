"""Bad images through the command line: what a person sees, and that nothing already made is lost."""

import gzip
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs import cli
from pipelines.columns import values_of
from pipelines.shards import ShardReader, split_of
from tests.pipelines.loops import TINY

pytestmark = pytest.mark.usefixtures("ray_instance")

SIDE = 8


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 90).convert(mode).save(file, format=kind)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def fill(home: Path) -> Path:
    """Six good pictures of several sizes, modes and formats, and five that are none."""
    home.mkdir()
    good = {
        "rgb.png": picture(),
        "grey.png": picture("L", (300, 40)),
        "palette.png": picture("P", (7, 9)),
        "see_through.webp": picture("RGBA", (33, 33), "WEBP"),
        "cmyk.jpg": picture("CMYK", (64, 48), "JPEG"),
    }
    bad = {
        "noise.jpg": bytes(range(256)) * 4,
        "cut.jpg": picture(kind="JPEG", size=(64, 64))[:600],
        "text.jpg": b"this is a text file",
        "huge.png": bomb(14_143),
    }
    for name, data in {**good, **bad}.items():
        (home / name).write_bytes(data)
    with tarfile.open(home / "some.tar", "w") as tar:
        for name, data in {"../climbs.png": picture(), "inside.png": picture()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return home


def vqray(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, dict, str]:
    """(exit code, the JSON of the last line of stdout, stderr)."""
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}, said.err


def ingest(capsys: pytest.CaptureFixture, source: Path, out: Path, *more: object) -> tuple[int, dict, str]:
    return vqray(capsys, "ingest", "--corpus", "images", "--source", source, "--out", out, *more)


def test_dirt_is_set_aside_with_its_reason_and_the_rest_becomes_rows(tmp_path, capsys):
    source, out = fill(tmp_path / "photos"), tmp_path / "shards"
    code, _, said = ingest(capsys, source, out, "--set", f"size={SIDE}")
    assert code == 1
    assert "5 of 11 units looked at could not be read (45.5%), more than max_bad_fraction allows" in said
    assert not (out / "manifest.json").exists()

    code, made, said = ingest(capsys, source, out, "--set", f"size={SIDE}", "--max-bad-fraction", 0.5)
    assert code == 0
    assert (made["rows"], made["quarantined"], made["skipped"]) == (6, 5, False)
    assert "11 units: 6 rows" in said
    listed = pa.ipc.open_file(str(out / "quarantine.arrow")).read_all().to_pylist()
    reasons = {row["source"].rsplit("/", 1)[-1]: row["reason"] for row in listed}
    assert reasons["text.jpg"] == reasons["noise.jpg"] == "not an image in JPEG, PNG, WEBP format"
    assert reasons["cut.jpg"].startswith("cut off or damaged")
    assert reasons["huge.png"] == "more than 178,956,970 pixels"
    assert reasons["climbs.png"] == "its path climbs out of the archive"
    assert not (tmp_path / "climbs.png").exists()
    rows = values_of(ShardReader(str(out)).take("all", np.arange(6)))
    assert rows["image"].shape == (6, 3, SIDE, SIDE)

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, again, said = ingest(capsys, source, out, "--set", f"size={SIDE}", "--max-bad-fraction", 0.5)
    assert (code, again["skipped"], again["digest"]) == (0, True, made["digest"])
    assert "nothing to do" in said
    code, _, said = ingest(capsys, source, out, "--set", "size=16")
    assert code == 2
    assert f"settings.size: {SIDE} -> 16" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_last_lines_about_a_mixed_and_dirty_folder_read_well(tmp_path, capsys):
    source, out = fill(tmp_path / "photos"), tmp_path / "shards"
    (source / "deep/er").mkdir(parents=True)
    (source / "deep/er/loop").symlink_to(source)
    (source / "itself.jpg").symlink_to("itself.jpg")
    for name in ("empty.png", "deep/empty.jpg", "deep/er/also empty.webp"):
        (source / name).touch()
    digits = struct.pack(">IIII", 0x803, 3, 4, 4) + bytes(48)
    (source / "deep/digits-idx3-ubyte.gz").write_bytes(gzip.compress(digits, mtime=0)[:-20])
    for name in ("notes.txt", "a.pdf", "b.pdf", ".DS_Store"):
        (source / name).write_bytes(b"%PDF")
    code, made, said = ingest(capsys, source, out, "--set", f"size={SIDE}", "--max-bad-fraction", 0.8)
    assert code == 0, said
    lines = said.splitlines()
    print("\n".join(lines))
    (start,) = [n for n, line in enumerate(lines) if line.startswith("20 units: ")]
    assert lines[start].endswith(f" {made['quarantined']} quarantined, 4 left out")
    assert made["rows"] + made["quarantined"] + 4 == 20
    assert "the file is empty" in lines[start + 2]
    assert lines[start + 2].split()[0] == "3"
    assert lines[start + 5] == f"all of them are in {out}/quarantine.arrow (source, unit, reason)"
    assert lines[start + 6].startswith("left out: 2 x not an image file (.pdf), 1 x ")
    assert lines[start + 7].startswith(f"in {out}: 1 shards")
    listed = pa.ipc.open_file(str(out / "quarantine.arrow")).read_all().num_rows
    assert listed == made["quarantined"]


@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "test"])
def test_one_image_is_a_corpus_and_is_trained_on_if_it_is_a_train_row(split, tmp_path, capsys):
    name = next(f"{n}.png" for n in range(100) if split_of(f"{n}.png", 0.1) == split)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_bytes(picture())
    code, made, _ = ingest(capsys, tmp_path / "photos", tmp_path / "shards", "--set", f"size={SIDE}")
    assert (code, made["rows"]) == (0, 1)
    out = tmp_path / "run"
    settings = [f"{key}={value}" for key, value in {**TINY["plain_vq"], "steps": 2}.items()]
    words = ("--recipe", "plain_vq", "--shards", tmp_path / "shards", "--out", out, "--set", *settings)
    code, _, said = vqray(capsys, "train", *words)
    if split == "train":
        assert code == 0
        assert (out / "bundle" / "card.json").exists()
    else:
        assert code == 2
        assert "no rows in its train split (1 in all): ingest more files or a smaller holdout" in said
        assert not out.exists()


def test_nothing_to_read_is_refused_before_work_begins(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, _, said = ingest(capsys, tmp_path / "empty", tmp_path / "shards")
    assert code == 2
    assert "it holds nothing. Allowed are folders of" in said
    code, _, said = ingest(capsys, tmp_path / "nowhere", tmp_path / "shards")
    assert code == 2
    assert f"{tmp_path / 'nowhere'}: it does not exist" in said
    code, _, said = ingest(capsys, fill(tmp_path / "photos"), tmp_path / "shards", "--set", "sise=8")
    assert code == 2
    assert "no setting 'sise'; did you mean 'size'" in said
    assert not (tmp_path / "shards").exists()
