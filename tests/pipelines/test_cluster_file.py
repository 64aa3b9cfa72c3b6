"""cluster.yaml: nothing is wrong with it, and every way to break it that Ray's own check or ours knows is found."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines import cluster_file
from pipelines.errors import Refused

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster.yaml"
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
OURS = cluster_file.read(FILE)
WORKER = ("available_node_types", "worker")
HEAD = ("available_node_types", "head")
RIGHT = f"{ray.__version__}-py311"


def broken(*path: Any, to: Any = None, drop: bool = False) -> list[str]:
    config = copy.deepcopy(OURS)
    *above, last = path
    place: Any = config
    for key in above:
        place = place[key]
    if drop:
        del place[last]
    else:
        place[last] = to
    return cluster_file.problems(config, CONSTRAINTS)


def test_ours_has_nothing_to_mend_by_ray_or_by_us():
    assert cluster_file.problems(OURS, CONSTRAINTS) == []
    validate_config(prepare_config(copy.deepcopy(OURS)))


def test_ours_is_spot_gpus_from_none_and_no_work_on_the_head():
    worker, head = (OURS["available_node_types"][name] for name in ("worker", "head"))
    assert worker["min_workers"] == 0
    assert worker["resources"]["GPU"] >= 1
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (("max_worker",), 3, "^max_worker is not a key; did you mean 'max_workers'"),
        (("docker", "imag"), "x", "docker.imag is not a key; did you mean 'image'"),
        (("nonsense",), "x", "nonsense is not a key; the documentation of Ray has all"),
        (("idle_timeout_minutes",), "ten", "Ray's check: 'ten' is not of type 'number'"),
        (("head_node_type",), "haed", "Ray's check: .*head_node_type"),
        ((*WORKER, "min_workers"), 9, r"worker: min_workers 9 is more than max_workers 8|Ray's check: .*max_workers"),
        ((*WORKER, "max_workers"), 9, "max_workers 9 is more than the 8 that the whole cluster may have"),
        ((*WORKER, "min_worker"), 1, "worker.min_worker is not a key; did you mean 'min_workers'"),
        (("provider", "type"), "gcp", "Ray's check|provider.type is 'gcp'"),
        (("provider", "regoin"), "eu-west-1", "provider.regoin is not a key; did you mean 'region'"),
        (("provider", "use_internal_ip"), True, "did you mean 'use_internal_ips'"),
        (("provider", "aws_credentials"), {}, "provider.aws_credentials: no keys in the file"),
        ((*WORKER, "node_config", "InstanceTyp"), "p5", "InstanceTyp is not a key; did you mean 'InstanceType'"),
        ((*WORKER, "node_config", "InstanceMarketOptions"), {"MarketTyp": "spot"}, 'Unknown parameter .*"MarketTyp"'),
        ((*WORKER, "node_config", "BlockDeviceMappings"), {}, "Invalid type for parameter BlockDeviceMappings"),
        ((*HEAD, "resources"), {"CPU": 4}, "head: resources has to say CPU: 0"),
        ((*HEAD, "resources"), {"CPU": 0, "GPU": 1}, "head: resources has to say CPU: 0"),
        ((*HEAD, "max_workers"), 1, "head: max_workers has to be 0"),
        (("docker", "image"), "rayproject/ray:2.59.0-py311-gpu", f"docker.image is .* begin with {RIGHT}"),
        (("docker", "head_image"), "rayproject/ray:2.60.0-py312-cpu", f"docker.head_image is .* begin with {RIGHT}"),
        (("docker", "worker_image"), "rayproject/ray:latest", f"docker.worker_image is .* begin with {RIGHT}"),
        (("setup_commands",), ["pip install -c /home/ray/constraints.txt torch==2.9.0"], "installs torch==2.9.0"),
        (("setup_commands",), ["pip install vqray"], "every `pip install` has to have --constraint"),
        (("idle_timeout_minutes",), 0, "idle_timeout_minutes is 0; give 1 to 60"),
        (("idle_timeout_minutes",), 6000, "idle_timeout_minutes is 6000"),
        (("worker_start_ray_commands",), ["ray stop"], "worker_start_ray_commands has no `ray start`"),
        (("file_mounts",), {"/home/ray/vqray": "."}, "RAY_AUTH_TOKEN_PATH has to name a target of file_mounts"),
    ],
)  # fmt: skip
def test_each_mistake_is_found_and_named(path, to, said):
    assert_said(broken(*path, to=to), said)


def assert_said(found: list[str], said: str) -> None:
    assert any(re.search(said, line) for line in found), found


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("idle_timeout_minutes",), "idle_timeout_minutes is None"),
        (("head_node_type",), "head_node_type"),
        (("available_node_types",), "available_node_types"),
        ((*WORKER, "resources"), "'resources' is a required property"),
        ((*WORKER, "node_config", "IamInstanceProfile"), "worker.node_config: IamInstanceProfile is missing"),
        ((*WORKER, "node_config", "InstanceType"), "worker.node_config: InstanceType is missing"),
        (("head_start_ray_commands",), "head_start_ray_commands has no `ray start`"),
        (("docker",), "docker.image is missing"),
        (("setup_commands",), "every `pip install` has to have --constraint"),
    ],
)
def test_what_is_left_out_is_found(path, said):
    assert_said(broken(*path, drop=True), said)


@pytest.mark.parametrize(
    ("key", "before", "after", "said"),
    [
        ("head_start_ray_commands", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "--dashboard-host=127"),
        ("head_start_ray_commands", " --dashboard-host=127.0.0.1", "", "--dashboard-host=127.0.0.1 is missing"),
        ("head_start_ray_commands", "RAY_AUTH_MODE=token ", "", "head_start_ray_commands: RAY_AUTH_MODE=token"),
        ("worker_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "worker_.*: RAY_AUTH_MODE"),
        ("worker_start_ray_commands", "/home/ray/.ray/auth_token", "/tmp/other", "has to name a target of file_mounts"),
    ],
)  # fmt: skip
def test_a_node_without_the_token_or_a_dashboard_for_everybody_is_found(key, before, after, said):
    commands = [line.replace(before, after) for line in OURS[key]]
    assert commands != OURS[key]
    assert_said(broken(key, to=commands), said)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("cluster_name",), "AKIAIOSFODNN7EXAMPLE"),
        (("metadata",), {"password": "hunter2"}),
        (("setup_commands",), ["export AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPxRfiCY"]),
        (("worker_start_ray_commands",), ["RAY_AUTH_TOKEN=abc RAY_AUTH_MODE=token ray start --address=h:1"]),
        (("setup_commands",), ["echo 3f786850e387550fdab836ed7e6dc881de23001b3f786850e387550fdab836ed > t"]),
        (("auth", "ssh_private_key"), "-----BEGIN RSA PRIVATE KEY-----"),
    ],
)  # fmt: skip
def test_keys_and_tokens_in_the_file_are_found_and_not_repeated(path, to):
    found = [line for line in broken(*path, to=to) if " holds a" in line]
    assert found
    text = yaml.safe_dump(to)
    assert not any(
        word in line for line in found for word in ("hunter2", "AKIA", "wJalr", "3f7868", "abc ") if word in text
    )


def test_min_over_max_is_what_ray_lets_pass():
    """Why ours is needed; should Ray learn it, this test says so."""
    config = copy.deepcopy(OURS)
    config["available_node_types"]["worker"].update(min_workers=8, max_workers=2)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert_said(cluster_file.problems(config, CONSTRAINTS), "min_workers 8 is more than max_workers 2")


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        cluster_file.read(tmp_path / "cluster.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(Refused, match="no YAML mapping"):
        cluster_file.read(tmp_path / "list.yaml")


def test_the_check_as_a_command(tmp_path, capsys):
    assert cluster_file.main(FILE) == 0
    assert "nothing to mend" in capsys.readouterr().err
    other = tmp_path / "cluster.yaml"
    other.write_text(FILE.read_text().replace("region:", "regoin:"))
    assert cluster_file.main(other) == 2
    assert "did you mean 'region'" in capsys.readouterr().err
