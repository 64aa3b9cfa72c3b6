"""The engine of ingest, encode, decode and evaluate: one Ray Data task a part, each leaving a record when it is done.

A record is the last thing a part writes, so an interrupted run redoes only the parts without one, and a part that is
tried twice overwrites its own files with the same bytes.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray.data
from tqdm import tqdm

from pipelines import cluster, storage
from pipelines.errors import Failed, Refused

Record = dict[str, Any]
Work = Callable[[int, Any, dict[str, Any]], Record]
"""(part number, its payload, config) -> record, all JSON values. A module-level function that writes its own files."""


@dataclass(frozen=True)
class Part:
    units: int
    """What the progress bar counts: rows, files ..."""
    payload: Any = None
    """JSON value that only this part's task gets. What all share belongs into the config."""


def run_parts(
    parts: Mapping[int, Part],
    work: Work,
    config: dict[str, Any],
    *,
    label: str,
    unit: str,
    out: str | None = None,
    check: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Do every part that has no record yet, and return all records in the order of their numbers.

    Args:
        parts: part number -> what it is.
        out: directory that keeps the records under `parts/`; None keeps none and does every part.
        check: sees each record as it arrives and may raise to stop the whole run.

    Raises:
        Refused, Failed: as raised by `work`, with its message; what finished parts made is kept.
    """
    records = dict(_recorded(out, parts)) if out else {}
    missing = [part for part in parts if part not in records]
    for record in records.values():
        if check:
            check(record)
    if not missing:
        return [records[part] for part in parts]
    cluster.connect()
    cluster.require_free_cpu()
    # Ray Data's own bars and log lines would tear ours apart.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    task = _Task(work, config, out)
    todo = ray.data.from_items(
        [{"part": part, "payload": json.dumps(parts[part].payload)} for part in missing],
        override_num_blocks=min(len(missing), 10_000),
    )
    total = sum(part.units for part in parts.values())
    done = sum(parts[part].units for part in records)
    with tqdm(total=total, initial=done, desc=label, unit=f" {unit}", file=sys.stderr) as bar:
        for row in todo.map(task).iter_rows():
            if row.get("error"):
                raise {"Refused": Refused, "Failed": Failed}[row["error"]](row["record"])
            record = json.loads(row["record"])
            if check:
                check(record)
            records[row["part"]] = record
            bar.update(parts[row["part"]].units)
    return [records[part] for part in parts]


class _Task:
    """One part on a worker. Our own errors travel as values: raised there, they would come back wrapped in Ray's."""

    def __init__(self, work: Work, config: dict[str, Any], out: str | None):
        self.work, self.config, self.out = work, config, out

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = int(row["part"])
        try:
            record = self.work(part, json.loads(row["payload"]), self.config)
        except (Refused, Failed) as error:
            return {"part": part, "error": type(error).__name__, "record": str(error)}
        if self.out:
            storage.write_json_atomic(_home(self.out, part), record)
        return {"part": part, "error": "", "record": json.dumps(record)}


def forget_records(out: str) -> None:
    """Remove the records of a finished directory: its manifest says everything they said."""
    storage.remove(storage.join(out, "parts"))


def _home(out: str, part: int) -> str:
    return storage.join(out, "parts", f"part-{part:05d}.json")


def _recorded(out: str, parts: Iterable[int]) -> Iterator[tuple[int, Record]]:
    home = storage.join(out, "parts")
    if not storage.exists(home):
        return
    known = {entry.name for entry in storage.list_files(home)}
    for part in parts:
        if f"part-{part:05d}.json" in known:
            yield part, storage.read_json(_home(out, part))
