"""Starting Ray, or joining the cluster that RAY_ADDRESS names. Nothing happens at import."""

import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

from pipelines import storage, tokens, tracking
from pipelines.errors import Failed, Refused


def connect() -> None:
    """Start a local Ray once, or join the cluster at RAY_ADDRESS; where Ray already runs in this process, do nothing.

    RAY_AUTH_MODE is never left implicit: unset, it depends on whether anybody ever ran `ray.init()` under this HOME.
    A value the user set stays. Else a local Ray gets a token of its own, which lives in this process's environment
    (workers inherit it) and leaves no file; a cluster gets `token` where a token is to be found, `disabled` where not.

    Raises:
        Refused: there is no cluster at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS") or "local"
    if "RAY_AUTH_MODE" not in os.environ:
        _choose_auth(address)
    # "local" and not None: None would join whatever `ray start` last left on this machine.
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
        else:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        raise Refused(
            f"could not join Ray at {address} ({type(error).__name__}). Check RAY_ADDRESS, RAY_AUTH_MODE and the "
            "token, or unset RAY_ADDRESS to run on this machine."
        ) from error


def cpus() -> int:
    """Logical CPUs of the whole cluster."""
    connect()
    return int(ray.cluster_resources().get("CPU", 0))


def most(resource: str) -> float:
    """CPUs, GPUs ... of the cluster, or of what it may grow to where `ray up` made it: such a one begins empty."""
    connect()
    has = float(ray.cluster_resources().get(resource, 0))
    plan = _growth_plan()
    if plan is None:
        return has
    kinds = plan["available_node_types"].values()
    limit = int(plan["max_workers"])
    each = [float(kind["resources"].get(resource, 0)) for kind in kinds for _ in range(kind["max_workers"])]
    return max(has, sum(sorted(each, reverse=True)[:limit]))


def require_free_cpu(patience: float = 300.0, gpus: float = 0) -> None:
    """Wait until a task of one CPU (and `gpus` CUDA devices) runs: Ray Data would wait too, but for ever and silently.

    A task is asked for, not counted: on a cluster that grows with demand there is no CPU until somebody asks.

    Raises:
        Refused: a Ray of this process's own has fewer CUDA devices.
        Failed: none ran within `patience` seconds.
    """
    connect()
    devices = ray.cluster_resources().get("GPU", 0)
    has = f"the cluster has {cpus()}" + (f", and {devices:g} CUDA devices" if gpus else "")
    if gpus > devices and not os.environ.get("RAY_ADDRESS"):
        raise Refused(f"{gpus:g} CUDA devices a worker were asked for, and this machine has {devices:g}.")
    what = "CPU" if not gpus else f"CPU with {gpus:g} CUDA devices"
    waiting = [ray.remote(num_cpus=1, num_gpus=gpus)(_nothing).remote()]
    if not ray.wait(waiting, timeout=min(5.0, patience))[0]:
        print(f"waiting for a free {what} ({has}, all in use)", file=sys.stderr)
        if not ray.wait(waiting, timeout=max(0.0, patience - 5.0))[0]:
            ray.cancel(waiting[0], force=True)
            raise Failed(
                f"no {what} became free within {patience:g} s; {has}. "
                "Wait for other jobs or stop one, then run this again: it goes on where it stopped."
            )


def require_shared(*uris: str, tracked: bool = False) -> None:
    """Refuse what only one machine of a cluster sees: local paths and, where the work is `tracked`, a database file."""
    connect()
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    here = tracking.uri() if tracked else ""
    grows = _growth_plan() is not None
    if len(machines) < 2 and not grows:
        return
    has = "starts others when it needs them" if grows else f"has {len(machines)}"
    if local := [uri for uri in uris if storage.is_local(uri)]:
        raise Refused(f"{', '.join(local)} is a path of one machine, and the cluster {has}; use s3:// URIs.")
    if here.startswith("sqlite:"):
        raise Refused(
            f"MLflow at {tracking.where()} is a file of one machine, and the cluster {has}: start `mlflow server` and"
            " set MLFLOW_TRACKING_URI to its address."
        )


def _growth_plan() -> dict[str, Any] | None:
    """What `ray up` leaves on a head, where this driver runs on one: Ray itself tells nobody what it may start."""
    home = Path("~/ray_bootstrap_config.yaml").expanduser()
    if not os.environ.get("RAY_ADDRESS") or not home.is_file():
        return None
    return dict(yaml.safe_load(home.read_text(encoding="utf-8")))


def _nothing() -> None:
    return None


def _choose_auth(address: str) -> None:
    if address == "local":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ["RAY_AUTH_MODE"] = "token"
    else:
        os.environ["RAY_AUTH_MODE"] = "token" if tokens.find() else "disabled"
    # Ray reads the mode when it is imported, which was earlier; it refreshes its own copy in this way too.
    Config.initialize("")
