"""The engine of ingest, encode and decode: one Ray Data task a part, each leaving a record when it is done.

What parts share (a trained bundle) is made once a process. What is heavy (a language model) has actors: processes that
do nothing else. A bundle has none: actors start anew each time, which takes longer than to encode a few shards.

A record is the last thing a part writes, so an interrupted run redoes only the parts without one, and a part that is
tried twice overwrites its own files with the same bytes.
"""

import gc
import json
import logging
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from tqdm import tqdm

from pipelines import cluster, storage
from pipelines.errors import Failed, Refused
from pipelines.manifest import record_uri

TRIES = 4
"""How often a run begins a part. Ray Data begins it again whenever its worker dies, for ever: a file that kills who
reads it (out of memory, a crash in a library) would never end."""

Record = dict[str, Any]
Work = Callable[..., Record]
"""work(part number, payload), or work(part number, payload, state) where there is a setup. It writes its own files."""


@dataclass(frozen=True)
class Part:
    """What one task is given, and how much it counts."""

    units: int
    """What the progress bar counts: files, rows ..."""
    payload: Any = None
    """JSON value. What all parts share belongs into `work` (functools.partial)."""
    about: str = ""
    """What it reads, for messages."""


def run_parts(
    parts: Sequence[Part],
    work: Work,
    out: str,
    *,
    label: str,
    unit: str,
    setup: partial[Any] | None = None,
    actors: bool = False,
    gpus: float = 0,
    at_once: int | None = None,
    check: Callable[[Record], None] | None = None,
    halt: "Halt | None" = None,
) -> list[Record]:
    """Do every part that has no record below `out`/parts yet; all records, in part order.

    Args:
        work: a module-level function (or partial of one) returning a JSON record.
        setup: a partial of a module-level function that makes what all parts of a process share (a loaded bundle);
            equal partials give it once a process. Its process then computes with one torch thread, so that results do
            not depend on how many CPUs there are.
        actors: parts run in actors of their own, one a CPU.
        gpus: CUDA devices of an actor.
        at_once: most parts at one time, a CPU each; default as many as the cluster has CPUs free.
        check: sees every record, found or new, and may raise to stop the run.
        halt: ends the run from another thread.

    Raises:
        Halted: by `halt`.
        Refused, Failed: as raised by `work` or `setup`, with their own message. What finished parts made is kept.
    """
    records = _recorded(out, len(parts))
    for record in records.values():
        if check:
            check(record)
    missing = {number: part for number, part in enumerate(parts) if number not in records}
    if missing:
        cluster.connect()
        cluster.require_free_cpu(gpus=gpus)
    bar = tqdm(
        total=sum(part.units for part in parts),
        initial=sum(parts[number].units for number in records),
        desc=label,
        unit=f" {unit}",
        file=sys.stderr,
        disable=not missing,
    )
    task = _Task(work, setup, out, uuid.uuid4().hex)
    finished = _finished(missing, task, actors, gpus, at_once, halt or Halt())
    with bar, closing(finished):
        for number, record in finished:
            records[number] = record
            bar.update(parts[number].units)
            if check:
                check(record)
    return [records[number] for number in range(len(parts))]


class Halted(Failed):
    """A run of parts was ended from outside."""


class Halt:
    """Ends a run of parts from another thread: what is being made is given up, finished parts are kept."""

    def __init__(self) -> None:
        self.wished = threading.Event()
        self._executor: Any = None

    def now(self) -> None:
        """Ask for the end. Asked for while the run is being started, it may have to be asked for again."""
        self.wished.set()
        if self._executor is not None:
            self._executor.shutdown(force=True)

    def rows(self, results: Any) -> Generator[dict[str, Any], None, None]:
        """The rows of a dataset, until the halt."""
        create = results._create_executor

        def kept() -> Any:
            self._executor = create()
            return self._executor

        # The thread that waits for a part cannot be woken otherwise, and a part may take minutes. The dataset itself
        # tells nobody of its executor before there is a first row.
        results._create_executor = kept
        try:
            if not self.wished.is_set():
                yield from results.iter_rows()
        except Exception as error:
            # Whatever a dataset says whose execution was taken away.
            if not self.wished.is_set():
                raise
            raise Halted(HALTED) from error
        finally:
            # Also where a caller had enough: what it left undone would go on and keep its CPUs.
            if self._executor is not None:
                self._executor.shutdown(force=True)
            self._executor = None
            del results._create_executor
        if self.wished.is_set():
            raise Halted(HALTED)


HALTED = "it was stopped from outside. Finished parts are kept; run this again to go on."


class _Task:
    """One part on a worker. Our own errors travel as values: raised, they would come back in Ray's stack trace."""

    def __init__(self, work: Work, setup: partial[Any] | None, out: str, run: str) -> None:
        self.work, self.setup, self.out, self.run = work, setup, out, run

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = int(row["part"])
        name = f"part {part} ({row['about']})" if row["about"] else f"part {part}"
        mark = record_uri(self.out, part).removesuffix(".json") + ".begun"
        try:
            self._begin(mark, name)
            shared = (_kept(self.setup),) if self.setup else ()
            record = self.work(part, json.loads(row["payload"]), *shared)
            storage.write_json_atomic(record_uri(self.out, part), record)
            storage.remove(mark)
        except (Refused, Failed) as error:
            return {"part": part, "error": type(error).__name__, "text": str(error)}
        except Exception as error:
            # A bug, or a library's own error. The driver raises it as Failed; the trace would be lost on the way.
            told = [f"{name} ended with {type(error).__name__}: {error}", traceback.format_exc()]
            return {"part": part, "error": "other", "text": json.dumps(told)}
        return {"part": part, "error": "", "text": json.dumps(record)}

    def _begin(self, mark: str, name: str) -> None:
        """Count the times this run began the part: whoever dies in it leaves nothing but this."""
        before = storage.read_bytes(mark).decode().split() if storage.exists(mark) else []
        times = int(before[1]) + 1 if before[:1] == [self.run] else 1
        if times > TRIES:
            raise Failed(
                f"{name} ended {TRIES} worker processes: memory ran out, or a library crashed on what it reads. "
                "Finished parts are kept; run this again to go on, without the file that does it."
            )
        with storage.writing(mark, sync=False) as staged:
            staged.write_text(f"{self.run} {times}")


_STATES: dict[str, Any] = {}


def _kept(setup: partial[Any]) -> Any:
    """What `setup` makes, made once a process, with its first part, so that errors travel; only the newest is kept."""
    name = f"{setup.func.__module__}.{setup.func.__qualname__}{setup.args}{setup.keywords}"
    if name not in _STATES:
        import torch

        torch.set_num_threads(1)
        _STATES.clear()
        _STATES[name] = setup()
    return _STATES[name]


def _finished(
    todo: Mapping[int, Part], task: _Task, actors: bool, gpus: float, at_once: int | None, halt: Halt
) -> Generator[tuple[int, Record], None, None]:
    """Records as their parts finish, in any order."""
    if not todo:
        return
    import ray.data

    items = [{"part": n, "payload": json.dumps(part.payload), "about": part.about} for n, part in todo.items()]
    with _quiet():
        # One block a part: a block is Ray Data's unit of scheduling and of retry.
        blocks = ray.data.from_items(items, override_num_blocks=len(items))
        if not actors:
            results = blocks.map(task, num_cpus=1, compute=ray.data.TaskPoolStrategy(at_once))
        else:
            # One part at a time: a second one would wait behind it while another actor has nothing to do.
            most = min(len(items), at_once or len(items))
            pool = ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=most,
                initial_size=min(most, max(1, cluster.cpus())),
                max_tasks_in_flight_per_actor=1,
            )
            results = blocks.map(
                _Task,
                fn_constructor_args=(task.work, task.setup, task.out, task.run),
                compute=pool,
                num_cpus=1,
                num_gpus=gpus or None,
            )
        try:
            with closing(halt.rows(results)) as rows:
                for row in rows:
                    if row["error"]:
                        raise _raised(row["error"], row["text"])
                    yield int(row["part"]), json.loads(row["text"])
        except ray.exceptions.RayError as error:
            # What Ray does not do again by itself.
            raise Failed(f"a worker was lost: {error}. Finished parts are kept; run this again to go on.") from error
        finally:
            # Ray Data leaves its actors, and their CPUs, to reference counts, and holds them in cycles.
            del blocks, results
            gc.collect()


def _raised(error: str, text: str) -> Refused | Failed:
    if error != "other":
        return Refused(text) if error == "Refused" else Failed(text)
    line, trace = json.loads(text)
    print(trace, file=sys.stderr)
    return Failed(f"{line} (its trace is above). Finished parts are kept; run this again to go on.")


def _recorded(out: str, parts: int) -> dict[int, Record]:
    home = storage.join(out, "parts")
    if not storage.exists(home):
        return {}
    known = {entry.name for entry in storage.list_files(home)}
    uris = {number: record_uri(out, number) for number in range(parts)}
    found = {number: uri for number, uri in uris.items() if uri.rsplit("/", 1)[-1] in known}
    # Side by side: from s3 each takes a round trip, and there may be thousands.
    with ThreadPoolExecutor(16) as readers:
        return dict(zip(found, readers.map(storage.read_json, found.values()), strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data's own bars and log lines would tear ours apart. And a pool of actors grows when all of them are busy."""
    context = ray.data.DataContext.get_current()
    pool, log = context.autoscaling_config, logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, log.level
    threshold = pool.actor_pool_util_upscaling_threshold
    context.enable_progress_bars, context.print_on_execution_start = False, False
    # Its own 1.75 means that parts wait behind busy actors, which they never do here.
    pool.actor_pool_util_upscaling_threshold = 1.0
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        pool.actor_pool_util_upscaling_threshold = threshold
        log.setLevel(before[2])
