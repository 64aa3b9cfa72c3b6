"""Work for tests of the parts engine; importable by name, so that Ray's workers find it too."""

import os
import time
from pathlib import Path
from typing import Any

from pipelines.errors import Failed, Refused


def square(part: int, payload: Any) -> dict[str, Any]:
    if payload == "refuse":
        raise Refused("the request was wrong: it's refused")
    if payload == "fail":
        raise Failed("the disk is full")
    if payload == "crash":
        raise KeyError("two\nlines")
    return {"part": part, "square": payload**2, "process": os.getpid()}


def die_once(folder: str, part: int, payload: Any) -> dict[str, Any]:
    """A worker that is killed the first time it does part 1."""
    mark = Path(folder) / "died"
    if part == 1 and not mark.exists():
        mark.touch()
        os._exit(1)
    return {"part": part}


def die_always(part: int, payload: Any, *shared: Any) -> dict[str, Any]:
    """Part 1 is a file that kills whoever reads it."""
    if part == 1:
        os._exit(1)
    return {"part": part}


def take_the_place_of_its_record(out: str, part: int, payload: Any) -> dict[str, Any]:
    """As a full disk would: the work is done, and its record cannot be written."""
    (Path(out) / f"parts/part-{part:05d}.json/x").mkdir(parents=True)
    return {}


def load(folder: str) -> int:
    (Path(folder) / f"{os.getpid()}.{time.time_ns()}").touch()
    return 100


def refuse_to_load() -> int:
    raise Refused("no such bundle")


def add(part: int, payload: int, state: int) -> dict[str, Any]:
    time.sleep(0.05)
    return {"sum": payload + state, "process": os.getpid()}
