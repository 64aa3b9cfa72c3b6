"""Heads and nodes of clusters on this machine: own ports, own directory, ended by the ids of their processes."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests

TOKEN = "0123456789abcdef" * 4


class Cluster:
    """A head that asks for a token, and nodes that joined it."""

    def __init__(self, home: Path):
        self.home = home
        self.token_file = home / "token"
        self.token_file.write_text(TOKEN)
        self.gcs, self.dashboard = free_ports(2)
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
        self.environment = {
            **ours,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }

    def start_head(self, cpus: int) -> None:
        (client,) = free_ports(1)
        self._start(
            "--head", f"--port={self.gcs}", f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={client}", f"--temp-dir={self.home / 'ray'}", f"--num-cpus={cpus}",
        )  # fmt: skip
        wait_for(self._answers, "the head's dashboard did not answer")

    def _start(self, *words: str) -> None:
        # Two Rays on one machine would take one port for the agents that jobs need, and the second never takes a job.
        (agent,) = free_ports(1)
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={agent}", f"--object-store-memory={150 * 2**20}", *words,
        ]  # fmt: skip
        with open(self.home / f"node-{len(self.nodes)}.log", "wb") as log:
            self.nodes.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.address}/api/gcs_healthz", timeout=2).ok
        except requests.RequestException:
            return False

    def logs(self) -> Iterator[Path]:
        """Every file that Ray wrote."""
        return (path for path in (self.home / "ray").rglob("*") if path.is_file() and not path.is_symlink())

    def end(self) -> None:
        family = [psutil.Process(node.pid) for node in self.nodes]
        family += [child for process in list(family) for child in process.children(recursive=True)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=20)
        for node in self.nodes:
            node.wait(10)


@contextmanager
def cluster(cpus: int) -> Iterator[Cluster]:
    """A running head. Its directory is directly below the system's: Ray's sockets have names of at most 107 bytes."""
    home = Path(tempfile.mkdtemp(prefix="vqray-"))
    made = Cluster(home)
    try:
        made.start_head(cpus)
        yield made
    finally:
        made.end()
        shutil.rmtree(home, ignore_errors=True)


def wait_for(ready, what: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"{what} within {seconds:g} s"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
