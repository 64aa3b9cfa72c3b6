"""What a search shows and keeps while it runs: a live table, and one MLflow run a trial below the search's own."""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines import storage, tracking
from pipelines.errors import Failed
from pipelines.loop import Event
from pipelines.trial_run import home_of, read_proposal
from pipelines.trials import Trial

TRACKING = "tracking.json"
SHOWN = 24
"""Rows of the table; more do not fit a screen."""
STATUS = {"finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}


@dataclass
class Row:
    """One trial in the table."""

    settings: dict[str, Any]
    repeat: int
    state: str = "running"
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    seconds: float | None = None


class SearchLog:
    """Hears events of trials on a thread of the driver, the only writer of the tracking store.

    Args:
        take: gives what trials have told since it was called last.
        columns: metrics shown for each trial.
    """

    def __init__(
        self,
        out: str,
        experiment: str,
        parent: str,
        tags: Mapping[str, str],
        take: Callable[[], list[Event]],
        total: int,
        columns: list[str],
        every: float = 0.5,
    ):
        self.out, self.experiment, self.parent, self.tags = out, experiment, parent, tags
        self.take, self.total, self.columns, self.every = take, total, columns, every
        self.rows: dict[int, Row] = {}
        self.runs: dict[int, tracking.Run] = {}
        self.ended: list[Trial] = []
        self.before = 0
        """Trials that had ended before this session."""
        self.began = time.monotonic()
        self.spent: list[float] = []
        """Seconds in the training loop of each trial that ended in this session, as far as they were spent in it."""
        self.error: Exception | None = None
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._listen, name="search log", daemon=True)
        console = Console(stderr=True)
        self.live = Live(self.table(), console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "SearchLog":
        if self.live is not None:
            self.live.start()
        self.thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.done.set()
        self.thread.join()
        if self.live is not None:
            self.live.stop()
        if kind is None:
            self.check()

    def sum_up(self, slots: int) -> None:
        """Say what the search cost beside training: starting processes, reading, scoring, writing, waiting."""
        if not self.spent:
            return
        wall, trained = time.monotonic() - self.began, sum(self.spent)
        bare, count = trained / len(self.spent), len(self.spent)
        other = max(0.0, wall * slots - trained) / count
        self.say(
            f"{count} trials in {wall:.0f} s, {slots} at a time: {bare:.1f} s of training each and {other:.1f} s else"
        )

    def check(self) -> None:
        """Raises Failed where what trials did could not be kept."""
        if self.error is not None:
            raise Failed(f"the search's log stopped: {self.error}") from self.error

    def end(self, trial: Trial) -> None:
        """A trial has ended. Called by the driver, from any thread."""
        with self.lock:
            self.ended.append(trial)

    def keep(self, trial: Trial) -> None:
        """Log an ended trial once, also one that ended in a session which was killed before it could."""
        home = home_of(self.out, trial.number)
        uri = storage.join(home, TRACKING)
        if storage.exists(uri) and storage.read_json(uri).get("ended") == trial.state:
            return
        run = self._run_of(trial.number)
        values = {f"valid/{name}": value for name, value in trial.metrics.items()}
        run.log_metrics([(trial.steps, {**values, "seconds": trial.seconds})])
        told = {"state": trial.state, "bundle_digest": trial.bundle_digest or "", "error": (trial.error or "")[-4000:]}
        run.tags({name: text for name, text in told.items() if text})
        run.finish(STATUS[trial.state])  # type: ignore[arg-type]
        storage.write_json_atomic(uri, {"run_id": run.id, "ended": trial.state})

    def table(self) -> Table:
        """The newest trials, running ones last."""
        table = Table(title=self.headline(), title_justify="left", box=None, pad_edge=False)
        order = sorted(self.rows, key=lambda number: (self.rows[number].state == "running", number))[-SHOWN:]
        keys = list(dict.fromkeys(key for number in order for key in self.rows[number].settings))
        for name in ["trial", *keys, "state", "step", *self.columns, "seconds"]:
            table.add_column(name, justify="right" if name not in ("state", *keys) else "left", no_wrap=True)
        for number in order:
            row = self.rows[number]
            spent = row.seconds if row.seconds is not None else time.monotonic() - row.began
            table.add_row(
                str(number) + (f".{row.repeat}" if row.repeat else ""),
                *(shown(row.settings.get(key)) for key in keys),
                row.state,
                f"{row.step:,}",
                *(shown(row.metrics.get(name)) for name in self.columns),
                f"{spent:.0f}",
            )
        return table

    def headline(self) -> str:
        states = [row.state for row in self.rows.values()]
        ended = self.before + len(states) - states.count("running")
        bad = f", {states.count('failed')} failed" if "failed" in states else ""
        early = f", {states.count('pruned')} stopped early" if "pruned" in states else ""
        left = ""
        if self.spent and ended < self.total:
            seconds = (time.monotonic() - self.began) / len(self.spent) * (self.total - ended)
            left = f", about {timedelta(seconds=round(seconds))} left"
        return f"{ended} of {self.total} trials have ended{bad}{early}{left}"

    def _listen(self) -> None:
        while True:
            finished = self.done.wait(self.every)
            try:
                # Ends first, then events: what a trial told before it ended is then heard before it is closed.
                with self.lock:
                    ended, self.ended = self.ended, []
                for event in self.take():
                    self._hear(event)
                for trial in ended:
                    self._close(trial)
                if self.live is not None:
                    self.live.update(self.table(), refresh=True)
            except Exception as error:
                # Raised on the driver's own thread by `check`; here it would vanish with the thread.
                self.error = error
                return
            if finished:
                return

    def _hear(self, event: Event) -> None:
        number = event["trial"]
        match event["kind"]:
            case "begin":
                proposal = read_proposal(self.out, number)
                self.rows[number] = Row(proposal.settings, proposal.repeat)
                self._run_of(number)
            case "progress" if self._runs(number):
                self.rows[number].step = event["run_step"]
            case "metrics" if self._runs(number):
                self._run_of(number).log_metrics([(event["run_step"], event["metrics"])])
            case "log" if event["text"].startswith("resuming"):
                self.say(f"trial {number}: {event['text']}")

    def _runs(self, number: int) -> bool:
        """False for what a killed process had told before it died, and is heard after the trial was closed."""
        return number in self.rows and self.rows[number].state == "running"

    def _close(self, trial: Trial) -> None:
        row = self.rows.setdefault(trial.number, Row(trial.settings, trial.repeat))
        self.spent.append(min(trial.seconds, time.monotonic() - row.began))
        row.state, row.step, row.seconds = trial.state, trial.steps, trial.seconds
        row.metrics = trial.metrics
        self.keep(trial)
        self.runs.pop(trial.number, None)
        numbers = " ".join(f"{name}={shown(trial.metrics[name])}" for name in self.columns if name in trial.metrics)
        settings = " ".join(f"{key}={shown(value)}" for key, value in trial.settings.items())
        why = f": {trial.error.strip().splitlines()[-1]}" if trial.error else ""
        if self.live is None or why:
            self.say(f"trial {trial.number} {trial.state} ({settings}) {numbers}{why} [{self.headline()}]")

    def _run_of(self, number: int) -> tracking.Run:
        """The trial's MLflow run, opened again where an earlier session began it."""
        if number not in self.runs:
            proposal = read_proposal(self.out, number)
            uri = storage.join(home_of(self.out, number), TRACKING)
            earlier = storage.read_json(uri)["run_id"] if storage.exists(uri) else None
            about = {"mlflow.parentRunId": self.parent, "kind": "trial", "trial": str(number), **self.tags}
            settings = {**proposal.settings, "seed": proposal.seed, "repeat": proposal.repeat}
            self.runs[number] = tracking.start_run(self.experiment, f"trial {number}", settings, about, earlier)
            storage.write_json_atomic(uri, {"run_id": self.runs[number].id})
        return self.runs[number]

    def say(self, text: str) -> None:
        """One line for people, above the table where there is one."""
        if self.live is not None:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr)


def shown(value: Any) -> str:
    """A setting or a metric in a few characters."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
