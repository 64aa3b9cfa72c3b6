"""How a quantizer with one codebook gets its first vectors: at once by its seed, or from data that forwards gather."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vqcore.codebook import Codebook, unit
from vqcore.quantizers.contract import Quantized, VectorBatch, passed_on
from vqcore.quantizers.rows import Rows, full_precision, keys_of, rows_of
from vqcore.quantizers.updates import Updates
from vqcore.reduction import Reduction, resolve
from vqcore.seeding import Metric, Offer, Seeding, draw_sample, share
from vqcore.update import Book


def normal_vectors(num_codes: int, code_dim: int, seed: int, std: float = 1.0) -> Float[Tensor, "K D"]:
    """float32 draws from N(0, std^2), a function of the arguments alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_codes, code_dim, generator=generator, dtype=torch.float32, device="cpu") * std


def seed_from(
    offers: Iterable[Offer], book: Codebook, updates: Updates, seeding: Seeding | None, count: float | None = None
) -> str:
    """Set `book` to what `seeding` makes of a sample of all workers' offers; returns a sentence on what was used.

    Counts start at `count`, which is max(1, 2 revive_below) unless given. Errors as VectorQuantizer.seed.
    """
    if seeding is None:
        raise RuntimeError(
            "this quantizer drew its codebook by its own seed (seeding=None); build it with "
            "seeding=vqcore.seeding.kmeans_plus_plus to seed it from data, or call codebook.set_vectors(v)"
        )
    metric: Metric = "cosine" if book.unit_norm else "euclidean"
    vectors, said = vectors_from(offers, book.vectors.detach(), metric, updates, seeding)
    book.set_vectors(vectors, updates.rules[0].revived_count if count is None else count)
    updates.forget()
    return said


def vectors_from(
    offers: Iterable[Offer], like: Float[Tensor, "K D"], metric: Metric, updates: Updates, seeding: Seeding
) -> tuple[Float[Tensor, "K D"], str]:
    """What `seeding` makes of a sample of all workers' offers, the same bits on all of them, of the shape, type and
    device of `like`; and a sentence on what was used. Raises ValueError where there are too few."""
    reduce, seed = resolve(updates.reduce), updates.rules[0].seed
    sample = draw_sample(offers, like, seed=seed, reduce=reduce)
    with full_precision(like.device):
        vectors = seeding(sample.rows, len(like), metric=metric, seed=seed)
    name = getattr(seeding, "__name__", repr(seeding))
    left_out = f"; {sample.non_finite} more were not finite" if sample.non_finite else ""
    said = f"{len(like)} codes by {name} from {len(sample.rows)} of {sample.seen} vectors{left_out}"
    return share(vectors, reduce), said


def offers_of(batches: Iterable[VectorBatch], book: Book, reduce: Reduction | None) -> Iterator[Offer]:
    """What this worker's `batches` offer to the seeding of `book`."""
    rank, seen = resolve(reduce).rank, 0
    for batch in batches:
        if not isinstance(batch, tuple):  # a tensor would be taken apart into x, mask and keys
            raise ValueError(
                f"seeding got a {type(batch).__name__} where it takes batches: give an iterable of "
                "vqcore.quantizers.VectorBatch(x), or VectorBatch(x, mask, keys)"
            )
        x, mask, keys = VectorBatch(*batch)
        named = keys_of(keys, x, rank, seen)
        seen += len(named)
        yield _offer(rows_of(x, mask, book.code_dim, book.dtype), named, book)


def gather(
    given: Rows,
    x: Float[Tensor, "*shape D"],
    keys: Int64[Tensor, "*shape"] | None,
    book: Book,
    updates: Updates,
    levels: tuple[int, ...] = (),
) -> Quantized:
    """A training forward of an unseeded quantizer: keep the vectors and pass x on, until all workers together can
    seed. `levels` is the trailing shape of the codes of quantizers that have several a vector."""
    rank = resolve(updates.reduce).rank
    offer = _offer(given, keys_of(keys, x, rank, updates.gathered), book)
    # Copies: raw data may come in a buffer that its owner fills again for the next step.
    updates.gather(offer._replace(rows=offer.rows.clone(), keys=offer.keys.clone()))
    return passed_on(x, given, levels)


def _offer(given: Rows, keys: Tensor, book: Book) -> Offer:
    rows, usable = given.x.detach(), given.valid
    if book.unit_norm:
        rows = unit(rows)
        usable = usable & (rows != 0).any(-1)  # no direction, no code
    return Offer(rows, usable, keys, int(given.non_finite))
