"""First codebooks from data: a sample that does not depend on the number of workers, and what to make of it.

`draw_sample` lets every usable vector of every worker race once and keeps the smallest keys, so the sample is the same
however the vectors are spread. A *seeding* (`random_rows`, `kmeans_plus_plus`, `scaled_spherical`, `norm_blocks`, or
any function of that signature; bind options with functools.partial) then turns it into K vectors.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vqcore import assign, noise
from vqcore.assign import Metric
from vqcore.codebook import unit
from vqcore.lloyd import Totals, lloyd, scale_of
from vqcore.reduction import Alone, Reduction

SAMPLE, SPREAD = 1, 2
"""Streams of noise.race: which vectors enter the sample, and which of them become k-means++ centres."""

_SAMPLE_VALUES = 2**25  # numbers in a sample: 128 MiB as float32
_REDUCED_VALUES = 2**21  # numbers in one reduce of sampled vectors: 16 MiB as float64
_COPIED_VALUES = 2**18  # numbers copied at a time: 1 MiB
_MOST_ROUNDS = 1024


@runtime_checkable
class Seeding(Protocol):
    """Turns a sample into a codebook.

    `rows` are in race order, so that any prefix is a random subset, and at least `num_codes`; they lie on the unit
    sphere where `metric` is "cosine".
    """

    def __call__(
        self, rows: Float[Tensor, "R D"], num_codes: int, *, metric: Metric, seed: int
    ) -> Float[Tensor, "K D"]: ...


class Offer(NamedTuple):
    """The vectors of one batch as the draw sees them."""

    rows: Float[Tensor, "N D"]
    usable: Bool[Tensor, " N"]
    keys: Int64[Tensor, " N"]
    non_finite: int
    """Unmasked vectors that are not usable because they hold a NaN or an infinity."""


class Sample(NamedTuple):
    """Vectors drawn from all workers, the same on every one."""

    rows: Float[Tensor, "R D"]
    seen: int
    """Usable vectors that took part in the draw, over all workers."""
    non_finite: int
    """Unmasked vectors left out for a NaN or an infinity, over all workers."""


def sample_size(num_codes: int, code_dim: int) -> int:
    """64 vectors a code and at least 65,536, but at most 2^25 numbers (128 MiB) and never fewer than K vectors."""
    return max(num_codes, min(max(64 * num_codes, 65536), _SAMPLE_VALUES // code_dim))


@torch.no_grad()
def draw_sample(
    offers: Iterable[Offer],
    like: Float[Tensor, "K D"],
    *,
    seed: int,
    reduce: Reduction,
    level: int = 0,
    size: int | None = None,
) -> Sample:
    """A uniform sample of `size` (sample_size(K, D)) of all workers' vectors, without replacement, in race order.

    `like` is the codebook to be seeded: its shape, type and device. Workers may offer different numbers of batches,
    also none. Memory: up to three times the sample, plus one batch. Raises ValueError, on all workers alike, where
    there are fewer usable vectors than codes.
    """
    num_codes, code_dim = like.shape
    size = sample_size(num_codes, code_dim) if size is None else size
    race, rows = like.new_zeros(0, dtype=torch.float64), like.new_zeros(0, code_dim)
    waiting: list[tuple[Tensor, Tensor]] = []
    counted = torch.zeros(2, dtype=torch.float64, device=like.device)
    held, slowest = 0, math.inf
    for offer in offers:
        drawn = noise.race(seed, 0, offer.keys, level=level, stream=SAMPLE)
        counted += torch.stack([offer.usable.sum(), torch.tensor(offer.non_finite, device=like.device)])
        entered = (offer.usable & (drawn < slowest)).nonzero().squeeze(-1)  # of most batches, next to none
        waiting.append((drawn[entered], offer.rows[entered].to(like)))
        held += len(entered)
        if held > size:
            race, rows = _smallest([(race, rows), *waiting], size)
            waiting, held, slowest = [], 0, float(race[-1])
    race, rows = _smallest([(race, rows), *waiting], size)
    waiting = []
    reduce(counted)
    seen, non_finite = (int(total) for total in counted.tolist())
    if seen < num_codes:
        raise ValueError(
            f"{seen} usable vectors in all for a codebook of {num_codes} codes ({non_finite} more were not finite); "
            f"seeding needs at least {num_codes}: offer more vectors or ask for fewer codes"
        )
    return Sample(_merge(race, rows, min(size, seen), reduce), seen, non_finite)


def _smallest(parts: list[tuple[Tensor, Tensor]], size: int) -> tuple[Tensor, Tensor]:
    """The `size` rows with the smallest race keys, in their order; each is copied once, to its place."""
    race = torch.cat([part[0] for part in parts])
    order = torch.argsort(race, stable=True)[:size]
    place = torch.full_like(race, -1, dtype=torch.int64)
    place[order] = torch.arange(len(order), device=race.device)
    rows = parts[0][1].new_empty(len(order), parts[0][1].shape[1])
    block = max(1, _COPIED_VALUES // rows.shape[1])
    for part, places in zip(parts, place.split([len(part[0]) for part in parts]), strict=True):
        for some, where in zip(part[1].split(block), places.split(block), strict=True):
            kept = where >= 0
            rows[where[kept]] = some[kept]
    return race[order], rows


def _merge(race: Tensor, rows: Tensor, total: int, reduce: Reduction) -> Tensor:
    """The `total` smallest of all workers, in order, from each worker's smallest; sums stand in for gathers.

    A race key is positive, hence 0 is an empty slot. Keys go first, [W, total]; then every vector travels once, added
    into its own place of a tensor of zeros by the worker that holds it.
    """
    table = race.new_zeros(reduce.world, total)
    table[reduce.rank, : len(race)] = race[:total]
    reduce(table)
    order = torch.argsort(table.reshape(-1).masked_fill(table.reshape(-1) == 0, torch.inf), stable=True)[:total]
    merged = rows.new_empty(total, rows.shape[1])
    block = max(1, _REDUCED_VALUES // rows.shape[1])
    for start in range(0, total, block):
        slot = order[start : start + block]
        mine = torch.div(slot, total, rounding_mode="floor") == reduce.rank
        shared = race.new_zeros(len(slot), rows.shape[1])
        shared[mine] = rows[slot[mine] % total].double()
        reduce(shared)
        merged[start : start + block] = shared.to(rows.dtype)
    return merged


@torch.no_grad()
def share(vectors: Float[Tensor, "K D"], reduce: Reduction) -> Float[Tensor, "K D"]:
    """Worker 0's bits, everywhere: two machines may round a product differently, and codebooks must not."""
    shared = vectors.double() if reduce.rank == 0 else torch.zeros_like(vectors, dtype=torch.float64)
    reduce(shared)
    return shared.to(vectors.dtype)


@torch.no_grad()
def level_by_level(
    rows: Float[Tensor, "R D"],
    sizes: Sequence[int],
    seeding: Seeding,
    *,
    shared: bool,
    seed: int,
    reduce: Reduction,
) -> list[Float[Tensor, "K D"]]:
    """`sizes[l]` codewords for every level l of a residual quantizer, each from what the level before it leaves of
    `rows`; where `shared`, from what all codewords made so far leave, since they will be one codebook.

    Each level sees the rows in another random order: a seeding that takes the first of them would else meet, at level
    2, the residuals of the very rows that became codewords of level 1, which are 0.
    """
    made: list[Tensor] = []
    residual = rows
    for level, size in enumerate(sizes):
        if level:
            indices = torch.arange(len(rows), device=rows.device)
            residual = residual[noise.race(seed, 0, indices, level=level, stream=SAMPLE).argsort(stable=True)]
        made.append(share(seeding(residual, size, metric="euclidean", seed=seed), reduce))
        known = torch.cat(made) if shared else made[-1]
        residual = residual - known[assign.nearest(residual, known)]
    return made


def random_rows(rows: Float[Tensor, "R D"], num_codes: int, *, metric: Metric, seed: int) -> Float[Tensor, "K D"]:
    """K vectors of the data, drawn uniformly without replacement."""
    del metric, seed  # the sample is in race order already
    return rows[:num_codes]


@torch.no_grad()
def kmeans_plus_plus(
    rows: Float[Tensor, "R D"], num_codes: int, *, metric: Metric, seed: int, iterations: int = 10
) -> Float[Tensor, "K D"]:
    """k-means++ (Arthur and Vassilvitskii 2007) followed by at most `iterations` of Lloyd over the whole sample.

    Centres are drawn among the first max(4096, 8 K) rows with probability proportional to their squared distance from
    the nearest centre so far, one at a time up to K = 1,024; above that ceil(K / 1024) at a time (k-means|| in
    spirit, Bahmani et al. 2012), because K passes over the rows would take hours. Rows equal to a centre weigh nothing;
    where the data has fewer distinct vectors than codes, the rest are copies of rows: codes nobody chooses, which
    revival can give away. An empty cluster keeps its centre. With "cosine" the means are normalised in every iteration.
    """
    start = rows[_spread(rows, num_codes, seed)]
    return lloyd(lambda: [rows], start, metric=metric, iterations=iterations, reduce=Alone()).vectors


@torch.no_grad()
def scaled_spherical(
    rows: Float[Tensor, "R D"], num_codes: int, *, metric: Metric, seed: int, iterations: int = 30, restarts: int = 1
) -> Float[Tensor, "K D"]:
    """Directions from k-means on x / |x|, each as long as its cluster's mean |x| (CLVQ-VAE's "spherical" start).

    Euclidean k-means on the unit vectors, its centroids normalised afterwards, as the authors' first version does; an
    empty cluster takes the mean length of all. Of several `restarts` the one with the smallest sum of squared distances
    counts (the authors' 5, then 10). Zero vectors are left out. Raises ValueError where too few remain, or for restarts
    below 1.
    """
    if restarts < 1:
        raise ValueError(f"restarts is {restarts}; it must be at least 1")
    del metric
    rows = rows[(rows != 0).any(-1)]
    if len(rows) < num_codes:
        raise ValueError(f"{len(rows)} sampled vectors are not zero; scaled_spherical needs at least {num_codes}")
    directions = unit(rows)
    least = math.inf
    for restart in range(restarts):
        start = directions[_spread(directions, num_codes, seed + restart)]
        fitted = lloyd(lambda: [directions], start, iterations=iterations, reduce=Alone())
        if fitted.objective < least:
            least, centres = fitted.objective, fitted.vectors
    lengths = torch.linalg.vector_norm(rows.double(), dim=-1)
    totals = _totals(lengths.unsqueeze(-1), assign.nearest(directions, centres), num_codes)
    scale = torch.where(totals.counts.unsqueeze(-1) > 0, totals.means(), lengths.mean())
    return unit(centres) * scale.to(rows.dtype)


@torch.no_grad()
def norm_blocks(rows: Float[Tensor, "R D"], num_codes: int, *, metric: Metric, seed: int) -> Float[Tensor, "K D"]:
    """Means of K equal blocks of the rows sorted by length, shortest first: the first corners of SFVQ's curve (the
    authors' code for K = 4; their papers do not state it).

    Where K does not divide R, blocks differ by one row; the authors leave the longest rows out instead. Equal lengths
    stay in race order. Raises ValueError with "cosine", where all lengths are 1.
    """
    del seed
    if metric == "cosine":
        raise ValueError(
            "norm_blocks sorts by length, and cosine vectors all have length 1; use 'euclidean' or another seeding"
        )
    order = torch.argsort(torch.linalg.vector_norm(rows.double(), dim=-1), stable=True)
    blocks = torch.empty_like(order)
    blocks[order] = torch.arange(len(rows), device=rows.device) * num_codes // len(rows)
    return _totals(rows, blocks, num_codes).means().to(rows.dtype)


def _spread(rows: Tensor, num_codes: int, seed: int) -> Tensor:
    """Indices of `num_codes` different rows, drawn by D^2 weights (see `kmeans_plus_plus`)."""
    pool = rows[: max(4096, 8 * num_codes)]
    x = (pool.double() - pool.double().mean(0)).to(pool.dtype)  # about the mean, where |x|^2 - 2xc + |c|^2 is sharpest
    norms = x.square().sum(-1)
    rounding = torch.finfo(x.dtype).eps * (8 + math.sqrt(x.shape[1]))
    keys = torch.arange(len(x), device=x.device)
    distance = torch.full_like(norms, torch.inf)
    newest, chosen = keys[:1], [keys[:1]]
    left = num_codes - 1
    for draw in range(num_codes):
        if left == 0:
            break
        bound = norms.unsqueeze(-1) + norms[newest]
        squared = bound - 2.0 * (x @ x[newest].T)
        distance = torch.minimum(distance, torch.where(squared > rounding * bound, squared, 0.0).amin(-1))
        distance[newest] = 0.0
        drawable = distance > 0
        race = noise.race(seed, draw, keys, torch.where(drawable, distance, 1.0).double(), stream=SPREAD)
        race = torch.where(drawable, race, torch.inf)
        count = min(left, -(-num_codes // _MOST_ROUNDS))
        best = torch.topk(race, min(count, len(race)), largest=False)
        newest = best.indices[best.values.isfinite()]
        if len(newest) == 0:
            break
        chosen.append(newest)
        left -= len(newest)
    found = torch.cat(chosen)
    fresh = torch.ones_like(keys, dtype=torch.bool).index_fill_(0, found, False)
    return torch.cat([found, keys[fresh][:left]])


def _totals(rows: Tensor, codes: Tensor, num_codes: int) -> Totals:
    totals = Totals(num_codes, rows.shape[1], scale_of(rows), rows.device)
    totals.add(rows, codes)
    return totals
