"""Shards that come into being part by part, as an ingest makes them, but when a test says so."""

from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import manifest, storage
from pipelines.loop import RunSpec
from pipelines.manifest import load_manifest, part_of, record_uri
from tests.pipelines.loops import spec_of


class Growing:
    """Finished shards whose parts are hidden again, to be shown one by one."""

    def __init__(self, home: str, parts: int) -> None:
        """`parts`: how many there are, those without a shard included."""
        self.home, self.parts = Path(home), parts
        self.manifest = load_manifest(home)
        self.shards: dict[int, list[Any]] = defaultdict(list)
        for shard in self.manifest.shards:
            self.shards[part_of(shard.name)].append(shard)
        (self.home / manifest.NAME).rename(self.home / "hidden.json")
        for shard in self.manifest.shards:
            (self.home / shard.name).rename(self.home / f"{shard.name}.hidden")

    def show(self, part: int) -> None:
        """A part is finished: its shards, and last its record."""
        for shard in self.shards[part]:
            (self.home / f"{shard.name}.hidden").rename(self.home / shard.name)
        storage.write_json_atomic(
            record_uri(str(self.home), part), {"shards": [asdict(shard) for shard in self.shards[part]]}
        )

    def finish(self) -> None:
        (self.home / "hidden.json").rename(self.home / manifest.NAME)

    def train_rows(self, part: int) -> list[int]:
        """Row ids, read from the files without this program's reader."""
        found: list[int] = []
        for shard in self.shards[part]:
            for name in (shard.name, f"{shard.name}.hidden"):
                if (self.home / name).exists():
                    with pa.memory_map(str(self.home / name)) as file:
                        rows = pa.ipc.open_file(file).read_all()
                    splits = rows.column("split").to_numpy()
                    found += rows.column("row_id").to_numpy()[splits == 0].tolist()
        return found


def streamed(spec: RunSpec, home: str, once: bool = False) -> RunSpec:
    """The same run over the stream of these (still finished) shards."""
    known = load_manifest(home)
    return replace(spec, stream={"kind": known.kind, "settings": known.settings, "once": once})


def stream_spec(name: str, home: str, out: Path, once: bool = False, **changes: Any) -> RunSpec:
    return streamed(spec_of(name, home, out, **changes), home, once)


def empty_split(home: str, part: int) -> None:
    """Give all rows of a part to the test split, in its shards and in the manifest."""
    known = load_manifest(home)
    shards = []
    for shard in known.shards:
        if part_of(shard.name) == part:
            path = Path(home) / shard.name
            with pa.OSFile(str(path)) as file:
                batch = pa.ipc.open_file(file).get_batch(0)
            columns = [
                pa.array(np.full(batch.num_rows, 2, np.int8)) if name == "split" else batch.column(name)
                for name in batch.schema.names
            ]
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=batch.schema))
            size, digest = path.stat().st_size, storage.sha256_of_file(path)
            splits = {"train": 0, "valid": 0, "test": batch.num_rows}
            shard = replace(shard, bytes=size, sha256=digest, splits=splits)
        shards.append(shard)
    manifest.save_manifest(replace(known, shards=tuple(shards)), home)
