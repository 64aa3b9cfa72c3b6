"""One part of an ingest, without Ray: units of one row and of many, each kept or quarantined as a whole."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import reading
from pipelines.errors import Failed
from pipelines.reading import Selection, read_part
from tests.pipelines.tiny_corpus import TinySettings, corpus

TOO_LARGE = "1" + "0" * 39
"""For float32."""


def read(folder: Path, lines: list[str], limit: int | None = None) -> tuple[dict[str, Any], list[float]]:
    """(record, values of all rows) of a part with two slices of the same lines."""
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("\n".join(lines))
    settings = TinySettings(most=10)
    survey = corpus.survey([str(folder)], settings)
    payload = [[place * len(lines), asdict(piece)] for place, piece in enumerate(survey.slices)]
    selection = Selection(2 * len(lines), limit, 0.1)
    record = read_part(corpus, settings, survey.context, selection, str(folder / "out"), 0, payload)
    batches = [pa.ipc.open_file(str(folder / "out" / shard["name"])).get_batch(0) for shard in record["shards"]]
    values = [value for batch in batches for value in batch["vector"].storage.flatten().to_numpy()[::4].tolist()]
    return record, values


def test_a_unit_of_many_rows_is_one_unit(tmp_path: Path) -> None:
    record, values = read(tmp_path, ["g 1", "g 2,3,4", "g 50", "none", "h 5,"])
    assert values == [1, 2, 3, 4, 5] * 2
    assert [source[:5] for source in record["sources"]] == [["a.txt", 0, 5, 3, 1], ["b.txt", 0, 5, 3, 1]]
    assert (record["filtered"], [bad[:2] for bad in record["bad"]]) == ({"most": 2}, [["a.txt", 3], ["b.txt", 3]])


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 1024])
def test_one_row_that_does_not_fit_takes_its_unit_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", batch_rows)
    record, values = read(tmp_path, ["g 1,2", f"g 3,{TOO_LARGE},4", "g 5", f"g {TOO_LARGE},"])
    assert values == [1, 2, 5] * 2
    assert [source[3:5] for source in record["sources"]] == [[2, 2]] * 2
    assert [bad[1] for bad in record["bad"]] == [1, 3] * 2


def test_a_unit_in_the_row_of_another_is_kept(tmp_path: Path) -> None:
    record, values = read(tmp_path, ["joined", "g 1", "none", "joined"])
    assert values == [1] * 2
    assert [source[3:5] for source in record["sources"]] == [[3, 1]] * 2


def test_a_limit_counts_units_and_not_rows(tmp_path: Path) -> None:
    record, values = read(tmp_path, ["g 1,2,3", "g 4,5", "g 6"], limit=2)
    assert values == [1, 2, 3] * 2
    assert record["filtered"] == {"limit": 4}


def test_a_unit_without_a_row_has_to_say_why(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"a\.txt: its corpus gave unit 1 without a row and without saying why"):
        read(tmp_path, ["g 1", "g ,"])
