"""A node is lost while a run goes on: with the workers that are left, on the same rows, to the same codebook."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines import loop, train
from pipelines.checkpoint import Checkpoints
from pipelines.feed import Feed
from pipelines.shards import ShardReader
from pipelines.train import Request
from tests.cluster import recorded
from tests.pipelines.loops import CPU, TINY, make_shards, spec_of
from vqcore.bundle import read_bundle

NAME, STEPS, EVERY = "rotation_trick", 200, 50
ROOT = Path(__file__).parents[2]
# In a process of its own: this one may have a Ray already, and a process has but one.
DRIVER = """
    import json, os, sys, threading, time
    import ray
    from ray.cluster_utils import Cluster
    from pipelines import group, train
    from tests.cluster import recorded

    words = json.loads(sys.argv[1])
    group._worker = recorded.double_worker
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False,
                                                            "object_store_memory": 10**8})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)

    def lose() -> None:
        while recorded.newest_step(words["out"]) < words["at"]:
            time.sleep(0.02)
        cluster.remove_node(nodes[1], allow_graceful=False)

    threading.Thread(target=lose, daemon=True).start()
    train.train(train.Request(**words["request"]))
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Ray's own files. Not pytest's: the path of a socket has at most 107 bytes."""
    home = Path(tempfile.mkdtemp(prefix="vqray-node-"))
    yield home
    shutil.rmtree(home)


@pytest.mark.slow
def test_after_losing_a_node_the_run_goes_on_with_fewer_workers_and_reaches_the_codebook(tmp_path, scratch):
    shards, out = make_shards(tmp_path / "shards"), tmp_path / "run"
    asked = {
        "recipe": NAME, "shards": shards, "out": str(out), "preset": "small", "workers": 2, "at_least": 1,
        "checkpoint_every": EVERY, "overrides": {**TINY[NAME], "steps": STEPS},
    }  # fmt: skip
    words = json.dumps({"request": asked, "out": str(out), "at": 73})
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
    assert recorded.worlds(out) == [2, 1]
    assert "1 of 2 workers" in done.stderr
    assert "resuming stage" in done.stderr
    recorded.check_rows(train.prepare(Request(**asked)).spec, STEPS)

    spec = spec_of(NAME, shards, tmp_path / "whole", steps=STEPS, checkpoint_every=STEPS, double=True)
    whole, _ = loop.train(spec, Feed(ShardReader(shards)), CPU, lambda _: None)
    made = read_bundle(out / "bundle").tensors
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(made[name].double(), tensor.double(), rtol=0, atol=1e-9), name
    assert Checkpoints(str(out)).complete()[-1] == (0, STEPS)
