"""Raw files to shards: survey, cut into parts, read and write each part once, and last the manifest."""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import corpora, recipe, registry, storage
from pipelines.corpora import NOT_TEST, Bad, CorpusSettings, Row, Slice, Survey
from pipelines.errors import Failed, Refused
from pipelines.manifest import (
    SPLITS,
    Manifest,
    ShardRecord,
    Units,
    describe,
    is_finished,
    load_manifest,
    save_manifest,
)
from pipelines.options import differences, validated
from pipelines.parts import Part, Record, forget_records, run_parts
from pipelines.shards import ShardWriter, batch_of, check_holdout, export_parquet, split_of
from vqcore.bundle import read_card

MOST_PART_BYTES = 256 << 20
LEAST_PART_BYTES = 4 << 20
BATCH_ROWS = 1024
QUARANTINE = "quarantine.arrow"
SOURCES = "sources.arrow"


@dataclass(frozen=True)
class IngestResult:
    out: str
    digest: str
    rows: int
    quarantined: int
    filtered: dict[str, int]
    skipped: bool


def prepared_by(
    *, corpus: str | None, recipe_name: str | None, bundle: str | None, overrides: dict[str, Any]
) -> tuple[str, CorpusSettings]:
    """The corpus kind and its settings, from a kind, from a recipe's kind, or from how a bundle's data was prepared."""
    if bundle is not None:
        if overrides:
            raise Refused("--bundle takes the preparation from the card; leave --set out, or use --corpus.")
        made = read_card(registry.local_bundle(bundle))["corpus"]
        return made["kind"], corpora.load(made["kind"]).Settings.model_validate(made["settings"])
    kind = corpus if corpus is not None else recipe.load(recipe_name or "").corpus[0]
    return kind, validated(corpora.load(kind).Settings, overrides, f"corpus {kind!r}")


def ingest(
    kind: str,
    sources: Sequence[str],
    out: str,
    *,
    settings: CorpusSettings,
    limit: int | None = None,
    holdout: float = 0.1,
    max_bad_fraction: float = 0.05,
    parquet: bool = False,
) -> IngestResult:
    """Turn raw files into shards and a manifest under `out`.

    Units read = kept + quarantined + filtered. Rerunning goes on where it stopped, or does nothing when it is done.

    Raises:
        Refused: nothing to read, a number out of range, or an `out` that holds something else.
        Failed: too much of it could not be read, or nothing of it could.
    """
    _check_numbers(limit, holdout, max_bad_fraction)
    corpus = corpora.load(kind)
    out = storage.normalise(out)
    survey = corpus.survey([storage.normalise(source) for source in sources], settings)
    parts = _cut(survey.slices)
    request = {
        "kind": kind,
        "settings": settings.model_dump(mode="json"),
        "limit": limit,
        "holdout": holdout,
        "source files": _listing_digest(survey),
    }
    _claim(out, request)
    if is_finished(out):
        return _result(load_manifest(out), out, skipped=True)
    units = sum(s.stop - s.start for s in survey.slices)
    bad = 0

    def check(record: Record) -> None:
        nonlocal bad
        bad += len(record["bad"])
        if bad > max_bad_fraction * units:
            raise Failed(_too_bad(bad, units, max_bad_fraction, out, record["bad"]))

    config = {
        "kind": kind,
        "settings": request["settings"],
        "context": survey.context,
        "out": out,
        "holdout": holdout,
        "limit": limit,
        "units": units,
    }
    todo = {
        number: Part(sum(s.stop - s.start for _, s in part), [[first, asdict(s)] for first, s in part])
        for number, part in enumerate(parts)
    }
    records = run_parts(todo, _ingest_part, config, label="ingest", unit="units", out=out, check=check)
    manifest = _finish(kind, corpus, settings, {"limit": limit, "holdout": holdout}, survey, records, out)
    if manifest.rows() == 0:
        raise Failed(f"nothing in {', '.join(sources)} could be read: {_reasons(records)}. See {out}/{QUARANTINE}.")
    save_manifest(manifest, out)
    forget_records(out)
    if parquet:
        export_parquet(out)
    _tell(manifest, records, out)
    return _result(manifest, out, skipped=False)


def _check_numbers(limit: int | None, holdout: float, max_bad_fraction: float) -> None:
    if limit is not None and limit < 1:
        raise Refused(f"--limit {limit}: it is a number of units to take, so at least 1.")
    check_holdout(holdout)
    if not 0 <= max_bad_fraction <= 1:
        raise Refused(f"--max-bad-fraction {max_bad_fraction}: it is a share of all units, so it lies in [0, 1].")


def _cut(slices: list[Slice]) -> list[list[tuple[int, Slice]]]:
    """Runs of slices with the number of their first unit, at most 256 MiB and about a 32nd of a small corpus each.

    Nothing of the machine takes part, so the same files give the same parts anywhere.
    """
    target = min(MOST_PART_BYTES, max(LEAST_PART_BYTES, sum(s.bytes for s in slices) // 32))
    parts: list[list[tuple[int, Slice]]] = []
    first, size = 0, 0
    for piece in slices:
        if not parts or size + piece.bytes > target:
            parts.append([])
            size = 0
        parts[-1].append((first, piece))
        size += piece.bytes
        first += piece.stop - piece.start
    return parts


def _listing_digest(survey: Survey) -> str:
    listing = [[s.name, s.start, s.stop, s.bytes, s.meta] for s in survey.slices]
    return storage.sha256_of_bytes(storage.canonical_json([listing, survey.context, survey.ignored]))[:16]


def _claim(out: str, request: dict[str, Any]) -> None:
    """Make `out` this ingest's, or find that it is."""
    home = storage.join(out, "request.json")
    if not storage.exists(home):
        if storage.exists(out) and storage.list_files(out):
            raise Refused(f"{out} holds other files; give an --out that is empty or does not exist.")
        storage.write_json_atomic(home, request)
        return
    if different := differences(storage.read_json(home), request):
        raise Refused(
            f"{out} holds an ingest with other settings or files ({'; '.join(different)})."
            " Choose another --out, or repeat its settings."
        )


def is_wanted(unit: int, units: int, limit: int | None) -> bool:
    """Whether unit number `unit` of `units` is among `limit` units spread evenly over all."""
    if limit is None or limit >= units:
        return True
    return unit * limit // units != (unit - 1) * limit // units


def _ingest_part(number: int, slices: list[Any], config: dict[str, Any]) -> Record:
    """Read one part, write its shards, and say what became of every unit."""
    corpus = corpora.load(config["kind"])
    settings = corpus.Settings.model_validate(config["settings"])
    record: Record = {"bad": [], "left_out": 0, "sources": []}
    with ShardWriter(config["out"], number, corpus.schema(settings)) as writer:
        waiting: list[Row] = []
        for row in _rows(corpus, settings, slices, config, record):
            waiting.append(row)
            if len(waiting) == BATCH_ROWS:
                _write(writer, waiting, config["holdout"])
                waiting = []
        _write(writer, waiting, config["holdout"])
    record["shards"] = [asdict(shard) for shard in writer.records]
    return record


def _rows(
    corpus: corpora.Corpus, settings: CorpusSettings, slices: list[Any], config: dict[str, Any], record: Record
) -> Iterator[Row]:
    """The rows of a part; what becomes of all other units goes into the record."""
    for first, fields in slices:
        piece = Slice(**fields)
        hashed, seen = hashlib.sha256(), 0
        wanted = _wanted(first, config["units"], config["limit"])
        for _, found, fingerprint in corpus.read(piece, config["context"], settings, wanted):
            hashed.update(fingerprint)
            seen += 1
            if isinstance(found, Bad):
                record["bad"].append([found.source, found.reason])
            else:
                yield found
        record["left_out"] += piece.stop - piece.start - seen
        record["sources"].append([piece.name, piece.start, piece.stop, hashed.hexdigest()])


def _write(writer: ShardWriter, rows: list[Row], holdout: float) -> None:
    splits = np.array([SPLITS.index(_split_of(row, holdout)) for row in rows], dtype=np.int8)
    writer.write(batch_of([row.values for row in rows], writer.corpus_schema), splits)


def _wanted(first: int, units: int, limit: int | None) -> Callable[[int], bool]:
    return lambda unit: is_wanted(first + unit, units, limit)


def _split_of(row: Row, holdout: float) -> str:
    by_hash = split_of(row.group, holdout)
    if row.split == NOT_TEST:
        return "valid" if by_hash == "valid" else "train"
    return row.split or by_hash


def _finish(
    kind: str,
    corpus: corpora.Corpus,
    settings: CorpusSettings,
    selection: dict[str, Any],
    survey: Survey,
    records: list[Record],
    out: str,
) -> Manifest:
    """Write the side tables and make the manifest that will name them."""
    bad = [[part, *found] for part, record in enumerate(records) for found in record["bad"]]
    sources = [[part, *source] for part, record in enumerate(records) for source in record["sources"]]
    _write_table(out, QUARANTINE, "part source reason", bad)
    shards = tuple(ShardRecord(**shard) for record in records for shard in record["shards"])
    kept = sum(shard.rows for shard in shards)
    left_out = sum(record["left_out"] for record in records)
    filtered = {**survey.ignored, **({"limit": left_out} if left_out else {})}
    return Manifest(
        kind=kind,
        settings=settings.model_dump(mode="json"),
        selection=selection,
        columns=describe(corpus.schema(settings)),
        shards=shards,
        units=Units(kept + len(bad) + sum(filtered.values()), kept, len(bad), filtered),
        sources=_write_table(out, SOURCES, "part name start stop sha256", sources),
        context=survey.context,
    )


def _write_table(out: str, name: str, columns: str, rows: list[list[Any]]) -> str:
    """Write rows as one Arrow file and return its digest. `part`, `start` and `stop` are numbers, the rest is text."""
    numbers = {"part", "start", "stop"}
    schema = pa.schema([(column, pa.int64() if column in numbers else pa.string()) for column in columns.split()])
    arrays = [pa.array([row[place] for row in rows], field.type) for place, field in enumerate(schema)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(arrays, schema=schema))
    data = sink.getvalue().to_pybytes()
    storage.write_atomic(storage.join(out, name), data)
    return storage.sha256_of_bytes(data)


def _reasons(records: list[Record], most: int = 3) -> str:
    return _commonest([reason for record in records for _, reason in record["bad"]], most)


def _commonest(reasons: list[str], most: int = 3) -> str:
    return ", ".join(f"{reason} ({count:,})" for reason, count in Counter(reasons).most_common(most))


def _too_bad(bad: int, units: int, allowed: float, out: str, newest: list[list[str]]) -> str:
    example = f"; for example {newest[-1][0]}: {newest[-1][1]}" if newest else ""
    return (
        f"{bad:,} of {units:,} units could not be read, more than --max-bad-fraction {allowed:g} allows"
        f" (commonest in the last part: {_commonest([reason for _, reason in newest])}{example})."
        f" Mend the source or raise the fraction; finished parts in {out} are kept."
    )


def _tell(manifest: Manifest, records: list[Record], out: str) -> None:
    """Counts for a person, on standard error."""
    units = manifest.units
    per_split = {split: sum(shard.splits[split] for shard in manifest.shards) for split in SPLITS}
    rows = ", ".join(f"{split} {count:,}" for split, count in per_split.items())
    print(f"ingest: {units.read:,} units read, {units.kept:,} kept ({rows})", file=sys.stderr)
    if units.filtered:
        left = ", ".join(f"{reason} ({count:,})" for reason, count in units.filtered.items())
        print(f"ingest: filtered by {left}", file=sys.stderr)
    if units.quarantined:
        print(
            f"ingest: {units.quarantined:,} quarantined: {_reasons(records)}; each with its reason in"
            f" {storage.join(out, QUARANTINE)}",
            file=sys.stderr,
        )


def _result(manifest: Manifest, out: str, skipped: bool) -> IngestResult:
    units = manifest.units
    return IngestResult(out, manifest.digest, units.kept, units.quarantined, units.filtered, skipped)
