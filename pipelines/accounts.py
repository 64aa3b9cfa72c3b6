"""What became of every unit: the tables beside the shards that list it, and the lines a person reads at the end."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.manifest import SPLITS, Manifest
from pipelines.parts import Record

SOURCES = "sources.arrow"
QUARANTINE = "quarantine.arrow"
SHOWN = 3
"""How many reasons a person is told; all of them are in the quarantine."""


def write_sources(records: Sequence[Record], out: str) -> str:
    """What was read, slice by slice, with a fingerprint of its bytes; the sha256 of that file."""
    names = ("name", "start", "stop", "kept", "quarantined", "fingerprint")
    return _write([row for record in records for row in record["sources"]], names, storage.join(out, SOURCES))


def write_quarantine(records: Sequence[Record], out: str) -> None:
    """Every unit that could not be read: its source and the reason."""
    # Its digest stays out of the manifest: a reason may quote a path or a library's version.
    rows = [row for record in records for row in record["bad"]]
    _write(rows, ("source", "unit", "reason"), storage.join(out, QUARANTINE))


def kept_of(records: Sequence[Record]) -> int:
    """Units, not rows: a document is one unit of many rows."""
    return sum(kept for record in records for _, _, _, kept, _, _ in record["sources"])


def looked_at(records: Sequence[Record]) -> int:
    """Units that were kept or bad."""
    return kept_of(records) + sum(len(record["bad"]) for record in records)


def too_bad(records: Sequence[Record], looked: int, what: str, out: str) -> str:
    """Why an ingest fails: the share, the commonest reasons, where to look and what to do."""
    reasons = Counter(reason for record in records for _, _, reason in record["bad"])
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(SHOWN))
    return (
        f"{reasons.total()} of {looked} {what} looked at could not be read ({reasons.total() / looked:.1%}), more than "
        f"max_bad_fraction allows: {told}. They are listed in {storage.join(out, QUARANTINE)}. "
        "Mend the sources and use a new --out, or run this again with a larger --max-bad-fraction; what was made stays."
    )


def summary(manifest: Manifest, out: str) -> str:
    """The last lines of an ingest: the counts, the commonest reasons with an example of each, where to look."""
    units, left_out = manifest.units, sum(manifest.units.filtered.values())
    splits = ", ".join(f"{split} {manifest.rows(split)}" for split in SPLITS)
    kept = "" if units.kept == manifest.rows() else f"{units.kept} kept in "
    head = f"{units.read} units: {kept}{manifest.rows()} rows ({splits}), {units.quarantined} quarantined"
    lines = [head + (f", {left_out} left out" if left_out else "")]
    lines += [
        f"table {t.name}: {t.rows} rows of {t.units.read}, {_left_out(t.units.filtered)}" for t in manifest.tables
    ]
    lines += _quarantined(out)
    if left_out:
        lines.append(f"left out: {_left_out(units.filtered)}")
    size = sum(shard.bytes for shard in manifest.shards)
    lines.append(f"in {out}: {len(manifest.shards)} shards, {in_bytes(size)}, digest {manifest.digest[:16]}")
    return "\n".join(lines)


def in_bytes(size: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _quarantined(out: str) -> list[str]:
    with storage.open_read(storage.join(out, QUARANTINE)) as file:
        table = pa.ipc.open_file(file).read_all()
    if not table.num_rows:
        return []
    reasons = Counter(table.column("reason").to_pylist())
    examples: dict[str, str] = {}
    for source, reason in zip(*(table.column(name).to_pylist() for name in ("source", "reason")), strict=True):
        examples.setdefault(reason, source)
    shown = [(_cut(reason, 60), f"{count:>9,} x", examples[reason]) for reason, count in reasons.most_common(SHOWN)]
    widest = max(len(reason) for reason, _, _ in shown)
    more = f"the commonest of {len(reasons)} reasons" if len(reasons) > SHOWN else "the reasons"
    lines = [f"quarantined, {more}, each with a unit of its kind:"]
    lines += [f"{count} {reason:<{widest}}  {_cut(example, 40, keep_end=True)}" for reason, count, example in shown]
    return [*lines, f"all of them are in {storage.join(out, QUARANTINE)} (source, unit, reason)"]


def _left_out(filtered: dict[str, int]) -> str:
    commonest = Counter(filtered).most_common(SHOWN)
    rest = sum(filtered.values()) - sum(count for _, count in commonest)
    told = [f"{count:,} x {reason}" for reason, count in commonest] + ([f"{rest:,} x other reasons"] if rest else [])
    return ", ".join(told) or "0 left out"


def _cut(text: str, most: int, keep_end: bool = False) -> str:
    """At most so many characters, on one line; of a path the end says more than the beginning."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    return "..." + text[-most + 3 :] if keep_end else text[: most - 3] + "..."


def _write(rows: list[list[Any]], names: Sequence[str], uri: str) -> str:
    """Rows as one Arrow IPC file; its sha256."""
    numbers = {"unit", "start", "stop", "kept", "quarantined"}
    schema = pa.schema([(name, pa.int64() if name in numbers else pa.string()) for name in names])
    columns = [pa.array([row[index] for row in rows], item.type) for index, item in enumerate(schema)]
    with storage.writing(uri) as staged:
        with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        return storage.sha256_of_file(staged)
