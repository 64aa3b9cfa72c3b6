"""What a streamed run may be asked for, and whose its shards are."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import cli, train
from pipelines import alongside, storage, used
from pipelines.alongside import Alongside
from pipelines.claims import claim
from pipelines.errors import Failed, Refused
from pipelines.ingest_request import REQUEST, ask
from pipelines.recipe import load
from pipelines.request import Request, prepare
from pipelines.stream_request import Streamed, check_stream, stream_of
from tests.pipelines.loops import TINY, make_shards

NAME = "plain_vq"


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "source").mkdir()
    np.save(tmp_path / "source" / "x.npy", np.ones((40, 4), np.float32))
    return str(tmp_path / "source")


@pytest.fixture
def request_(tmp_path: Path, source: str) -> Request:
    overrides = {"num_codes": 4, "batch_size": 8, "steps": 4}
    stream = Streamed((source,), "vectors")
    return Request(NAME, str(tmp_path / "shards"), str(tmp_path / "run"), "small", overrides, stream=stream)


def test_a_run_is_known_before_there_are_shards_and_by_what_its_manifest_follows_from(request_: Request) -> None:
    first = prepare(request_)
    assert first.about["corpus"]["kind"] == "vectors"
    assert first.about["settings"]["shape"] == [4]
    assert first.about["parents"] == {}
    assert "fitted_on" not in first.about
    assert first.asked is not None
    assert first.spec.stream == {"kind": "vectors", "settings": first.about["corpus"]["settings"], "once": False}
    assert not Path(request_.shards).exists()
    assert not Path(str(request_.out)).exists()
    same = replace(request_, stream=replace(request_.stream, delete_used=True, max_bad_fraction=0.5))
    assert prepare(same).about == first.about
    for changes in ({"limit": 7}, {"holdout": 0.2}, {"preparation": {"dtype": "float16"}}):
        other = replace(request_, stream=replace(request_.stream, **changes))
        assert prepare(other).about["stream"] != first.about["stream"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sources": ()}, r"it was said how a source is read, and there is none: give --source too"),
        ({"sources": (), "corpus": None, "holdout": 0.2}, r"it was said how a source is read"),
        ({"sources": (), "corpus": None}, r"goes through finished shards, and .* holds no shards: give its --source"),
        ({"sources": ("/nowhere",)}, r"/nowhere: it does not exist"),
        ({"preparation": {"dtyp": "float16"}}, r"corpus 'vectors' has no setting 'dtyp'; did you mean 'dtype'"),
        ({"corpus": "vector"}, r"no corpus kind 'vector'; did you mean 'vectors'"),
        ({"corpus": "images"}, r"there is no image in .*not an image file"),
        ({"limit": 0}, r"limit=0 was given"),
        ({"holdout": 0.5}, r"holdout=0.5 was given"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction=2.0 was given"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(request_: Request, tmp_path: Path, changes, said) -> None:
    with pytest.raises(Refused, match=said):
        prepare(replace(request_, stream=replace(request_.stream, **changes)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_recipe_gets_only_what_it_trains_on(request_: Request) -> None:
    with pytest.raises(Refused, match=r"recipe 'rotation_trick' trains on images; .* holds vectors"):
        prepare(replace(request_, recipe="rotation_trick", overrides={}))


def test_an_unfinished_ingest_is_gone_on_with_by_its_source_alone(request_: Request, source: str) -> None:
    asked = prepare(request_).asked
    assert asked is not None
    claim(asked.out, REQUEST, asked.request, "an ingest", "--shards")
    with pytest.raises(Refused, match=r"holds an ingest that is not finished: repeat its --source"):
        prepare(replace(request_, stream=Streamed()))
    other = prepare(replace(request_, stream=replace(request_.stream, limit=5))).asked
    assert other is not None
    with pytest.raises(Refused, match=r"limit: None -> 5. Give another --shards, or repeat"):
        claim(other.out, REQUEST, other.request, "an ingest", "--shards")


def test_finished_shards_are_a_stream_too(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    request = Request(
        NAME, shards, str(tmp_path / "run"), "small", {**TINY[NAME], "steps": 4}, stream=Streamed(delete_used=True)
    )
    prepared = prepare(request)
    assert prepared.asked is None
    assert prepared.spec.stream is not None
    assert prepared.spec.stream["once"]


def test_parts_are_not_deleted_under_a_recipe_that_begins_again_or_under_another_run(
    request_: Request, tmp_path: Path
) -> None:
    assert request_.stream is not None
    found = load(NAME)
    stream = stream_of(replace(request_.stream, delete_used=True), found, request_.shards)
    (stage,) = found.stages(found.Settings(**prepare(request_).spec.settings))
    check_stream(stream, (stage,), request_.shards, "mine")
    with pytest.raises(Refused, match=r"--delete-used was given, and this recipe has the stages codebook, second"):
        check_stream(stream, (stage, replace(stage, name="second")), request_.shards, "mine")
    used.note_reading(request_.shards, "another", 3)
    with pytest.raises(Refused, match=r"are deleted as the run in another uses them"):
        check_stream(stream, (stage,), request_.shards, "mine")
    check_stream(stream, (stage,), request_.shards, "another")
    used.note_deleted(request_.shards, "another", 2)
    assert used.state_of(request_.shards) == {"run": "another", "reading": 3, "deleted": 2}
    with pytest.raises(Refused, match=r"2 parts in .* were deleted by this run as it was begun; repeat --delete-used"):
        check_stream(replace(stream, once=False), (stage,), request_.shards, "another")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", "x"], "--source given without --stream"),
        (["--prepare", "a=1", "--delete-used"], "--prepare, --delete-used given without --stream"),
        (["--limit", "3"], "--limit given without --stream"),
        (["--stream", "--source", "x", "--prepare", "size"], "--prepare takes key=value words; 'size' is not one"),
        (["--stream", "--source", "x", "--prepare", "a=1", "a=2"], "--prepare gives 'a' twice"),
    ],
)
def test_options_of_a_stream_are_refused_without_it_and_in_their_own_words(words, said, capsys) -> None:
    assert cli.main(["train", "--recipe", NAME, "--shards", "/tmp/none", *words]) == 2
    assert said in capsys.readouterr().err


def test_options_mean_what_they_mean_to_an_ingest() -> None:
    parser, _ = cli.parser_of("train")
    words = "--recipe r --shards s --stream --source a b --prepare layers=3,6 model=m --limit 7 --delete-used"
    asked = train.streamed(parser.parse_args(words.split()))
    assert asked == Streamed(("a", "b"), None, {"layers": ["3", "6"], "model": "m"}, limit=7, delete_used=True)
    assert train.streamed(parser.parse_args(["--recipe", "r", "--shards", "s"])) is None


def test_a_part_begins_when_there_is_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(used, "POLL", 0.01)
    shards, begun = str(tmp_path), []
    threads = [
        threading.Thread(
            target=used.after_room, args=(shards, 2, lambda part, _: begun.append(part), part, None), daemon=True
        )
        for part in range(6)
    ]
    for thread in threads:
        thread.start()
    for reading in (0, 1, 3, used.ALL):
        used.note_reading(shards, "run", reading)
        until = time.monotonic() + 20
        allowed = {part for part in range(6) if part <= reading + 2}
        while set(begun) != allowed:
            assert time.monotonic() < until
            assert set(begun) <= allowed
            time.sleep(0.01)
        time.sleep(0.05)
        assert set(begun) == allowed
    for thread in threads:
        thread.join()


def test_an_ingest_that_fails_says_so_once_and_one_that_is_halted_does_not(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask("vectors", [source], str(tmp_path / "s"), prepare_settings(), None, 0.05, 0.1)
    told: list[str] = []

    def beside() -> Alongside:
        return Alongside(asked, asked.out, "run", deletes=False, at_once=1, fail=told.append)

    def failing(*_: object, **how: object) -> None:
        raise Failed("the sources are damaged")

    monkeypatch.setattr(alongside.ingest, "carry_out", failing)
    with beside() as running:
        running.join()
    assert told == ["the ingest failed: the sources are damaged"]

    def halted(*_: object, halt, **how: object) -> None:
        assert halt.wished.wait(20)
        raise Failed("whatever")

    monkeypatch.setattr(alongside.ingest, "carry_out", halted)
    began = time.monotonic()
    with beside():
        pass
    assert time.monotonic() - began < 10
    assert len(told) == 1


def prepare_settings():
    from pipelines import corpora

    return corpora.load("vectors").Settings()


def test_what_is_used_is_told_beside_the_shards_in_json(tmp_path: Path) -> None:
    used.note_reading(str(tmp_path), "run", 4)
    assert json.loads(storage.read_bytes(str(tmp_path / used.NAME))) == {"run": "run", "reading": 4, "deleted": 0}
    assert used.why_missing(str(tmp_path), "shard-00000-000.arrow") is None
    used.note_deleted(str(tmp_path), "run", 4)
    assert used.why_missing(str(tmp_path), "shard-00004-000.arrow") is None
    gone = used.why_missing(str(tmp_path), "shard-00003-000.arrow")
    assert gone is not None
    assert "deleted after use by the streamed run in run (--delete-used)" in gone
    assert "ingest the same source into a new --out" in gone
