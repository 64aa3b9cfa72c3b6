"""Items to embeddings, and a log in which every line is accounted for and every event has its place and its split."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel

from jobs import cli
from pipelines.columns import batch_of, values_of
from pipelines.corpora import Bad, Filtered, Row, SideTable, items
from pipelines.corpora import _item_files as files
from pipelines.corpora.items import ItemSettings
from pipelines.errors import Refused
from tests.pipelines.corpora import tiny_language_models as tiny

TITLES = {"a": "the cat sat", "b": "good film", "c": "bad dog, bad mat", "d": "the film and the dog"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("models") / "bert"))


def table(path: Path, rows: Iterable[dict[str, Any]], delimiter: str = ",") -> Path:
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def catalog(home: Path, titles: dict[str, str] = TITLES) -> Path:
    table(home / "films.csv", ({"item_id": item, "title": title} for item, title in titles.items()))
    return home


def events(home: Path, rows: Iterable[tuple[Any, ...]], columns: str = "user_id item_id timestamp") -> Path:
    table(home / "log.csv", (dict(zip(columns.split(), row, strict=True)) for row in rows))
    return home


def read_all(source: Path, model: str, **settings: Any) -> list[Row | Bad | Filtered]:
    chosen = ItemSettings(model=model, **settings)
    found = items.survey([str(source)], chosen)
    chosen = chosen.model_copy(update=found.settings)
    shared = items.setup(chosen)
    rows = []
    for piece in found.slices:
        units = list(items.read(piece, found.context, chosen, lambda _: True, shared))
        assert [unit for unit, _, _ in units] == list(range(piece.stop - piece.start))
        rows += [row for _, row, _ in units]
    return rows


def log_of(source: Path, model: str, **settings: Any) -> SideTable:
    [log] = items.tables([str(source)], ItemSettings(model=model, **settings))
    return log


def lines(log: SideTable, *columns: str) -> list[tuple[Any, ...]]:
    splits = ["train", "valid", "test"]
    rows = [{**row, "split": splits[row["split"]]} for row in log.table.to_pylist()]
    return [tuple(row[name] for name in columns) for row in rows]


def test_an_item_is_the_mean_of_the_last_layer_over_its_tokens(tmp_path: Path, model: str) -> None:
    rows = read_all(catalog(tmp_path), model)
    tokens = tiny.tokenizer()
    bare = AutoModel.from_pretrained(model)
    for (item, title), row in zip(TITLES.items(), rows, strict=True):
        assert isinstance(row, Row)
        assert (row.values["item"], row.values["text"], row.group, row.split) == (item, title, item, None)
        with torch.inference_mode():
            states = bare(**tokens(title, return_tensors="pt")).last_hidden_state[0]
        assert np.allclose(row.values["embedding"], states.mean(0).numpy(), atol=1e-5)
    settings = ItemSettings(model=model, width=tiny.WIDTH)
    made = values_of(batch_of([row.values for row in rows if isinstance(row, Row)], items.schema(settings)))
    assert items.tensors(made, settings)["embedding"].shape == (4, tiny.WIDTH)
    normal = read_all(tmp_path, model, normalise=True)
    norms = [np.linalg.norm(row.values["embedding"]) for row in normal if isinstance(row, Row)]
    assert np.allclose(norms, 1)


def test_width_and_digest_are_kept_so_that_shards_are_read_without_the_model(tmp_path: Path, model: str) -> None:
    chosen = ItemSettings(model=model)
    kept = chosen.model_copy(update=items.survey([str(catalog(tmp_path))], chosen).settings).model_dump(mode="json")
    assert kept["width"] == tiny.WIDTH
    assert model not in str(kept)
    assert items.shapes(ItemSettings.model_validate(kept)) == {"embedding": [tiny.WIDTH]}
    other = str(tiny.save(tmp_path / "other", seed=1))
    with pytest.raises(Refused, match="another model than these settings were made with"):
        items.survey([str(tmp_path)], ItemSettings(model=other, model_digest=kept["model_digest"]))
    with pytest.raises(Refused, match=r"width=7 was given; this model has 16"):
        items.survey([str(tmp_path)], ItemSettings(model=model, width=7))
    with pytest.raises(Refused, match="no model was named: --set model=FOLDER"):
        items.survey([str(tmp_path)], ItemSettings())
    with pytest.raises(Refused, match="ingest first"):
        items.shapes(ItemSettings())


def test_text_is_joined_from_the_columns_that_are_asked_for(tmp_path: Path, model: str) -> None:
    rows = [
        {"id": 7, "title": " the\ncat ", "brand": "", "parts": "['good', \"bad\"]", "year": 1995},
        {"id": 8, "title": "[mat]", "brand": "dog", "parts": "[]", "year": 1996},
    ]
    path = table(tmp_path / "x.csv", rows)

    def texts(**settings: Any) -> list[Any]:
        return [row.values["text"] for row in read_all(path, model, **settings) if isinstance(row, Row)]

    assert texts() == ["the cat. good bad. 1995", "[mat]. dog. []. 1996"]
    assert texts(text=("parts", "Title")) == ["good bad. the cat", "[]. [mat]"]
    assert texts(text="title") == ["the cat", "[mat]"]
    with pytest.raises(Refused, match=r"no column 'name' of text; .*brand, parts, title, year"):
        read_all(path, model, text="name")


def test_json_of_items_in_its_three_forms(tmp_path: Path, model: str) -> None:
    given = {item: {"title": title, "parts": ["good", "bad"]} for item, title in TITLES.items()}
    texts = [f"{title}. good bad" for title in TITLES.values()]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "items.json").write_text(json.dumps(given))
    rows = [{"asin": item, **record} for item, record in given.items()]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "items.json").write_text(json.dumps(rows))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "items.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    for form in "abc":
        found = read_all(tmp_path / form, model)
        assert [(row.values["item"], row.values["text"]) for row in found if isinstance(row, Row)] == [
            *zip(TITLES, texts, strict=True)
        ]


def test_a_large_json_is_several_slices(tmp_path: Path, model: str) -> None:
    records = {str(n): {"title": f"film {n}"} for n in range(600)}
    (tmp_path / "items.json").write_text(json.dumps(records))
    settings = ItemSettings(model=model)
    pieces = items.survey([str(tmp_path)], settings).slices
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 256), (256, 512), (512, 600)]
    [(unit, found, _)] = files.read_items(pieces[1], lambda unit: unit == 3)
    assert (unit, found) == (3, files.Item("items.json/259", "259", "film 259"))


def test_dirty_items_each_have_a_reason(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_bytes(b"item_id,title\na,cat\na,dog\n,cat\nb,\nc,\xff\nd\ne,mat\n")
    (tmp_path / "b.jsonl").write_text('{"item": "f", "title": "cat"}\n[1]\nnothing\n{"item": {}, "title": "x"}\n')
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.json").write_text("3")
    (tmp_path / "e.csv").write_bytes(b"")
    (tmp_path / "f.md").write_text("x")
    reasons = [row.reason if isinstance(row, Bad) else None for row in read_all(tmp_path, model)]
    assert reasons == [
        *[None, "an item of this id came before", "it has no item id", "the item has no text", "not UTF-8 text"],
        *["it has fewer fields than the header", None],
        *[None, "not a record of an item", "not a line of JSON", "it has no item id"],
        "not JSON of items: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "not JSON of items: it is neither a list of items nor an object of them by id",
        "the file is empty",
    ]
    (tmp_path / "g.json").write_text(json.dumps({"z": {"title": "cat"}}))
    monkeypatch.setattr(files, "MOST_JSON_BYTES", 10)
    [bad] = read_all(tmp_path / "g.json", model)
    assert isinstance(bad, Bad)
    assert "23 bytes are more than 10; write a record a line (.jsonl)" in bad.reason


def test_an_embedding_that_is_not_finite_is_bad(tmp_path: Path, model: str) -> None:
    settings = ItemSettings(model=model)
    found = items.survey([str(catalog(tmp_path))], settings)
    shared = items.setup(settings)
    with torch.no_grad():
        shared.model.embeddings.word_embeddings.weight[tiny.VOCABULARY.index("cat")] = np.inf
    rows = [row for _, row, _ in items.read(found.slices[0], found.context, settings, lambda _: True, shared)]
    assert [type(row) for row in rows] == [Bad, Row, Row, Row]
    assert rows[0] == Bad("films.csv/0", "its embedding is not finite")


def test_sources_without_items_are_refused(tmp_path: Path, model: str) -> None:
    (tmp_path / "x.md").write_text("x")
    with pytest.raises(Refused, match=r"no items in .* it holds 1 x not a table \(\.md\)"):
        read_all(tmp_path, model)
    with pytest.raises(Refused, match=r"there are logs \(log\.csv\) but no table of items"):
        read_all(events(tmp_path, [("u", "a", 1)]), model)
    assert list(items.tables([str(catalog(tmp_path / "films"))], ItemSettings(model=model))) == []


def test_every_line_of_the_log_is_an_event_or_has_a_reason(tmp_path: Path, model: str) -> None:
    catalog(tmp_path)
    (tmp_path / "log.csv").write_bytes(
        b"user_id,item_id,timestamp,rating\n"
        b"u,a,5,1\n,a,1,1\nu,,1,1\nu,a,soon,1\nu,a,2,high\nu,\xff,1,1\nu,b\nu,zzz,3,1\n\nv,b,4,\nu,b,inf,1\nv,c,1970-01-01,2.5\n"
    )
    log = log_of(tmp_path, model, log_holdout=0)
    assert lines(log, "user", "item", "time", "rating", "position", "split") == [
        ("v", "c", 0.0, 2.5, 0, "train"),
        ("v", "b", 4.0, None, 1, "train"),
        ("u", "a", 5.0, 1.0, 0, "train"),
    ]
    assert [(unit, bad.source, bad.reason) for unit, bad in log.bad] == [
        (1, "log.csv/1", "it has no user"),
        (2, "log.csv/2", "it has no item"),
        (3, "log.csv/3", "its time is no number and no date"),
        (4, "log.csv/4", "its rating is no number"),
        (5, "log.csv/5", "not UTF-8 text"),
        (6, "log.csv/6", "it has fewer fields than the header"),
        (9, "log.csv/9", "its time is no number and no date"),
    ]
    assert log.filtered == {"item without text": 1}
    assert log.table.num_rows + len(log.bad) + sum(log.filtered.values()) == 11


def random_log(home: Path, count: int = 400, seed: int = 0) -> list[tuple[str, str, int]]:
    draw = np.random.default_rng(seed)
    titles = {f"i{n}": "cat" for n in range(40)}
    catalog(home, titles)
    users, chosen, times = draw.integers(0, 50, count), draw.integers(0, 40, count), draw.permutation(count)
    rows = [(f"u{a}", f"i{b}", int(c)) for a, b, c in zip(users, chosen, times, strict=True)]
    events(home, rows)
    return rows


def test_by_time_the_last_tenth_is_test_and_the_one_before_it_valid(tmp_path: Path, model: str) -> None:
    rows = random_log(tmp_path)
    log = log_of(tmp_path, model)
    ordered = sorted(rows, key=lambda row: row[2])
    expected = [(*row, "train" if n < 320 else "valid" if n < 360 else "test") for n, row in enumerate(ordered)]
    assert lines(log, "user", "item", "time", "split") == expected
    seen: Counter[str] = Counter()
    for user, position in lines(log, "user", "position"):
        assert position == seen[user]
        seen[user] += 1


def test_events_of_one_moment_are_in_one_split(tmp_path: Path, model: str) -> None:
    events(catalog(tmp_path), [("u", "a", n // 4) for n in range(10)])
    splits = lines(log_of(tmp_path, model, log_holdout=0.2), "time", "split")
    assert splits == [(0.0, "train")] * 4 + [(1.0, "valid")] * 4 + [(2.0, "test")] * 2


@pytest.mark.parametrize("timed", [True, False])
def test_leave_one_out_takes_the_last_event_of_each_user(tmp_path: Path, model: str, timed: bool) -> None:
    rows = random_log(tmp_path)
    if not timed:
        events(tmp_path, [row[:2] for row in rows], "user_id item_id")
    by_user: dict[str, list[str]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]) if timed else rows:
        by_user.setdefault(user, []).append(item)
    found: dict[str, list[tuple[int, str, str]]] = {}
    for user, *rest in lines(log_of(tmp_path, model, log_split="leave_one_out"), "user", "position", "item", "split"):
        found.setdefault(user, []).append(tuple(rest))
    for user, sequence in by_user.items():
        splits = (["train"] * len(sequence) + ["valid", "test"])[2:] if len(sequence) > 1 else ["test"]
        assert sorted(found[user]) == [*zip(range(len(sequence)), sequence, splits, strict=True)]


@pytest.mark.parametrize("core", [2, 5, 8])
def test_core_leaves_users_and_items_with_enough_events_and_drops_no_more(tmp_path, model, core) -> None:
    rows = random_log(tmp_path)
    kept = list(rows)
    while True:
        users, chosen = Counter(row[0] for row in kept), Counter(row[1] for row in kept)
        fewer = [row for row in kept if users[row[0]] >= core and chosen[row[1]] >= core]
        if len(fewer) == len(kept):
            break
        kept = fewer
    log = log_of(tmp_path, model, core=core)
    assert sorted(lines(log, "user", "item", "time")) == sorted(kept)
    assert log.filtered.get("core", 0) == len(rows) - len(kept)
    found = read_all(tmp_path, model, core=core)
    left = {row.values["item"] for row in found if isinstance(row, Row)}
    assert left == {row[1] for row in kept}
    assert all(row == Filtered("core") for row in found if not isinstance(row, Row))


def test_items_first_seen_in_test_are_test_rows(tmp_path: Path, model: str) -> None:
    events(catalog(tmp_path), [("u", "a", n) for n in range(8)] + [("u", "b", 8), ("u", "a", 9), ("v", "c", 10)])
    rows = read_all(tmp_path, model, log_holdout=0.2)
    splits = {row.values["item"]: row.split for row in rows if isinstance(row, Row)}
    assert splits == {"a": "train", "b": "test", "c": "test", "d": None}


def test_cold_items_are_in_the_log_as_if_they_were_new(tmp_path: Path, model: str) -> None:
    rows = random_log(tmp_path)
    log, plain = log_of(tmp_path, model, cold_items=0.3), log_of(tmp_path, model)
    cold = {row.values["item"] for row in read_all(tmp_path, model, cold_items=0.3) if row.split == "test"}
    assert 5 <= len(cold) <= 20
    expected = [row for row in lines(plain, "user", "item", "time", "split") if row[1] not in cold or row[3] == "test"]
    assert lines(log, "user", "item", "time", "split") == expected
    assert log.filtered == {"cold_items": len(rows) - len(expected)}


def test_histories_of_a_user_are_one_sequence(tmp_path: Path, model: str) -> None:
    """Windows of the last three of a a b c d a a b; the targets of valid.csv and test.csv are the official splits."""
    catalog(tmp_path)
    columns = ("user_id", "history_item_id", "item_id")

    def write(name: str, rows: list[tuple[str, str, str]]) -> None:
        table(tmp_path / f"{name}.csv", (dict(zip(columns, row, strict=True)) for row in rows))

    write(
        "valid", [("u", "['a', 'a', 'b']", "c"), ("u", '["a", "b", "c"]', "d"), ("v", "['d']", "b"), ("w", "oops", "b")]
    )
    broken = ("u", "[d, 1", "b")
    write("test", [("u", "b c d", "a"), ("u", "['c', 'd', 'a']", "a"), broken, ("u", "['d','a','a']", "b")])
    log = log_of(tmp_path, model)
    assert lines(log, "user", "item", "position", "split") == [
        *[("u", "a", 0, "train"), ("u", "a", 1, "train"), ("u", "b", 2, "train"), ("v", "d", 0, "train")],
        *[("u", "c", 3, "valid"), ("u", "d", 4, "valid"), ("v", "b", 1, "valid"), ("w", "b", 0, "valid")],
        *[("u", "a", 5, "test"), ("u", "a", 6, "test"), ("u", "b", 7, "test")],
    ]
    assert lines(log, "time", "rating") == [(None, None)] * 11
    assert [(unit, bad.reason) for unit, bad in log.bad] == [(6, "its history is no list of items")]
    assert log.filtered == {"item without text": 1}


def test_recbole_files_have_types_in_their_headers_and_no_quotes(tmp_path: Path, model: str) -> None:
    (tmp_path / "x.item").write_text('item_id:token\ttitle:token_seq\tyear:float\n1\t"Great" film\t1995\n2\tmat\t\n')
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (tmp_path / "x.inter").write_text(f"{header}\n7\t1\t3\t5\n7\t2\t4\t2\n")
    (tmp_path / "x.user").write_text("user_id:token\n7\n")
    rows = [row.values["text"] for row in read_all(tmp_path, model) if isinstance(row, Row)]
    assert rows == ['"Great" film. 1995', "mat"]
    log = log_of(tmp_path, model, log_split="leave_one_out")
    assert lines(log, "user", "item", "time", "rating", "split") == [
        ("7", "2", 2.0, 4.0, "valid"),
        ("7", "1", 5.0, 3.0, "test"),
    ]
    (tmp_path / "x.train.inter").write_text("user_id:token\titem_id:token\n8\t2\n")
    (tmp_path / "x.inter").rename(tmp_path / "x.test.inter")
    assert lines(log_of(tmp_path, model), "user", "split") == [("8", "train"), ("7", "test"), ("7", "test")]


def test_other_tsv_has_quotes(tmp_path: Path, model: str) -> None:
    (tmp_path / "films.tsv").write_text('item_id\ttitle\n1\t"good\nfilm"\n2\tmat\n')
    (tmp_path / "log.tsv").write_text('user_id\titem_id\n"a\nb"\t1\n')
    assert [row.values["text"] for row in read_all(tmp_path, model) if isinstance(row, Row)] == ["good film", "mat"]
    assert lines(log_of(tmp_path, model), "user", "item") == [("a\nb", "1")]


def test_parquet_logs_and_other_column_names(tmp_path: Path, model: str) -> None:
    pq.write_table(pa.table({"film": [1, 2], "words": ["cat", "mat"]}), tmp_path / "films.parquet")
    when = pa.array([2, 1], pa.timestamp("s"))
    pq.write_table(pa.table({"who": ["u", "u"], "film": [1, 2], "when": when}), tmp_path / "log.parquet")
    names = {"user": "who", "item": "film", "time": "when"}
    log = log_of(tmp_path, model, log_holdout=0, **names)
    assert lines(log, "user", "item", "time") == [("u", "2", 1.0), ("u", "1", 2.0)]
    assert [row.values["item"] for row in read_all(tmp_path, model, **names) if isinstance(row, Row)] == ["1", "2"]


def test_a_split_the_log_cannot_give_is_refused(tmp_path: Path, model: str) -> None:
    events(catalog(tmp_path), [("u", "a")], "user_id item_id")
    with pytest.raises(Refused, match=r"log_split=official was given, but no log is called valid"):
        read_all(tmp_path, model, log_split="official")
    with pytest.raises(Refused, match=r"log_split=time was given, but not every event has a time"):
        read_all(tmp_path, model, log_split="time")


def test_items_have_no_files(model: str) -> None:
    with pytest.raises(Refused, match="decode with --format shards"):
        items.write_files({}, [], "x", ItemSettings(model=model))


@pytest.mark.usefixtures("ray_instance")
def test_items_and_their_log_through_the_command_line(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [("u", "a", 1), ("u", "b", 2), ("v", "zzz", 3), ("", "a", 4)]
    events(catalog(tmp_path / "data"), few + [("v", "c", 5)] * 40)
    words = ["ingest", "--corpus", "items", "--source", str(tmp_path / "data"), "--set", f"model={model}", "--out"]
    made = []
    for out in ("one", "two"):
        assert cli.main([*words, str(tmp_path / out)]) == 0
        made.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert made[0]["digest"] == made[1]["digest"]
    assert made[0]["rows"] == 4
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    [log] = manifest["tables"]
    assert (log["name"], log["rows"]) == ("log", 42)
    assert log["units"] == {"read": 44, "kept": 42, "quarantined": 1, "filtered": {"item without text": 1}}
    stored = pa.ipc.open_file(str(tmp_path / "one" / "log.arrow")).read_all()
    assert stored.column("item").to_pylist()[:2] == ["a", "b"]
