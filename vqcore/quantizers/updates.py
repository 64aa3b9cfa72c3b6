"""When a quantizer learns: at every training forward, or once for all forwards of an `accumulate` block. And how its
training forwards gather vectors until there are enough to seed from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vqcore.reduction import Reduction, check_reduction, resolve
from vqcore.seeding import Offer
from vqcore.update import Book, Rule, Statistics, update


@dataclass
class _Block:
    """An update that `accumulate` has begun."""

    count: int | None
    statistics: list[Statistics]
    offers: list[Offer] = field(default_factory=list)


class Updates:
    """The training side of one quantizer, which owns it: statistics of its books, and what waits to seed them.

    Arguments:
        books: in level order; their statistics travel in one reduce.
        rules: one a book.
        reduce: None: torch.distributed's default group if there is one at the call, else nothing.
        needed: how many usable vectors of all workers are enough to seed.
        seed: a bound method of the quantizer, called with the gathered offers once there are enough.
        updated: called after every update with the statistics, which then hold the sums over all workers.
    """

    def __init__(
        self,
        books: Sequence[Book],
        rules: Sequence[Rule],
        reduce: Reduction | None,
        *,
        needed: int = 0,
        seed: Callable[[Sequence[Offer]], str] | None = None,
        updated: Callable[[Sequence[Statistics]], None] | None = None,
    ) -> None:
        check_reduction(reduce)
        self.books = list(books)
        self.rules = list(rules)
        self.reduce = reduce
        self.needed = needed
        self._seed = seed
        self._updated = updated
        self._open: _Block | None = None
        self._gathered: list[Offer] = []

    @contextmanager
    def accumulate(self, count: int | None, training: bool) -> Iterator[None]:
        """See VectorQuantizer.accumulate."""
        if self._open is not None:
            raise RuntimeError("accumulate is already open on this quantizer; close it before opening another")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise ValueError(f"count is {count!r}; it is a number of vectors, so a whole number of at least 0")
        if not training:
            yield
            return
        opened = self._open = _Block(count, self._fresh())
        try:
            yield
        finally:
            self._open = None
        reduce = resolve(self.reduce)
        if all(book.is_seeded for book in self.books):
            self._update(opened.statistics, reduce)
        else:
            self._seed_when_enough(opened.offers, reduce)

    def begin(self) -> list[Statistics]:
        """The statistics, one a book, that this forward adds to."""
        return self._open.statistics if self._open else self._fresh()

    def end(self, statistics: list[Statistics], valid: Bool[Tensor, " N"]) -> tuple[Float[Tensor, ""], int]:
        """Update at once, or leave it to the block. Returns (global number of valid vectors, W): the loss of this
        forward is W x sum / number. `statistics[0]` must have counted every valid vector exactly once."""
        reduce = resolve(self.reduce)
        if self._open is None:
            self._update(statistics, reduce)
            return statistics[0].total(), reduce.world
        for one in statistics:
            one.hold()
        if self._open.count is not None:
            return torch.tensor(self._open.count, dtype=torch.float64, device=valid.device), reduce.world
        count = valid.sum().double()
        reduce(count)
        return count, reduce.world

    @property
    def gathered(self) -> int:
        """Vectors that wait to seed, valid or not: where the default keys of the next forward begin."""
        kept = self._open.offers if self._open else []
        return sum(len(offer.keys) for offer in (*self._gathered, *kept))

    def gather(self, offer: Offer) -> None:
        """Keep vectors; outside a block, seed if all workers together now have enough."""
        if self._open is not None:
            self._open.offers.append(offer)
        else:
            self._seed_when_enough([offer], resolve(self.reduce))

    def forget(self) -> None:
        """Drop what was gathered: the books are seeded."""
        self._gathered = []

    def _update(self, statistics: list[Statistics], reduce: Reduction) -> None:
        update(statistics, reduce)
        if self._updated is not None:
            self._updated(statistics)

    def _fresh(self) -> list[Statistics]:
        return [Statistics(book, rule) for book, rule in zip(self.books, self.rules, strict=True)]

    def _seed_when_enough(self, offers: list[Offer], reduce: Reduction) -> None:
        self._gathered += offers
        usable = torch.zeros((), dtype=torch.float64, device=self.books[0].counts.device)
        usable += sum(int(offer.usable.sum()) for offer in self._gathered)
        reduce(usable)
        if usable >= self.needed and self._seed is not None:
            self._seed(self._gathered)
