"""What workers tell the driver while they train: an actor between them, an end for each side.

`ray.train.report` would hold every worker up until the controller's next look; this holds up nobody.
"""

import sys
import threading
import time
from typing import Any

import ray
from tqdm import tqdm

from pipelines.loop import Event
from pipelines.tracking import Run


@ray.remote(num_cpus=0)
class Mailbox:
    """Between workers and driver. Outlives the worker group, so it also remembers an error that no restart mends."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.error: str | None = None

    def put(self, events: list[Event]) -> None:
        self.events += events

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def fail(self, text: str) -> None:
        self.error = self.error or text

    def failure(self) -> str | None:
        return self.error


class Outbox:
    """A worker's end of the mailbox: batches events, and of progress keeps only the newest."""

    def __init__(self, mailbox: Any, every: float = 0.25, **label: Any):
        """Events get the keys of `label` too, where several tell one mailbox."""
        self.mailbox, self.every, self.label = mailbox, every, label
        self.waiting: list[Event] = []
        self.sent = 0.0

    def tell(self, event: Event) -> None:
        if event["kind"] == "progress" and self.waiting and self.waiting[-1]["kind"] == "progress":
            self.waiting.pop()
        self.waiting.append({**event, **self.label})
        if time.monotonic() - self.sent > self.every:
            self.flush()

    def flush(self) -> Any:
        """Send what waits; `ray.get` of what this returns waits until it is there."""
        events, self.waiting = self.waiting, []
        self.sent = time.monotonic()
        return self.mailbox.put.remote(events)


class Listener:
    """Drains the mailbox on a thread of the driver, the only writer of the tracking store."""

    def __init__(self, mailbox: Any, run: Run, every: float = 0.5):
        self.mailbox, self.run, self.every = mailbox, run, every
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        if self.bar is not None:
            self.bar.close()

    def _listen(self) -> None:
        while True:
            finished = self.done.wait(self.every)
            for event in ray.get(self.mailbox.take.remote()):
                self._hear(event)
            if finished:
                return

    def _hear(self, event: Event) -> None:
        match event["kind"]:
            case "log":
                tqdm.write(event["text"], file=sys.stderr)
            case "progress":
                self._show(event)
            case "metrics":
                self.run.log_metrics([(event["run_step"], event["metrics"])])
                if self.bar is not None:
                    self.bar.set_postfix(_headline(event["metrics"]), refresh=False)

    def _show(self, event: Event) -> None:
        name = f"train {event['stage']}"
        if self.bar is None or self.bar.desc != name:
            if self.bar is not None:
                self.bar.close()
            first = event["step"] - 1
            self.bar = tqdm(total=event["steps"], initial=first, desc=name, unit="step", file=sys.stderr)
        self.bar.update(event["step"] - self.bar.n)


def _headline(metrics: dict[str, float]) -> dict[str, str]:
    """The two or three numbers a person watches."""
    shown = {}
    for name, value in metrics.items():
        if name.startswith("train/loss/") or name.endswith("usage"):
            shown[name.removeprefix("train/").removeprefix("loss/")] = f"{value:.3g}"
    return shown
