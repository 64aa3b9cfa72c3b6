"""Decoded bundles as files of the kind they came from: below `decoded/`, under the names of their sources."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines import storage
from pipelines.corpora import _streamline_files as files
from pipelines.corpora._sources import prefixes
from pipelines.corpora._streamline_writing import as_file
from pipelines.encode import seen_batches
from pipelines.errors import Failed, Refused
from pipelines.recipe import Batch
from pipelines.shards import ShardReader

DECODED = "decoded"


def sources_of(given: tuple[str, ...]) -> dict[str, files.Source]:
    """Name as the shards have it -> file."""
    found: dict[str, files.Source] = {}
    for source, prefix in zip(given, prefixes(list(given)), strict=True):
        found |= {one.name: one for one in files.sources_in(storage.list_files(source), prefix)[0]}
    return found


def check_sources(reader: ShardReader, split: str, given: tuple[str, ...]) -> None:
    """Raise Refused unless every file of the split's rows is among the sources."""
    there = sources_of(given)
    wanted = _rows_of_files(reader, split)
    if absent := sorted(wanted - there.keys()):
        raise Refused(
            f"{len(absent):,} of the {len(wanted):,} files of these shards, such as {absent[0]!r}, are not in"
            f" {', '.join(given)}; give the source that was ingested, from the same folder on."
        )


def write_decoded(
    reader: ShardReader,
    split: str,
    given: tuple[str, ...],
    decoded: Callable[[Batch], Iterator[tuple[int, Tensor]]],
    out: str,
) -> int:
    """Write each file's streamlines of the split, in their order, and return how many files there are. A file is
    written when its last row is decoded; no more than what is unfinished is held.

    Args:
        decoded: a batch of chunks -> (row of the batch, its streamlines [row_chunk, n, 3] in mm).
    """
    there, left = sources_of(given), _rows_of_files(reader, split)
    held: dict[str, dict[int, npt.NDArray[np.float32]]] = {}
    for shard in range(len(reader.manifest.shards)):
        for batch, _, stored in seen_batches(reader, shard, split):
            with torch.inference_mode():
                for row, lines in decoded(batch):
                    name = _file_of(stored["name"][row])
                    own = held.setdefault(name, {})
                    kept = np.flatnonzero(np.asarray(stored["real"][row]))
                    own.update({int(stored["index"][row][place]): lines[place].numpy() for place in kept})
                    left[name] -= 1
                    if not left[name]:
                        _write(held.pop(name), there[name], storage.join(out, DECODED, *PurePosixPath(name).parts))
    if lacking := sorted(name for name, rows in left.items() if rows):
        raise Failed(
            f"{len(lacking):,} of {len(left):,} files, such as {lacking[0]!r}, have rows that were not decoded: their"
            " values are not finite. Look at them, or ingest again without them. The other files are written."
        )
    return len(left)


def _write(lines: dict[int, npt.NDArray[np.float32]], source: files.Source, to: str) -> None:
    try:
        with files.opened(source.uri, source.member) as like:
            data = as_file([lines[index] for index in sorted(lines)], like, PurePosixPath(source.name).suffix.lower())
    except files.DAMAGE as damage:
        raise Failed(f"{source.uri} has no header to take over: {damage}; is it the file that was ingested?") from None
    storage.write_atomic(to, data)


def _rows_of_files(reader: ShardReader, split: str) -> Counter[str]:
    rows = reader.take(split, np.arange(reader.rows(split)), ("name",))
    return Counter(_file_of(name) for name in rows.column("name").to_pylist())


def _file_of(row: str) -> str:
    """A row's file, by its name (`sub/AF.trk#0+e1`)."""
    return row.rpartition("#")[0]
