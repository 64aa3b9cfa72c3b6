"""The ingest of a streamed run: on a thread of the driver beside the workers, held back and tidied up behind them."""

import threading
import time
import traceback
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from tqdm import tqdm

from pipelines import ingest, storage, used
from pipelines.checkpoint import Checkpoints
from pipelines.errors import Failed, Refused
from pipelines.ingest_request import Asked
from pipelines.parts import Halt

AHEAD, MORE_AHEAD = 2, 2
"""Parts that are made beyond the one that is read, where used ones are deleted, and as many more for each process that
makes them: what the disk has to hold."""
LAST_WAIT = 30.0
"""Seconds that a halted ingest has for its end."""


class Alongside:
    """The ingest while the context lasts; it is halted when that is left, and has its finished parts then."""

    def __init__(
        self, asked: Asked | None, shards: str, run: str, *, deletes: bool, at_once: int, fail: Callable[[str], None]
    ) -> None:
        """
        Args:
            asked: None where there is nothing left to ingest.
            deletes: parts are deleted when no checkpoint of the run goes on in them.
            at_once: parts that are made at one time: the CPUs that the workers leave.
            fail: is told, on a thread of its own, why the ingest failed.
        """
        self.asked, self.shards, self.run, self.deletes = asked, shards, run, deletes
        self._at_once = at_once
        self._fail = fail
        self._halt = Halt()
        self._thread = threading.Thread(target=self._ingest, name="ingest", daemon=True)

    def __enter__(self) -> "Alongside":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        until = time.monotonic() + LAST_WAIT
        while self._thread.is_alive() and time.monotonic() < until:
            self._halt.now()
            self._thread.join(0.5)

    def join(self) -> None:
        """Wait for its end: it has said what it made, and nothing is written any more."""
        self._thread.join()
        if self.deletes:
            delete_used(self.shards, self.run)

    def hear(self, event: dict[str, Any]) -> None:
        """What the workers say, as they say it."""
        if not self.deletes or event["kind"] not in ("part", "checkpoint", "trained"):
            return
        try:
            if event["kind"] == "checkpoint":
                delete_used(self.shards, self.run)
            else:
                used.note_reading(self.shards, self.run, event.get("part", used.ALL))
        except (Failed, Refused, OSError) as error:
            # Neither must end the thread that listens; the next event tries again.
            tqdm.write(f"{error} Used parts stay until the next checkpoint.")

    def _ingest(self) -> None:
        if self.asked is None:
            return
        try:
            ahead = AHEAD + MORE_AHEAD * self._at_once if self.deletes else None
            ingest.carry_out(self.asked, at_once=self._at_once, ahead=ahead, halt=self._halt)
        except (Failed, Refused) as error:
            reason = str(error)
        except BaseException as error:
            reason = "".join(traceback.format_exception(error))
        else:
            return
        if not self._halt.wished.is_set():
            self._fail(f"the ingest failed: {reason}")


def delete_used(shards: str, run: str) -> int:
    """Delete the shards of every part that no kept checkpoint of the run goes on in; how many parts are deleted now.

    A run goes on from the newest checkpoint, or from the one before it where the newest is damaged. So a part goes when
    the older of the two lies past its last step; and, when the run has its bundle, every part it has begun.
    """
    store, before = Checkpoints(run), int(used.state_of(shards)["deleted"])
    finished = storage.exists(storage.join(run, "bundle", "card.json"))
    kept = store.complete()[-2:]
    if not kept or (len(kept) < 2 and not finished):
        return before
    stage, step = kept[-1] if finished else kept[0]
    steps = store.state(stage, step)["parts"]
    ends = list(accumulate(steps))
    if finished:
        parts = sum(end - its < step for end, its in zip(ends, steps, strict=True))
    else:
        parts = sum(end <= step for end in ends)
    if parts <= before:
        return before
    # Said first: whoever comes in between must not take what is missing for damage.
    used.note_deleted(shards, run, parts)
    gone = tuple(f"shard-{part:05d}-" for part in range(before, parts))
    for entry in storage.list_files(shards):
        if entry.name.startswith(gone):
            storage.remove(entry.uri)
    return parts
