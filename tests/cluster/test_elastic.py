"""A node is lost, or comes, while a run goes on: with other workers, on the same rows, to the same codebook."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines import loop
from pipelines.checkpoint import Checkpoints
from pipelines.feed import Feed
from pipelines.request import Request, prepare
from pipelines.shards import ShardReader
from pipelines.step import Wish
from tests.cluster import recorded
from tests.pipelines.loops import CPU, TINY, make_shards, spec_of
from vqcore.bundle import read_bundle

NAME = "rotation_trick"
ROOT = Path(__file__).parents[2]
# In a process of its own: this one may have a Ray already, and a process has but one.
DRIVER = """
    import json, os, sys, threading, time
    import ray
    from ray.cluster_utils import Cluster
    from pipelines import group, train
    from pipelines.mailbox import mailbox_here
    from pipelines.request import Request
    from tests.cluster import recorded

    words = json.loads(sys.argv[1])
    group._worker = recorded.double_worker
    plain = group.ScalingConfig
    group.ScalingConfig = lambda **named: plain(**named, elastic_resize_monitor_interval_s=5)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False,
                                                            "object_store_memory": 10**8})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(words["nodes"])]
    ray.init(address=cluster.address, log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()
    where = lambda mailbox: ray.get(
        mailbox.__ray_call__.remote(lambda it: ray.get_runtime_context().get_node_id()))
    assert {where(mailbox_here()) for _ in range(6)} == {here}, "a mailbox must not be lost with another node"
    run = threading.Thread(target=train.train, args=(Request(**words["request"]),))
    run.start()
    while recorded.newest_step(words["out"]) < words["at"]:
        time.sleep(0.02)
    if words["nodes"] == 2:
        cluster.remove_node(nodes[1], allow_graceful=False)
    else:
        cluster.add_node(num_cpus=1, object_store_memory=10**8)
    run.join()
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Ray's own files. Not pytest's: the path of a socket has at most 107 bytes."""
    home = Path(tempfile.mkdtemp(prefix="vqray-node-"))
    yield home
    shutil.rmtree(home)


def run(tmp_path: Path, scratch: Path, nodes: int, steps: int, every: int) -> tuple[Request, str]:
    """A run of up to two workers on `nodes` nodes of one CPU, of which one is lost after 73 steps, or, where there was
    but one, another comes. Returns the request and what was said."""
    out = tmp_path / "run"
    asked = {
        "recipe": NAME, "shards": make_shards(tmp_path / "shards"), "out": str(out), "preset": "small", "workers": 2,
        "at_least": 1, "checkpoint_every": every, "overrides": {**TINY[NAME], "steps": steps},
    }  # fmt: skip
    words = json.dumps({"request": asked, "out": str(out), "at": 73, "nodes": nodes})
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment = {
        **kept, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(scratch), "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'vqray.db'}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER), words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return Request(**asked), done.stderr


def assert_state_of_one_worker(asked: Request, home: Path, step: int, made: dict[str, torch.Tensor]) -> None:
    """`made` is the model after `step` steps, as one worker without a break reaches it."""
    spec = spec_of(NAME, asked.shards, home / "whole", steps=asked.overrides["steps"], double=True)
    wishes = itertools.chain([Wish.NOTHING] * (step - 1), [Wish.STOP])
    with pytest.raises(loop.Stopped):
        loop.train(spec, Feed(ShardReader(asked.shards)), CPU, lambda _: None, lambda: next(wishes))
    whole = model_in(spec.out, step)
    assert made.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.allclose(made[name].double(), tensor.double(), rtol=0, atol=1e-9), name


def model_in(out: str, step: int) -> dict[str, torch.Tensor]:
    tensors = Checkpoints(out).load(0, step).tensors
    return {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}


@pytest.mark.slow
def test_after_losing_a_node_the_run_goes_on_with_fewer_workers_and_reaches_the_codebook(tmp_path, scratch):
    asked, said = run(tmp_path, scratch, nodes=2, steps=200, every=50)
    assert recorded.worlds(asked.out) == [2, 1]
    assert "1 of 2 workers" in said
    assert "resuming stage" in said
    recorded.check_rows(prepare(asked).spec, 200)
    assert_state_of_one_worker(asked, tmp_path, 200, read_bundle(Path(asked.out) / "bundle").tensors)


@pytest.mark.slow
def test_when_a_node_comes_the_workers_save_first_and_go_on_as_more(tmp_path, scratch):
    """No checkpoint is due before the end: what the new group goes on from was saved because it was to come."""
    asked, said = run(tmp_path, scratch, nodes=1, steps=1500, every=1500)
    assert recorded.worlds(asked.out) == [1, 2]
    resumed = int(re.search(r"resuming stage '\w+' after step ([\d,]+)", said)[1].replace(",", ""))
    last = max(entry["step"] for entry in recorded.entries(asked.out) if entry["world"] == 1)
    assert 0 < resumed <= last + 1
    recorded.check_rows(prepare(asked).spec, 1500)
    # Not the end: over many more than 400 steps also undisturbed runs of one and two workers come apart at a code that
    # flips.
    assert_state_of_one_worker(asked, tmp_path, resumed, model_in(asked.out, resumed))
