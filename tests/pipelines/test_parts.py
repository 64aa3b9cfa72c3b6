"""The engine: each part once, records in part order, errors with their own words."""

from functools import partial
from pathlib import Path

import pytest

from pipelines.errors import Failed, Refused
from pipelines.parts import Part, record_uri, run_parts
from tests.pipelines import counting

pytestmark = pytest.mark.usefixtures("ray_instance")


def run(payloads: list, out: Path, work=counting.square, **rest) -> list[dict]:
    return run_parts([Part(2, payload) for payload in payloads], work, str(out), label="test", unit="rows", **rest)


def test_records_come_in_part_order_and_only_missing_parts_are_done(tmp_path: Path, capsys) -> None:
    first = run(list(range(9)), tmp_path)
    assert [record["square"] for record in first] == [n**2 for n in range(9)]
    assert [record["part"] for record in first] == list(range(9))
    assert "18/18" in capsys.readouterr().err
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    gone = Path(record_uri(str(tmp_path), 4))
    gone.unlink()
    second = run(list(range(9)), tmp_path)
    assert [record["square"] for record in second] == [n**2 for n in range(9)]
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {gone}


@pytest.mark.parametrize(
    ("payload", "error", "words"),
    [
        ("refuse", Refused, "^the request was wrong: it's refused$"),
        ("fail", Failed, "^the disk is full$"),
        ("crash", Failed, r"^part 1 ended with KeyError: 'two\\nlines' \(its trace is above\)"),
    ],
)
def test_errors_of_workers_come_back_in_their_own_words(
    payload: str, error: type, words: str, tmp_path: Path, capsys
) -> None:
    with pytest.raises(error, match=words):
        run([1, payload, 3], tmp_path)
    assert ("in square" in capsys.readouterr().err) == (payload == "crash")
    assert not Path(record_uri(str(tmp_path), 1)).exists()
    assert run([1, 2, 3], tmp_path)[1]["square"] == 4


def test_every_record_old_or_new_is_checked_and_a_check_may_stop_the_run(tmp_path: Path) -> None:
    seen: list[int] = []
    run([1, 2], tmp_path, check=lambda record: seen.append(record["square"]))
    run([1, 2, 3], tmp_path, check=lambda record: seen.append(record["square"]))
    assert sorted(seen) == [1, 1, 4, 4, 9]

    def stop(record: dict) -> None:
        raise Failed("enough")

    with pytest.raises(Failed, match="enough"):
        run([1, 2, 3, 4], tmp_path, check=stop)


@pytest.mark.parametrize("actors", [False, True])
def test_what_setup_makes_is_made_once_a_process(actors: bool, tmp_path: Path) -> None:
    (tmp_path / "loads").mkdir()
    setup = partial(counting.load, str(tmp_path / "loads"))
    records = run(list(range(12)), tmp_path / "out", counting.add, setup=setup, actors=actors)
    assert [record["sum"] for record in records] == [100 + n for n in range(12)]
    loaded = [path.name.split(".")[0] for path in (tmp_path / "loads").iterdir()]
    assert {str(record["process"]) for record in records} <= set(loaded)
    assert len(loaded) == len(set(loaded)) < 12


def test_a_setup_that_refuses_is_heard(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^no such bundle$"):
        run([1], tmp_path, counting.add, setup=partial(counting.refuse_to_load))


def test_a_record_that_cannot_be_written_is_a_failure_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"^could not write .*part-00000\.json: Is a directory"):
        run([0], tmp_path, partial(counting.take_the_place_of_its_record, str(tmp_path)))


@pytest.mark.slow
def test_a_part_that_kills_every_worker_ends_in_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"part 1 ended 4 worker processes: .*run this again to go on, without the file"):
        run([0, 0], tmp_path, counting.die_always)
    with pytest.raises(Failed, match="part 1 ended 4 worker processes"):
        run([0, 0], tmp_path, counting.die_always, setup=partial(counting.load, str(tmp_path)), actors=True)


def test_a_part_whose_worker_dies_is_done_again(tmp_path: Path) -> None:
    records = run([0, 0, 0], tmp_path, partial(counting.die_once, str(tmp_path)))
    assert [record["part"] for record in records] == [0, 1, 2]
    assert (tmp_path / "died").exists()
