"""Rows a second on one core for every kind of corpus that exists, and what a billion rows would take.

One thread reads the slices of made-up files and writes their shards, as a task of an ingest does, without Ray.
Seconds are those of the processor, so a busy machine changes little; waiting for a disk or a network is not in them.
The projection multiplies: it takes for granted that cores do not hinder each other, as tasks share nothing.
Requests to S3 are those of reading slices (64 MiB as a rule; a file each, where files are small) and of writing shards
in multipart uploads.
"""

import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import corpora
from pipelines.corpora import Slice
from pipelines.errors import Refused
from pipelines.ingest import MOST_PART_BYTES
from pipelines.reading import Selection, read_part
from pipelines.shards import SHARD_BYTES
from pipelines.storage import MULTIPART_BYTES
from tests.benchmarks.kind_inputs import MAKERS, Input
from tests.benchmarks.timing import one_thread

SECONDS, PASSES = 20.0, 3
"""Least work of a kind."""
BILLION = 1_000_000_000
CORES = (64, 256, 1024)


@dataclass(frozen=True)
class Speed:
    """What was measured of one kind."""

    kind: str
    input: Input
    units: int
    rows: int
    bytes_in: int
    bytes_out: int
    files: int
    seconds: float
    """Of one core, median over passes."""
    passes: int


@dataclass(frozen=True)
class Projection:
    """A billion rows."""

    core_hours: float
    gets: int
    puts: int


def run(quick: bool = False) -> None:
    """Print a table of speeds and a table of projections, as the README has them."""
    speeds = []
    for kind in corpora.names():
        if kind not in MAKERS:
            print(f"{kind}: no input is made up for it here (tests/benchmarks/kind_inputs.py)")
            continue
        with tempfile.TemporaryDirectory() as scratch, one_thread():
            try:
                speeds.append(measure(kind, Path(scratch), quick))
            except (ImportError, Refused) as missing:
                print(f"{kind}: left out: {missing}")
            else:
                print(f"  {kind}: {speeds[-1].passes} passes of {speeds[-1].seconds:.1f} s", flush=True)
    print("\n".join(["", *_speeds(speeds), "", *_projections(speeds)]))


def measure(kind: str, scratch: Path, quick: bool) -> Speed:
    make, count = MAKERS[kind]
    (scratch / "in").mkdir()
    made = make(scratch / "in", max(1, count // 20) if quick else count)
    corpus = corpora.load(kind)
    settings = corpus.Settings.model_validate(made.settings)
    survey = corpus.survey([str(made.source)], settings)
    settings = settings.model_copy(update=survey.settings)
    shared = (corpus.setup(settings),) if corpus.setup else ()
    payload, units = _payload(survey.slices)
    times: list[float] = []
    while not times or (not quick and (sum(times) < SECONDS or len(times) < PASSES)):
        began = time.process_time()
        record: dict[str, Any] = read_part(
            corpus, settings, survey.context, Selection(units, None, 0.1), str(scratch / "out"), 0, payload, *shared
        )
        times.append(time.process_time() - began)
    if record["bad"] or record["filtered"]:
        raise RuntimeError(f"{kind}: not all made-up units became rows: {record['bad'][:2]}, {record['filtered']}")
    files = [path for path in made.source.rglob("*") if path.is_file()]
    return Speed(
        kind,
        made,
        units,
        sum(shard["rows"] for shard in record["shards"]),
        sum(path.stat().st_size for path in files),
        sum(shard["bytes"] for shard in record["shards"]),
        len(files),
        statistics.median(times),
        len(times),
    )


def project(rows: int, bytes_in: int, bytes_out: int, requests: float, seconds: float) -> Projection:
    """What a billion rows take, from what `rows` took; `requests` read them."""
    scale = BILLION / rows
    shards = math.ceil(bytes_out * scale / SHARD_BYTES)
    # A multipart upload begins, sends its parts and ends.
    puts_a_shard = 2 + math.ceil(SHARD_BYTES / MULTIPART_BYTES)
    # A part of the ingest leaves a mark when it is begun and a record when it is done.
    notes = 2 * math.ceil(bytes_in * scale / MOST_PART_BYTES)
    return Projection(seconds * scale / 3600, math.ceil(requests * scale), shards * puts_a_shard + notes)


def _payload(slices: list[Slice]) -> tuple[list[list[Any]], int]:
    """All slices as one part, by way of JSON as on the way to a worker."""
    payload, first = [], 0
    for piece in slices:
        payload.append([first, asdict(piece)])
        first += piece.stop - piece.start
    return json.loads(json.dumps(payload)), first


def _speeds(speeds: list[Speed]) -> list[str]:
    lines = ["| kind | input | rows/s | MB/s read | MB/s written | bytes a row, read | written |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for s in speeds:
        rates = f"{s.rows / s.seconds:,.0f} | {s.bytes_in / s.seconds / 1e6:.2f} | {s.bytes_out / s.seconds / 1e6:.1f}"
        lines.append(
            f"| {s.kind} | {s.input.what} | {rates} | {s.bytes_in / s.rows:,.0f} | {s.bytes_out / s.rows:,.0f} |"
        )
    return lines


def _projections(speeds: list[Speed]) -> list[str]:
    hours = " | ".join(f"hours on {cores:,} cores" for cores in CORES)
    lines = [f"| a billion rows of | core hours | {hours} | TB read | TB written | S3 GET | S3 PUT |"]
    lines.append("|---|" + "---:|" * (5 + len(CORES)))
    for s in speeds:
        requests = s.bytes_in / s.input.range_bytes if s.input.packed else s.files
        made = project(s.rows, s.bytes_in, s.bytes_out, requests, s.seconds)
        each = " | ".join(f"{made.core_hours / cores:.2f}" for cores in CORES)
        sizes = f"{s.bytes_in / s.rows / 1e3:.2f} | {s.bytes_out / s.rows / 1e3:.2f}"
        lines.append(f"| {s.kind} | {made.core_hours:,.1f} | {each} | {sizes} | {made.gets:,} | {made.puts:,} |")
    return lines
