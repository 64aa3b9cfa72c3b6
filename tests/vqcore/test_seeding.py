"""The sample is the same for any number of workers; what is made of it is checked against numpy and chance."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.together import Seat, together
from vqcore import noise
from vqcore import seeding as seeding_module
from vqcore.reduction import Alone
from vqcore.seeding import (
    SAMPLE,
    Offer,
    draw_sample,
    kmeans_plus_plus,
    norm_blocks,
    random_rows,
    sample_size,
    scaled_spherical,
    share,
)

ROWS, D = 300, 5
LIKE = torch.zeros(8, D)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def offer(x: Tensor, rows: Tensor) -> Offer:
    """Rows of `x` keyed by their index; every tenth is not usable."""
    usable = rows % 10 != 0
    return Offer(torch.where(usable.unsqueeze(-1), x[rows], 0.0), usable, rows, int((~usable).sum()))


@pytest.mark.parametrize("size", [8, 50, 1000])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_sample_does_not_depend_on_the_workers(world: int, size: int) -> None:
    x = drawn(0, ROWS, D)
    alone = draw_sample([offer(x, torch.arange(ROWS))], LIKE, seed=3, reduce=Alone(), size=size)

    def work(seat: Seat) -> tuple[Tensor, int, int]:
        mine = torch.arange(ROWS)[torch.arange(ROWS) % 3 == seat.rank] if seat.rank < 3 else torch.arange(0)
        if seat.world < 3:
            mine = torch.arange(ROWS)[torch.arange(ROWS) % seat.world == seat.rank]
        batches = (offer(x, part) for part in mine.split(17) if len(part))
        return tuple(draw_sample(batches, LIKE, seed=3, reduce=seat, size=size))

    for rows, seen, non_finite in together(world, work):
        assert torch.equal(rows, alone.rows)
        assert (seen, non_finite) == (270, 30) == (alone.seen, alone.non_finite)


@pytest.mark.parametrize("size", [8, 20])
def test_the_sample_is_the_rows_with_the_smallest_race_keys_in_their_order(size: int) -> None:
    x, usable = drawn(0, ROWS, D), torch.arange(ROWS)[torch.arange(ROWS) % 10 != 0]
    for seed in range(20):
        batches = (offer(x, part) for part in torch.arange(ROWS).split(7))
        sample = draw_sample(batches, LIKE, seed=seed, reduce=Alone(), size=size)
        order = noise.race(seed, 0, usable, stream=SAMPLE).argsort()[:size]
        assert torch.equal(sample.rows, x[usable[order]])


def test_the_draw_holds_twice_its_sample_and_a_batch_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    smallest = seeding_module._smallest

    def watched(parts: list[tuple[Tensor, Tensor]], size: int) -> tuple[Tensor, Tensor]:
        held.append(sum(len(rows) for _, rows in parts))
        return smallest(parts, size)

    monkeypatch.setattr(seeding_module, "_smallest", watched)
    x = drawn(0, ROWS, D)
    draw_sample((offer(x, part) for part in torch.arange(ROWS).split(10)), LIKE, seed=3, reduce=Alone(), size=20)
    assert max(held) <= 2 * 20 + 10
    assert sum(held) < 150, "a vector that has lost already is not kept: 20 ln(270 / 20) enter after the first 20"


MEMORY = """
import torch
torch.set_num_threads(1)
from vqcore.quantizers import VectorBatch, VectorQuantizer
from vqcore.seeding import random_rows
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
rows = torch.randn(8192, 128)
def batches(count):
    return (VectorBatch(rows + batch) for batch in range(count))
q = VectorQuantizer(16, 128, seeding=random_rows)
q.seed(batches(1))  # the library's own buffers
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # start the peak again from here
before = peak()
said = q.seed(batches(64))
print(peak() - before)
print(said)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_256_mib_of_rows_without_keys_pass_through_four_samples_of_32() -> None:
    """facebookresearch/faiss 39, 935, 2047, 3234 and 4744: data that must fit in memory. The resident peak of another
    process; a batch has 4 MiB, and race keys take some more."""
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment)
    beyond, said = run.stdout.splitlines()
    assert said == "16 codes by random_rows from 65536 of 524288 vectors"
    assert 2**20 < int(beyond) < 4 * 32 * 2**20, f"{int(beyond) / 2**20:.1f} MiB"


def test_the_sample_is_a_uniform_draw_without_repeats_in_random_order() -> None:
    x = torch.arange(ROWS).float().unsqueeze(-1).expand(ROWS, D).contiguous()
    hits = torch.zeros(ROWS)
    firsts = torch.zeros(ROWS)
    for seed in range(200):
        rows = draw_sample([offer(x, torch.arange(ROWS))], LIKE, seed=seed, reduce=Alone(), size=27).rows[:, 0].long()
        assert len(rows.unique()) == 27
        hits[rows] += 1
        firsts[rows[0]] += 1
    assert hits[::10].sum() == 0, "unusable rows were drawn"
    usable = torch.arange(ROWS) % 10 != 0
    assert ((hits[usable] - 20).square() / 18).mean().item() == pytest.approx(1.0, abs=0.3)  # binomial(200, 0.1)
    assert firsts.max() <= 6


def test_too_few_vectors_is_an_error_on_every_worker() -> None:
    x = drawn(0, ROWS, D)

    def work(seat: Seat) -> str:
        with pytest.raises(ValueError) as error:
            draw_sample([offer(x, torch.arange(4))] if seat.rank == 0 else [], LIKE, seed=0, reduce=seat)
        return str(error.value)

    for message in together(2, work):
        assert "3 usable" in message
        assert "8 codes" in message


def test_the_sample_is_bounded() -> None:
    assert sample_size(256, 64) == 65536
    assert sample_size(4096, 64) == 4096 * 64
    assert sample_size(8192, 256) == 131072
    assert sample_size(300000, 1024) == 300000


def test_share_gives_every_worker_the_bits_of_the_first() -> None:
    results = together(3, lambda seat: share(LIKE + 0.1 * (1 + seat.rank), seat))
    assert all(torch.equal(result, LIKE + 0.1) for result in results)


def test_random_rows_are_different_rows() -> None:
    rows = drawn(1, 40, D)
    made = random_rows(rows, 8, metric="euclidean", seed=0)
    assert torch.equal(made, rows[:8])


def blobs(count: int, each: int) -> tuple[Tensor, Tensor]:
    centres = 10 * drawn(4, count, D)
    x = centres.repeat_interleave(each, 0) + 0.01 * drawn(5, count * each, D)
    return centres, x[torch.randperm(len(x), generator=torch.Generator().manual_seed(6))]


def test_kmeans_plus_plus_finds_every_separated_cluster() -> None:
    centres, x = blobs(40, 25)
    made = kmeans_plus_plus(x, 40, metric="euclidean", seed=0)
    nearest = torch.cdist(centres, made).min(1).values
    assert nearest.max() < 0.05
    missed = torch.cdist(centres, random_rows(x, 40, metric="euclidean", seed=0)).min(1).values
    assert missed.max() > 1.0, "the case is too easy"


def test_the_second_centre_is_drawn_by_squared_distance() -> None:
    """Arthur and Vassilvitskii 2007, step 1b: from 0, the points 1 and 3 have weights 1 and 9."""
    rows = torch.tensor([[0.0], [1.0], [3.0], [0.0]])
    far = [kmeans_plus_plus(rows, 2, metric="euclidean", seed=seed, iterations=0)[1].item() for seed in range(400)]
    assert set(far) == {1.0, 3.0}
    assert far.count(3.0) / 400 == pytest.approx(0.9, abs=0.05)


def test_lloyd_matches_a_numpy_reference() -> None:
    rows = drawn(2, 500, D)
    centres = kmeans_plus_plus(rows, 12, metric="euclidean", seed=1, iterations=0).double().numpy()
    x = rows.double().numpy()
    for _ in range(6):
        codes = ((x[:, None] - centres) ** 2).sum(-1).argmin(1)
        centres = np.stack([x[codes == k].mean(0) if (codes == k).any() else centres[k] for k in range(12)])
    made = kmeans_plus_plus(rows, 12, metric="euclidean", seed=1, iterations=6)
    np.testing.assert_allclose(made.numpy(), centres, atol=1e-5)


@pytest.mark.parametrize(("offset", "dim"), [(0.0, 5), (1000.0, 5), (0.0, 64)])
def test_fewer_distinct_vectors_than_codes(offset: float, dim: int) -> None:
    """facebookresearch/faiss tests 5 distinct points for 10 centroids; lucidrains gives 30 distinct of 64."""
    distinct = drawn(7, 30, dim) + offset
    rows = distinct.repeat(20, 1)
    made = kmeans_plus_plus(rows, 64, metric="euclidean", seed=0, iterations=0)
    assert made.shape == (64, dim)
    assert torch.equal(made[:30].unique(dim=0), distinct.unique(dim=0)), "the first thirty must be all there are"


def test_rounding_does_not_make_copies_of_a_centre_worth_drawing() -> None:
    """4,000 copies of two far points, their squared distances rounded, outweigh the one other point there is."""
    far = 300.0 * drawn(1, 1, 64)
    rows = torch.cat([far, -far]).repeat(2000, 1)
    rows[-1, 0] += 10.0
    for seed in range(10):
        made = kmeans_plus_plus(rows, 3, metric="euclidean", seed=seed, iterations=0)
        assert len(made.unique(dim=0)) == 3


def test_many_codes_are_drawn_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqcore.seeding._MOST_ROUNDS", 8)
    centres, x = blobs(30, 40)
    made = kmeans_plus_plus(x, 60, metric="euclidean", seed=0)
    assert len(made.unique(dim=0)) == 60
    assert torch.cdist(centres, made).min(1).values.max() < 0.05


def test_cosine_centres_are_directions() -> None:
    x = torch.nn.functional.normalize(drawn(8, 400, D), dim=-1)
    made = kmeans_plus_plus(x, 16, metric="cosine", seed=0)
    torch.testing.assert_close(made.norm(dim=-1), torch.ones(16))
    codes = (x @ made.T).argmax(-1)
    for k in range(16):
        mean = x[codes == k].double().mean(0)
        assert torch.cosine_similarity(mean, made[k].double(), dim=0) > 0.99


def test_scaled_spherical_gives_directions_the_mean_length_of_their_cluster() -> None:
    """CLVQ-VAE: scaling all inputs scales the lengths only; lengths are means over clusters of directions."""
    directions = torch.nn.functional.normalize(drawn(9, 6, D), dim=-1)
    lengths = 20 + 10 * torch.rand(600, 1, generator=torch.Generator().manual_seed(1))
    x = directions.repeat(100, 1) * lengths
    x[599] = 0.0
    seeding = partial(scaled_spherical, metric="euclidean", seed=0)
    made = seeding(x, 6)
    order = (directions @ made.T).argmax(-1)
    assert len(order.unique()) == 6
    for k in range(6):
        wanted = directions[k] * lengths[k::6][: 100 - (k == 5)].mean()
        torch.testing.assert_close(made[order[k]], wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seeding(3 * x, 6), 3 * made, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"599 sampled vectors are not zero.*at least 600"):
        seeding(x, 600)


def authors_initialization(vectors: Tensor) -> Tensor:
    """codebook_initialization of MHVali/Space-Filling-Vector-Quantizer 8f067a4, utils.py."""
    _, indices = torch.sort(torch.linalg.norm(vectors, dim=1))
    ordered, hop = vectors[indices], len(vectors) // 4
    return torch.stack([ordered[i * hop : (i + 1) * hop].mean(0) for i in range(4)])


def test_norm_blocks_are_those_of_the_authors() -> None:
    rows = 2.0 + drawn(10, 10_000, D)
    made = norm_blocks(rows, 4, metric="euclidean", seed=0)
    torch.testing.assert_close(made, authors_initialization(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "codes"), [(10, 10), (10, 4), (301, 7)])
def test_norm_blocks_use_every_row_once_in_blocks_of_almost_one_size(rows: int, codes: int) -> None:
    x = torch.zeros(rows, 2)
    x[:, 0] = 1.0 + torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    made = norm_blocks(x, codes, metric="euclidean", seed=0)[:, 0].double()
    # Block b of consecutive integers has mean (first + last) / 2, and the next begins one after its end.
    last = 0.0
    for mean in made.tolist():
        first = last + 1
        last = round(2 * mean - first)
        assert last - first + 1 in (rows // codes, -(-rows // codes))
    assert last == rows


def test_norm_blocks_refuse_cosine() -> None:
    with pytest.raises(ValueError, match="length 1"):
        norm_blocks(drawn(1, 20, D), 4, metric="cosine", seed=0)


def spherical_reference(rows: np.ndarray, start: np.ndarray, iterations: int) -> tuple[np.ndarray, float]:
    """CLVQ dossier, "Initialisation spherical", steps 2 to 5, and the k-means objective."""
    lengths = np.linalg.norm(rows, axis=1)
    directions = rows / lengths[:, None]
    centres = start / np.linalg.norm(start, axis=1, keepdims=True)
    distances = ((directions[:, None] - centres) ** 2).sum(-1)
    for _ in range(iterations):
        codes = distances.argmin(1)
        centres = np.stack([directions[codes == k].mean(0) if (codes == k).any() else c for k, c in enumerate(centres)])
        distances = ((directions[:, None] - centres) ** 2).sum(-1)
    codes = distances.argmin(1)
    scale = [lengths[codes == k].mean() if (codes == k).any() else lengths.mean() for k in range(len(centres))]
    return centres / np.linalg.norm(centres, axis=1, keepdims=True) * np.array(scale)[:, None], distances.min(1).sum()


def test_scaled_spherical_matches_a_numpy_reference() -> None:
    """k-means on unit vectors, centroids normalised again, each as long as its cluster's mean |x|."""
    rows = (drawn(2, 500, D) + 1.0) * torch.linspace(20, 30, 500).unsqueeze(-1)
    start = scaled_spherical(rows, 12, metric="euclidean", seed=1, iterations=0)
    wanted, _ = spherical_reference(rows.double().numpy(), start.double().numpy(), 7)
    made = scaled_spherical(rows, 12, metric="euclidean", seed=1, iterations=7)
    np.testing.assert_allclose(made.numpy(), wanted, rtol=1e-4, atol=1e-3)


def test_scaled_spherical_does_not_see_the_lengths_when_it_clusters() -> None:
    """CLVQ dossier, check 5: scaling single vectors leaves directions and clusters alone."""
    rows = drawn(2, 500, D) + 1.0
    other = rows * (0.5 + 4 * torch.rand(500, 1, generator=torch.Generator().manual_seed(3)))
    made, of_other = (scaled_spherical(x, 12, metric="euclidean", seed=1) for x in (rows, other))
    torch.testing.assert_close(
        torch.nn.functional.normalize(made), torch.nn.functional.normalize(of_other), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(made.norm(dim=-1), of_other.norm(dim=-1), rtol=0.1)


def test_an_empty_cluster_takes_the_mean_length_of_all() -> None:
    directions = torch.nn.functional.normalize(drawn(9, 3, D), dim=-1)
    rows = directions.repeat(10, 1) * torch.linspace(1, 4, 30).unsqueeze(-1)
    made = scaled_spherical(rows, 5, metric="euclidean", seed=0)
    lengths, counts = made.norm(dim=-1), torch.bincount((directions @ made.T).argmax(-1), minlength=5)
    for k in range(3):
        wanted = rows[k::3].norm(dim=-1).mean()
        assert ((lengths - wanted).abs() < 1e-3).any()
    assert int((counts == 0).sum()) == 2
    torch.testing.assert_close(lengths[counts == 0], torch.full((2,), rows.norm(dim=-1).mean().item()))


def test_of_several_restarts_the_best_counts() -> None:
    rows = drawn(3, 400, D)
    single = [scaled_spherical(rows, 30, metric="euclidean", seed=seed) for seed in range(4)]
    starts = [scaled_spherical(rows, 30, metric="euclidean", seed=seed, iterations=0) for seed in range(4)]
    objectives = [spherical_reference(rows.double().numpy(), s.double().numpy(), 30)[1] for s in starts]
    best = int(np.argmin(objectives))
    assert best != 0, "the case must have a better start than the first"
    assert torch.equal(scaled_spherical(rows, 30, metric="euclidean", seed=0, restarts=4), single[best])
    with pytest.raises(ValueError, match="restarts is 0"):
        scaled_spherical(rows, 30, metric="euclidean", seed=0, restarts=0)
