"""Side tables of a corpus (the log beside its items): each an Arrow IPC file beside the shards, in the manifest."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.accounts import QUARANTINE, SOURCES
from pipelines.corpora import SideTable
from pipelines.errors import Failed
from pipelines.manifest import TABLE_NAME, TableRecord, Units

RECORD = "parts/tables.json"
TAKEN = (SOURCES, QUARANTINE)
BATCH_ROWS = 2**20


def write_tables(tables: Iterable[SideTable], out: str) -> list[dict[str, Any]]:
    """Write what is not there yet; a JSON record of each: the fields of TableRecord, and bad: [source, unit, reason].

    Raises:
        Failed: two tables of one name, or a name that is no file's.
    """
    home = storage.join(out, RECORD)
    if storage.exists(home):
        found: list[dict[str, Any]] = storage.read_json(home)
        return found
    records: list[dict[str, Any]] = []
    for made in tables:
        taken = [name.removesuffix(".arrow") for name in TAKEN] + [record["name"] for record in records]
        if not TABLE_NAME.fullmatch(made.name) or made.name in taken or made.name.startswith("shard"):
            raise Failed(f"a corpus named a table {made.name!r}; names are lower-case, once each, and not {taken}.")
        records.append(_write(made, out))
    storage.write_json_atomic(home, records)
    return records


def record_of(record: dict[str, Any]) -> TableRecord:
    """What the manifest says of a table."""
    fields = {name: value for name, value in record.items() if name != "bad"}
    return TableRecord(**{**fields, "units": Units(**fields["units"])})


def _write(made: SideTable, out: str) -> dict[str, Any]:
    # One batch a million rows, however the corpus built it: bytes must not depend on how it chunks.
    table = made.table.combine_chunks()
    with storage.writing(storage.join(out, f"{made.name}.arrow")) as staged:
        with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=BATCH_ROWS)
        size, digest = staged.stat().st_size, storage.sha256_of_file(staged)
    kept, bad = table.num_rows, len(made.bad)
    units = Units(kept + bad + sum(made.filtered.values()), kept, bad, dict(made.filtered))
    record = asdict(TableRecord(made.name, kept, size, digest, units))
    return {**record, "bad": [[found.source, unit, found.reason] for unit, found in made.bad]}
