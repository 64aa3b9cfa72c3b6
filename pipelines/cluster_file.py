"""What is wrong with a file for `ray up` on AWS, found before it costs anything.

    python -m pipelines.cluster_file cluster.yaml

Ray's own check lets misspelt keys of the provider and of nodes pass, and more workers at least than at most. It also
knows nothing of our versions, and would put the Jobs API on every interface without a token.
"""

import copy
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import ray.autoscaler
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.errors import Refused, nearest_names

PROVIDER_KEYS = {
    "type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group", "key_pair",
    "cloudwatch",
}  # fmt: skip
"""What Ray's AWS provider reads. It also reads `aws_credentials`, which is where keys would be."""
IDLE_MINUTES = 60
SECRETS = {
    "an AWS access key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a token or key with its value": (
        r"(?i)\b(RAY_AUTH_TOKEN|AWS_\w*(KEY|TOKEN)\w*|\w*PASSWORD|\w*SECRET\w*)\s*[=:]\s*['\"]?[^\s'\"$]"
    ),
    "a word as long and mixed as a token": (
        r"(?<![\w/.])(?=[A-Za-z+]*[0-9])(?=[0-9+]*[A-Za-z])[A-Za-z0-9+]{32,}(?![\w/.])"
    ),
}
FORBIDDEN = "it belongs in an instance profile, or in a file that file_mounts names"
LOOPBACK = re.compile(r"--dashboard-host[= ](127\.0\.0\.1|localhost)\b")


def read(path: Path) -> dict[str, Any]:
    """A cluster file as a dictionary. Raises Refused where there is none, or no YAML in it."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise Refused(f"{path} holds no YAML mapping; a file for `ray up` is one.")
    return config


def problems(config: Mapping[str, Any], constraints: str) -> list[str]:
    """Everything wrong with a cluster file, each as a line that says where and what to do; empty where all is well.

    Args:
        constraints: the text of constraints.txt, whose versions the nodes have to have.
    """
    # Secrets first, and whatever the rest says: they were given away the moment the file was shared.
    found = list(_secrets(config))
    if shape := _ray_says(config):
        return [*found, shape]
    checks = (_provider, _sizes, _nodes, _head, _commands, _idle)
    return [*found, *(line for check in checks for line in check(config)), *_versions(config, constraints)]


def _ray_says(config: Mapping[str, Any]) -> str | None:
    """Ray's complaint, if it has one. It checks what it has filled in, never the file as it is."""
    if misspelt := next(_misspelt(config), None):
        return misspelt
    try:
        validate_config(prepare_config(copy.deepcopy(dict(config))))
    except KeyError as error:
        return f"Ray's check: {error} is missing or names nothing"
    except Exception as error:
        # jsonschema's message goes on with the whole schema.
        return f"Ray's check: {str(error).strip().partition(chr(10))[0]}"
    for missing in ("available_node_types", "head_node_type"):
        if missing not in config:
            return f"{missing} is missing: Ray would fill in nodes of its own"
    return None


def _misspelt(config: Mapping[str, Any]) -> Iterator[str]:
    """Keys that Ray's schema does not have. Ray refuses them too, but names no nearest."""
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text(encoding="utf-8"))
    top = schema["properties"]
    (of_a_node,) = top["available_node_types"]["patternProperties"].values()
    nodes = config.get("available_node_types")
    docker = (config.get("docker"), top["docker"]["properties"])
    places: dict[str, tuple[Any, Any]] = {"": (config, top), "docker.": docker}
    for name, node in nodes.items() if isinstance(nodes, Mapping) else ():
        places[f"available_node_types.{name}."] = (node, of_a_node["properties"])
    for where, (given, allowed) in places.items():
        for key in given if isinstance(given, Mapping) else ():
            if key not in allowed:
                yield f"{where}{key} is not a key; {_nearest(key, allowed, 'Ray')}"


def _provider(config: Mapping[str, Any]) -> Iterator[str]:
    if config["provider"].get("type") != "aws":
        yield f"provider.type is {config['provider'].get('type')!r}; these checks know aws"
    for key in config["provider"]:
        if key == "aws_credentials":
            yield "provider.aws_credentials: no keys in the file; nodes use IamInstanceProfile, you your environment"
        elif key not in PROVIDER_KEYS:
            yield f"provider.{key} is not a key; {nearest_names(key, PROVIDER_KEYS)}"


def _sizes(config: Mapping[str, Any]) -> Iterator[str]:
    most = config.get("max_workers", 0)
    for name, node in config["available_node_types"].items():
        low, high = node.get("min_workers", 0), node.get("max_workers", most)
        where = f"available_node_types.{name}"
        if not 0 <= low <= high:
            yield f"{where}: min_workers {low} is more than max_workers {high}, or below 0"
        if high > most:
            yield f"{where}: max_workers {high} is more than the {most} that the whole cluster may have (max_workers)"


def _nodes(config: Mapping[str, Any]) -> Iterator[str]:
    """Node settings against EC2's own description of a request for instances."""
    shape = _instances()
    allowed = {*shape.members, "SubnetIds"}
    for name, node in config["available_node_types"].items():
        where = f"available_node_types.{name}.node_config"
        given = dict(node["node_config"])
        for key in sorted(given.keys() - allowed):
            yield f"{where}.{key} is not a key; {_nearest(key, allowed, 'RunInstances of EC2')}"
        # Ray takes several subnets and numbers of instances itself; EC2 asks for the numbers.
        known = {key: value for key, value in given.items() if key in shape.members}
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **known}, shape).generate_report()
        yield from (f"{where}: {line}" for line in report.splitlines())
        if "InstanceType" not in given:
            yield f"{where}: InstanceType is missing"
        if "IamInstanceProfile" not in given:
            yield f"{where}: IamInstanceProfile is missing: without one, a node reaches S3 only with keys handed round"


def _head(config: Mapping[str, Any]) -> Iterator[str]:
    name = config["head_node_type"]
    head = config["available_node_types"][name]
    resources = head.get("resources", {})
    if resources.get("CPU") != 0 or resources.get("GPU", 0) != 0:
        yield f"available_node_types.{name}: resources has to say CPU: 0 and no GPU, or work is scheduled on the head"
    if head.get("max_workers") != 0:
        yield f"available_node_types.{name}: max_workers has to be 0, or nodes of the head's kind are started for work"


def _commands(config: Mapping[str, Any]) -> Iterator[str]:
    mounted = {str(path) for path in config.get("file_mounts", {})}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(key, []) if "ray start" in command]
        if not starts:
            yield f"{key} has no `ray start`: Ray's own would start nodes without a token"
        for command in starts:
            if not re.search(r"\bRAY_AUTH_MODE=token\b", command):
                yield f"{key}: RAY_AUTH_MODE=token is missing; without it, whoever reaches a node may run anything"
            path = re.search(r"\bRAY_AUTH_TOKEN_PATH=([^\s;]+)", command)
            if path is None or path.group(1) not in mounted:
                targets = ", ".join(sorted(mounted)) or "none"
                yield f"{key}: RAY_AUTH_TOKEN_PATH has to name a target of file_mounts; those are: {targets}"
            if key.startswith("head") and not LOOPBACK.search(command):
                yield f"{key}: --dashboard-host=127.0.0.1 is missing; `ray dashboard` tunnels to it"


def _idle(config: Mapping[str, Any]) -> Iterator[str]:
    minutes = config.get("idle_timeout_minutes")
    if minutes is None or not 0 < minutes <= IDLE_MINUTES:
        yield f"idle_timeout_minutes is {minutes}; give 1 to {IDLE_MINUTES}: it is what ends nodes that nobody uses"


def _versions(config: Mapping[str, Any], constraints: str) -> Iterator[str]:
    pinned = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", constraints, re.MULTILINE))
    python = "py{}{}".format(*sys.version_info[:2])
    right = f"{pinned['ray']}-{python}"
    images = {key: image for key, image in config.get("docker", {}).items() if key.endswith("image")}
    for key, image in images.items():
        tag = re.fullmatch(r"[^:]+:([\d.]+-py\d+)(-\w+)?", image)
        if tag is None or tag.group(1) != right:
            yield f"docker.{key} is {image}; its tag has to begin with {right}, as constraints.txt and these tests do"
    if not images:
        yield f"docker.image is missing: name one whose tag begins with {right}"
    commands = [line for key, lines in config.items() if key.endswith("commands") for line in lines]
    for name, version in re.findall(r"\b([A-Za-z0-9._-]+)==([\w.]+)", " ".join(commands)):
        if pinned.get(name, version) != version:
            yield f"a command installs {name}=={version}; constraints.txt has {pinned[name]}"
    installs = [command for command in commands if "pip install" in command]
    if not installs or any(not re.search(r"(-c|--constraint)[= ]\S*constraints\.txt", line) for line in installs):
        yield "every `pip install` has to have --constraint .../constraints.txt, or nodes get untested versions"


def _secrets(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _secrets(below, f"{where}.{key}" if where else str(key))
            # `password: x` is a mapping, not a text with both in it.
            if isinstance(below, str) and (kind := _secret_in(f"{key}={below}")) and not _secret_in(below):
                yield f"{where}.{key} holds {kind}; {FORBIDDEN}"
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _secrets(below, f"{where}[{index}]")
    elif isinstance(value, str) and (kind := _secret_in(value)):
        yield f"{where} holds {kind}; {FORBIDDEN}"


def _secret_in(text: str) -> str | None:
    return next((kind for kind, pattern in SECRETS.items() if re.search(pattern, text)), None)


def _nearest(key: str, allowed: Iterable[str], whose: str) -> str:
    """Only the nearest: there are up to fifty."""
    said = nearest_names(key, allowed)
    return said.partition(" Allowed:")[0] if "did you mean" in said else f"the documentation of {whose} has all"


@cache
def _instances() -> Any:
    """Costs half a second."""
    return botocore.session.get_session().get_service_model("ec2").shape_for("RunInstancesRequest")


def main(path: Path) -> int:
    """Print what is wrong. 0 where nothing is, else 2."""
    root = Path(__file__).parents[1]
    try:
        found = problems(read(path), (root / "constraints.txt").read_text(encoding="utf-8"))
    except Refused as refusal:
        found = [str(refusal)]
    for line in found:
        print(line, file=sys.stderr)
    print(f"{path}: {f'{len(found)} to mend' if found else 'nothing to mend'}", file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "cluster.yaml")))
