"""Assignment against brute force in float64, and the laws it owes the training loop."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from vqcore import noise
from vqcore.assign import CODES_PER_TILE, nearest, sample_top_k

TILE = CODES_PER_TILE


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(code, how much farther the second nearest is) by explicit differences in float64."""
    mode = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(x.double(), vectors.double(), compute_mode=mode).square()
    two = distances.topk(min(2, len(vectors)), largest=False).values
    return distances.argmin(1), two[:, -1] - two[:, 0]


@pytest.mark.parametrize("n", [1, 513])
@pytest.mark.parametrize("dim", [1, 3, 64])
@pytest.mark.parametrize("num_codes", [1, 2, 63, 129, TILE, TILE + 1, 2 * TILE + 77])
def test_agrees_with_brute_force_at_every_tail(n: int, dim: int, num_codes: int) -> None:
    x, vectors = random(n, dim), random(num_codes, dim, seed=1)
    codes, gap = brute_force(x, vectors)
    clear = (gap > 1e-5) | (num_codes == 1)
    assert clear.double().mean() > 0.9 or dim == 1
    found = nearest(x, vectors)
    assert found.dtype == torch.int64
    assert torch.equal(found[clear], codes[clear])


def test_float64_stays_float64() -> None:
    """Codes 1e-6 apart around 1: float32 cannot tell them, float64 can."""
    vectors = 1 + 1e-6 * torch.arange(50, dtype=torch.float64).unsqueeze(1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest(vectors[order] + 1e-8, vectors), order)
    assert not torch.equal(nearest(vectors[order].float(), vectors.float()), order)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_arguments_are_compared_in_float32(dtype: torch.dtype) -> None:
    x, vectors = random(600, 16).to(dtype), random(1100, 16, seed=1).to(dtype)
    assert torch.equal(nearest(x, vectors), nearest(x.float(), vectors.float()))
    assert torch.equal(nearest(x.float(), vectors), nearest(x.float(), vectors.float()))


def test_cosine_is_the_largest_inner_product() -> None:
    x = torch.nn.functional.normalize(random(700, 16), dim=1)
    vectors = torch.nn.functional.normalize(random(1500, 16, seed=1), dim=1)
    expected = (x.double() @ vectors.double().T).argmax(1)
    assert torch.equal(nearest(x, vectors, metric="cosine"), expected)
    # On longer codes the two metrics disagree: lengths count in one and not in the other.
    longer = vectors * (1 + torch.arange(1500).unsqueeze(1) / 500)
    assert torch.equal(nearest(x, longer, metric="cosine"), (x.double() @ longer.double().T).argmax(1))
    assert not torch.equal(nearest(x, longer, metric="cosine"), nearest(x, longer))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_ties_take_the_lowest_code_within_and_across_tiles(metric) -> None:
    base = torch.nn.functional.normalize(random(300, 8), dim=1)
    vectors = base.repeat(8, 1)  # every vector at k, k + 300, ..., over three tiles
    assert torch.equal(nearest(base, vectors, metric=metric), torch.arange(300))
    same = torch.ones(2 * TILE + 5, 8)
    assert nearest(random(600, 8), same, metric=metric).unique().tolist() == [0]
    behind = torch.cat([random(TILE, 8, seed=2) * 0.01, same])
    assert nearest(torch.full((5, 8), 9.0), behind, metric=metric).tolist() == [TILE] * 5


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_ties_or_codes(threads: int) -> None:
    before = torch.get_num_threads()
    x, vectors = random(600, 8), random(TILE + 8, 8, seed=1).repeat_interleave(2, dim=0)
    try:
        torch.set_num_threads(threads)
        found = nearest(x, vectors)
    finally:
        torch.set_num_threads(before)
    codes, gap = brute_force(x, vectors[::2])
    clear = gap > 1e-4
    assert torch.equal(found[clear], 2 * codes[clear])


SPLITS = [[1500], [1] * 30 + [1470], [750, 750], [513, 987], [1499, 1], [0, 1024, 476], [7, 100, 1393]]


@pytest.mark.parametrize(
    ("num_codes", "dim"), [(64, 3), (100, 64), (256, 8), (256, 300), (1000, 8), (3000, 32), (40, 5000)]
)
def test_no_split_of_a_batch_changes_a_code(num_codes: int, dim: int) -> None:
    """Every code has a neighbour 2e-7 away: rounding decides, so it must not depend on the split."""
    half = random(num_codes // 2, dim, seed=1)
    vectors = torch.cat([half, half + 2e-7 * random(num_codes // 2, dim, seed=2)])
    x = half[torch.arange(1500) % len(half)] + 0.01 * random(1500, dim, seed=3)
    whole = nearest(x, vectors)
    for sizes in SPLITS:
        assert torch.equal(torch.cat([nearest(part, vectors) for part in x.split(sizes)]), whole), sizes
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(4))
    assert torch.equal(nearest(x[order], vectors), whole[order])
    assert torch.equal(nearest(x[3::2], vectors), whole[3::2]), "strided rows"
    assert torch.equal(nearest(x.T.contiguous().T, vectors.T.contiguous().T), whole), "transposed storage"


def test_autocast_does_not_change_codes() -> None:
    """vector-quantize-pytorch guards CUDA only: 1.7 % of its codes change under CPU bfloat16 autocast."""
    x, vectors = random(2000, 64), random(1024, 64, seed=1)
    codes = nearest(x, vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest(x, vectors), codes)
        assert (x @ vectors.T).dtype == torch.bfloat16, "autocast was not left as it was found"
    assert not torch.equal((x.bfloat16() @ vectors.bfloat16().T - vectors.square().sum(1) / 2).argmax(1), codes)


def test_float32_precision_settings_are_overruled_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has bfloat16 products, set_float32_matmul_precision("medium") would use them."""
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    during: list[str] = []
    real = torch.addmm

    def addmm(*args, **kwargs) -> Tensor:
        during.extend(backend.fp32_precision for backend in backends)
        during.append("autocast" if torch.is_autocast_enabled("cpu") else "ieee")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", addmm)
    try:
        torch.set_float32_matmul_precision("medium")
        before = [backend.fp32_precision for backend in backends]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nearest(random(5, 4), random(9, 4))
        assert [backend.fp32_precision for backend in backends] == before == ["bf16", "tf32"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(during) == {"ieee"}


def test_no_gradient_and_no_change_of_arguments() -> None:
    x, vectors = random(600, 4).requires_grad_(), random(70, 4, seed=1).requires_grad_()
    copies = x.detach().clone(), vectors.detach().clone()
    assert not nearest(x, vectors).requires_grad
    with torch.no_grad():
        nearest(x, vectors)
    assert torch.equal(x, copies[0])
    assert torch.equal(vectors, copies[1])


def test_empty_batch_and_foolish_rows() -> None:
    vectors = random(1100, 4)
    assert nearest(torch.empty(0, 4), vectors).shape == (0,)
    x = random(600, 4, seed=1)
    codes = nearest(x, vectors)
    x[5], x[6, 0], x[7] = float("nan"), float("inf"), 3e38
    found = nearest(x, vectors)
    assert ((found >= 0) & (found < 1100)).all()
    rest = torch.ones(600, dtype=torch.bool)
    rest[5:8] = False
    assert torch.equal(found[rest], codes[rest]), "a bad row changed its neighbours' codes"


def test_refusals_name_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*flatten"):
        nearest(torch.zeros(2, 3, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(5, 4\)"):
        nearest(torch.zeros(2, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"empty.*\(0, 4\)"):
        nearest(torch.zeros(2, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"'manhattan'.*'euclidean', 'cosine'"):
        nearest(torch.zeros(2, 4), torch.zeros(5, 4), metric="manhattan")  # type: ignore[arg-type]


MEMORY = """
import torch
torch.set_num_threads(1)
from vqcore.assign import nearest
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
for n, dim, num_codes, transposed in ((400_000, 2, 16, False), (400_000, 2, 16, True), (500, 2, 1_200_000, False),
                                      (20_000, 64, 1024, False), (3000, 2048, 1100, True), (17_000, 512, 16, True)):
    vectors = torch.randn(num_codes, dim)
    x = torch.randn(dim, n).T if transposed else torch.randn(n, dim)
    nearest(torch.randn(1024, dim), torch.randn(1024, dim))  # the library's own buffers, the same for all shapes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # start the peak again from here
    before = peak()
    codes = nearest(x, vectors)
    print(n, dim, num_codes, transposed, peak() - before - 8 * n)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_stays_under_16_mib_and_the_codes() -> None:
    """The resident peak of another process: temporaries, and what the allocator and the library hold, all count."""
    # Blocks go back to the system when freed, so that no call reuses what one before it left behind.
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        beyond = int(line.split()[-1])
        assert 2**16 < beyond < 16 * 2**20, f"N, D, K, transposed, bytes: {line}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_finds_the_same_codes() -> None:
    x, vectors = random(5000, 32), random(3000, 32, seed=1)
    codes, gap = brute_force(x, vectors)
    clear = gap > 1e-3
    assert torch.equal(nearest(x.cuda(), vectors.cuda()).cpu()[clear], codes[clear])
    same = torch.ones(TILE + 5, 32, device="cuda")
    assert nearest(x.cuda(), same).unique().tolist() == [0]


# sample_top_k


def uniforms(n: int) -> Tensor:
    return noise.uniform(3, 1, torch.arange(n)).squeeze(-1)


@pytest.mark.parametrize("num_codes", [3, 200, TILE + 1, 2 * TILE + 77])
def test_one_of_one_or_a_temperature_of_nought_is_the_nearest(num_codes: int) -> None:
    """CLVQ dossier, check 1."""
    x, vectors = random(700, 16), random(num_codes, 16, seed=1)
    codes = nearest(x, vectors)
    for k, temperature in ((1, 1e-3), (1, 1e6), (2, 1e-12), (5, 1e-12)):
        assert torch.equal(sample_top_k(x, vectors, k, temperature, uniforms(700)), codes)
        assert torch.equal(sample_top_k(x, vectors, k, temperature, uniforms(700), relative=True), codes)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("num_codes", [3, 60, TILE + 300])
def test_every_row_draws_the_code_of_its_uniform(num_codes: int, relative: bool) -> None:
    """Against explicit distances in float64, the k nearest by a full sort, and numpy's own inverse of the sums."""
    x, vectors, u, k = random(400, 6), random(num_codes, 6, seed=1), uniforms(400), 5
    distances = torch.cdist(x.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    sorted_distances, order = distances.sort(-1)
    gaps = (sorted_distances[:, :k] - sorted_distances[:, :1]).numpy()
    temperature = 0.7 * (gaps[:, 1:].mean(-1, keepdims=True) if relative else 1.0)
    p = np.exp(-gaps / temperature)
    reached = p.cumsum(-1) / p.sum(-1, keepdims=True)
    wanted = [int(order[i, np.searchsorted(reached[i], u[i].item(), side="right")]) for i in range(400)]
    assert sample_top_k(x, vectors, k, 0.7, u, relative=relative).tolist() == wanted


def test_frequencies_over_the_k_nearest_are_the_tempered_ones() -> None:
    """CLVQ dossier, check 2: 1e5 draws at a low, a middling and a high temperature; nothing outside the k nearest."""
    x, vectors, draws, k = random(1, 4), random(30, 4, seed=1), 100_000, 5
    distances = (x - vectors).double().square().sum(-1)
    best = distances.topk(k, largest=False)
    for temperature in (0.5, 3.0, 1e9):
        codes = sample_top_k(x.expand(draws, 4), vectors, k, temperature, uniforms(draws))
        counts = torch.bincount(codes, minlength=30)
        assert int(counts[best.indices].sum()) == draws
        wanted = torch.softmax(-best.values / temperature, 0) * draws
        assert stats.chisquare(counts[best.indices].numpy(), wanted.numpy()).pvalue > 1e-3
    assert wanted.max() - wanted.min() < 1.0, "the last temperature makes all k alike"


def test_a_relative_temperature_does_not_depend_on_the_scale() -> None:
    """At a norm of 24, an absolute T of 1 is next to argmin (CLVQ dossier, section 4)."""
    x, vectors, u = random(2000, 8), random(50, 8, seed=1), uniforms(2000)
    codes = sample_top_k(x, vectors, 5, 1.0, u, relative=True)
    assert (codes != nearest(x, vectors)).double().mean() > 0.3
    assert torch.equal(sample_top_k(32 * x, 32 * vectors, 5, 1.0, u, relative=True), codes)
    assert (sample_top_k(32 * x, 32 * vectors, 5, 1.0, u) != nearest(x, vectors)).double().mean() < 0.01
    same = torch.ones(4, 8)
    assert sample_top_k(x, same, 4, 1.0, u, relative=True).unique().numel() == 4, "equal distances are all alike"


@pytest.mark.parametrize(("num_codes", "dim"), [(64, 3), (1000, 8), (3000, 32)])
def test_no_split_of_a_batch_changes_a_draw(num_codes: int, dim: int) -> None:
    half, u = random(num_codes // 2, dim, seed=1), uniforms(1500)
    vectors = torch.cat([half, half + 2e-7 * random(num_codes // 2, dim, seed=2)])
    x = half[torch.arange(1500) % len(half)] + 0.01 * random(1500, dim, seed=3)
    whole = sample_top_k(x, vectors, 4, 1.0, u, relative=True)
    for sizes in SPLITS:
        parts = [
            sample_top_k(*part, relative=True)
            for part in (
                (rows, vectors, 4, 1.0, of_rows) for rows, of_rows in zip(x.split(sizes), u.split(sizes), strict=True)
            )
        ]
        assert torch.equal(torch.cat(parts), whole), sizes


def test_sampling_takes_empty_batches_foolish_rows_and_autocast() -> None:
    x, vectors, u = random(600, 4), random(1100, 4, seed=1), uniforms(600)
    assert sample_top_k(x[:0], vectors, 3, 1.0, u[:0]).shape == (0,)
    codes = sample_top_k(x, vectors, 3, 1.0, u)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample_top_k(x, vectors, 3, 1.0, u), codes)
    bad = x.clone()
    bad[5], bad[6, 0], bad[7] = float("nan"), float("inf"), 3e38
    found = sample_top_k(bad, vectors, 3, 1.0, u)
    assert ((found >= 0) & (found < 1100)).all()
    rest = torch.ones(600, dtype=torch.bool)
    rest[5:8] = False
    assert torch.equal(found[rest], codes[rest])


@pytest.mark.parametrize(("k", "temperature", "rows"), [(0, 1.0, 5), (3, 0.0, 5), (3, float("nan"), 5), (3, 1.0, 4)])
def test_sampling_refuses_bad_arguments(k: int, temperature: float, rows: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k}, temperature={temperature}.*\({rows},\) for 5 rows"):
        sample_top_k(random(5, 4), random(9, 4), k, temperature, uniforms(rows))
