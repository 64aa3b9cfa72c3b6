"""What workers tell the driver while they train: an actor between them, an end for each side.

`ray.train.report` would hold every worker up until the controller's next look; this holds up nobody.
"""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from tqdm import tqdm

from pipelines.errors import Failed
from pipelines.loop import Event
from pipelines.step import Wish
from pipelines.tracking import Run


@ray.remote(num_cpus=0, max_concurrency=64)
class Mailbox:
    """Between workers and driver. Outlives the worker group, so it also remembers an error that no restart mends.

    Its methods are coroutines, so that one may wait for what another brings.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.error: str | None = None
        self.stopping = False
        self.last_words: str | None = None
        self.saves_wished = 0
        self.saving = False
        self.saved = asyncio.Event()

    async def put(self, events: list[Event]) -> tuple[bool, int]:
        """Returns what is wished from outside: (an end, the number of the checkpoint that is waited for, or 0)."""
        self.events += events
        if any(event["kind"] == "checkpoint" for event in events):
            self.saving = False
            self.saved.set()
        return self.stopping, self.saves_wished if self.saving else 0

    async def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    async def fail(self, text: str) -> None:
        self.error = self.error or text

    async def failure(self) -> str | None:
        return self.error

    async def stop(self) -> None:
        """Ask the workers to save and end."""
        self.stopping = True

    async def stop_with(self, text: str) -> None:
        self.last_words = text

    async def stopped(self) -> str | None:
        """What the workers said when they had ended because they were asked to."""
        return self.last_words

    async def save(self, seconds: float) -> None:
        """Ask the workers for a checkpoint and wait until one is written, at most so many seconds."""
        self.saved.clear()
        self.saves_wished += 1
        self.saving = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.saved.wait(), seconds)
        # Workers that start later were not asked.
        self.saving = False


def mailbox_here() -> Any:
    """A mailbox on the caller's node: where Ray likes, it would be lost with a node that the run outlives."""
    node = ray.get_runtime_context().get_node_id()
    return Mailbox.options(label_selector={"ray.io/node-id": node}).remote()  # type: ignore[attr-defined]


class Outbox:
    """A worker's end of the mailbox: batches events, and of progress and waits keeps only the newest."""

    def __init__(self, mailbox: Any, every: float = 0.25, **label: Any):
        """Events get the keys of `label` too, where several tell one mailbox."""
        self.mailbox, self.every, self.label = mailbox, every, label
        self.waiting: list[Event] = []
        self.sent = 0.0
        self.reply: Any = None
        self.save_heard = 0

    def tell(self, event: Event) -> None:
        if event["kind"] in ("progress", "waiting") and self.waiting and self.waiting[-1]["kind"] == event["kind"]:
            self.waiting.pop()
        self.waiting.append({**event, **self.label})
        if time.monotonic() - self.sent > self.every:
            self.flush()

    def flush(self) -> Any:
        """Send what waits; `ray.get` of what this returns waits until it is there."""
        events, self.waiting = self.waiting, []
        self.sent = time.monotonic()
        sent = self.mailbox.put.remote(events)
        # An earlier answer that was not read yet stays: it is the next to come.
        self.reply = self.reply or sent
        return sent

    def wish(self) -> Wish:
        """What the newest answer asks for. Waits for nothing."""
        if self.reply is None or not ray.wait([self.reply], timeout=0)[0]:
            return Wish.NOTHING
        (stopping, save), self.reply = ray.get(self.reply), None
        if stopping:
            return Wish.STOP
        # Asked again until it is written, which takes a while.
        if save > self.save_heard:
            self.save_heard = save
            return Wish.SAVE
        return Wish.NOTHING


class Listener:
    """Drains the mailbox on a thread of the driver, the only writer of the tracking store.

    A tracking store that fails does not end a run: what it missed waits, is sent with what comes next, and is counted
    at the end if it never got there.
    """

    def __init__(self, mailbox: Any, run: Run, every: float = 0.5, also: Callable[[Event], None] | None = None):
        """`also` hears every event after this."""
        self.also = also
        self.mailbox, self.run, self.every = mailbox, run, every
        self.done = threading.Event()
        self.stop_wished = threading.Event()
        """Set by whoever wants the workers to save and end."""
        self.thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self.bar: tqdm[Any] | None = None
        self.points: list[tuple[int, dict[str, float]]] = []
        self.untracked = False
        self.waited_for = ""

    def __enter__(self) -> "Listener":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        if self.bar is not None:
            self.bar.close()
        if self.points:
            print(f"{len(self.points)} points of metrics did not reach the tracking store", file=sys.stderr)

    def _listen(self) -> None:
        asked = False
        while True:
            finished = self.done.wait(self.every)
            if self.stop_wished.is_set() and not asked:
                asked = True
                self._say("asked to stop: a checkpoint of the current step, then the end")
                self.mailbox.stop.remote()
            for event in ray.get(self.mailbox.take.remote()):
                self._hear(event)
                if self.also is not None:
                    self.also(event)
            self._track()
            if finished:
                return

    def _track(self) -> None:
        if not self.points:
            return
        try:
            self.run.log_metrics(self.points)
        except Failed as error:
            if not self.untracked:
                self._say(f"{error} Training goes on; metrics wait to be sent.")
            self.untracked = True
        else:
            self.points, self.untracked = [], False

    def _say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def _hear(self, event: Event) -> None:
        match event["kind"]:
            case "log":
                self._say(event["text"])
            case "progress":
                self._show(event)
            case "waiting":
                self._wait(event["text"])
            case "metrics":
                self.points.append((event["run_step"], event["metrics"]))
                if self.bar is not None:
                    self.bar.set_postfix(headline(event["metrics"]), refresh=False)

    def _wait(self, text: str) -> None:
        """Said again and again while it lasts: in the bar, or once where there is none yet."""
        if text == self.waited_for:
            return
        self.waited_for = text
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self._say(text)

    def _show(self, event: Event) -> None:
        self.waited_for = ""
        name = f"train {event['stage']}"
        if self.bar is None or self.bar.desc != name:
            if self.bar is not None:
                self.bar.close()
            first = event["step"] - 1
            self.bar = tqdm(total=event["steps"], initial=first, desc=name, unit="step", file=sys.stderr)
        self.bar.update(event["step"] - self.bar.n)


SHARES = {"speed/data_share": "data", "speed/reduce_share": "reduce"}


def headline(metrics: dict[str, float]) -> dict[str, str]:
    """The few numbers a person watches: losses, codes in use, rows a second, and what is not computing."""
    shown = {}
    for name, value in metrics.items():
        if name.startswith("train/loss/") or name.endswith("usage"):
            shown[name.removeprefix("train/").removeprefix("loss/")] = f"{value:.3g}"
        elif name.endswith("dead_codes"):
            shown[name.removeprefix("train/").replace("dead_codes", "dead")] = f"{value:.0f}"
        elif name == "speed/rows_per_second":
            shown["rows/s"] = f"{value:.3g}"
        elif name in SHARES:
            shown[SHARES[name]] = f"{value:.0%}"
    return shown
