"""Starting Ray, or joining the cluster that RAY_ADDRESS names. Nothing happens at import."""

import logging
import os
import secrets
import sys

import ray
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

from pipelines import storage, tokens
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


def require_shared(*uris: str) -> None:
    """Refuse local paths on a cluster of several machines: each would see files of its own."""
    connect()
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    local = [uri for uri in uris if storage.is_local(uri)]
    if len(machines) > 1 and local:
        raise Refused(
            f"{', '.join(local)} is a path of one machine, and the cluster has {len(machines)}; use s3:// URIs."
        )


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
