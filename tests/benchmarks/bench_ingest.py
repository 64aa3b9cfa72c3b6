"""Ingest and shards: images against a bare pool of the same decoder, shards to torch against a copy and Parquet, peak
memory of a corpus larger than the object store, and what a 3 GiB tar is cut into. All files are generated, and removed.

Images and the pool use every core, so their seconds are those of the clock; sides take turns, ratios are taken within
a round, and of them the median. The ingest also hashes, splits, writes and syncs what it made; the pool decodes and
drops it. Shards are read on one thread, in seconds of the processor, after the first touch has checked their digest,
which happens once a process; a copy is of the same batches of an array in memory, in the same order.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as parquet
import ray
import torch
from PIL import Image

from pipelines import corpora, export, ingest, storage
from pipelines.columns import tensor_array
from pipelines.corpora.images import ImageSettings, prepare
from pipelines.manifest import Manifest, Units, describe, save_manifest
from pipelines.plan import Plan, lanes_for
from pipelines.shards import ShardReader, ShardWriter
from tests.benchmarks.timing import one_thread

ROUNDS, ROUND_SECONDS = 3, 24
SHARD_ROUNDS = 5
STORE_BYTES = 80 * 2**20
SIDE = 256

Array = npt.NDArray[Any]
Ordinals = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """What shards hold, and how many of them a batch takes."""

    about: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    batch: int


SHARDS = [
    Rows("400,000 x 384 float16", 400_000, (384,), "float16", 1024),
    Rows("400,000 x 384 float16", 400_000, (384,), "float16", 8192),
    Rows("30,000 images 3 x 64 x 64", 30_000, (3, 64, 64), "uint8", 512),
]


def run(quick: bool = False) -> None:
    with tempfile.TemporaryDirectory(prefix="vqray-bench-") as scratch:
        home = Path(scratch)
        _tar(home, 3 * 2**30)
        with one_thread():
            for rows in SHARDS:
                _shards(home, rows._replace(count=rows.count // 10) if quick else rows, 0.5 if quick else 20)
        for mebibytes in (64, 256) if quick else (256, 2048):
            _memory(home, mebibytes)
        _images(home, quick)


def _images(home: Path, quick: bool) -> None:
    """Rows/s of an ingest and of a pool, photographs of 500 x 375 to 64 x 64."""
    source, settings, cores = home / "photos", ImageSettings(size=64), os.cpu_count() or 1
    files = _photos(source, 1000)
    with multiprocessing.get_context("spawn").Pool(cores, _warm) as pool:
        pool.map(_decode, files[:200], chunksize=25)
        began = time.perf_counter()
        pool.map(_decode, files, chunksize=25)
        per_second = len(files) / (time.perf_counter() - began)
        files = _photos(source, 500 if quick else int(per_second * ROUND_SECONDS))
        ray.init(
            address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            object_store_memory=STORE_BYTES,
        )  # fmt: skip
        ratios, ours, theirs = [], [], []
        for number in range(1 if quick else ROUNDS + 1):
            began = time.perf_counter()
            pool.map(_decode, files, chunksize=25)
            bare = time.perf_counter() - began
            began = time.perf_counter()
            ingest.ingest("images", [str(source)], str(home / "out"), settings=settings)
            seconds = time.perf_counter() - began
            storage.remove(str(home / "out"))
            if number or quick:  # The first round starts Ray's workers.
                ratios.append(bare / seconds)
                ours.append(len(files) / seconds)
                theirs.append(len(files) / bare)
        ray.shutdown()
    print(
        f"images: {statistics.median(ours):.0f} rows/s ({statistics.median(ours) / cores:.0f} a core), pool of the same"
        f" decoder {statistics.median(theirs):.0f}, ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to"
        f" {max(ratios):.2f}; {len(files)} files, {len(ratios)} rounds; the bar is 0.9)",
        flush=True,
    )


def _warm() -> None:
    # As Ray starts its workers: beside anything else that runs here, the two sides would not get equal shares.
    os.nice(15)
    torch.set_num_threads(1)


def _decode(path: str) -> int:
    return prepare(Path(path).read_bytes(), ImageSettings(size=64)).nbytes


def _photos(home: Path, count: int) -> list[str]:
    """JPEGs of soft noise, about as large as photographs: a hundred of them under `count` names."""
    drawn = np.random.default_rng(0)
    home.mkdir(exist_ok=True)
    paths = [home / f"{n:06}.jpg" for n in range(count)]
    for n, path in enumerate(paths):
        if path.exists():
            continue
        if n < 100:
            small = Image.fromarray(drawn.integers(0, 256, (47, 63, 3), np.uint8))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            path.hardlink_to(paths[n % 100])
    return [str(path) for path in paths]


def _shards(home: Path, rows: Rows, seconds: float) -> None:
    """GB/s from shards to torch, in order and as training walks them.

    A copy is of an array in memory, whose pages are large, and of one in a mapped file, as shards are.
    """
    uri, flat = str(home / "rows"), _rows(home / "rows", rows)
    reader = ShardReader(uri)
    for number in range(len(reader.manifest.shards)):
        export._export(number, [uri, number])
    files = sorted((home / "rows/parquet").glob("*.parquet"))
    np.save(home / "flat.npy", flat)
    mapped = np.load(home / "flat.npy", mmap_mode="r")
    plan = Plan(rows.count, rows.batch, lanes_for(rows.batch, 1), seed=0)
    order = [np.arange(n, min(n + rows.batch, rows.count)) for n in range(0, rows.count, rows.batch)]
    walked = [plan.at(step)[0] for step in range(rows.count // rows.batch)]
    speeds = _speeds(
        {
            "copy": partial(_copied, flat, order),
            "copy, mapped file": partial(_copied, mapped, order),
            "shards": partial(_taken, reader, order),
            "gather": partial(_picked, flat, walked),
            "gather, mapped file": partial(_picked, mapped, walked),
            "shards as training walks": partial(_taken, reader, walked),
            "parquet": partial(_from_parquet, files, rows.batch),
        },
        seconds,
    )
    told = ", ".join(f"{name} {statistics.median(found):.2f}" for name, found in speeds.items())
    print(f"shards to torch, {rows.about}, {rows.batch} rows a batch, GB/s: {told}", flush=True)
    for ours, theirs in (("shards", "copy"), ("shards as training walks", "gather")):
        here, there = (_ratio(speeds[ours], speeds[f"{theirs}{where}"]) for where in ("", ", mapped file"))
        table = _ratio(speeds[ours], speeds["parquet"])
        print(
            f"  {ours}: {here:.2f} of numpy's {theirs}, {there:.2f} of that from a mapped file (the bar is 0.8),"
            f" {table:.1f} x Parquet (the bar is 4)",
            flush=True,
        )
    storage.remove(uri)
    storage.remove(str(home / "flat.npy"))


def _speeds(sides: dict[str, Callable[[], int]], seconds: float) -> dict[str, list[float]]:
    """GB/s of each side in each of ROUNDS rounds, `seconds` of work a side in all; what comes first is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(SHARD_ROUNDS):
        for name, side in sides.items():
            size, began = 0, time.process_time()
            while (passed := time.process_time() - began) < seconds / SHARD_ROUNDS or not size:
                size += side()
            speeds[name].append(size / 1e9 / passed)
    return speeds


def _ratio(speeds: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(speeds, reference, strict=True))


def _copied(flat: Array, order: list[Ordinals]) -> int:
    return sum(flat[part[0] : part[-1] + 1].copy().nbytes for part in order)


def _picked(flat: Array, order: list[Ordinals]) -> int:
    return sum(np.take(flat, part, axis=0, mode="clip").nbytes for part in order)


def _taken(reader: ShardReader, order: list[Ordinals]) -> int:
    return sum(torch.from_numpy(reader.values("all", part, ["value"])["value"]).nbytes for part in order)


def _from_parquet(files: list[Path], rows: int) -> int:
    size = 0
    for path in files:
        for batch in parquet.ParquetFile(path).iter_batches(rows, columns=["value"]):
            column = batch.column("value")
            numbers = (column.storage if isinstance(column, pa.ExtensionArray) else column).flatten()
            size += torch.from_dlpack(numbers).view(len(batch), -1).nbytes
    return size


def _rows(home: Path, rows: Rows) -> Array:
    drawn = np.random.default_rng(0)
    schema = pa.schema({"value": pa.fixed_shape_tensor(pa.from_numpy_dtype(rows.dtype), rows.shape)})
    flat = drawn.integers(0, 100, (rows.count, *rows.shape)).astype(rows.dtype)
    with ShardWriter(str(home), 0, schema) as writer:
        for first in range(0, rows.count, 10_000):
            some = flat[first : first + 10_000]
            column = tensor_array(some, schema.field("value").type)
            writer.write(pa.RecordBatch.from_arrays([column], schema=schema), np.zeros(len(some), np.int8))
    units = Units(rows.count, rows.count, 0, {})
    save_manifest(Manifest("vectors", {}, {}, describe(schema), tuple(writer.records), units, ""), str(home))
    return flat


CHILD = """
import json, os, sys, threading, time
import psutil, ray
from pipelines import ingest, storage
from pipelines.corpora.images import ImageSettings

source, out, store, side = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=store)
peak = {"driver": 0, "worker": 0, "all": 0}

def watch():
    me = psutil.Process()
    while True:
        workers = []
        for process in me.children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                    workers.append(process.memory_full_info().uss)
            except psutil.Error:
                pass
        driver = me.memory_full_info().uss
        for name, value in (("driver", driver), ("worker", max(workers, default=0)), ("all", driver + sum(workers))):
            peak[name] = max(peak[name], value)
        time.sleep(0.1)

threading.Thread(target=watch, daemon=True).start()
began = time.perf_counter()
done = ingest.ingest("images", [source], out, settings=ImageSettings(size=side, colour="grey"))
print(json.dumps({**peak, "rows": done.rows, "seconds": time.perf_counter() - began}))
"""


def _memory(home: Path, mebibytes: int) -> None:
    """Peak memory (unique to each process) of an ingest of raw pixels, with a small object store."""
    source, out = home / "pixels", str(home / "out")
    count = mebibytes * 2**20 // SIDE**2
    source.mkdir()
    with open(source / "train-images-idx3-ubyte", "wb") as file:
        file.write(b"".join(number.to_bytes(4, "big") for number in (0x803, count, SIDE, SIDE)))
        file.truncate(16 + count * SIDE**2)  # Holes read as zeros and take no room.
    command = [sys.executable, "-c", CHILD, str(source), out, str(STORE_BYTES), str(SIDE)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = json.loads(said.splitlines()[-1])
    peaks = ", ".join(f"{name} {found[name] / 2**20:.0f}" for name in ("driver", "worker", "all"))
    print(
        f"memory: {mebibytes} MiB of pixels, object store {STORE_BYTES >> 20} MiB: peak MiB of the {peaks}"
        f" ({found['rows']} rows in {found['seconds']:.0f} s)",
        flush=True,
    )
    storage.remove(out)
    storage.remove(str(source))


def _tar(home: Path, size: int) -> None:
    """How many slices and parts one large tar is, from its headers alone."""
    path, member = home / "large.tar", 2**20
    with open(path, "wb") as file:
        for n in range(size // (member + 512)):
            info = tarfile.TarInfo(f"{n:06}.png")
            info.size = member
            file.seek(n * (member + 512))
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate((n + 1) * (member + 512) + 1024)
    began = time.perf_counter()
    slices = corpora.load("images").survey([str(path)], ImageSettings()).slices
    seconds = time.perf_counter() - began
    parts, largest = ingest._cut(slices), max(piece.bytes for piece in slices)
    print(
        f"tar: one of {path.stat().st_size / 2**30:.1f} GiB is {len(slices)} slices of at most {largest / 2**20:.0f}"
        f" MiB in {len(parts)} parts; surveyed in {seconds:.2f} s",
        flush=True,
    )
    path.unlink()
