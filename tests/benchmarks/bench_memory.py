"""Peak memory beyond state and inputs, each case in a process of its own: the resident peak that Linux keeps (VmHWM).

Bars: a search 16 MiB + 8 N bytes at any K, a training step with backward that plus 20 N D + 24 K (D + 1) bytes. The
torch and BLAS libraries' own buffers are there before the count starts, after a small run of the same kind.
"""

import os
import subprocess
import sys

CASES = [
    ("search", 16384, 64, 1024),
    ("search", 16384, 256, 8192),
    ("search", 8192, 32, 65536),
    ("search", 8192, 8, 2**20),
    ("search", 2**20, 8, 256),
    ("step", 16384, 64, 1024),
    ("step", 16384, 256, 8192),
    ("step", 8192, 32, 65536),
    ("step", 2**18, 8, 256),
    ("step", 1024, 64, 2**17),
]

CHILD = """
import sys, torch
torch.set_num_threads(1)
from vqcore.assign import nearest
from vqcore.quantizers import VectorQuantizer
kind, (n, dim, num_codes) = sys.argv[1], map(int, sys.argv[2:])

def prepared(n, dim, num_codes):
    x = torch.randn(n, dim, requires_grad=True)
    if kind == "search":
        vectors = torch.randn(num_codes, dim)
        return lambda: nearest(x, vectors)
    quantizer, weight = VectorQuantizer(num_codes, dim).train(), torch.randn(n, dim)
    def step():
        out = quantizer(x)
        torch.autograd.backward([out.vectors, out.loss], [weight, torch.ones(())])
    return step

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

prepared(2048, dim, min(num_codes, 2048))()
measured = prepared(n, dim, num_codes)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # start the peak again from here
before = peak()
kept = measured()
print(peak() - before)
"""


def run(quick: bool = False) -> None:
    if not sys.platform.startswith("linux"):
        print("peak memory is read from /proc, which only Linux has")
        return
    print(f"{'':8}{'N':>8} {'D':>4} {'K':>8}{'MiB':>10}{'bar':>10}")
    for kind, n, dim, num_codes in CASES[:1] if quick else CASES:
        bar = 16 * 2**20 + 8 * n + (20 * n * dim + 24 * num_codes * (dim + 1) if kind == "step" else 0)
        used = peak_of(kind, n, dim, num_codes)
        verdict = "<=" if used <= bar else ">"
        print(f"{kind:8}{n:>8} {dim:>4} {num_codes:>8}{used / 2**20:>10.1f} {verdict:2}{bar / 2**20:>8.1f}", flush=True)


def peak_of(kind: str, n: int, dim: int, num_codes: int) -> int:
    """Bytes by which one call raises the resident peak of a process."""
    # Blocks go back to the system when freed, so that the call reuses nothing that came before it.
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CHILD, kind, str(n), str(dim), str(num_codes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
