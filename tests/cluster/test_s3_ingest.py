"""From s3 to s3 through the command line, in processes of its own: the same rows, and the keys nowhere."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from PIL import Image

from pipelines import storage
from pipelines.shards import ShardReader

ROOT = Path(__file__).parents[2]
KEY, SECRET = "AKIAVQRAYTESTKEY", "s3cr3t/with+signs-that-stand-out"
SIDE, PHOTOS = 420, 70


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Ray's own files, logs among them. Not pytest's: the path of a socket has at most 107 bytes."""
    home = Path(tempfile.mkdtemp(prefix="vqray-s3-"))
    yield home
    shutil.rmtree(home)


def photos() -> bytes:
    """A tar of noise, which no format makes smaller, with one member that is none: about 36 MiB."""
    drawn = np.random.default_rng(0)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for n in range(PHOTOS):
            data = io.BytesIO(b"no picture")
            if n != 7:
                Image.fromarray(drawn.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(data, "png", compress_level=0)
            member = tarfile.TarInfo(f"{n:03}.png")
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
    return file.getvalue()


def vqray(scratch: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process that has the keys in its environment and a Ray of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "RAY_TMPDIR": str(scratch)}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words],
        cwd=ROOT,
        env={**kept, **keys, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_from_s3_to_s3_in_parts_and_the_keys_are_nowhere(bucket: str, scratch: Path, tmp_path: Path) -> None:
    name = bucket.removeprefix("s3://")
    client = boto3.client("s3")
    packed = photos()
    large = boto3.s3.transfer.TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    client.upload_fileobj(io.BytesIO(packed), name, "raw/photos.tar", Config=large)
    tag = client.head_object(Bucket=name, Key="raw/photos.tar")["ETag"]
    assert tag.strip('"').endswith(f"-{-(-len(packed) // (5 * 2**20))}")

    ingest = ("ingest", "--corpus", "images", "--out", f"{bucket}/shards", "--set", "encoding=original")
    code, out, said = vqray(scratch, *ingest, "--source", f"{bucket}/raw")
    assert code == 0, said
    result = json.loads(out.splitlines()[-1])
    assert (result["out"], result["rows"], result["quarantined"]) == (f"{bucket}/shards", PHOTOS - 1, 1)
    assert "1 x not an image" in said
    # A shard of more than 32 MiB went up in parts, and is what the manifest says.
    reader = ShardReader(f"{bucket}/shards")
    record = max(reader.manifest.shards, key=lambda shard: shard.bytes)
    tag = client.head_object(Bucket=name, Key=f"shards/{record.name}")["ETag"]
    assert record.bytes > 2 * storage.MULTIPART_BYTES
    assert tag.strip('"').endswith(f"-{-(-record.bytes // storage.MULTIPART_BYTES)}")
    local = tmp_path / "raw"
    local.mkdir()
    (local / "photos.tar").write_bytes(packed)
    code, out, said_locally = vqray(scratch, *ingest[:4], str(tmp_path / "shards"), *ingest[5:], "--source", str(local))
    assert json.loads(out.splitlines()[-1])["digest"] == result["digest"] == reader.manifest.digest
    taken = reader.take("all", np.arange(3)).column("image").to_pylist()
    assert taken == ShardReader(str(tmp_path / "shards")).take("all", np.arange(3)).column("image").to_pylist()

    # A store that does not answer, and a bucket that is not there.
    lost = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    code, _, failed = vqray(scratch, *ingest, "--source", f"{bucket}/raw", **lost)
    assert code == 1
    assert "AWS_ENDPOINT_URL" in failed
    code, _, refused = vqray(scratch, *ingest, "--source", "s3://nobody-has-this/raw")
    assert code == 2
    assert "s3://nobody-has-this/raw: it does not exist" in refused

    everything = {
        "output": "\n".join([out, said, said_locally, failed, refused]).encode(),
        **{entry.uri: storage.read_bytes(entry.uri) for entry in storage.list_files(bucket)},
        **{str(path): path.read_bytes() for home in (scratch, tmp_path) for path in home.rglob("*") if path.is_file()},
    }
    logs = [name for name in everything if name.endswith((".log", ".out", ".err"))]
    assert len(logs) > 3
    for secret in (KEY, SECRET):
        assert [name for name, data in everything.items() if secret.encode() in data] == []
