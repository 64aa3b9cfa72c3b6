"""Shards: immutable Arrow IPC files of one record batch each, memory-mapped and read by row number.

Every shard has `row_id` int64 (part x 2^28 + index in the part: unique in its manifest) and `split` int8 before the
corpus's own columns. Tensors are Arrow's fixed_shape_tensor and ragged ones lists, so any Arrow reads them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import storage, used
from pipelines.columns import plain, tensor_array
from pipelines.errors import Failed, Refused, nearest_names
from pipelines.manifest import SPLITS, Manifest, ShardRecord, check_split, load_manifest

ROWS_PER_PART = 2**28
SHARD_BYTES = 128 * 2**20
PLATFORM = (pa.field("row_id", pa.int64(), nullable=False), pa.field("split", pa.int8(), nullable=False))

Int64s = npt.NDArray[np.int64]


def split_of(group: str, holdout: float) -> str:
    """train, valid or test by a hash of the group key; valid and test each get the share `holdout` of all groups."""
    draw = (
        int.from_bytes(hashlib.blake2b(group.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "big")
        / 2**64
    )
    return "valid" if draw < holdout else "test" if draw < 2 * holdout else "train"


def check_holdout(holdout: float) -> None:
    """Refuse a holdout that leaves nothing to train on."""
    if not 0 <= holdout < 0.5:
        raise Refused(
            f"holdout={holdout} was given; it is the share of groups for valid and again for test: 0 <= holdout < 0.5."
        )


class ShardWriter:
    """Writes the rows of one part as shards of about `target_bytes`, each of which appears whole or not at all.

    A part that is written again writes the same names, so a retry overwrites itself.
    """

    def __init__(self, uri: str, part: int, schema: pa.Schema, target_bytes: int = SHARD_BYTES) -> None:
        """`schema`: the corpus's columns, without row_id and split."""
        if taken := {"row_id", "split"} & set(schema.names):
            raise Refused(
                f"the columns {sorted(taken)} are the platform's own; a corpus must name its columns otherwise."
            )
        self.uri = storage.normalise(uri)
        self.part = part
        self.corpus_schema = schema
        self.schema = pa.schema([*PLATFORM, *schema], metadata=schema.metadata)
        self.target_bytes = target_bytes
        self.records: list[ShardRecord] = []
        self.rows = 0
        self._waiting: list[pa.RecordBatch] = []
        self._bytes = 0

    def write(self, batch: pa.RecordBatch, splits: npt.NDArray[np.int8], row_ids: Int64s | None = None) -> None:
        """Add rows. `row_ids` are kept where rows are made from rows (codes); else they follow from part and index."""
        if row_ids is None:
            if self.rows + batch.num_rows > ROWS_PER_PART:
                raise Failed(f"part {self.part} has more than {ROWS_PER_PART} rows; cut its source into smaller parts.")
            row_ids = np.arange(self.rows, self.rows + batch.num_rows) + self.part * ROWS_PER_PART
        columns = [pa.array(row_ids, pa.int64()), pa.array(splits, pa.int8()), *batch.columns]
        whole = pa.RecordBatch.from_arrays(columns, schema=self.schema)
        if self._waiting and self._bytes + whole.nbytes > self.target_bytes:
            self._flush()
        self.rows += batch.num_rows
        if batch.num_rows:
            self._waiting.append(whole)
            self._bytes += whole.nbytes

    def close(self) -> list[ShardRecord]:
        """Write what is left; the records of all shards of this part, in order."""
        if self._waiting:
            self._flush()
        return self.records

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    def _flush(self) -> None:
        batch = pa.concat_batches(self._waiting)
        self._waiting, self._bytes = [], 0
        name = f"shard-{self.part:05d}-{len(self.records):03d}.arrow"
        with storage.writing(storage.join(self.uri, name)) as staged:
            with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, self.schema) as writer:
                writer.write_batch(batch)
            size, digest = staged.stat().st_size, storage.sha256_of_file(staged)
        counts = np.bincount(batch.column("split").to_numpy(), minlength=len(SPLITS)).tolist()
        self.records.append(ShardRecord(name, batch.num_rows, size, digest, dict(zip(SPLITS, counts, strict=True))))


class _Run(NamedTuple):
    """What a batch takes from one shard."""

    shard: int
    places: Int64s | None
    """Where in the batch it goes; None where it is all of it."""
    rows: Int64s
    """Of the shard."""


class ShardReader:
    """The rows of a finished directory, by split and ordinal (order: shards of the manifest, then rows of the shard).

    Shards are mapped when first touched; then, once a process, their digest is checked.
    """

    def __init__(self, uri: str, manifest: Manifest | None = None) -> None:
        """
        Raises:
            Refused: no manifest, or a shard is missing or has another size; the message names it.
        """
        self.uri = storage.normalise(uri)
        self.manifest = manifest or load_manifest(uri)
        self._starts = {
            split: np.array([0, *accumulate(_count(shard, split) for shard in self.manifest.shards)], np.int64)
            for split in (*SPLITS, "all")
        }
        self._batches: dict[int, pa.RecordBatch] = {}
        self._schemas: dict[frozenset[str] | None, pa.Schema] = {}
        self._views: dict[tuple[int, str], npt.NDArray[Any] | None] = {}
        self._members: dict[tuple[int, str], npt.NDArray[np.int32]] = {}
        self._check_presence()

    def rows(self, split: str = "all") -> int:
        return self.manifest.rows(split)

    @property
    def schema(self) -> pa.Schema:
        """Columns as stored, row_id and split first."""
        return self.shard(0).schema

    def take(self, split: str, ordinals: Int64s, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Rows of a split by ordinal, in the order asked for; repeats are fine. The result owns its memory.

        Args:
            ordinals: [N] in [0, rows(split)).
            columns: default all.
        """
        runs = self._runs(split, ordinals)
        wanted = self._fields(None if columns is None else frozenset(columns))
        return pa.RecordBatch.from_arrays([self._gather(item, runs, len(ordinals)) for item in wanted], schema=wanted)

    def values(self, split: str, ordinals: Int64s, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """`values_of(take(...))`, without the way through Arrow for what is dense: what training reads."""
        runs = self._runs(split, ordinals)
        found: dict[str, Any] = {}
        for item in self._fields(None if columns is None else frozenset(columns)):
            dense = self._dense(item.name, runs, len(ordinals))
            found[item.name] = plain(self._gather(item, runs, len(ordinals))) if dense is None else dense
        return found

    def batches(self, shard: int, rows: int, split: str = "all") -> Iterator[pa.RecordBatch]:
        """The rows of one shard (of one split) in order, `rows` at a time."""
        ordinals = self.ordinals(shard, split)
        for first in range(0, len(ordinals), rows):
            yield self.take(split, ordinals[first : first + rows])

    def ordinals(self, shard: int, split: str = "all") -> Int64s:
        """The ordinals of one shard's rows in a split."""
        check_split(split)
        start, stop = self._starts[split][shard : shard + 2]
        return np.arange(start, stop)

    def table(self, name: str) -> pa.Table:
        """A side table, memory-mapped: zero-copy and read-only.

        Raises:
            Refused: there is none of that name.
            Failed: its content is not what the manifest recorded.
        """
        records = {table.name: table for table in self.manifest.tables}
        if name not in records:
            raise Refused(f"{self.uri} has no table {name!r}; {nearest_names(name, records)}.")
        return pa.ipc.open_file(self._mapped(records[name].file, records[name].sha256)).read_all()

    def shard(self, index: int) -> pa.RecordBatch:
        """One shard, memory-mapped: zero-copy and read-only.

        Raises:
            Failed: its content is not what the manifest recorded.
        """
        if index not in self._batches:
            record = self.manifest.shards[index]
            self._batches[index] = pa.ipc.open_file(self._mapped(record.name, record.sha256)).get_batch(0)
        return self._batches[index]

    def _mapped(self, name: str, sha256: str) -> pa.MemoryMappedFile:
        uri = storage.join(self.uri, name)
        path = storage.local_copy(uri, sha256)
        _check_digest(uri, str(path), sha256)
        return pa.memory_map(str(path))

    def _check_presence(self) -> None:
        found = {entry.name: entry.bytes for entry in storage.list_files(self.uri)}
        expected = [("shard", shard.name, shard.bytes) for shard in self.manifest.shards]
        expected += [("table", table.file, table.bytes) for table in self.manifest.tables]
        for what, name, size in expected:
            if name not in found:
                gone = used.why_missing(self.uri, name) if what == "shard" else None
                missing = f"{what} {name} of {self.uri} is missing; restore it, or ingest into a new --out."
                raise Refused(gone or missing)
            if found[name] != size:
                raise Refused(
                    f"{what} {name} of {self.uri} has {found[name]} bytes instead of {size}; "
                    "restore it, or ingest into a new --out."
                )

    def _fields(self, names: frozenset[str] | None) -> pa.Schema:
        if names not in self._schemas:
            fields = [item for item in self.schema if names is None or item.name in names]
            self._schemas[names] = pa.schema(fields, self.schema.metadata)
        return self._schemas[names]

    def _runs(self, split: str, ordinals: Int64s) -> list["_Run"]:
        """What is taken from each shard. Most batches lie within one, and are not sorted by shard first."""
        check_split(split)
        ordinals = np.asarray(ordinals, np.int64)
        if not ordinals.size:
            return []
        starts, lowest, highest = self._starts[split], int(ordinals.min()), int(ordinals.max())
        if lowest < 0 or highest >= starts[-1]:
            raise IndexError(f"ordinals from {lowest} to {highest} of {starts[-1]} rows in {split!r}")
        first, last = (int(shard) - 1 for shard in np.searchsorted(starts, (lowest, highest), side="right"))
        if first == last:
            return [_Run(first, None, self._local(first, split, ordinals - starts[first]))]
        shards = np.searchsorted(starts, ordinals, side="right") - 1
        order = np.argsort(shards, kind="stable")
        runs = []
        for places in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            shard = int(shards[places[0]])
            runs.append(_Run(shard, places, self._local(shard, split, ordinals[places] - starts[shard])))
        return runs

    def _local(self, shard: int, split: str, ranks: Int64s) -> Int64s:
        """Ranks within a shard's share of the split -> rows of the shard."""
        record = self.manifest.shards[shard]
        if _count(record, split) == record.rows:
            return ranks
        if (shard, split) not in self._members:
            column = self.shard(shard).column("split").to_numpy()
            self._members[shard, split] = np.flatnonzero(column == SPLITS.index(split)).astype(np.int32)
        return self._members[shard, split][ranks].astype(np.int64)

    def _gather(self, item: pa.Field, runs: list["_Run"], rows: int) -> pa.Array:
        if not runs:
            return self.shard(0).column(item.name).slice(0, 0)
        out = self._dense(item.name, runs, rows)
        if out is not None:
            return tensor_array(out, item.type) if isinstance(item.type, pa.FixedShapeTensorType) else pa.array(out)
        taken = [self.shard(run.shard).column(item.name).take(pa.array(run.rows)) for run in runs]
        if runs[0].places is None:
            return taken[0]
        back = np.argsort(np.concatenate([run.places for run in runs]))
        return pa.concat_arrays(taken).take(pa.array(back))

    def _dense(self, name: str, runs: list["_Run"], rows: int) -> npt.NDArray[Any] | None:
        """[rows, *shape] of a column that has a view in every shard; None for all others."""
        views = [self._view(run.shard, name) for run in runs]
        dense = [view for view in views if view is not None]
        if not runs or len(dense) < len(views):
            return None
        out = np.empty((rows, *dense[0].shape[1:]), dense[0].dtype)
        for view, run in zip(dense, runs, strict=True):
            here = slice(0, rows) if run.places is None else slice(int(run.places[0]), int(run.places[-1]) + 1)
            if here.stop - here.start != len(run.rows):
                out[run.places] = view[run.rows]
            elif _in_order(run.rows):
                out[here] = view[run.rows[0] : run.rows[-1] + 1]
            else:
                # mode="clip": "raise" would copy once more, and the bounds were checked.
                np.take(view, run.rows, axis=0, out=out[here], mode="clip")
        return out

    def _view(self, shard: int, name: str) -> npt.NDArray[Any] | None:
        """A fixed-width column without nulls as [rows, *shape]; None for all others, which Arrow gathers."""
        if (shard, name) not in self._views:
            column = self.shard(shard).column(name)
            if isinstance(column.type, pa.FixedShapeTensorType):
                self._views[shard, name] = column.to_numpy_ndarray()
            elif (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)) and not column.null_count:
                self._views[shard, name] = column.to_numpy(zero_copy_only=True)
            else:
                self._views[shard, name] = None
        return self._views[shard, name]


_checked: set[tuple[str, str]] = set()


def _check_digest(uri: str, path: str, sha256: str) -> None:
    """Once a process and shard: a flipped byte must stop a run, but hashing at every open would read all data again."""
    if (uri, sha256) in _checked:
        return
    found = storage.sha256_of_file(path)
    if found != sha256:
        storage.forget_copy(uri, sha256)
        raise Failed(
            f"{uri} has sha256 {found}, but the manifest recorded {sha256}: it is damaged. "
            "Restore it from a copy, or ingest into a new --out."
        )
    _checked.add((uri, sha256))


def _in_order(rows: Int64s) -> bool:
    """Whether they follow one another, so that they are one copy."""
    return int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((rows[1:] - rows[:-1] == 1).all())


def _count(shard: ShardRecord, split: str) -> int:
    return shard.rows if split == "all" else shard.splits[split]
