"""The registry on a database file: versions, aliases, and bundles that come back whole or not at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

from pipelines import registry, storage, tracking
from pipelines.errors import Failed, Refused
from vqcore.bundle import read_bundle, write_bundle


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One working directory for the module: making the database takes seconds."""
    home = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        patched.delenv("MLFLOW_TRACKING_URI", raising=False)
        patched.setenv("VQRAY_CACHE", str(home / "cache"))
        yield home


def bundle(directory: Path, value: float) -> Path:
    card = {
        "recipe": "plain_vq",
        "settings": {"lr": 0.1},
        "codebooks": [{"num_codes": 8, "code_dim": 4}, {"num_codes": 16, "code_dim": 4}],
        "parents": {"shards": "ab" * 32},
    }
    write_bundle(directory, {"codebook.vectors": torch.full((8, 4), value)}, card)
    return directory


@pytest.fixture(scope="module")
def cells(store: Path) -> dict[int, Path]:
    """`cells` v1 and v2, version -> the directory each was published from."""
    made = {version: bundle(store / f"made-{version}", float(version)) for version in (1, 2)}
    for version, directory in made.items():
        published = registry.publish(directory, "cells", tags={"by": "test"})
        assert (published.name, published.version, published.skipped) == ("cells", version, False)
        assert published.digest == read_bundle(directory).digest
    return made


def stored(ref: str) -> Path:
    """Where the store keeps a version's files."""
    name, version = registry.resolve(ref)
    uri = tracking.client().get_model_version(name, str(version)).source
    return Path(unquote(urlsplit(uri).path))


def test_the_same_bundle_keeps_its_version(cells: dict[int, Path]) -> None:
    again = registry.publish(cells[1], "cells")
    assert (again.version, again.skipped) == (1, True)
    assert [entry.version for entry in registry.list_entries("cells")] == [2, 1]


def test_entries_say_what_a_version_is(cells: dict[int, Path]) -> None:
    [entry] = [entry for entry in registry.list_entries("cells") if entry.version == 2]
    assert (entry.recipe, entry.num_codes, entry.code_dim) == ("plain_vq", [8, 16], [4, 4])
    assert entry.digest == read_bundle(cells[2]).digest
    assert entry.created.endswith("+00:00")
    assert "8 x 4 + 16 x 4" in str(entry)
    tags = tracking.client().get_model_version("cells", "2").tags
    assert (tags["by"], tags["parent_shards"]) == ("test", "ab" * 32)


def test_an_alias_moves(cells: dict[int, Path]) -> None:
    first = registry.promote("cells@v1", "champion")
    assert (first.out, first.registered, first.skipped) == ("cells@champion", "cells@v1", False)
    assert registry.resolve("cells@champion") == ("cells", 1)
    assert registry.promote("cells@v1", "champion").skipped
    registry.promote("cells@v2", "champion")
    assert registry.resolve("cells@champion") == ("cells", 2)
    registry.promote("cells@champion", "stable")
    assert {entry.version: entry.aliases for entry in registry.list_entries("cells")} == {
        2: ["champion", "stable"],
        1: [],
    }


def test_pull_brings_the_very_bundle_and_a_second_pull_does_nothing(cells: dict[int, Path], tmp_path: Path) -> None:
    pulled = registry.pull("cells@v1", tmp_path / "new" / "cells")
    assert (pulled.registered, pulled.skipped) == ("cells@v1", False)
    assert Path(pulled.out) == tmp_path / "new" / "cells"
    for file in cells[1].iterdir():
        assert (Path(pulled.out) / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cells"]
    assert registry.pull("cells@v1", tmp_path / "new" / "cells").skipped


def test_pull_into_an_empty_directory(cells: dict[int, Path], tmp_path: Path) -> None:
    registry.pull("cells@v2", tmp_path)
    assert read_bundle(tmp_path).digest == read_bundle(cells[2]).digest


def test_pull_leaves_other_directories_alone(cells: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Refused, match="holds something else than cells@v1"):
        registry.pull("cells@v1", tmp_path)
    registry.pull("cells@v2", tmp_path / "two")
    with pytest.raises(Refused, match="holds something else than cells@v1"):
        registry.pull("cells@v1", tmp_path / "two")
    with pytest.raises(Refused, match="is a file"):
        registry.pull("cells@v1", tmp_path / "notes.txt")
    with pytest.raises(Refused, match="not one"):
        registry.pull("cells@v1", "s3://bucket/x")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("attack", ["plant a pickle", "flip a byte", "swap the bundle"])
def test_a_store_that_was_tampered_with_is_not_trusted(
    store: Path, cells: dict[int, Path], tmp_path: Path, attack: str
) -> None:
    name = attack.replace(" ", "-")
    registry.publish(bundle(tmp_path / "made", 3.0), name)
    home = stored(f"{name}@v1")
    if attack == "plant a pickle":
        (home / "model.pkl").write_bytes(b"\x80\x04]\x94K\x01a.")
        said = r"model\.pkl"
    elif attack == "flip a byte":
        data = bytearray((home / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (home / "model.safetensors").write_bytes(data)
        said = r"model\.safetensors.* does not match its card"
    else:
        for file in cells[1].iterdir():
            (home / file.name).write_bytes(file.read_bytes())
        said = "replaced after publication"
    with pytest.raises(Failed, match=said):
        registry.pull(f"{name}@v1", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_bundle_that_is_not_whole_is_not_published(store: Path, tmp_path: Path) -> None:
    directory = bundle(tmp_path / "made", 4.0)
    (directory / "extra.pt").write_bytes(b"x")
    with pytest.raises(Refused, match=r"extra\.pt"):
        registry.publish(directory, "broken")
    with pytest.raises(Refused, match="no 'broken'"):
        registry.list_entries("broken")


@pytest.mark.parametrize("fails", ["log_artifacts", "create_registered_model", "create_model_version"])
def test_a_publication_that_fails_half_way_leaves_no_version_and_can_be_repeated(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    from mlflow.exceptions import MlflowException

    directory, name = bundle(tmp_path / "made", 5.0), f"half-{fails}"

    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(tracking.client(), fails, fail)
        with pytest.raises(Failed, match="the disk is full"):
            registry.publish(directory, name)
    with pytest.raises(Refused):
        registry.find(f"{name}@v1")
    assert registry.publish(directory, name).version == 1
    registry.pull(f"{name}@v1", tmp_path / "out")


def test_a_second_bundle_of_one_run_leaves_the_first_ones_files_alone(store: Path, tmp_path: Path) -> None:
    run = tracking.start_run("plain_vq", "run", {}, {})
    for version in (1, 2):
        registry.publish(bundle(tmp_path / str(version), 10.0 + version), "twice", run_id=run.id)
    for version in (1, 2):
        pulled = registry.pull(f"twice@v{version}", tmp_path / f"out-{version}")
        assert pulled.digest == read_bundle(tmp_path / str(version)).digest
    assert tracking.client().get_model_version("twice", "2").run_id == run.id


def test_versions_that_are_no_bundles_are_passed_over(store: Path, cells: dict[int, Path]) -> None:
    client = tracking.client()
    client.create_registered_model("someone's model")
    client.create_model_version("someone's model", source="file:///nowhere")
    assert "someone's model" not in {entry.name for entry in registry.list_entries()}
    assert {"cells"} <= {entry.name for entry in registry.list_entries()}


def test_long_lists_are_read_page_by_page(cells: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PAGE", 1)
    assert [entry.version for entry in registry.list_entries("cells")] == [2, 1]


def test_unknown_names_and_versions_name_the_nearest(cells: dict[int, Path]) -> None:
    with pytest.raises(Refused, match=r"no 'cell'; did you mean 'cells'"):
        registry.find("cell@v1")
    with pytest.raises(Refused, match=r"'cells' has no 'v9'; .*v1"):
        registry.find("cells@v9")
    registry.promote("cells@v1", "first")
    with pytest.raises(Refused, match=r"has no 'frist'; did you mean 'first'"):
        registry.find("cells@frist")


@pytest.mark.parametrize("ref", ["cells", "cells@", "@v1", "a/b@v1", "cells@a b", "cells@v1@v2", "it's@v1", ""])
def test_what_is_no_reference_is_refused(store: Path, ref: str) -> None:
    with pytest.raises(Refused, match="write NAME@v3 or NAME@ALIAS"):
        registry.find(ref)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "-a", ".", "a b", "x" * 129, "a@b", "é"])
def test_impossible_names_are_refused_before_anything_is_logged(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match="cannot be a registry name"):
        registry.publish(tmp_path, name)


@pytest.mark.parametrize("alias", ["v3", "V12", "latest", "Latest", "a.b", "", "-x", "a b"])
def test_impossible_aliases_are_refused(alias: str) -> None:
    with pytest.raises(Refused, match="cannot be an alias"):
        registry.promote("cells@v1", alias)


def test_the_registrys_own_tags_cannot_be_set(cells: dict[int, Path]) -> None:
    with pytest.raises(Refused, match="'digest'"):
        registry.publish(cells[1], "other", tags={"digest": "0" * 64})


# local_bundle


def test_local_bundle_takes_bundles_runs_and_references(cells: dict[int, Path], tmp_path: Path) -> None:
    made = bundle(tmp_path / "run" / "bundle", 6.0)
    assert registry.local_bundle(made) == registry.local_bundle(str(tmp_path / "run")) == made
    fetched = registry.local_bundle("cells@v2")
    assert read_bundle(fetched).digest == read_bundle(cells[2]).digest
    stamp = (fetched / "card.json").stat().st_mtime_ns
    assert registry.local_bundle("cells@v2") == fetched
    assert (fetched / "card.json").stat().st_mtime_ns == stamp


def test_local_bundle_refuses_what_is_not_whole(store: Path, tmp_path: Path) -> None:
    made = bundle(tmp_path / "made", 7.0)
    (made / "x.pkl").write_bytes(b"x")
    with pytest.raises(Refused, match=r"x\.pkl"):
        registry.local_bundle(made)
    with pytest.raises(Refused, match=r"is no bundle: there is no card\.json"):
        registry.local_bundle(tmp_path)
    with pytest.raises(Refused, match="is no bundle"):
        registry.local_bundle(tmp_path / "nowhere")
    with pytest.raises(Refused, match="the registry at sqlite"):
        registry.local_bundle("nobody@v1")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of an S3-protocol server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("VQRAY_CACHE", str(tmp_path / "cache"))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bundles")
    yield "s3://bundles"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_remote_bundle_is_fetched_once_and_verified(store: Path, bucket: str, tmp_path: Path) -> None:
    made = bundle(tmp_path / "made", 8.0)
    home = f"{bucket}/run/bundle"
    for file in made.iterdir():
        storage.upload(file, f"{home}/{file.name}")
    fetched = registry.local_bundle(f"{bucket}/run")
    assert read_bundle(fetched).digest == read_bundle(made).digest
    storage.remove(f"{home}/model.safetensors")
    assert registry.local_bundle(home) == fetched
    storage.remove(str(fetched))

    storage.write_atomic(f"{home}/model.safetensors", b"other")
    with pytest.raises(Failed, match="not a whole bundle"):
        registry.local_bundle(home)
    storage.write_atomic(f"{home}/x.pkl", b"x")
    with pytest.raises(Refused, match=r"x\.pkl"):
        registry.local_bundle(home)
    assert list((tmp_path / "cache" / "bundles").iterdir()) == []
