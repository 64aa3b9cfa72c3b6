"""A worker that hangs: the others' time-out says which one, and in what."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipelines import loop, places
from pipelines.feed import Feed
from pipelines.loop import RunSpec
from pipelines.shards import ShardReader
from pipelines.step import Wish
from tests.pipelines import forks
from tests.pipelines.loops import make_shards, spec_of


def hanging_worker(spec: RunSpec, home: str, rank: int, how: str) -> None:
    """Rank 1 stops for good while it reads the rows of step 3; rank 0 writes what it raises."""
    places.BEAT, places.SILENT = 0.1, 1.0
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{home}/group", rank=rank, world_size=2, timeout=timedelta(seconds=3)
    )
    asked = 0

    def wish() -> Wish:
        """Asked between the reading of a step's rows and its first sum."""
        nonlocal asked
        asked += 1
        if asked == 3 and rank == 1:
            time.sleep(0.5)
            if how == "silent":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        return Wish.NOTHING

    try:
        loop.train(spec, Feed(ShardReader(spec.shards)), torch.device("cpu"), lambda _: None, wish)
    except RuntimeError as error:
        Path(home, f"said-{rank}").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("how", ["busy", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_time_out_names_the_worker_that_did_not_come_and_the_collective(tmp_path, how):
    shards = make_shards(tmp_path / "shards")
    spec = spec_of("plain_vq", shards, tmp_path / "run", steps=6, checkpoint_every=2)
    workers = [forks.start(hanging_worker, spec, str(tmp_path), rank, how) for rank in (0, 1)]
    try:
        assert forks.ended(workers[0]) == 0
    finally:
        workers[1].kill()
        workers[1].join(10)
    said = (tmp_path / "said-0").read_text()
    where = "is" if how == "busy" else r"was last heard of \d+ s ago,"
    told = rf"rank 1 {where} in the reading of rows of step 3\."
    assert re.fullmatch(rf"Hung: rank 0 waited in vain in the sum of counts of step 3: {told}", said)
    # Nothing is lost but the step.
    assert (tmp_path / "run/checkpoints/000-000000000002/state.json").exists()
