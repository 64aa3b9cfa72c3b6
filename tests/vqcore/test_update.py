"""The synchronised update of several codebooks, with workers as threads."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.together import Seat, together
from vqcore import assign, noise
from vqcore.codebook import Codebook
from vqcore.reduction import Alone
from vqcore.update import Rule, Statistics, update

K, D, N = 16, 4, 60
RULE = Rule(decay=0.9, revive_below=1.0, eps=1e-5, seed=5)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(level: int = 0, spread: float = 0.05) -> Codebook:
    """A codebook crowded in one corner, so that most codes get no vector and die at the second update."""
    made = Codebook(K, D)
    made.set_vectors(3 + spread * drawn(level, K, D))
    return made


def two_updates(
    parts: Sequence[Tensor], seat: Seat | Alone, rules: Sequence[Rule]
) -> tuple[list[Codebook], list[list[bool]]]:
    """Two updates of one codebook per rule from this worker's `parts`: row indices, one forward each.

    Returns the codebooks and which codes each update revived.
    """
    revived: list[list[bool]] = []
    books = [fresh(rule.level) for rule in rules]
    x = drawn(9, N, D)
    for step in range(2):
        statistics = [Statistics(book, rule) for book, rule in zip(books, rules, strict=True)]
        for part in parts:
            rows = x[part] + step
            for book, one in zip(books, statistics, strict=True):
                codes = assign.nearest(rows, book.vectors).masked_fill(part % 7 == 0, -1)
                one.add(rows.masked_fill((codes < 0).unsqueeze(-1), 0.0), codes, part)
        update(statistics, seat)
        revived += [[] if book.revived is None else book.revived.tolist() for book in books]
    return books, revived


def bits(books: Sequence[Codebook]) -> list[bytes]:
    return [tensor.numpy().tobytes() for book in books for tensor in book.state_dict().values()]


WHOLE = [torch.arange(N)]
SPLITS: dict[str, list[list[Tensor]]] = {
    "halves": [[torch.arange(0, 30)], [torch.arange(30, N)]],
    "uneven and empty": [[torch.arange(0, 5)], [torch.arange(0, 0)], [torch.arange(5, N)]],
    "interleaved": [[torch.arange(i, N, 4)] for i in range(4)],
    "fully masked part": [[torch.arange(0, N, 7)], [torch.tensor([i for i in range(N) if i % 7])]],
    "several forwards": [[torch.arange(40, N), torch.arange(0, 20)], [torch.arange(20, 30), torch.arange(30, 40)]],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("levels", [1, 3])
def test_any_split_reaches_the_state_of_one_worker(split: str, levels: int) -> None:
    rules = [Rule(decay=0.9, revive_below=1.0, eps=1e-5, seed=5, level=level) for level in range(levels)]
    alone, revived = two_updates(WHOLE, Alone(), rules)
    assert all(revived[:levels]), "the case must revive something at every level"
    parts = SPLITS[split]

    def work(seat: Seat) -> tuple[list[Codebook], list[list[bool]], int]:
        return *two_updates(parts[seat.rank], seat, rules), seat.calls

    results = together(len(parts), work)
    assert len({tuple(bits(books)) for books, *_ in results}) == 1, "workers disagree"
    wanted_calls = 2 + any(revived[:levels]) + any(revived[levels:])
    assert {calls for *_, calls in results} == {wanted_calls}, "one reduce an update and one a revival, for all levels"
    assert all(masks == revived for _, masks, _ in results)
    for book, wanted in zip(results[0][0], alone, strict=True):
        torch.testing.assert_close(book.vectors, wanted.vectors, rtol=0, atol=1e-6)
        torch.testing.assert_close(book.counts, wanted.counts)
        torch.testing.assert_close(book.sums, wanted.sums)


def test_revival_takes_the_smallest_race_keys_in_index_order() -> None:
    book, x, keys = fresh(), drawn(9, N, D), torch.arange(100, 100 + N)
    one = Statistics(book, RULE)
    codes = torch.full((N,), 3)
    codes[::2] = -1
    one.add(torch.where((codes < 0).unsqueeze(-1), 0.0, x), codes, keys)
    update([one], Alone())
    race = noise.race(RULE.seed, 0, keys, stream=0).masked_fill(codes < 0, torch.inf)
    order = race.argsort()[: K - 1]
    dead = [code for code in range(K) if code != 3]
    assert torch.equal(book.vectors[dead], x[order])
    assert book.counts[dead].tolist() == [2.0] * (K - 1)
    assert torch.equal(one.split()[0], torch.zeros(K).double().index_fill_(0, torch.tensor([3]), N / 2))
    assert torch.equal(book.last_counts, one.split()[0]), "a revival leaves the batch's counts as they were"


def test_levels_race_on_their_own() -> None:
    """Otherwise all levels of a residual quantizer would take their replacements from the same rows."""
    taken = []
    for level in range(2):
        book = fresh()
        one = Statistics(book, Rule(decay=0.9, revive_below=1.0, eps=1e-5, seed=5, level=level))
        one.add(drawn(9, N, D), torch.full((N,), 3), torch.arange(N))
        update([one], Alone())
        taken.append(book.vectors)
    assert (taken[0] != taken[1]).any(-1).sum() > K // 2


def test_too_few_vectors_let_the_rest_wait() -> None:
    book = fresh()
    before = book.vectors.clone()
    one = Statistics(book, RULE)
    one.add(drawn(9, 3, D), torch.full((3,), 15), torch.arange(3))
    update([one], Alone())
    assert book.revived is not None
    assert book.revived.tolist() == [True] * 3 + [False] * 13
    assert torch.equal(book.vectors[3:15], before[3:15])
    assert book.counts[3:15].tolist() == pytest.approx([0.9] * 12)


def test_nobody_revives_from_an_empty_update() -> None:
    book = fresh()
    book.counts.fill_(0.1)
    before = book.vectors.clone()
    one = Statistics(book, RULE)
    one.add(torch.zeros(4, D), torch.full((4,), -1), torch.arange(4))
    calls: list[int] = []

    class Counting(Alone):
        def __call__(self, tensor: Tensor) -> None:
            calls.append(tensor.numel())

    update([one], Counting())
    assert torch.equal(book.vectors, before)
    assert int(book.step) == 0
    assert calls == [K * (1 + D)]


def test_zero_vectors_do_not_revive_a_direction() -> None:
    book = Codebook(K, D, unit_norm=True)
    book.set_vectors(drawn(1, K, D))
    one = Statistics(book, RULE)
    x = torch.zeros(N, D)
    x[7, 0] = 1.0
    one.add(x, torch.full((N,), 2), torch.arange(N))
    update([one], Alone())
    assert book.revived is not None
    assert int(book.revived.sum()) == 1
    torch.testing.assert_close(book.vectors.norm(dim=-1), torch.ones(K))


def test_float32_rows_are_summed_in_float64() -> None:
    book = Codebook(1, 1)
    book.set_vectors(torch.zeros(1, 1))
    one = Statistics(book, Rule(decay=0.0, revive_below=0.0, eps=0.0, seed=0))
    x = torch.full((4096, 1), 0.1)
    x[0] = 2.0**24
    one.add(x, torch.zeros(4096, dtype=torch.int64), None)
    sums = one.split()[1]
    assert sums is not None
    assert sums.item() == pytest.approx(2.0**24 + 4095 * x[1].double().item(), rel=1e-15)


def test_several_codes_a_vector_share_it_equally() -> None:
    """IA-GPL's mean of m draws: the same as m passes over the vectors, each weighing 1/m."""
    rule = Rule(decay=0.9, revive_below=0.0, eps=1e-5, seed=5, draws=3)
    x = drawn(1, N, D)
    codes = torch.randint(K, (N, 3), generator=torch.Generator().manual_seed(2))
    codes[::5] = -1
    x[::5] = 0.0
    one, book = Statistics(fresh(), rule), fresh()
    one.add(x[:20], codes[:20], None)
    one.add(x[20:], codes[20:], None)
    update([one], Alone())
    counts, sums = one.split()
    of_vectors = torch.nn.functional.one_hot(codes[codes[:, 0] >= 0], K).sum(1).double()
    assert torch.equal(counts, of_vectors.sum(0) / 3), "to the bit in any order: divided once, at the end"
    torch.testing.assert_close(sums, (of_vectors / 3).T @ x[codes[:, 0] >= 0].double())
    assert one.total() == 48
    assert one.seen == N
    book.ema_update(counts, sums, 0.9, 1e-5)
    assert bits([one.book]) == bits([book])


def test_shares_that_add_up_short_of_a_vector_still_count_it() -> None:
    """Cut off instead of rounded, the number of vectors could be one too low, and one fewer code revived."""
    rule = Rule(decay=0.9, revive_below=1.0, eps=1e-5, seed=5, draws=7)
    book = fresh()
    book.counts.fill_(0.5)
    one = Statistics(book, rule)
    one.add(drawn(1, 1, D), (torch.arange(7) % 3).unsqueeze(0), torch.arange(1))
    update([one], Alone())
    assert one.split()[0].sum() < 1.0, "the case must fall short"
    assert book.revived is not None
    assert int(book.revived.sum()) == 1


def test_a_rule_of_its_own_may_kill_codes_that_the_decay_alone_would_not() -> None:
    def halve(book: Codebook, counts: Tensor, sums: Tensor | None, decay: float, eps: float) -> None:
        book.ema_update(counts, sums, decay, eps)
        book.counts *= 0.5

    rule = Rule(decay=0.9, revive_below=1.0, eps=1e-5, seed=5, move=halve)
    x, keys = drawn(9, N, D), torch.arange(N)
    books = [fresh(), fresh()]
    for book, parts in zip(books, ([N], [20, 20, 20]), strict=True):
        book.counts.fill_(1.5)
        one = Statistics(book, rule)
        for rows, of_rows in zip(x.split(parts), keys.split(parts), strict=True):
            one.add(rows, torch.full((len(rows),), 3), of_rows)
        update([one], Alone())
    assert books[0].revived is not None
    assert bits(books[:1]) == bits(books[1:])


def test_revival_without_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="keys are needed where revive_below > 0"):
        Statistics(fresh(), RULE).add(drawn(0, 3, D), torch.zeros(3, dtype=torch.int64), None)
