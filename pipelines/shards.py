"""Arrow IPC shards: written atomically, read through memory maps, each verified when a process first touches it."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import Failed, Refused
from pipelines.manifest import SPLITS, Manifest, ShardRecord, load_manifest

ROWS_PER_PART = 1 << 28
"""A row id is part x 2^28 + its place in the part, so that parts number their rows without knowing each other."""
BATCH_ROWS = 1024


def split_of(group: str, holdout: float) -> str:
    """The split of a group by the hash of its name: valid and test get `holdout` of all groups each."""
    place = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") / 2**64
    return "test" if place < holdout else "valid" if place < 2 * holdout else "train"


def with_platform_columns(schema: pa.Schema) -> pa.Schema:
    """A corpus's schema with the columns every shard has: row_id and split."""
    return schema.insert(0, pa.field("row_id", pa.int64())).insert(1, pa.field("split", pa.int8()))


def table_of(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """Rows as one record batch; fixed-shape tensor columns take arrays of exactly their shape and type."""
    return pa.record_batch([_column(field, [row[field.name] for row in rows]) for field in schema], schema=schema)


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if not isinstance(field.type, pa.FixedShapeTensorType):
        return pa.array(values, field.type)
    kind = field.type.value_type.to_pandas_dtype()
    stacked = np.ascontiguousarray(np.stack(values))
    if stacked.dtype != kind or list(stacked.shape[1:]) != list(field.type.shape):
        raise ValueError(
            f"column {field.name!r} takes {np.dtype(kind)} arrays of {list(field.type.shape)};"
            f" given {stacked.dtype} of {list(stacked.shape[1:])}"
        )
    flat = pa.array(stacked.reshape(-1))
    return pa.ExtensionArray.from_storage(
        field.type, pa.FixedSizeListArray.from_arrays(flat, int(np.prod(field.type.shape)))
    )


def write_shards(
    uri: str, part: int, schema: pa.Schema, batches: Iterable[pa.RecordBatch], target_bytes: int = 256 << 20
) -> list[ShardRecord]:
    """Write a part's record batches as `shard-<part>-<n>.arrow`, a new file when one has reached `target_bytes`.

    A repeated part overwrites its own files with the same bytes.
    """
    records: list[ShardRecord] = []
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(b.nbytes for b in waiting) >= target_bytes:
            records.append(_write_one(uri, part, len(records), schema, waiting))
            waiting = []
    if waiting:
        records.append(_write_one(uri, part, len(records), schema, waiting))
    return records


def _write_one(uri: str, part: int, number: int, schema: pa.Schema, batches: list[pa.RecordBatch]) -> ShardRecord:
    name = f"shard-{part:05d}-{number:03d}.arrow"
    home = storage.join(uri, name)
    with storage.open_write(home) as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    digest = _digest_of(home)
    splits = np.concatenate([batch.column("split").to_numpy() for batch in batches])
    counts = {split: int((splits == place).sum()) for place, split in enumerate(SPLITS)}
    return ShardRecord(name, len(splits), storage.size(home), digest, counts)


def _digest_of(uri: str) -> str:
    with storage.open_read(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardReader:
    """Random access to the rows of a manifest, by split.

    A row's ordinal in a split is its place among the split's rows, in the order of shards and of rows inside them.
    Opening checks that every shard is there with the right size; its bytes are hashed when a row of it is first read.
    """

    def __init__(self, uri: str):
        self.uri = storage.normalise(uri)
        self.manifest: Manifest = load_manifest(self.uri)
        self._tables: dict[int, pa.Table] = {}
        self._arrays: dict[tuple[int, str], Any] = {}
        self._places: dict[tuple[int, str], np.ndarray] = {}
        present = {entry.name: entry.bytes for entry in storage.list_files(self.uri)}
        for shard in self.manifest.shards:
            if present.get(shard.name) != shard.bytes:
                found = f"{present[shard.name]:,} bytes" if shard.name in present else "missing"
                raise Refused(
                    f"{storage.join(self.uri, shard.name)} is {found}; the manifest says {shard.bytes:,} bytes."
                    " Ingest into a new directory, or restore the file."
                )

    def rows(self, split: str) -> int:
        """Number of rows of a split, or of `all`."""
        _check_split(split)
        return self.manifest.rows if split == "all" else sum(s.splits[split] for s in self.manifest.shards)

    def span(self, shard: int, split: str) -> tuple[int, int]:
        """The ordinals [first, stop) that one shard holds of a split."""
        bounds = self._bounds(split)
        return int(bounds[shard]), int(bounds[shard + 1])

    def take(self, split: str, ordinals: np.ndarray) -> dict[str, Any]:
        """Column -> values of the rows with these ordinals, in their order.

        Fixed-shape tensors and numbers come as numpy arrays, everything else as lists.
        """
        bounds = self._bounds(split)
        shard_of = np.searchsorted(bounds, ordinals, side="right") - 1
        touched = np.unique(shard_of)
        if len(ordinals) and (ordinals.min() < 0 or ordinals.max() >= bounds[-1]):
            raise ValueError(f"ordinals run from {ordinals.min()} to {ordinals.max()}; {split} has {bounds[-1]} rows")
        out: dict[str, Any] = {}
        for shard in touched:
            where = np.flatnonzero(shard_of == shard)
            rows = self._rows_of(int(shard), split)[ordinals[where] - bounds[shard]]
            for name in self._table(int(shard)).column_names:
                _scatter(out, name, self._array(int(shard), name), rows, where, len(ordinals))
        return out

    def _bounds(self, split: str) -> np.ndarray:
        _check_split(split)
        return self._all_bounds[split]

    @cached_property
    def _all_bounds(self) -> dict[str, np.ndarray]:
        def summed(counts: list[int]) -> np.ndarray:
            return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

        shards = self.manifest.shards
        bounds = {split: summed([s.splits[split] for s in shards]) for split in SPLITS}
        return {**bounds, "all": summed([s.rows for s in shards])}

    def _rows_of(self, shard: int, split: str) -> np.ndarray:
        """Row numbers inside a shard of its rows of a split."""
        key = (shard, split)
        if key not in self._places:
            if split == "all":
                self._places[key] = np.arange(self.manifest.shards[shard].rows)
            else:
                self._places[key] = np.flatnonzero(self._array(shard, "split") == SPLITS.index(split))
        return self._places[key]

    def _table(self, shard: int) -> pa.Table:
        if shard not in self._tables:
            record = self.manifest.shards[shard]
            home = storage.join(self.uri, record.name)
            path = storage.local_copy(home, record.sha256)
            if storage.sha256_of_file(path) != record.sha256:
                raise Failed(
                    f"{home} does not have the bytes that were written: its sha256 is not the manifest's"
                    f" ({record.sha256[:16]}...). Nothing was read from it; restore the file or ingest again."
                )
            self._tables[shard] = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return self._tables[shard]

    def _array(self, shard: int, name: str) -> Any:
        """A column without copying: a numpy view over the memory map, or for other types the Arrow column."""
        key = (shard, name)
        if key not in self._arrays:
            column = self._table(shard).column(name)
            self._arrays[key] = _view(column)
        return self._arrays[key]


class _Chunks:
    """Equally shaped numpy views of a chunked column, indexed as one."""

    def __init__(self, chunks: list[np.ndarray]):
        self.chunks = chunks
        self.bounds = np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks])])

    def into(self, out: np.ndarray, rows: np.ndarray, where: np.ndarray) -> None:
        chunk_of = np.searchsorted(self.bounds, rows, side="right") - 1
        for chunk in np.unique(chunk_of):
            here = chunk_of == chunk
            out[where[here]] = self.chunks[chunk][rows[here] - self.bounds[chunk]]


def _view(column: pa.ChunkedArray) -> Any:
    if isinstance(column.type, pa.FixedShapeTensorType):
        return _Chunks([chunk.to_numpy_ndarray() for chunk in column.chunks])
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_numpy()
    return column


def _scatter(out: dict[str, Any], name: str, values: Any, rows: np.ndarray, where: np.ndarray, count: int) -> None:
    """Put a shard's values of one column at their places in the answer."""
    if isinstance(values, _Chunks):
        if name not in out:
            out[name] = np.empty((count, *values.chunks[0].shape[1:]), dtype=values.chunks[0].dtype)
        values.into(out[name], rows, where)
    elif isinstance(values, np.ndarray):
        out.setdefault(name, np.empty(count, dtype=values.dtype))[where] = values[rows]
    else:
        listed = out.setdefault(name, [None] * count)
        for place, value in zip(where.tolist(), values.take(pa.array(rows)).to_pylist(), strict=True):
            listed[place] = value


def _check_split(split: str) -> None:
    if split not in (*SPLITS, "all"):
        raise Refused(f"there is no split {split!r}; allowed: {', '.join(SPLITS)}, all.")


def shard_tables(uri: str) -> Iterator[tuple[ShardRecord, Path]]:
    """Each shard's record with a local path to its file."""
    for record in load_manifest(uri).shards:
        yield record, storage.local_copy(storage.join(uri, record.name), record.sha256)


def export_parquet(uri: str) -> list[str]:
    """Write each shard also as Parquet, for other tools, under `<uri>/parquet`. Tensors become flat lists there."""
    names = []
    for record, path in shard_tables(uri):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        plain = [c.combine_chunks().storage if isinstance(c.type, pa.ExtensionType) else c for c in table.columns]
        name = f"parquet/{Path(record.name).stem}.parquet"
        with storage.open_write(storage.join(uri, name)) as file:
            pq.write_table(pa.table(dict(zip(table.column_names, plain, strict=True))), file)
        names.append(name)
    return names
