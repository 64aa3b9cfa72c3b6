"""Decoded bundles as files of the kind they came from: below `decoded/`, under the names of their sources."""

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np
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
    rows = reader.take(split, np.arange(reader.rows(split)), ("name",))
    wanted = {_file_of(name) for name in rows.column("name").to_pylist()}
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
    """Write each file's streamlines of the split, in their order, and return how many files there are.

    Args:
        decoded: a batch of chunks -> (row of the batch, its streamlines [row_chunk, n, 3] in mm).
    """
    there = sources_of(given)
    held: dict[str, dict[int, np.ndarray]] = {}
    for shard in range(len(reader.manifest.shards)):
        for batch, _, stored in seen_batches(reader, shard, split):
            with torch.inference_mode():
                for row, lines in decoded(batch):
                    own = held.setdefault(_file_of(stored["name"][row]), {})
                    kept = np.flatnonzero(np.asarray(stored["real"][row]))
                    own.update({int(stored["index"][row][place]): lines[place].numpy() for place in kept})
    for name, own in held.items():
        source = there[name]
        try:
            with files.opened(source.uri, source.member) as like:
                data = as_file([own[index] for index in sorted(own)], like, PurePosixPath(name).suffix.lower())
        except files.DAMAGE as damage:
            raise Failed(
                f"{source.uri} has no header to take over: {damage}; is it the file that was ingested?"
            ) from None
        storage.write_atomic(storage.join(out, DECODED, *PurePosixPath(name).parts), data)
    return len(held)


def _file_of(row: str) -> str:
    """A row's file, by its name (`sub/AF.trk#0+e1`)."""
    return row.rpartition("#")[0]
