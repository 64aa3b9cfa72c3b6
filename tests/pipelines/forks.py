"""Processes that may be killed, and cheaply made: forked from one that has imported everything.

Importing torch takes seconds; a fork of a process that has it takes hundredths.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pipelines import checkpoint, loop, recipe, storage
from pipelines.loop import Event, RunSpec
from pipelines.step import Wish
from pipelines.stream import feed_of

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.pipelines.forks"])

for name in recipe.names():
    recipe.load(name)
# Its first step imports a good part of torch.
still = torch.zeros(1, requires_grad=True)
still.grad = torch.zeros(1)
torch.optim.Adam([still]).step()

WRITES = ("os.replace", "os.fsync", "shutil.rmtree", "safetensors.torch.save_file")
"""What writing a checkpoint comes down to. A process can be killed before and after each."""


def start(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = FORKS.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def ended(process: BaseProcess, seconds: float = 60) -> int:
    """Its exit code; minus the signal where one ended it."""
    process.join(seconds)
    assert process.exitcode is not None, "the process did not end"
    return process.exitcode


def train(spec: RunSpec, log: str, kill_at: tuple[int, bool] | None = None, group: tuple[str, int, int] | None = None):
    """One run in this process; its events go to `log`, its weights to `log` + .safetensors.

    Args:
        kill_at: (n, after): die before or after the n-th call of WRITES.
        group: (file, rank, world) of gloo workers.
    """
    torch.set_num_threads(1)
    if group is not None:
        file, rank, world = group
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    if kill_at is not None:
        _die_at(*kill_at)
    wish = Wish.NOTHING

    def stop(*_: object) -> None:
        nonlocal wish
        wish = Wish.STOP

    signal.signal(signal.SIGTERM, stop)
    with open(log, "a", buffering=1) as lines:

        def tell(event: Event) -> None:
            lines.write(json.dumps(event) + "\n")

        try:
            model, _ = loop.train(spec, feed_of(spec), torch.device("cpu"), tell, lambda: wish)
        except loop.Stopped as stopped:
            tell({"kind": "stopped", "text": str(stopped)})
            return
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, f"{log}.safetensors")


def events(log: Path, kind: str) -> list[Event]:
    """Events of one kind, of all processes that wrote to `log`; a line that a death cut off is no event."""
    found = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["kind"] == kind:
            found.append(event)
    return found


def _die_at(nth: int, after: bool) -> None:
    calls = 0

    def deadly(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            mine = calls
            if mine == nth and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = plain(*words, **named)
            if mine == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    for name in WRITES:
        home: Any = {"os": storage.os, "shutil": storage.shutil, "safetensors": checkpoint.safetensors.torch}[
            name.split(".")[0]
        ]
        setattr(home, name.rsplit(".", 1)[1], deadly(getattr(home, name.rsplit(".", 1)[1])))
