"""Connecting to Ray: the cluster that RAY_ADDRESS names, or one of this machine's own that ends with the process."""

import logging
import os
import warnings

import ray

from pipelines.errors import Refused


def connect() -> None:
    """Connect once per process.

    An embedded instance listens on loopback only, starts no dashboard and so no Jobs API, and ends with the process;
    it runs without token authentication unless RAY_AUTH_MODE says otherwise. A cluster's own mode is left to the
    environment: a client must use what the cluster uses.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Otherwise Ray warns on every start that it will stop clearing CUDA_VISIBLE_DEVICES for tasks without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            raise Refused(
                f"RAY_ADDRESS={address!r} does not answer: {error}. Unset it to run on this machine."
            ) from None
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        ray.init(include_dashboard=False, **quiet)


def cpus() -> int:
    """CPUs of the whole cluster."""
    return int(ray.cluster_resources().get("CPU", 0))


def require_free_cpu() -> None:
    """Refuse to start what would wait without a word: Ray Data shows nothing while no CPU is free."""
    free = ray.available_resources().get("CPU", 0.0)
    if free < 1:
        raise Refused(
            f"no CPU is free on this cluster ({free:g} of {cpus()}); wait for the work that holds them, or add nodes."
        )
