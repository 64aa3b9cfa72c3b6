"""URIs, local and s3: whole files or none, errors that name the URI and no secret."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.errors import Failed, Refused


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/a/b/../c/", "/a/c"),
        ("file:///a/b%20c", "/a/b c"),
        ("file://localhost/a", "/a"),
        ("s3://bucket/a b/", "s3://bucket/a b"),
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_every_uri_has_one_spelling(given: str, meant: str) -> None:
    assert storage.normalise(given) == meant
    assert storage.normalise(meant) == meant


def test_relative_paths_and_home_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.normalise("a/b") == str(tmp_path / "a/b")
    assert storage.normalise("~/a") == "/home/someone/a"
    assert storage.join("a", "b/c", "d") == str(tmp_path / "a/b/c/d")
    assert storage.join("s3://k/a/", "b") == "s3://k/a/b"


@pytest.mark.parametrize("given", ["gs://bucket/a", "", "file://elsewhere/a", "s3:///a", "http://host/a"])
def test_other_schemes_are_refused(given: str) -> None:
    with pytest.raises(Refused, match=r"s3://|file:///"):
        storage.normalise(given)


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(Refused) as refusal:
        storage.normalise("s3://AKIAKEY:SECRET@bucket/a")
    assert "AWS_SECRET_ACCESS_KEY" in str(refusal.value)
    assert "SECRET@" not in str(refusal.value)
    assert "AKIAKEY" not in str(refusal.value)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "s3://other/x"])
def test_a_name_cannot_leave_its_directory(name: str) -> None:
    with pytest.raises(Refused, match="does not lie below"):
        storage.join("/a", name)


@pytest.mark.parametrize(
    "read", [storage.size, storage.list_files, storage.read_bytes, storage.open_read, storage.local_copy]
)
def test_a_missing_uri_is_refused_by_name(read, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=f"{tmp_path}/gone: it does not exist"):
        read(str(tmp_path / "gone"))


def test_bytes_and_ranges(tmp_path: Path) -> None:
    uri = str(tmp_path / "deep/down/file")
    storage.write_atomic(uri, b"0123456789")
    assert (storage.read_bytes(uri), storage.size(uri)) == (b"0123456789", 10)
    assert [storage.read_bytes(uri, 2, 5), storage.read_bytes(uri, 7), storage.read_bytes(uri, None, 3)] == [
        b"234",
        b"789",
        b"012",
    ]
    with storage.open_read("file://" + uri) as file:
        file.seek(8)
        assert file.read() == b"89"
    assert storage.local_copy(uri) == Path(uri)


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        storage.write_atomic(str(tmp_path / "file"), b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_listing_is_sorted_relative_and_survives_odd_names_and_link_loops(tmp_path: Path) -> None:
    for name in ("b/2", "b/10", "a", "b.x"):
        storage.write_atomic(str(tmp_path / name), name.encode())
    (tmp_path / "b/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "c").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "there").symlink_to("back")
    (tmp_path / "back").symlink_to("there")
    os.mkfifo(tmp_path / "pipe")
    with open(os.fsencode(tmp_path) + b"/\xff", "wb"):
        pass
    listed = storage.list_files(str(tmp_path))
    files = {"\\xff": 0, "a": 1, "b.x": 3, "b/10": 4, "b/2": 3, "c/10": 4, "c/2": 3}
    links = dict.fromkeys(["back", "dangling", "itself", "there"], 0)
    assert {entry.name: entry.bytes for entry in listed} == {**files, **links}
    assert listed == sorted(listed)
    for link in links:
        with pytest.raises((Refused, Failed), match=link):
            storage.read_bytes(str(tmp_path / link))
    assert storage.read_bytes(listed[0].uri) == b""
    assert storage.read_bytes(listed[3].uri) == b"b/10"
    assert storage.list_files(str(tmp_path / "a")) == [storage.Entry("a", str(tmp_path / "a"), 1)]


def test_folders_deeper_than_python_may_call_are_listed(tmp_path: Path) -> None:
    depth = 1200  # A path has at most 4,096 bytes; what lies deeper no system call takes by name.
    handle = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=handle)
        below = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=handle))
    os.close(handle)
    try:
        assert [entry.name for entry in storage.list_files(str(tmp_path))] == ["d/" * depth + "file"]
    finally:
        subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # Deeper than shutil.rmtree may call.


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    storage.write_atomic(uri, b"old")
    with pytest.raises(TypeError), storage.writing(uri) as staged, staged.open("wb") as file:
        file.writelines([b"half", 1])  # type: ignore[list-item]
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_readers_beside_a_writer_and_after_its_kill_see_whole_files(tmp_path: Path) -> None:
    script = """
        import itertools, sys
        from pipelines import storage
        for n in itertools.count(1):
            storage.write_atomic(sys.argv[1], bytes([n % 256]) * 3_000_000)
            print(n, flush=True)
    """
    uri = str(tmp_path / "file")
    command = [sys.executable, "-c", textwrap.dedent(script), uri]
    writer = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    seen = [storage.read_bytes(uri) for _ in range(200)]
    writer.send_signal(signal.SIGKILL)
    writer.stdout.close()
    writer.wait()
    for data in [*seen, storage.read_bytes(uri)]:
        assert len(data) == 3_000_000
        assert data == data[:1] * 3_000_000
    assert len({data[0] for data in seen}) > 1


def test_disk_errors_are_failures_that_name_the_uri(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Failed, match=f"{tmp_path}/file/below"):
        storage.write_atomic(str(tmp_path / "file/below"), b"x")
    with pytest.raises(Failed, match="Is a directory"):
        storage.read_bytes(str(tmp_path))


def test_remove(tmp_path: Path) -> None:
    storage.write_atomic(str(tmp_path / "d/e/f"), b"x")
    storage.remove(str(tmp_path / "d"))
    storage.remove(str(tmp_path / "d"))
    assert not storage.exists(str(tmp_path / "d"))


def test_canonical_json_has_one_spelling_and_no_nan() -> None:
    assert storage.canonical_json({"b": [1, 0.5], "a": "é"}) == b'{"a":"\\u00e9","b":[1,0.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.canonical_json(float("nan"))


def test_json_files(tmp_path: Path) -> None:
    uri = str(tmp_path / "x.json")
    storage.write_json_atomic(uri, {"b": 1, "a": None})
    assert storage.read_json(uri) == {"a": None, "b": 1}
    storage.write_atomic(uri, b'{"a": ')
    with pytest.raises(Refused, match=r"x\.json is not JSON"):
        storage.read_json(uri)
    with pytest.raises(Refused, match="does not exist"):
        storage.read_json(uri + "n")


def test_s3_roundtrip(bucket: str, tmp_path: Path) -> None:
    storage.write_atomic(f"{bucket}/d/a", b"0123456789")
    (tmp_path / "big").write_bytes(bytes(range(256)) * 40_000)
    storage.upload(tmp_path / "big", f"{bucket}/d/e/big")
    storage.write_atomic(f"{bucket}/d-other", b"x")
    assert storage.list_files(f"{bucket}/d") == [
        storage.Entry("a", f"{bucket}/d/a", 10),
        storage.Entry("e/big", f"{bucket}/d/e/big", 10_240_000),
    ]
    assert [entry.name for entry in storage.list_files(bucket)] == ["d-other", "d/a", "d/e/big"]
    assert storage.list_files(f"{bucket}/d/a") == [storage.Entry("a", f"{bucket}/d/a", 10)]
    assert (storage.exists(f"{bucket}/d"), storage.exists(f"{bucket}/d/x")) == (True, False)
    assert [storage.read_bytes(f"{bucket}/d/a", 2, 5), storage.read_bytes(f"{bucket}/d/a", 7)] == [b"234", b"789"]
    with storage.open_read(f"{bucket}/d/e/big") as file:
        file.seek(10_239_990)
        assert file.read() == (tmp_path / "big").read_bytes()[-10:]
    assert storage.size(f"{bucket}/d/a") == 10
    storage.remove(f"{bucket}/d")
    storage.remove(f"{bucket}/d")
    assert [entry.name for entry in storage.list_files(bucket)] == ["d-other"]


def test_large_files_go_to_s3_in_parts(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    monkeypatch.setattr(storage, "MULTIPART_BYTES", 5 * 2**20)
    data = os.urandom(2**20) * 12 + b"the end"
    (tmp_path / "big").write_bytes(data)
    storage.upload(tmp_path / "big", f"{bucket}/big")
    tag = boto3.client("s3").head_object(Bucket=bucket.removeprefix("s3://"), Key="big")["ETag"]
    assert tag.strip('"').endswith("-3")
    assert storage.size(f"{bucket}/big") == len(data)
    assert storage.read_bytes(f"{bucket}/big") == data
    assert storage.read_bytes(f"{bucket}/big", 5 * 2**20 - 3, 5 * 2**20 + 3) == data[5 * 2**20 - 3 : 5 * 2**20 + 3]
    assert storage.local_copy(f"{bucket}/big", storage.sha256_of_bytes(data)).read_bytes() == data


@pytest.mark.parametrize("read", [storage.size, storage.list_files, storage.read_bytes, storage.local_copy])
def test_a_missing_s3_uri_is_refused_by_name(read, bucket: str) -> None:
    with pytest.raises(Refused, match=f"{bucket}/gone: it does not exist"):
        read(f"{bucket}/gone")
    with pytest.raises(Refused, match="s3://no-such-bucket-here/x"):
        read("s3://no-such-bucket-here/x")


def test_downloads_are_kept_by_digest_and_checked(bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/a.arrow"
    storage.write_atomic(uri, b"one")
    one, two = storage.sha256_of_bytes(b"one"), storage.sha256_of_bytes(b"two")
    kept = storage.local_copy(uri, one, tmp_path)
    assert (kept.read_bytes(), kept.name) == (b"one", "a.arrow")
    unnamed = storage.local_copy(uri, cache=tmp_path)
    storage.write_atomic(uri, b"two")
    assert storage.local_copy(uri, one, tmp_path) == kept
    assert storage.local_copy(uri, two, tmp_path).read_bytes() == b"two"
    assert storage.local_copy(uri, cache=tmp_path).read_bytes() == b"two"
    assert unnamed.read_bytes() == b"one"
    with pytest.raises(Failed, match=f"{uri} arrived with sha256 {two}"):
        storage.local_copy(uri, "0" * 64, tmp_path)
    storage.forget_copy(uri, one, tmp_path)
    assert not kept.exists()


def test_an_unreachable_store_is_a_failure_without_secrets(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    # Another test may have had answers from a store, and one that answered before is asked again for this long.
    monkeypatch.setenv("VQRAY_STORAGE_PATIENCE", "0.5")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises((Failed, Refused), match="s3://somewhere/x") as failure:
            storage.read_bytes("s3://somewhere/x")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert "very-secret" not in str(failure.value)


def test_secrets_are_cut_out_of_messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")

    def leak(*_: object, **__: object) -> int:
        raise OSError("the request signed with very-secret was not accepted")

    monkeypatch.setattr(storage.os, "stat", leak)
    with pytest.raises(Failed, match=r"signed with \$AWS_SECRET_ACCESS_KEY was"):
        storage.size("/x")
