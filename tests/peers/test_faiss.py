"""faiss: k-means from the same start, residual codes from the same codebooks, exact search."""

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.peers.verdict import peer_is_wrong
from vqcore import seeding
from vqcore.assign import nearest
from vqcore.lloyd import lloyd
from vqcore.quantizers import ResidualQuantizer, VectorBatch, VectorQuantizer

PEER = "faiss-cpu"


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kmeans(rows: Tensor, start: Tensor, iterations: int = 10, **options: int) -> tuple[Tensor, faiss.Kmeans]:
    peer = faiss.Kmeans(rows.shape[1], len(start), niter=iterations, **options)
    peer.train(rows.numpy(), init_centroids=start.numpy())
    return torch.from_numpy(peer.centroids), peer


def search(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances and codes of the two nearest."""
    index = faiss.IndexFlatL2(codes.shape[1])
    index.add(codes.numpy())
    distances, found = index.search(rows.numpy(), 2)
    return torch.from_numpy(distances), torch.from_numpy(found)


def test_lloyd_from_the_same_start() -> None:
    rows = drawn(1, 4000, 8)
    centroids, peer = kmeans(rows, rows[:32], max_points_per_centroid=4000)
    ours = lloyd(lambda: rows.split(700), rows[:32], iterations=10)
    torch.testing.assert_close(ours.vectors, centroids, rtol=0, atol=1e-5)
    assert ours.objective == pytest.approx(peer.obj[-1], rel=0.01)


def test_the_objective_of_every_iteration() -> None:
    """faiss measures before it moves the centres, so that its iteration i is ours after i moves."""
    rows = drawn(2, 3000, 16)
    _, peer = kmeans(rows, rows[:50], max_points_per_centroid=3000)
    for moves, theirs in enumerate(peer.obj):
        assert lloyd(lambda: [rows], rows[:50], iterations=moves).objective == pytest.approx(float(theirs), rel=1e-4)


def test_spherical_k_means() -> None:
    rows = torch.nn.functional.normalize(drawn(10, 3000, 6) + 0.5, dim=-1)
    centroids, _ = kmeans(rows, rows[:20], spherical=True, max_points_per_centroid=3000)
    ours = lloyd(lambda: [rows], rows[:20], metric="cosine", iterations=10)
    torch.testing.assert_close(ours.vectors, centroids, rtol=0, atol=1e-5)


def test_k_means_plus_plus_is_as_good_as_its_best_of_five() -> None:
    rows = drawn(3, 4000, 8)
    best = faiss.Kmeans(8, 64, niter=25, nredo=5, seed=1, max_points_per_centroid=4000)
    best.train(rows.numpy())
    made = seeding.kmeans_plus_plus(rows, 64, metric="euclidean", seed=0, iterations=25)
    theirs, ours = (lloyd(lambda: [rows], one, iterations=0) for one in (torch.from_numpy(best.centroids), made))
    assert ours.objective <= 1.02 * theirs.objective


def test_search_of_separated_vectors() -> None:
    """Every vector beside its code, and among codes drawn at random every vector that is no near-tie."""
    far, rows, codes = 3 * drawn(0, 2500, 24), drawn(3, 3000, 32), drawn(4, 500, 32)
    truth = torch.arange(4000) * 7 % 2500
    near = far[truth] + 0.1 * drawn(1, 4000, 24)
    assert torch.equal(search(near, far)[1][:, 0], truth)
    assert torch.equal(nearest(near, far), truth)
    distances, found = search(rows, codes)
    clear = distances[:, 1] - distances[:, 0] > 1e-3
    assert clear.float().mean() > 0.99
    assert torch.equal(nearest(rows, codes)[clear], found[clear, 0])


def test_cosine_is_its_inner_product_search() -> None:
    rows, codes = drawn(5, 2000, 8), drawn(6, 64, 8)
    q = VectorQuantizer(64, 8, metric="cosine")
    q.codebook.set_vectors(codes)
    index = faiss.IndexFlatIP(8)
    index.add(q.codebook.vectors.numpy())
    _, found = index.search(torch.nn.functional.normalize(rows, dim=-1).numpy(), 1)
    assert torch.equal(q.assign(rows), torch.from_numpy(found[:, 0]))


def test_residual_codes_and_decoding_at_beam_one() -> None:
    """facebookresearch/faiss 4258: its default beam is 5; greedy search is beam 1. Levels of different sizes."""
    dim, bit_counts = 16, [6, 5, 5, 4]
    q = ResidualQuantizer([2**b for b in bit_counts], dim, seeding=seeding.kmeans_plus_plus)
    x = drawn(1, 4000, dim)
    q.seed([VectorBatch(x)])
    sizes = faiss.UInt64Vector()
    for count in bit_counts:
        sizes.push_back(count)
    peer = faiss.ResidualQuantizer(dim, sizes)
    books = torch.cat([book.vectors for book in q.codebooks])
    faiss.copy_array_to_vector(books.numpy().reshape(-1), peer.codebooks)
    peer.is_trained, peer.max_beam_size = True, 1
    packed = peer.compute_codes(x.numpy())
    theirs = faiss.unpack_bitstrings(packed, np.array(bit_counts))
    assert np.array_equal(q.assign(x).numpy(), theirs)
    torch.testing.assert_close(q.look_up(q.assign(x)), torch.from_numpy(peer.decode(packed)), rtol=1e-6, atol=1e-6)


def test_a_nan_never_reaches_the_centroids() -> None:
    """faiss refuses the batch; ours leaves the vector out and counts it."""
    rows = drawn(8, 500, 4)
    rows[7, 2] = torch.nan
    with pytest.raises(RuntimeError, match="NaN"):
        kmeans(rows, drawn(9, 8, 4))
    q = VectorQuantizer(8, 4, seeding=seeding.kmeans_plus_plus)
    assert "1 more were not finite" in q.seed([VectorBatch(rows)])
    assert q.codebook.vectors.isfinite().all()


def test_fewer_vectors_than_centroids_are_refused_by_both() -> None:
    with pytest.raises(RuntimeError, match="Number of training points"):
        kmeans(drawn(1, 7, 4), drawn(2, 8, 4))
    with pytest.raises(ValueError, match=r"7 usable vectors.* 8 codes"):
        VectorQuantizer(8, 4, seeding=seeding.kmeans_plus_plus).seed([VectorBatch(drawn(1, 7, 4))])


@peer_is_wrong(
    "facebookresearch/faiss 789: k-means of 3,000 vectors into 4 silently uses 1,024 of them",
    right="all 3,000, and the sentence says so",
)
def test_no_silent_sample() -> None:
    rows = drawn(1, 3000, 8)
    centroids, _ = kmeans(rows, rows[:4], 25)
    everything, _ = kmeans(rows, rows[:4], 25, max_points_per_centroid=3000)
    assert (centroids - everything).abs().max() > 0.01
    torch.testing.assert_close(lloyd(lambda: [rows], rows[:4], iterations=25).vectors, everything, rtol=0, atol=1e-4)
    q = VectorQuantizer(4, 8, seeding=seeding.kmeans_plus_plus)
    assert "from 3000 of 3000 vectors" in q.seed([VectorBatch(rows)])
