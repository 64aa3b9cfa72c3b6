"""Checkpoints written on a thread, from copies, while the loop goes on.

A store that fails for a while does not stop training: the newest state waits in memory and is tried again, with pauses
that grow. Only after `patience` seconds without one written checkpoint does the run end, so that what may be lost is
bounded. At most two copies of the state exist: the one being written and the newest that waits.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pipelines.checkpoint import Checkpoint, Checkpoints
from pipelines.errors import Failed, Refused
from pipelines.retries import pauses

Event = dict[str, Any]


class Writer:
    """Rank 0's end of the run's checkpoints; a context that is left when nothing is being written any more."""

    def __init__(
        self, store: Checkpoints, say: Callable[[Event], None], *, behind: bool = True, patience: float = 600.0
    ) -> None:
        """
        Args:
            say: is told of every written checkpoint and of every spell of failures, always on the caller's thread.
            behind: False writes inside `submit`, for callers that use a checkpoint as soon as it is announced.
            patience: seconds of failing after which the run ends.
        """
        self.store, self.say, self.behind, self.patience = store, say, behind, patience
        self._changed = threading.Condition()
        self._waiting: tuple[Checkpoint, Event] | None = None
        self._busy = False
        self._closing = False
        self._fatal: BaseException | None = None
        self._failing_since: float | None = None
        self._newest: int | None = None
        self._events: deque[Event] = deque()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        """What waits is tried once more, without patience: the run is over or has died."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def submit(self, checkpoint: Checkpoint, event: Event) -> None:
        """Have a snapshot written, and `event` said once it is. One that still waits from before is dropped for it.

        Raises:
            Failed: nothing could be written for `patience` seconds.
        """
        self.poll()
        with self._changed:
            self._waiting = (checkpoint, event)
            self._changed.notify_all()
        if not self.behind:
            self._write_all()
        elif self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
            self._thread.start()
        self.poll()

    def poll(self) -> None:
        """Say what has happened since; raises what ended the thread."""
        while self._events:
            self.say(self._events.popleft())
        if self._fatal is not None:
            raise self._fatal

    def finish(self) -> None:
        """Wait until the newest snapshot is written.

        Raises:
            Failed: it could not be, for `patience` seconds.
        """
        with self._changed:
            while (self._waiting or self._busy) and self._fatal is None:
                # Not for ever: what happens is said while it happens.
                self._changed.wait(0.5)
                while self._events:
                    self.say(self._events.popleft())
        self.poll()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closing:
                    self._changed.wait()
                if self._waiting is None:
                    return
            self._write_all()
            if self._fatal is not None:
                return

    def _write_all(self) -> None:
        """Write what waits, and what comes to wait meanwhile, until nothing does or patience is at its end."""
        waits = pauses()
        try:
            while job := self._take():
                error = self._attempt(*job)
                if error is None:
                    waits = pauses()
                    continue
                with self._changed:
                    if self._closing:
                        return
                    self._waiting = self._waiting or job
                    self._changed.wait_for(lambda: self._closing, timeout=next(waits))
        except BaseException as fault:
            self._fatal = fault
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _take(self) -> tuple[Checkpoint, Event] | None:
        with self._changed:
            job, self._waiting = self._waiting, None
            self._busy = job is not None
            return job

    def _attempt(self, checkpoint: Checkpoint, event: Event) -> Exception | None:
        try:
            self.store.save(checkpoint)
        except (Failed, Refused, OSError) as error:
            self._failed(error, event)
            return error
        if self._failing_since is not None:
            self._log(f"checkpoints are written again; the newest is of step {event['run_step']:,}")
        self._failing_since, self._newest = None, event["run_step"]
        self._events.append(event)
        return None

    def _failed(self, error: Exception, event: Event) -> None:
        now = time.monotonic()
        kept = f"the newest is of step {self._newest:,}" if self._newest else "none was written in this session"
        reason = str(error).rstrip(".")
        if self._failing_since is None:
            self._failing_since = now
            self._log(
                f"the checkpoint of step {event['run_step']:,} could not be written: {reason}. Training goes on and it "
                f"is tried again for {self.patience:g} s; {kept}."
            )
        elif now - self._failing_since > self.patience:
            raise Failed(
                f"no checkpoint could be written for {self.patience:g} s ({kept}): {reason}. Make room or mend the "
                "store, then run the same command again: it goes on from the newest checkpoint."
            )

    def _log(self, text: str) -> None:
        self._events.append({"kind": "log", "text": text})
