"""A directory exists when its manifest does; the manifest is believed only when its digest, format and version fit."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.errors import Refused
from pipelines.manifest import (
    Column,
    Manifest,
    ShardRecord,
    TableRecord,
    Units,
    describe,
    load_manifest,
    save_manifest,
    to_json,
)

SHARD = ShardRecord("shard-00000-000.arrow", 10, 999, "ab" * 32, {"train": 7, "valid": 2, "test": 1})
LOG = TableRecord("log", 5, 777, "ef" * 32, Units(7, 5, 1, {"test user": 1}))
MANIFEST = Manifest(
    kind="images",
    settings={"size": 64},
    selection={"limit": None, "holdout": 0.1},
    columns={"image": Column("uint8", (3, 64, 64)), "label": Column("int64", ()), "name": Column("string", None)},
    shards=(SHARD,),
    units=Units(13, 10, 1, {"limit": 2}),
    sources="cd" * 32,
    context={"classes": ["a", "b"]},
)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    save_manifest(MANIFEST, str(tmp_path))
    loaded = load_manifest(str(tmp_path))
    assert loaded == MANIFEST
    assert loaded.digest == MANIFEST.digest == json.loads((tmp_path / "manifest.json").read_bytes())["digest"]
    assert [loaded.rows(split) for split in ("train", "valid", "test", "all")] == [7, 2, 1, 10]
    with pytest.raises(Refused, match="allowed: train, valid, test, all"):
        loaded.rows("dev")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Manifest)])
def test_the_digest_covers_every_field(field: str) -> None:
    other = {
        "kind": "vectors",
        "settings": {"size": 65},
        "selection": {"limit": 9, "holdout": 0.1},
        "columns": {},
        "shards": (dataclasses.replace(SHARD, sha256="ba" * 32),),
        "units": Units(13, 10, 2, {"limit": 1}),
        "sources": "dc" * 32,
        "parents": {"shards": "ef" * 32},
        "context": {"classes": ["b", "a"]},
        "tables": (LOG,),
    }
    assert dataclasses.replace(MANIFEST, **{field: other[field]}).digest != MANIFEST.digest


def test_side_tables_make_it_version_2_and_without_them_digests_stay_what_they_were(tmp_path: Path) -> None:
    with_log = dataclasses.replace(MANIFEST, tables=(LOG,))
    save_manifest(with_log, str(tmp_path))
    assert load_manifest(str(tmp_path)) == with_log
    assert [to_json(manifest)["version"] for manifest in (MANIFEST, with_log)] == [1, 2]
    # What version 1 wrote before there were tables.
    assert MANIFEST.digest == "558932f5ce3f49e938921215252ed2c909aa9e10d7ad04e48dfd19c6c4e97b1b"
    for name in ("../../etc/passwd", "/etc/passwd", "log.arrow", ""):
        save_manifest(dataclasses.replace(MANIFEST, tables=(dataclasses.replace(LOG, name=name),)), str(tmp_path))
        with pytest.raises(Refused, match="table name"):
            load_manifest(str(tmp_path))


def test_a_directory_without_manifest_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=rf"no manifest\.json in {tmp_path}: .*give the --out of a finished"):
        load_manifest(str(tmp_path))
    storage.write_json_atomic(str(tmp_path / "ingest.json"), {})
    with pytest.raises(Refused, match="rerun the command that began it to complete it"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "format version 3; this vqray reads 1 and 2"),
        ({"format": "other"}, "not a vqray-shards manifest .format: 'other'"),
        ({"kind": "vectors"}, "it was edited or damaged"),
        ({"digest": None}, "it was edited or damaged"),
    ],
)
def test_what_is_not_ours_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    storage.write_json_atomic(
        str(tmp_path / "manifest.json"), {**to_json(MANIFEST), "digest": MANIFEST.digest, **change}
    )
    with pytest.raises(Refused, match=words):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "shard-00000-000.arrow.x", "notes.txt"])
def test_a_shard_name_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    save_manifest(dataclasses.replace(MANIFEST, shards=(dataclasses.replace(SHARD, name=name),)), str(tmp_path))
    with pytest.raises(Refused, match="shard name"):
        load_manifest(str(tmp_path))


def test_a_manifest_with_fields_missing_is_refused(tmp_path: Path) -> None:
    content = {"format": "vqray-shards", "version": 1, "kind": "images"}
    digest = storage.sha256_of_bytes(storage.canonical_json(content))
    storage.write_json_atomic(str(tmp_path / "manifest.json"), {**content, "digest": digest})
    with pytest.raises(Refused, match="not a version 1 manifest"):
        load_manifest(str(tmp_path))
    storage.write_atomic(str(tmp_path / "manifest.json"), b"[1]")
    with pytest.raises(Refused, match="not a vqray-shards manifest"):
        load_manifest(str(tmp_path))


def test_units_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="13 units read, but 12 kept"):
        Units(13, 10, 1, {"limit": 1})


def test_columns_are_described_in_numpys_words_where_it_has_them() -> None:
    schema = pa.schema(
        {
            "image": pa.fixed_shape_tensor(pa.float16(), (3, 4)),
            "label": pa.int64(),
            "time": pa.float64(),
            "text": pa.string(),
            "ragged": pa.list_(pa.float32()),
        }
    )
    assert {name: (column.type, column.shape) for name, column in describe(schema).items()} == {
        "image": ("float16", (3, 4)),
        "label": ("int64", ()),
        "time": ("float64", ()),
        "text": ("string", None),
        "ragged": ("list<item: float>", None),
    }
