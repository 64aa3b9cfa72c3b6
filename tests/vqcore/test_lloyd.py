"""Lloyd over batches: numpy's answer, the same bits however the data is spread, nothing kept. faiss: tests/peers."""

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.together import Seat, together
from vqcore.lloyd import Fitted, Totals, lloyd, scale_of
from vqcore.quantizers import VectorBatch, VectorQuantizer
from vqcore.reduction import Alone
from vqcore.seeding import kmeans_plus_plus

N, K, D = 1500, 24, 5
metrics = pytest.mark.parametrize("metric", ["euclidean", "cosine"])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(fitted: Fitted) -> tuple[bytes, int, int, int]:
    return fitted.vectors.numpy().tobytes(), fitted.rows, fitted.left_out, fitted.passes


def reference(rows: Tensor, start: Tensor, moves: int, metric: str) -> tuple[np.ndarray, float]:
    """Centres and the sum of squared distances from the nearest, by explicit distances in float64."""

    def normed(a: np.ndarray) -> np.ndarray:
        return a / np.linalg.norm(a, axis=1, keepdims=True) if metric == "cosine" else a

    x, centres = normed(rows.double().numpy()), normed(start.double().numpy())
    squared = ((x[:, None] - centres) ** 2).sum(-1)
    for _ in range(moves):
        codes = squared.argmin(1)
        means = [x[codes == k].mean(0) if (codes == k).any() else centre for k, centre in enumerate(centres)]
        centres = normed(np.stack(means))
        squared = ((x[:, None] - centres) ** 2).sum(-1)
    return centres, squared.min(1).sum()


@metrics
@pytest.mark.parametrize("moves", [0, 1, 7])
def test_it_is_lloyds(metric: str, moves: int) -> None:
    rows = drawn(1, N, D) + 0.3
    fitted = lloyd(lambda: rows.split(400), rows[:K], metric=metric, iterations=moves)
    wanted, objective = reference(rows, rows[:K], moves, metric)
    np.testing.assert_allclose(fitted.vectors.numpy(), wanted, atol=1e-5)
    assert fitted.objective == pytest.approx(objective, rel=1e-6)
    assert (fitted.rows, fitted.left_out, fitted.passes) == (N, 0, moves + 1)


def test_it_stops_when_no_centre_moves() -> None:
    rows = drawn(1, N, D)
    fitted = lloyd(lambda: [rows], rows[:K], iterations=1000)
    assert 5 < fitted.passes < 200
    again = lloyd(lambda: [rows], fitted.vectors, iterations=1000)
    assert again.passes == 1
    assert torch.equal(again.vectors, fitted.vectors)
    one_fewer = lloyd(lambda: [rows], rows[:K], iterations=fitted.passes - 1)
    assert torch.equal(one_fewer.vectors, fitted.vectors)
    assert one_fewer.objective == pytest.approx(fitted.objective, rel=1e-12)


@metrics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", [(1500,), (750, 750), (1, 1499), (0, 1500), (300, 0, 1199, 1)])
def test_any_workers_and_any_batches_give_the_same_bits(
    parts: tuple[int, ...], metric: str, dtype: torch.dtype
) -> None:
    """Rows of very different sizes, whose float64 sums would round otherwise in every order."""
    rows = (drawn(1, N, D) * torch.logspace(-6, 1, N).unsqueeze(-1)).to(dtype)
    start = rows[-K:]
    alone = lloyd(lambda: [rows], start, metric=metric, reduce=Alone())

    def work(seat: Seat) -> tuple[Fitted, list[int]]:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(len(parts)))
        own = rows[order].split(list(parts))[seat.rank]
        return lloyd(lambda: own.split(97), start, metric=metric, reduce=seat), seat.carried

    for fitted, carried in together(len(parts), work):
        assert bits(fitted) == bits(alone)
        assert fitted.objective == pytest.approx(alone.objective, rel=1e-12)
        assert carried == [K * (1 + 2 * D) + 2] * fitted.passes, "one reduce a pass"


def test_no_batch_is_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    one = drawn(3, 500, D)

    def batches() -> Iterator[Tensor]:
        for _ in range(20):
            held.append(sum(ref() is not None for ref in alive))
            batch = one.clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    fitted = lloyd(batches, one[:4], iterations=3)
    assert fitted.rows == 20 * 500
    assert len(held) == 20 * fitted.passes
    assert not any(held), "a batch was still held when the next one was made"


MEMORY = """
import torch
torch.set_num_threads(1)
from vqcore.lloyd import lloyd
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
generator = torch.Generator().manual_seed(0)
start = torch.randn(16, 256, generator=generator)
def batches():
    for batch in range(128):
        yield torch.full((2048, 256), float(batch)).add_(start.repeat(128, 1))
lloyd(lambda: [start], start)  # the library's own buffers
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # start the peak again from here
before = peak()
fitted = lloyd(batches, start, iterations=1)
print(fitted.rows * 256 * 4, fitted.passes, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_256_mib_of_rows_pass_through_24() -> None:
    """facebookresearch/faiss 2047 and 3234: k-means data must fit in memory. The resident peak of another process; a
    batch has 2 MiB."""
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    read, passes, beyond = (int(number) for number in said.split())
    assert (read, passes) == (256 * 2**20, 2)
    assert 2**20 < beyond < 24 * 2**20, f"{beyond / 2**20:.1f} MiB"


def test_a_centre_without_rows_stays() -> None:
    """EdoardoBotta/RQ-VAE-Recommender PR 27: the mean of no rows is NaN."""
    rows = drawn(1, N, D)
    start = torch.cat([rows[:6], torch.full((1, D), 50.0)])
    fitted = lloyd(lambda: [rows], start)
    assert torch.equal(fitted.vectors[6], start[6])
    assert torch.equal(fitted.vectors[:6], lloyd(lambda: [rows], start[:6]).vectors)


@metrics
def test_what_cannot_take_part_is_left_out_and_counted(metric: str) -> None:
    rows = drawn(1, N, D)
    dirty = rows.clone()
    dirty[::10, 2], dirty[5::10, 1] = torch.nan, torch.inf
    dirty[7::10] = 0.0
    keep = dirty.isfinite().all(-1) & ((dirty != 0).any(-1) | torch.tensor(metric == "euclidean"))
    fitted = lloyd(lambda: dirty.reshape(3, -1, D).split(1), rows[1 : 1 + K], metric=metric)
    clean = lloyd(lambda: [dirty[keep]], rows[1 : 1 + K], metric=metric)
    assert torch.equal(fitted.vectors, clean.vectors)
    assert (fitted.rows, fitted.left_out) == (int(keep.sum()), int((~keep).sum()))


def test_it_goes_on_from_what_a_quantizer_made_of_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docstring says: over all rows the objective is lower than what the sample alone could give."""
    monkeypatch.setattr("vqcore.seeding.sample_size", lambda *_: 200)
    rows = drawn(1, 4000, D)
    q = VectorQuantizer(K, D, seeding=kmeans_plus_plus)
    assert "from 200 of 4000 vectors" in q.seed(VectorBatch(x) for x in rows.split(500))
    sampled = q.codebook.vectors.clone()
    fitted = lloyd(lambda: rows.split(500), q.codebook.vectors, metric=q.metric)
    q.codebook.set_vectors(fitted.vectors)
    assert (fitted.rows, fitted.passes) == (4000, 11)
    assert fitted.objective < 0.95 * lloyd(lambda: [rows], sampled, iterations=0).objective
    assert q.eval()(rows).squared_error.item() == pytest.approx(fitted.objective, rel=1e-6)


def test_arguments_are_not_changed() -> None:
    rows = drawn(1, N, D).double()
    start = rows[:K].clone()
    before = rows.clone(), start.clone()
    lloyd(lambda: [rows], start)
    assert torch.equal(rows, before[0])
    assert torch.equal(start, before[1])


def test_a_generator_that_is_used_up_is_an_error_on_every_worker() -> None:
    rows = drawn(1, 40, D)

    def work(seat: Seat) -> str:
        once = iter(rows.split(7)) if seat.rank == 0 else None
        with pytest.raises(ValueError) as error:
            lloyd(lambda: rows.split(7) if once is None else once, rows[:4], reduce=seat)
        return str(error.value)

    for message in together(2, work):
        assert "pass 2 found 40 usable vectors (0 more were not), the first pass 80" in message


def test_bad_arguments_are_refused() -> None:
    rows = drawn(1, 40, D)
    for start, options, said in (
        (rows[:0], {}, r"start has shape \(0, 5\)"),
        (rows[0], {}, r"start has shape \(5,\)"),
        (rows[:4] * torch.inf, {}, "finite"),
        (rows[:4], {"metric": "manhattan"}, "metric is 'manhattan'.*euclidean, cosine"),
        (rows[:4], {"iterations": -1}, "iterations is -1"),
        (rows[:4, :3], {}, r"a batch is torch.float32 of shape \(40, 5\).*\[\.\.\., 3\]"),
    ):
        with pytest.raises(ValueError, match=said):
            lloyd(lambda: [rows], start, **options)
    with pytest.raises(ValueError, match="floating point"):
        lloyd(lambda: [rows.long()], rows[:4])
    with pytest.raises(ValueError, match="pass 1 found 0 usable vectors"):
        lloyd(lambda: [], rows[:4])
    with pytest.raises(ValueError, match=r"found 0 usable vectors \(40 more were not\)"):
        lloyd(lambda: [rows * torch.nan], rows[:4])


# The sums


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**30])
def test_totals_are_exact_within_their_step(scale: float) -> None:
    x = scale * drawn(1, 3000, D) * torch.logspace(-8, 1, 3000).unsqueeze(-1)
    codes = torch.arange(3000) % 7
    totals = Totals(9, D, scale, x.device)
    totals.add(x, codes)
    assert totals.counts.tolist() == [429] * 4 + [428] * 3 + [0, 0]
    step = scale * 2.0**-39
    for k in range(7):
        own = x[codes == k].double()
        whole = (own / step).round().long().sum(0)  # integers do not round
        torch.testing.assert_close(totals.means()[k], whole.double() * step / len(own), rtol=1e-15, atol=0)
        torch.testing.assert_close(totals.means()[k], own.mean(0), rtol=0, atol=step / 2)
    assert not totals.means()[7:].any()


def test_totals_do_not_depend_on_the_order_where_float64_sums_do() -> None:
    x = drawn(1, 20_000, D) * torch.logspace(-12, 1, 20_000).unsqueeze(-1)
    codes = torch.arange(20_000) % 3

    def added(order: Tensor) -> tuple[bytes, Tensor]:
        totals, plain = Totals(3, D, scale_of(x), x.device), torch.zeros(3, D, dtype=torch.float64)
        for part in order.split(777):
            totals.add(x[part], codes[part])
            plain.index_add_(0, codes[part], x[part].double())
        return totals.packed.numpy().tobytes(), plain

    forward, plain = added(torch.arange(20_000))
    backward, other = added(torch.arange(20_000).flip(0))
    assert forward == backward
    assert not torch.equal(plain, other), "the case must round"


def test_beyond_their_bounds_totals_are_float64_sums() -> None:
    x = 2.0**45 * drawn(1, 3000, D)
    totals = Totals(1, D, 1.0, x.device)
    totals.add(x, torch.zeros(3000, dtype=torch.int64))
    torch.testing.assert_close(totals.means()[0], x.double().mean(0), rtol=1e-12, atol=0)


def test_the_scale_is_a_power_of_two() -> None:
    for largest, scale in ((0.0, 1.0), (1.0, 2.0), (0.99, 1.0), (3.0, 4.0), (1e-30, 2.0**-99)):
        assert scale_of(torch.tensor([[0.0, -largest]])) == scale
