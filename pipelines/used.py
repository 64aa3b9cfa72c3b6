"""What a streamed run is done with: how far it reads, which parts are deleted. One small file beside the shards.

The ingest looks at it so as not to run ahead without bound, and readers look at it when a shard is missing.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipelines import storage
from pipelines.errors import Refused
from pipelines.manifest import part_of

T = TypeVar("T")

NAME = "used.json"
POLL = 0.5
"""Seconds between two looks of a part that waits until there is room for it."""
ALL = 2**31
"""The part that is read when training has ended: every part has room."""


def state_of(shards: str) -> dict[str, Any]:
    """`run`: whose they are; `reading`: the part that it reads or waits for; `deleted`: all parts below are deleted."""
    home = storage.join(shards, NAME)
    known: dict[str, Any] = storage.read_json(home) if storage.exists(home) else {}
    return {"run": None, "reading": 0, "deleted": 0, **known}


def check_owner(shards: str, run: str, deletes: bool) -> None:
    """Refuse shards whose parts another run deletes, and another run's deleting."""
    known = state_of(shards)
    if known["run"] not in (None, run):
        raise Refused(
            f"the parts in {shards} are deleted as the run in {known['run']} uses them; "
            "stream into another --shards, or go on with that --out."
        )
    if not deletes and known["deleted"]:
        raise Refused(
            f"{known['deleted']} parts in {shards} were deleted by this run as it was begun; repeat --delete-used."
        )


def note_reading(shards: str, run: str, part: int) -> None:
    """The run now reads, or waits for, this part."""
    storage.write_json_atomic(storage.join(shards, NAME), {**state_of(shards), "run": run, "reading": part})


def note_deleted(shards: str, run: str, parts: int) -> None:
    """The parts below this one are deleted, or are about to be."""
    storage.write_json_atomic(storage.join(shards, NAME), {**state_of(shards), "run": run, "deleted": parts})


def after_room(shards: str, ahead: int, work: Callable[..., T], part: int, payload: Any, *shared: Any) -> T:
    """`work` of a part, begun when the run reads at most `ahead` parts before it."""
    while part > state_of(shards)["reading"] + ahead:
        time.sleep(POLL)
    return work(part, payload, *shared)


def why_missing(shards: str, name: str) -> str | None:
    """What became of a shard that a stream deleted; None of any other."""
    known = state_of(shards)
    if not known["deleted"] or part_of(name) >= known["deleted"]:
        return None
    return (
        f"shard {name} of {shards} was deleted after use by the streamed run in {known['run']} (--delete-used), as were"
        f" those of all {known['deleted']} first parts; ingest the same source into a new --out to have them again."
    )
