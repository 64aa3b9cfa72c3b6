"""Shards for other tools: one Parquet file for each Arrow shard."""

import pyarrow as pa
import pyarrow.parquet as parquet

from pipelines import storage
from pipelines.parts import Part, Record, run_parts
from pipelines.shards import ShardReader

FOLDER = "parquet"


def export_parquet(uri: str) -> str:
    """Write the shards of a finished directory to `uri`/parquet, where they are not there yet; the URI of that.

    The manifest stays that of the Arrow shards, and nothing here reads the export. Tensors become fixed-size lists,
    with their shape kept in Arrow's own metadata.
    """
    uri = storage.normalise(uri)
    out = storage.join(uri, FOLDER)
    shards = ShardReader(uri).manifest.shards
    parts = [Part(shard.rows, [uri, index]) for index, shard in enumerate(shards)]
    run_parts(parts, _export, out, label="parquet", unit="rows")
    return out


def _export(part: int, payload: list[str | int]) -> Record:
    uri, index = str(payload[0]), int(payload[1])
    reader = ShardReader(uri)
    name = reader.manifest.shards[index].name.removesuffix(".arrow") + ".parquet"
    batch = reader.shard(index)
    with storage.writing(storage.join(uri, FOLDER, name)) as staged:
        parquet.write_table(pa.Table.from_batches([batch]), str(staged))
    return {"name": name, "rows": batch.num_rows}
