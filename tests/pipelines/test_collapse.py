"""The alarm of a collapsed codebook: when it is said, when not, and what it advises."""

from typing import Literal

import pytest
import torch
from pydantic import Field

from pipelines import collapse, loop
from pipelines.collapse import Alarm, advice
from pipelines.feed import Feed
from pipelines.mailbox import headline
from pipelines.recipe import Settings
from pipelines.shards import ShardReader
from tests.pipelines.loops import make_shards, spec_of


def used(codes: int, of: int, vectors: float = 1000) -> torch.Tensor:
    counts = torch.zeros(of, dtype=torch.float64)
    counts[:codes] = vectors
    return counts


class Tunable(Settings):
    revive_below: float = Field(0.0, ge=0)
    seeding: Literal["random_rows", "kmeans++"] = "random_rows"
    decay: float | None = Field(0.99, gt=0.95)
    num_codes: int = 1024
    patch: int = 2


def feed_alarm(
    levels: list[torch.Tensor], steps: int = 500, stage: int = 10_000, settings: Settings | None = None
) -> list[str]:
    said: list[str] = []
    alarm = Alarm(stage, settings or Settings(), said.append)
    for _ in range(0, 3 * steps, 20):
        alarm.add(20, {"quantizer": levels})
    return said


def test_a_collapse_is_said_once_with_what_the_settings_allow():
    (said,) = feed_alarm([used(7, 1024)], settings=Tunable())
    assert said == (
        "the codebook has collapsed (quantizer): 7 of 1,024 codes used for 500 steps: try --set revive_below=0.5, "
        "or seeding=kmeans++, or num_codes=256."
    )


@pytest.mark.parametrize("counts", [used(103, 1024), used(7, 1024, vectors=1), used(2, 12)])
def test_use_that_is_only_poor_or_data_that_is_only_little_is_no_collapse(counts):
    assert feed_alarm([counts]) == []


def test_codes_that_take_turns_are_all_used():
    alarm, said = Alarm(10_000, Settings(), pytest.fail), []
    for step in range(25):
        counts = torch.zeros(100, dtype=torch.float64)
        counts[4 * step % 100 : 4 * step % 100 + 4] = 1000
        alarm.add(20, {"q": [counts]})
    assert said == []


def test_the_level_that_collapsed_is_named_and_a_short_stage_has_a_short_window():
    (said,) = feed_alarm([used(90, 100), used(3, 100)], steps=80, stage=800)
    assert "(quantizer, level 1): 3 of 100 codes used for 80 steps; another number of codes" in said


def test_advice_names_settings_that_exist_and_values_they_take():
    assert advice(Tunable(decay=None, revive_below=0.5, seeding="kmeans++")) == ": try --set num_codes=256"
    assert advice(Settings()).startswith("; another number of codes")


def test_a_run_whose_codebook_collapses_says_so_and_tells_dead_codes(tmp_path, monkeypatch):
    monkeypatch.setattr(collapse, "LEAST", 8)
    shards = make_shards(tmp_path / "shards")
    spec = spec_of(
        "rotation_trick", shards, tmp_path / "run", steps=40, num_codes=64, code_dim=64, seeding="kaiming",
        revive_below=0.0, checkpoint_every=40,
    )  # fmt: skip
    said: list[loop.Event] = []
    loop.train(spec, Feed(ShardReader(shards)), torch.device("cpu"), said.append)
    warnings = [event["text"] for event in said if "collapsed" in event.get("text", "")]
    assert len(warnings) == 1
    assert "of 64 codes used for 8 steps: try --set revive_below=0.5" in warnings[0]
    metrics = next(event["metrics"] for event in said if event["kind"] == "metrics")
    assert metrics["train/dead_codes"] == round((1 - metrics["train/usage"]) * 64)
    shown = headline({**metrics, "speed/rows_per_second": 1234.5, "speed/data_share": 0.031})
    assert shown["dead"] == f"{metrics['train/dead_codes']:.0f}"
    assert (shown["rows/s"], shown["data"]) == ("1.23e+03", "3%")
    assert 0 < metrics["speed/data_share"] + metrics["speed/reduce_share"] < 1
