"""Two workers of one group against two that do not know of each other, what Ray adds, and what a step is made of.

All run the loop of `vqray train` on the same shards with the same rows a worker, one thread each, and take turns; a
side's time is from its first step to its last, by the clock, since a reduce is waiting. The ratio is of steps a second
of all workers within a round, then the median over rounds. Beside it, what waiting alone leaves: the copies' own steps,
paired, as if each took as long as the slower of its pair. A small model made of the parts (`predicted`) says what 2 and
4 workers do, and what nobody here can measure: 8 to 512 GPUs. Its numbers of GPUs are those of the makers, none of
ours.
"""

import multiprocessing as mp
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines import loop, recipe, train
from pipelines.checkpoint import Checkpoints
from pipelines.feed import Feed, columns_of
from pipelines.loop import RunSpec
from pipelines.request import Request
from pipelines.shards import ShardReader
from tests.pipelines.loops import make_shards

NAME, ROWS_A_WORKER, STEPS, ROUNDS = "rotation_trick", 32, 40, 7
LARGER_ROWS = 128
"""Rows a worker of a second comparison: the longer a step, the smaller what its reduces cost."""
BYTES = 8
"""Of a number in the codebooks' reduce: float64. Gradients are reduced in float32."""


@dataclass(frozen=True)
class Link:
    """What one ring of all-reduces is made of."""

    name: str
    bytes_per_second: float
    latency: float
    """Seconds of one hop."""

    def seconds(self, size: float, workers: int) -> float:
        """A ring sends 2 (W - 1) / W of the bytes in 2 (W - 1) hops."""
        hops = 2 * (workers - 1)
        return hops * self.latency + hops / workers * size / self.bytes_per_second


def predicted(link: Link, workers: int, compute: float, codes: int, dim: int, weights: int = 0) -> tuple[float, float]:
    """(seconds a step, share of it that is all-reduce) of `workers` with the same rows each.

    Args:
        compute: seconds a step of the worker that is slowest in it, alone.
        codes, dim: K and D of the codebook, whose counts and sums are reduced as K (D + 1) float64.
        weights: numbers in the network, whose gradients are reduced as float32.
    """
    reduce = link.seconds(BYTES * codes * (dim + 1), workers) + link.seconds(4 * weights, workers)
    return compute + reduce, reduce / (compute + reduce)


def run(quick: bool = False) -> None:
    steps, rounds = (8, 1) if quick else (STEPS, ROUNDS)
    with tempfile.TemporaryDirectory() as scratch:
        shards = make_shards(Path(scratch) / "shards", rows=1152, side=64)
        groups = (2,) if quick else (2, 4)
        for workers in groups:
            _against_copies(_spec(shards, scratch, workers, steps), workers, rounds)
        if not quick:
            larger = _spec(shards, scratch, 2, steps // 2, batch_size=2 * LARGER_ROWS)
            _against_copies(replace(larger, out=f"{scratch}/larger"), 2, rounds)
        link = _loopback(quick)
        print(f"loopback: {link.bytes_per_second / 2**20:.0f} MiB/s, {1e6 * link.latency:.0f} us a hop")
        _check_model(shards, scratch, link, groups, steps, rounds)
        if not quick:
            _against_ray(shards, scratch, steps, rounds=3)
    _project()


def _spec(shards: str, scratch: str, workers: int, steps: int, **settings: Any) -> RunSpec:
    found = recipe.load(NAME)
    # k-means++ of 65,536 codes takes minutes here, and no step.
    fixed = {"batch_size": ROWS_A_WORKER * workers, "steps": steps, "seeding": "random_rows"}
    chosen = {**found.presets["small"], **fixed, **settings}
    resolved = found.resolve(found.Settings.model_validate(chosen), columns_of(ShardReader(shards).manifest))
    values = resolved.model_dump(mode="json")
    return RunSpec(NAME, values, shards, 0, resolved.batch_size, f"{scratch}/run", checkpoint_every=10**6)


def _against_copies(spec: RunSpec, workers: int, rounds: int) -> None:
    """Print the ratio of one group to `workers` copies, and the parts of its step."""
    timed = _timed(spec, workers, rounds)
    ratios = [round_.group_rate() / round_.copies_rate() for round_ in timed]
    waiting = statistics.median(round_.in_step_rate() / round_.copies_rate() for round_ in timed)
    shares = {part: statistics.median(round_.shares[part] for round_ in timed) for part in ("data", "reduce")}
    each = 1e3 * statistics.median(workers / round_.group_rate() for round_ in timed)
    parts = ", ".join(f"{part} {each * share:.1f}" for part, share in shares.items())
    rows = spec.settings["batch_size"] // workers
    spread = f"{min(ratios):.3f} to {max(ratios):.3f} in {rounds} rounds"
    print(
        f"{workers} workers of {rows} rows: {statistics.median(ratios):.3f} of {workers} copies ({spread}; the bar of"
        f" two is 0.9; waiting for the slowest alone leaves {waiting:.3f}); a step {each:.1f} ms: {parts}, compute"
        f" {each * (1 - sum(shares.values())):.1f}",
        flush=True,
    )


@dataclass(frozen=True)
class Round:
    """One turn of both sides."""

    copies: list[list[float]]
    """Seconds of every step of every copy."""
    group: list[float]
    shares: dict[str, float]
    """Of the group's step: data, reduce."""

    def copies_rate(self) -> float:
        """Steps a second of all copies together."""
        return sum(len(steps) / sum(steps) for steps in self.copies)

    def group_rate(self) -> float:
        return len(self.copies) * len(self.group) / sum(self.group)

    def in_step_rate(self) -> float:
        """Of copies that wait for each other after every step, at no other cost."""
        return len(self.copies) * len(self.group) / sum(max(together) for together in zip(*self.copies, strict=True))


def _timed(spec: RunSpec, workers: int, rounds: int) -> list[Round]:
    context = mp.get_context("spawn")
    barrier, answers = context.Barrier(workers), context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_worker, args=(rank, workers, port, spec, rounds, barrier, answers))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=3600) for _ in processes)
    for process in processes:
        process.join()
    return [
        Round([found[rank][number][0] for rank in range(workers)], *found[0][number][1:]) for number in range(rounds)
    ]


def _worker(
    rank: int, workers: int, port: int, spec: RunSpec, rounds: int, barrier: Barrier, answers: "Queue[Any]"
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found = []
    for number in range(rounds):
        barrier.wait()
        each = spec.settings["batch_size"] // workers
        out = f"{spec.out}-alone-{rank}-of-{workers}-{number}"
        copies, _ = _steps(replace(spec, settings={**spec.settings, "batch_size": each}, lanes=each, out=out))
        barrier.wait()
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
        found.append((copies, *_steps(replace(spec, out=f"{spec.out}-{workers}-{number}"))))
        dist.destroy_process_group()
    answers.put((rank, found))


def _steps(spec: RunSpec) -> tuple[list[float], dict[str, float]]:
    """Seconds of every step but the first, and the shares of parts; nothing where another worker has the word."""
    times: list[float] = []
    shares: dict[str, float] = {}

    def tell(event: loop.Event) -> None:
        if event["kind"] == "progress":
            times.append(time.perf_counter())
        if event["kind"] == "metrics":
            shares.update({part: event["metrics"][f"speed/{part}_share"] for part in ("data", "reduce")})

    loop.train(spec, Feed(ShardReader(spec.shards)), torch.device("cpu"), tell)
    return [after - before for before, after in pairwise(times)], shares


def _loopback(quick: bool) -> Link:
    """Bandwidth and latency of one ring of two, from a small and a large all-reduce."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rounds = 5 if quick else 15
    processes = [context.Process(target=_reduce, args=(rank, port, rounds, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    small, large = answers.get(timeout=600)
    for process in processes:
        process.join()
    return Link("gloo over loopback", BYTES * (LARGE - SMALL) / (large - small), small / 2)


SMALL, LARGE = 64, 1 << 21
"""Numbers of the two all-reduces that the loopback's parts follow from."""


def _reduce(rank: int, port: int, rounds: int, answers: "Queue[Any]") -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = []
    for size in (SMALL, LARGE):
        carried = torch.zeros(size, dtype=torch.float64)
        seconds = []
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(carried)
            seconds.append(time.perf_counter() - start)
        found.append(statistics.median(seconds))
    dist.destroy_process_group()
    if rank == 0:
        answers.put(tuple(found))


def _check_model(shards: str, scratch: str, link: Link, workers_of: Sequence[int], steps: int, rounds: int) -> None:
    """The model's step beside the measured one, for a small and a large codebook. Waiting counts as reduce in both."""
    print(f"{'workers':>8}{'K':>8}{'D':>6}{'predicted ms':>14}{'measured ms':>13}{'its reduce':>12}{'measured':>10}")
    for workers in workers_of:
        for codes, dim in SHAPES:
            # A step over 65,536 codes takes seconds here.
            spec = _spec(
                shards, scratch, workers, steps if codes < 10_000 else max(3, steps // 5), num_codes=codes, code_dim=dim
            )
            timed = _timed(replace(spec, out=f"{spec.out}-{codes}"), workers, max(1, rounds // 2))
            found = recipe.load(NAME)
            model = found.stages(found.Settings(**spec.settings))[0].build(found.Settings(**spec.settings), None)
            weights = sum(p.numel() for p in model.parameters())
            each = statistics.median(workers / round_.in_step_rate() for round_ in timed)
            step, _ = predicted(link, workers, each, codes, dim, weights)
            share = 1 - statistics.median(workers / round_.copies_rate() for round_ in timed) / step
            measured = statistics.median(workers / round_.group_rate() for round_ in timed)
            reduce = statistics.median(round_.shares["reduce"] for round_ in timed)
            said = f"{workers:>8}{codes:>8}{dim:>6}{1e3 * step:>14.1f}{1e3 * measured:>13.1f}"
            print(f"{said}{share:>12.3f}{reduce:>10.3f}", flush=True)


SHAPES = [(256, 32), (65536, 32)]


def _against_ray(shards: str, scratch: str, steps: int, rounds: int) -> None:
    """The same two workers under Ray Train, between two checkpoints, and what it needs before and after."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/tracking.db"
    spec = replace(_spec(shards, scratch, 2, 3 * steps), checkpoint_every=steps)
    ratios, starts = [], []
    for number in range(rounds):
        plain = replace(spec, out=f"{spec.out}-plain-{number}")
        _timed(plain, 2, 1)
        out = f"{spec.out}-ray-{number}"
        overrides = {name: spec.settings[name] for name in ("batch_size", "steps", "seeding")}
        began = time.perf_counter()
        train.train(Request(NAME, shards, out, preset="small", overrides=overrides, workers=2, checkpoint_every=steps))
        starts.append(time.perf_counter() - began - Checkpoints(out).totals()["seconds"])
        ratios.append(_between(out) / _between(f"{plain.out}-2-0"))
    print(
        f"Ray Train: {statistics.median(ratios):.3f} of the time of two plain processes ({min(ratios):.3f} to"
        f" {max(ratios):.3f} in {rounds} rounds; the bar is 1.03); {statistics.median(starts):.1f} s to start and end"
    )


def _between(out: str) -> float:
    """Seconds between the two newest checkpoints."""
    store = Checkpoints(out)
    earlier, later = (store.load(*at).state["totals"]["seconds"] for at in store.complete())
    return float(later - earlier)


NVLINK, FABRIC = Link("NVLink in a machine", 200e9, 5e-6), Link("400 Gb/s a GPU between machines", 40e9, 10e-6)
"""What makers say of 8 GPUs in a machine and of a machine's share of the fabric. Assumed, measured by nobody here."""
GPU_STEP = 0.1
"""Seconds that one GPU computes a step. Assumed too."""


def _project() -> None:
    print(f"projected, none of it measured: {1e3 * GPU_STEP:.0f} ms of compute a step; {NVLINK.name}; {FABRIC.name}")
    print(f"{'GPUs':>6}{'K':>9}{'D':>6}{'MiB a step':>12}{'steps/s':>9}{'all-reduce':>12}")
    for gpus in (8, 64, 512):
        for codes, dim in ((1024, 64), (65536, 256), (1 << 20, 256), (1 << 20, 1024)):
            step, share = predicted(NVLINK if gpus == 8 else FABRIC, gpus, GPU_STEP, codes, dim)
            size = BYTES * codes * (dim + 1) / 2**20
            print(f"{gpus:>6}{codes:>9,}{dim:>6}{size:>12,.0f}{1 / step:>9.2f}{share:>12.1%}")
