"""What the one all-reduce of a training step costs, by bytes, for two and four gloo workers on this machine.

Workers are processes with one thread each that talk over loopback; with more workers than cores they also wait for one
another's turn, so four on two cores say little about four machines. Milliseconds of the clock: a reduce is waiting.
"""

import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZES = [(64, 256), (64, 1024), (256, 8192), (32, 65536)]
"""(D, K): a step carries K (D + 1) numbers of 8 bytes."""
ROUNDS = 15


def run(quick: bool = False) -> None:
    print(f"{'workers':>8}{'D':>6}{'K':>8}{'MiB':>10}{'ms':>10}{'MiB/s':>10}")
    for world in (2,) if quick else (2, 4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_worker, (world, port, SIZES[:1] if quick else SIZES), nprocs=world)


def _worker(rank: int, world: int, port: int, sizes: list[tuple[int, int]]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for dim, num_codes in sizes:
        carried = torch.zeros(num_codes * (dim + 1), dtype=torch.float64)
        seconds = []
        for _ in range(ROUNDS + 2):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(carried)
            seconds.append(time.perf_counter() - start)
        median, size = statistics.median(seconds[2:]), 8 * carried.numel() / 2**20
        if rank == 0:
            print(
                f"{world:>8}{dim:>6}{num_codes:>8}{size:>10.2f}{1e3 * median:>10.2f}{size / median:>10.0f}", flush=True
            )
    dist.destroy_process_group()
