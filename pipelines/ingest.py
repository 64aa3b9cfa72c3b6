"""Raw files to shards: survey, cut into parts, read and write each part in one task, and last of all the manifest."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from pipelines import cluster, corpora, recipe, registry, storage
from pipelines.accounts import in_bytes, kept_of, looked_at, summary, too_bad, write_quarantine, write_sources
from pipelines.claims import claim
from pipelines.corpora import Corpus, CorpusSettings, Slice, Survey
from pipelines.errors import Failed, Refused
from pipelines.export import export_parquet
from pipelines.ingest_request import REQUEST, Asked, ask
from pipelines.manifest import (
    Manifest,
    ShardRecord,
    Units,
    describe,
    is_finished,
    load_manifest,
    save_manifest,
)
from pipelines.options import validated
from pipelines.parts import Halt, Part, Record, Work, run_parts
from pipelines.reading import read_part
from pipelines.tables import record_of, write_tables
from pipelines.used import after_room
from vqcore.bundle import read_card

MOST_PART_BYTES = 256 * 2**20
LEAST_PART_BYTES = 4 * 2**20
MOST_PART_SLICES = 16_384
"""A part's record names its slices; a million tiny files must not make one record of all."""


@dataclass(frozen=True)
class IngestResult:
    """What an ingest made, or found made."""

    out: str
    digest: str
    """Of the manifest."""
    rows: int
    quarantined: int
    filtered: dict[str, int]
    """Named setting or reason -> units left out."""
    skipped: bool
    """True when it was finished before."""
    seconds: float


def prepared_by(
    *, corpus: str | None, recipe_name: str | None, bundle: str | None, overrides: dict[str, Any]
) -> tuple[str, CorpusSettings]:
    """The corpus kind and its settings: a kind's own, a recipe's kind, or how the data of a bundle was prepared."""
    if bundle is not None:
        made = read_card(registry.local_bundle(bundle))["corpus"]
        settings = corpora.load(made["kind"]).Settings
        places = sorted(name for name, info in settings.model_fields.items() if info.exclude)
        if not_places := sorted(overrides.keys() - places):
            also = f" but for where things lie ({', '.join(places)})" if places else ""
            raise Refused(
                f"--bundle takes the preparation from the card{also}; leave --set {', '.join(not_places)} out, "
                "or use --corpus."
            )
        return made["kind"], validated(settings, {**made["settings"], **overrides}, f"corpus {made['kind']!r}")
    kind = corpus if corpus is not None else recipe.load(recipe_name or "").corpus[0]
    return kind, validated(corpora.load(kind).Settings, overrides, f"corpus {kind!r}")


def ingest(
    kind: str,
    sources: Sequence[str],
    out: str,
    *,
    settings: CorpusSettings,
    limit: int | None = None,
    max_bad_fraction: float = 0.05,
    holdout: float = 0.1,
    parquet: bool = False,
) -> IngestResult:
    """Turn raw files into shards and a manifest at `out`. Run again, it goes on where it stopped or finds all done.

    Args:
        kind: corpus kind.
        limit: take about so many units, spread evenly over all of them.
        max_bad_fraction: largest share of the units looked at that may be quarantined. It may differ on a rerun.
        holdout: share of groups for valid, and again for test, where the data has no official splits.
        parquet: export every shard as Parquet too; the manifest stays that of the Arrow shards.

    Raises:
        Refused: nothing to read, a number out of range, or an `out` that holds something else.
        Failed: too many bad units, or no good one. Finished parts and the quarantine are kept.
    """
    return carry_out(ask(kind, sources, out, settings, limit, max_bad_fraction, holdout), parquet=parquet)


def carry_out(
    asked: Asked,
    *,
    parquet: bool = False,
    at_once: int | None = None,
    ahead: int | None = None,
    halt: Halt | None = None,
) -> IngestResult:
    """What `ingest` does, of an ingest that was checked.

    Args:
        at_once: parts that are read at one time; default as many as there are CPUs.
        ahead: parts that may be made beyond the one that a streamed run reads; default any number.
        halt: ends it from another thread.
    """
    began, out = time.monotonic(), asked.out
    skipped = is_finished(out)
    if not skipped:
        cluster.require_shared(out, *asked.sources)
    claim(out, REQUEST, asked.request, "an ingest")
    if not skipped:
        _make(asked, at_once, ahead, halt)
    manifest = load_manifest(out)
    if parquet:
        export_parquet(out)
    _tell(summary(manifest, out))
    return IngestResult(
        out,
        manifest.digest,
        manifest.rows(),
        manifest.units.quarantined,
        manifest.units.filtered,
        skipped,
        round(time.monotonic() - began, 3),
    )


def _make(asked: Asked, at_once: int | None, ahead: int | None, halt: Halt | None) -> None:
    """Every part that is missing, and the manifest."""
    corpus, settings, selection, survey, out = asked.corpus, asked.settings, asked.selection, asked.survey, asked.out
    if corpus.prepare:
        survey = corpus.prepare(survey, settings, selection.wanted, selection.split_of)
    work: Work = partial(read_part, corpus, settings, survey.context, selection, out)
    check = _StopIfHopeless(asked.max_bad_fraction * selection.wanted_before(selection.units), out)
    tables = _side_tables(corpus, asked.sources, settings, asked.max_bad_fraction, out)
    setup = partial(corpus.setup, settings) if corpus.setup else None
    parts = _cut(survey.slices)
    files, size = len({piece.name for piece in survey.slices}), sum(piece.bytes for piece in survey.slices)
    _tell(f"{selection.units} units in {files} files ({in_bytes(size)}), {len(parts)} parts")
    found = run_parts(
        parts,
        work if ahead is None else partial(after_room, out, ahead, work),
        out,
        label="ingest",
        unit="units",
        setup=setup,
        actors=setup is not None,
        gpus=corpus.gpus(settings) if setup else 0,
        at_once=at_once,
        check=check,
        halt=halt,
    )
    _finish(asked.kind, corpus.schema(settings), asked.request, survey, found, tables, asked.max_bad_fraction, out)


def _cut(slices: Sequence[Slice]) -> list[Part]:
    """Runs of slices. The sizes depend on the sources alone, so any machine cuts alike and digests agree."""
    target = min(MOST_PART_BYTES, max(LEAST_PART_BYTES, sum(piece.bytes for piece in slices) // 32))
    parts: list[list[list[Any]]] = []
    first, size = 0, 0
    for piece in slices:
        if not parts or size + piece.bytes > target or len(parts[-1]) == MOST_PART_SLICES:
            parts.append([])
            size = 0
        parts[-1].append([first, dict(vars(piece))])
        size += piece.bytes
        first += piece.stop - piece.start
    return [
        Part(sum(piece["stop"] - piece["start"] for _, piece in part), part, _named(part[0][1], part[-1][1]))
        for part in parts
    ]


def _named(first: dict[str, Any], last: dict[str, Any]) -> str:
    return f"{first['name']} unit {first['start']} to {last['name']} unit {last['stop'] - 1}"


class _StopIfHopeless:
    """Sees records as parts finish: the rest need not be read when more is bad already than may be in all."""

    def __init__(self, allowed: float, out: str) -> None:
        self.allowed, self.out = allowed, out
        self.records: list[Record] = []
        self.bad = 0

    def __call__(self, record: Record) -> None:
        self.records.append(record)
        self.bad += len(record["bad"])
        if self.bad > self.allowed:
            write_quarantine(self.records, self.out)
            raise Failed(too_bad(self.records, looked_at(self.records), "units", self.out))


def _side_tables(
    corpus: Corpus, sources: list[str], settings: CorpusSettings, max_bad_fraction: float, out: str
) -> list[Record]:
    """The corpus's further tables, written and checked before the parts, which take longer."""
    if corpus.tables is None:
        return []
    records = write_tables(corpus.tables(sources, settings), out)
    for record in records:
        units = record["units"]
        looked = units["kept"] + units["quarantined"]
        if units["quarantined"] > max_bad_fraction * looked:
            write_quarantine(records, out)
            raise Failed(too_bad([record], looked, f"rows of the table {record['name']!r}", out))
    return records


def _finish(
    kind: str,
    schema: pa.Schema,
    request: dict[str, Any],
    survey: Survey,
    records: list[Record],
    tables: list[Record],
    max_bad_fraction: float,
    out: str,
) -> None:
    """Checks over all parts, and the manifest that makes it all exist."""
    write_quarantine([*records, *tables], out)
    bad = sum(len(record["bad"]) for record in records)
    shards = tuple(ShardRecord(**shard) for record in records for shard in record["shards"])
    kept = kept_of(records)
    if bad > max_bad_fraction * (kept + bad):
        raise Failed(too_bad(records, kept + bad, "units", out))
    filtered: Counter[str] = Counter(survey.ignored)
    for record in records:
        filtered.update(record["filtered"])
    if not kept:
        raise Failed(f"not one row was kept: {bad} units were bad, and left out were {dict(filtered) or 'none'}.")
    # Of what the survey counted, so that a unit that nobody accounted for is noticed.
    looked = sum(piece.stop - piece.start for piece in survey.slices) + sum(survey.ignored.values())
    manifest = Manifest(
        kind=kind,
        settings=request["settings"],
        selection={"limit": request["limit"], "holdout": request["holdout"]},
        columns=describe(schema),
        shards=shards,
        units=Units(looked, kept, bad, dict(filtered)),
        sources=write_sources(records, out),
        context=survey.context,
        tables=tuple(record_of(table) for table in tables),
    )
    storage.remove_staged(out)
    save_manifest(manifest, out)


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
