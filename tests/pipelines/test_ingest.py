"""Ingest: every unit is accounted for, any interruption ends in the same digest, nothing else shares an --out."""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import cluster, corpora, ingest, storage
from pipelines.columns import to_tensor
from pipelines.corpora import SideTable
from pipelines.errors import Failed, Refused
from pipelines.ingest import IngestResult
from pipelines.manifest import Units, load_manifest
from pipelines.reading import Selection, read_part
from pipelines.shards import ShardReader, split_of
from pipelines.tables import write_tables
from tests.pipelines.tiny_corpus import TinySettings, corpus, logged, modelled

FILES = 6
LINES = 50

pytestmark = pytest.mark.usefixtures("ray_instance")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' corpus under the name `tiny`, and parts of one file each."""
    monkeypatch.setattr(corpora, "load", {"tiny": corpus, "modelled": modelled, "logged": logged}.__getitem__)
    monkeypatch.setattr(ingest, "LEAST_PART_BYTES", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for file in range(FILES):
        lines = [f"group{file}-{n // 2} {n}" for n in range(LINES)]
        storage.write_atomic(str(tmp_path / f"source/{'ab'[file % 2]}/{file}.txt"), "\n".join(lines).encode())
    return tmp_path / "source"


def run(source: Path, out: object, settings: TinySettings | None = None, kind: str = "tiny", **rest) -> IngestResult:
    return ingest.ingest(kind, [str(source)], str(out), settings=settings or TinySettings(), **rest)


def quarantined(out: Path) -> list[tuple[str, int, str]]:
    rows = pa.ipc.open_file(str(out / "quarantine.arrow")).read_all().to_pylist()
    return [(row["source"], row["unit"], row["reason"]) for row in rows]


def test_rows_keep_source_order_and_groups_stay_in_one_split(source: Path, tmp_path: Path) -> None:
    done = run(source, tmp_path / "out")
    assert (done.rows, done.quarantined, done.filtered, done.skipped) == (FILES * LINES, 0, {}, False)
    reader = ShardReader(str(tmp_path / "out"))
    assert reader.manifest.digest == done.digest
    taken = reader.take("all", np.arange(done.rows))
    in_order = [f"group{file}-{n // 2}" for file in (0, 2, 4, 1, 3, 5) for n in range(LINES)]
    assert taken.column("text").to_pylist() == in_order
    assert np.array_equal(to_tensor(taken.column("vector"))[:, 1, 1].numpy(), np.tile(np.arange(LINES), FILES))
    splits = [("train", "valid", "test")[split] for split in taken.column("split").to_pylist()]
    assert splits == [split_of(group, 0.1) for group in in_order]
    assert len(set(taken.column("row_id").to_pylist())) == done.rows
    assert reader.manifest.context == {"letters": ["a", "b"]}
    names = pa.ipc.open_file(str(tmp_path / "out/sources.arrow")).read_all().column("name").to_pylist()
    assert names == ["a/0.txt", "a/2.txt", "a/4.txt", "b/1.txt", "b/3.txt", "b/5.txt"]


def test_running_again_is_a_no_op(source: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = run(source, tmp_path / "out", max_bad_fraction=0.5)
    assert (again.skipped, again.digest, again.rows) == (True, first.digest, first.rows)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_the_digest_depends_on_content_and_not_on_place_or_on_the_order_of_parts(source: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "one")
    moved = source.rename(tmp_path / "moved")
    assert run(moved, tmp_path / "deep/er/two").digest == first.digest
    # Reference without Ray: the same parts, last one first, in this process.
    survey = corpus.survey([str(moved)], TinySettings())
    parts = ingest._cut(survey.slices)
    selection = Selection(FILES * LINES, None, 0.1)
    shards = []
    for number in reversed(range(len(parts))):
        payload = parts[number].payload
        record = read_part(corpus, TinySettings(), survey.context, selection, str(tmp_path / "solo"), number, payload)
        shards = record["shards"] + shards
    assert [shard["sha256"] for shard in shards] == [
        shard.sha256 for shard in load_manifest(str(tmp_path / "one")).shards
    ]
    (moved / "a/0.txt").write_text((moved / "a/0.txt").read_text().replace(" 7\n", " 8\n"))
    assert run(moved, tmp_path / "three").digest != first.digest


def test_an_interrupted_ingest_redoes_only_what_is_missing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "diary").mkdir()
    settings = TinySettings(diary=str(tmp_path / "diary"))
    out = tmp_path / "out"
    first = run(source, out, settings)
    assert len(list((tmp_path / "diary").iterdir())) == FILES
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrow") if "shard-00001" in path.name}
    (out / "manifest.json").unlink()
    for part in (0, 4):
        (out / f"parts/part-0000{part}.json").unlink()
    (out / "shard-00004-000.arrow").write_bytes(b"half")
    (out / ".shard-00000-000.arrow.0123.tmp").write_bytes(b"left by a kill")
    with pytest.raises(Refused, match="rerun the command that began it"):
        load_manifest(str(out))
    second = run(source, out, settings)
    assert (second.digest, second.skipped) == (first.digest, False)
    assert len(list((tmp_path / "diary").iterdir())) == FILES + 2
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert list(out.glob(".*")) == []
    ShardReader(str(out)).take("all", np.arange(first.rows))


def test_bad_units_are_quarantined_and_all_units_are_accounted_for(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with (source / "a/0.txt").open("a") as file:
        file.write("\none\na b c\ng 1" + "0" * 40)
    (source / "notes.md").write_text("not a unit")
    settings = TinySettings(most=10**41)
    done = run(source, tmp_path / "out", settings)
    assert (done.rows, done.quarantined, done.filtered) == (300, 3, {"other files": 1})
    found = quarantined(tmp_path / "out")
    assert found[:2] == [("a/0.txt", 50, "1 words instead of 2"), ("a/0.txt", 51, "3 words instead of 2")]
    assert found[2][:2] == ("a/0.txt", 52)
    assert "column 'vector'" in found[2][2]
    units = load_manifest(str(tmp_path / "out")).units
    assert (units.read, units.kept, units.quarantined) == (304, 300, 3)
    log = capsys.readouterr().err.splitlines()
    assert any(line.startswith("303 units in 6 files (") for line in log)
    (start,) = [n for n, line in enumerate(log) if line.startswith("304 units: 300 rows (train ")]
    assert log[start].endswith("), 3 quarantined, 1 left out")
    assert log[start + 1] == "quarantined, the reasons, each with a unit of its kind:"
    assert log[start + 2].split() == ["1", "x", "1", "words", "instead", "of", "2", "a/0.txt"]
    assert log[start + 3].split() == ["1", "x", "3", "words", "instead", "of", "2", "a/0.txt"]
    assert log[start + 5] == f"all of them are in {tmp_path}/out/quarantine.arrow (source, unit, reason)"
    assert log[start + 6] == "left out: 1 x other files"
    assert log[start + 7].startswith(f"in {tmp_path}/out: 6 shards, ")
    assert len(log) == start + 8
    run(source, tmp_path / "out", settings)
    assert capsys.readouterr().err.splitlines() == log[start:]


def test_of_many_reasons_the_three_commonest_are_told(source: Path, tmp_path: Path, capsys) -> None:
    with (source / "a/0.txt").open("a") as file:
        file.write("".join("\n" + "word " * (3 + n) for n in range(5) for _ in range(5 - n)))
    run(source, tmp_path / "out")
    log = capsys.readouterr().err.splitlines()
    (start,) = [n for n, line in enumerate(log) if line.startswith("quarantined, the commonest of 5 reasons")]
    assert [line.split()[:3] for line in log[start + 1 : start + 4]] == [
        [f"{5 - n}", "x", f"{3 + n}"] for n in range(3)
    ]
    assert log[start + 4].startswith("all of them are in ")


def test_units_of_many_rows_are_counted_as_units(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with (source / "a/0.txt").open("a") as file:
        file.write("\ng 1,2,3\ng 4,5\nbad")
    done = run(source, tmp_path / "out")
    units = load_manifest(str(tmp_path / "out")).units
    assert (done.rows, units.read, units.kept, units.quarantined) == (305, 303, 302, 1)
    assert "303 units: 302 kept in 305 rows (train" in capsys.readouterr().err
    # Parts of 50 units that finished before, and 3 more; of rows there would be 6 more.
    with pytest.raises(Failed, match=r"1 of (5|10|15|20|25|30)3 units looked at could not be read"):
        run(source, tmp_path / "other", max_bad_fraction=0)


def test_settings_that_the_survey_found_are_those_of_the_ingest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def survey(sources: list[str], settings: TinySettings) -> corpora.Survey:
        return replace(corpus.survey(sources, settings), settings={"scale": 3.0})

    monkeypatch.setattr(corpora, "load", lambda kind: replace(corpus, survey=survey))
    found = run(source, tmp_path / "found")
    assert load_manifest(str(tmp_path / "found")).settings["scale"] == 3.0
    monkeypatch.undo()
    monkeypatch.setattr(corpora, "load", lambda kind: corpus)
    monkeypatch.setattr(ingest, "LEAST_PART_BYTES", 1)
    assert run(source, tmp_path / "given", TinySettings(scale=3.0)).digest == found.digest


def test_named_settings_filter_and_are_counted(source: Path, tmp_path: Path) -> None:
    done = run(source, tmp_path / "out", TinySettings(most=39), limit=100)
    taken = ShardReader(str(tmp_path / "out")).take("all", np.arange(done.rows))
    assert done.filtered["limit"] == 200
    assert done.filtered["most"] + done.rows == 100
    assert to_tensor(taken.column("vector")).max() <= 39


def test_too_many_bad_units_fail_with_count_share_and_reasons_and_can_be_allowed(source: Path, tmp_path: Path) -> None:
    with (source / "b/5.txt").open("a") as file:
        file.write("\nx" * 60 + "\nx y z" * 40)
    out = tmp_path / "out"
    with pytest.raises(Failed, match=r"100 of \d+ units .*60 x 1 words instead of 2; 40 x 3 words") as failure:
        run(source, out)
    assert f"{out}/quarantine.arrow" in str(failure.value)
    assert len(quarantined(out)) == 100
    assert not (out / "manifest.json").exists()
    done = run(source, out, max_bad_fraction=0.25)
    assert (done.rows, done.quarantined) == (300, 100)
    with pytest.raises(Failed, match=r"100 of 400 units looked at could not be read \(25\.0%\)"):
        run(source, tmp_path / "other", max_bad_fraction=0.2499)


def test_what_a_setting_filters_does_not_dilute_the_share_of_bad_units(source: Path, tmp_path: Path) -> None:
    with (source / "a/0.txt").open("a") as file:
        file.write("\nx" * 3)
    with pytest.raises(Failed, match=r"3 of 33 units looked at could not be read \(9\.1%\)"):
        run(source, tmp_path / "out", TinySettings(most=4))


def test_nothing_kept_is_a_failure_that_says_why(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"not one row was kept: 0 units were bad, and left out were {'most': 300}"):
        run(source, tmp_path / "out", TinySettings(most=-1))
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("vanish", r"a/0\.txt: .* 50 of 51 units"),
        ("crash", r"part 0 \(a/0\.txt unit 0 to a/0\.txt unit 50\) ended with ZeroDivisionError: a bug"),
    ],
)
def test_a_bug_in_a_corpus_is_a_failure_that_names_it(line: str, words: str, source: Path, tmp_path: Path) -> None:
    with (source / "a/0.txt").open("a") as file:
        file.write(f"\n{line}")
    with pytest.raises(Failed, match=words):
        run(source, tmp_path / "out")


def test_the_same_out_is_refused_to_other_requests_naming_the_difference(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    for change, words in [
        ({"settings": TinySettings(scale=2.0)}, r"settings\.scale: 1\.0 -> 2\.0"),
        ({"limit": 5}, "limit: None -> 5"),
        ({"holdout": 0.2}, r"holdout: 0\.1 -> 0\.2"),
    ]:
        with pytest.raises(Refused, match=words):
            run(source, out, **change)
    storage.write_atomic(str(source / "a/new.txt"), b"g 1")
    with pytest.raises(Refused, match=r"sources\.names: 6 -> 7"):
        run(source, out)


def test_requests_that_make_no_sense_are_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for change, words in [
        ({"limit": 0}, "limit=0"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction=1.5"),
        ({"holdout": 0.5}, "holdout=0.5"),
    ]:
        with pytest.raises(Refused, match=words):
            run(source, out, **change)
    with pytest.raises(Refused, match="gone: it does not exist"):
        run(tmp_path / "gone", out)
    with pytest.raises(Refused, match="lies inside the source"):
        run(source, source / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="nothing of the kind 'tiny'"):
        run(tmp_path / "empty", out)
    assert not out.exists()
    storage.write_atomic(str(out / "thesis.tex"), b"")
    with pytest.raises(Refused, match="holds other files"):
        run(source, out)


@pytest.mark.slow
def test_a_model_is_loaded_once_an_actor_and_a_killed_one_is_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "diary").mkdir()
    with (source / "a/2.txt").open("a") as file:
        file.write("\nkill\n")
    settings = TinySettings(diary=str(tmp_path / "diary"), scale=2.0)
    done = run(source, tmp_path / "out", settings, kind="modelled")
    assert (done.rows, done.quarantined) == (FILES * LINES, 1)
    marks = [path.name for path in (tmp_path / "diary").iterdir()]
    assert "killed" in marks
    loads = [name.split(".")[1] for name in marks if name.startswith("load.")]
    assert len(loads) == len(set(loads)) <= 5  # Four actors, and one in place of the killed.
    taken = ShardReader(str(tmp_path / "out")).take("all", np.arange(done.rows))
    assert np.array_equal(to_tensor(taken.column("vector"))[:, 0, 0].numpy(), np.tile(2 * np.arange(LINES), FILES))
    assert {text.split()[1] for text in taken.column("text").to_pylist()} == {"1"}
    assert run(source, tmp_path / "again", settings, kind="modelled").digest == done.digest


def test_a_model_waits_for_a_cpu_aloud_and_not_for_ever(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    @ray.remote(num_cpus=4)
    class Hog:
        def ready(self) -> bool:
            return True

    hog = Hog.remote()
    ray.get(hog.ready.remote())
    patient = cluster.require_free_cpu
    monkeypatch.setattr(cluster, "require_free_cpu", partial(patient, patience=0.5))
    try:
        for kind in ("modelled", "tiny"):
            with pytest.raises(Failed, match=r"no CPU became free within 0\.5 s; the cluster has 4"):
                run(source, tmp_path / kind, kind=kind)
            assert "waiting for a free CPU" in capsys.readouterr().err
    finally:
        ray.kill(hog)
    monkeypatch.setattr(cluster, "require_free_cpu", patient)  # Ray takes a while to see that the CPUs are free
    assert run(source, tmp_path / "modelled", kind="modelled").rows == FILES * LINES


LINE = st.sampled_from(["g 1", "g 2", "h 70", "h 80", "x", "a b c", "", "i 9" + "9" * 50])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(LINE, max_size=12), min_size=1, max_size=4), st.none() | st.integers(1, 30))
def test_every_unit_is_kept_quarantined_or_filtered(files: list[list[str]], limit: int | None) -> None:
    with tempfile.TemporaryDirectory() as home:
        for number, lines in enumerate(files):
            storage.write_atomic(f"{home}/{number}.txt", "\n".join(lines).encode())
        chosen = TinySettings(most=75 if limit is None else 10**60)
        survey = corpus.survey([home], chosen)
        units = sum(piece.stop - piece.start for piece in survey.slices)
        selection = Selection(units, limit, 0.1)
        payload = [entry for part in ingest._cut(survey.slices) for entry in part.payload]
        record = read_part(corpus, chosen, survey.context, selection, f"{home}/out", 0, payload)
    lines = [line for file in files for line in "\n".join(file).splitlines()]
    looked = [line for unit, line in enumerate(lines) if selection.wanted(unit)]
    good = [line for line in looked if len(line.split()) == 2 and int(line.split()[1]) <= chosen.most]
    huge = [line for line in good if int(line.split()[1]) > 1e38]  # It is read, and fits no float32.
    assert units == len(lines)
    assert sum(shard["rows"] for shard in record["shards"]) == len(good) - len(huge)
    assert len(record["bad"]) == len([line for line in looked if len(line.split()) != 2]) + len(huge)
    assert sum(record["filtered"].values()) == len(lines) - len(good) - len(record["bad"]) + len(huge)
    assert record["filtered"].get("limit", 0) == len(lines) - len(looked)


def test_side_tables_are_kept_beside_the_shards_with_units_of_their_own(source: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.inter"
    log.write_text("u1 30\nu2 10\ntest 5\nu1\nu1 20\n")
    settings = TinySettings(log=str(log))
    with pytest.raises(Failed, match=r"1 of 4 rows of the table 'log' looked at could not be read .*1 x no time"):
        run(source, tmp_path / "out", settings, kind="logged")
    assert quarantined(tmp_path / "out") == [("log", 3, "no time")]
    assert list((tmp_path / "out").glob("shard*")) == []
    done = run(source, tmp_path / "out", settings, kind="logged", max_bad_fraction=0.25)
    assert (done.rows, done.quarantined) == (FILES * LINES, 0)
    reader = ShardReader(str(tmp_path / "out"))
    (record,) = reader.manifest.tables
    assert (record.name, record.rows, record.units) == ("log", 3, Units(5, 3, 1, {"test user": 1}))
    assert record.sha256 == storage.sha256_of_file(tmp_path / "out/log.arrow")
    assert reader.table("log").to_pydict() == {"user": ["u2", "u1", "u1"], "time": [10, 20, 30]}
    assert quarantined(tmp_path / "out") == [("log", 3, "no time")]
    with pytest.raises(Refused, match="no table 'logs'; did you mean 'log'"):
        reader.table("logs")
    assert run(source, tmp_path / "two", settings, kind="logged", max_bad_fraction=0.25).digest == done.digest
    data = bytearray((tmp_path / "two/log.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "two/log.arrow").write_bytes(data)
    with pytest.raises(Failed, match=r"two/log\.arrow.*it is damaged"):
        ShardReader(str(tmp_path / "two")).table("log")
    (tmp_path / "out/log.arrow").unlink()
    with pytest.raises(Refused, match=r"table log\.arrow of .* is missing"):
        ShardReader(str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["sources", "quarantine", "../log", "Log", "shard", "twice"])
def test_a_table_cannot_take_the_name_of_another_file(name: str, tmp_path: Path) -> None:
    made = [SideTable("twice", pa.table({})), SideTable(name, pa.table({}))]
    with pytest.raises(Failed, match=f"a corpus named a table '{name}'"):
        write_tables(iter(made), str(tmp_path))


@pytest.mark.parametrize(("units", "limit"), [(1, 1), (7, 3), (300, 7), (100, 99), (10, 10), (10, 50), (97, None)])
def test_a_limit_takes_units_spread_evenly(units: int, limit: int | None) -> None:
    selection = Selection(units, limit, 0.1)
    taken = [g for g in range(units) if selection.wanted(g)]
    if limit is None or limit >= units:
        assert taken == list(range(units))
    else:
        assert taken == [g for g in range(units) if (g * limit) // units != ((g - 1) * limit) // units]
        assert len(taken) == limit
        assert set(np.diff(taken)) <= {units // limit, -(-units // limit)}
    assert [selection.wanted_before(g) for g in range(units + 1)] == [
        sum(t < g for t in taken) for g in range(units + 1)
    ]


def test_parts_are_runs_of_slices_and_hold_every_unit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "MOST_PART_SLICES", 3)
    monkeypatch.setattr(ingest, "LEAST_PART_BYTES", 100)
    slices = [corpora.Slice(f"/{n}", str(n), 0, n + 1, size) for n, size in enumerate([10, 200, 50, 50, 1, 1, 1, 1])]
    parts = ingest._cut(slices)
    assert [[fields["name"] for _, fields in part.payload] for part in parts] == [
        ["0"],
        ["1"],
        ["2", "3"],
        ["4", "5", "6"],
        ["7"],
    ]
    assert [first for part in parts for first, _ in part.payload] == [0, 1, 3, 6, 10, 15, 21, 28]
    assert [part.units for part in parts] == [1, 2, 7, 18, 8]


def test_from_s3_to_s3_with_a_parquet_export(source: Path, bucket: str, tmp_path: Path) -> None:
    for entry in storage.list_files(str(source)):
        storage.upload(entry.uri, f"{bucket}/raw/{entry.name}")
    local = run(source, tmp_path / "out")
    done = ingest.ingest("tiny", [f"{bucket}/raw"], f"{bucket}/out", settings=TinySettings(), parquet=True)
    assert done.digest == local.digest
    assert ShardReader(f"{bucket}/out").take("valid", np.arange(3)).num_rows == 3
    again = ingest.ingest("tiny", [f"{bucket}/raw"], f"{bucket}/out", settings=TinySettings(), parquet=True)
    assert again.skipped
    exported = [entry for entry in storage.list_files(f"{bucket}/out/parquet") if entry.name.endswith(".parquet")]
    tables = [parquet.read_table(str(storage.local_copy(entry.uri))) for entry in exported]
    whole = ShardReader(str(tmp_path / "out")).take("all", np.arange(done.rows))
    assert pa.concat_tables(tables).to_pylist() == pa.Table.from_batches([whole]).to_pylist()
