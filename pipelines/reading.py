"""One part of an ingest, on a worker: read its units, write its shards, account for every one."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.columns import batch_of
from pipelines.corpora import NOT_TEST, Bad, Corpus, CorpusSettings, Filtered, Joined, Row, Slice
from pipelines.errors import Failed
from pipelines.manifest import SPLITS
from pipelines.parts import Record
from pipelines.shards import ShardWriter, split_of

BATCH_ROWS = 1024
BATCH_BYTES = 16 * 2**20
REASON_CHARS = 500


@dataclass(frozen=True)
class Selection:
    """Which units are taken, and which split their rows go to."""

    units: int
    """Of the whole corpus."""
    limit: int | None
    holdout: float

    def wanted(self, unit: int) -> bool:
        """Whether unit `unit` of all is taken: `limit` of them, spread evenly."""
        return self.wanted_before(unit + 1) > self.wanted_before(unit)

    def split_of(self, group: str, official: str | None) -> str:
        """train, valid or test for rows of a group; an official split wins over its hash."""
        if official is None:
            return split_of(group, self.holdout)
        if official == NOT_TEST:
            return "valid" if split_of(group, self.holdout) == "valid" else "train"
        return official

    def wanted_from(self, first: int) -> Callable[[int], bool]:
        """`wanted` for the units of a slice whose first one is `first` of all."""
        return lambda unit: self.wanted(first + unit)

    def wanted_before(self, unit: int) -> int:
        """How many of the units [0, unit) are taken."""
        if self.limit is None or self.limit >= self.units:
            return unit
        # Unit g is taken iff (g N) // T differs from ((g - 1) N) // T: of the first `unit`, so many.
        return (unit - 1) * self.limit // self.units + 1 if unit else 0


def read_part(
    corpus: Corpus,
    settings: CorpusSettings,
    context: Mapping[str, Any],
    selection: Selection,
    out: str,
    part: int,
    payload: list[Any],
    *shared: Any,
) -> Record:
    """Read the slices of one part ([number of the first unit, slice fields] each) and write its shards to `out`.

    Args:
        shared: what the corpus's setup made, where it has one.

    Returns:
        shards; bad: [source, unit, reason]; filtered: setting -> count; sources: [name, start, stop, units kept,
        quarantined, fingerprint of all units' fingerprints].
    """
    schema = corpus.schema(settings)
    accounts: list[_Account] = []

    def units() -> Iterator[_Unit]:
        for first, fields in payload:
            piece = Slice(**fields)
            accounts.append(_Account(piece))
            found = corpus.read(piece, context, settings, selection.wanted_from(first), *shared)
            yield from _units(found, selection, first, piece, accounts[-1])

    with ShardWriter(out, part, schema) as writer:
        # Over the ends of slices: a slice may be one small file, and a batch of one row costs as much as its decoding.
        for some in _grouped(units()):
            batch, good = _fitting(some, schema)
            rows = [(row, unit.account.piece) for unit in good for row in unit.rows]
            splits = np.array([SPLITS.index(_split(row, selection, piece)) for row, piece in rows], np.int8)
            writer.write(batch, splits)
            for unit in good:
                unit.account.kept += 1
    return {
        "shards": [asdict(record) for record in writer.records],
        "bad": [row for account in accounts for row in sorted(account.bad, key=itemgetter(1))],
        "filtered": dict(sum((account.filtered for account in accounts), Counter())),
        "sources": [account.source() for account in accounts],
    }


class _Account:
    """What became of the units of one slice."""

    def __init__(self, piece: Slice) -> None:
        self.piece = piece
        self.kept = 0
        self.bad: list[list[Any]] = []
        self.filtered: Counter[str] = Counter()
        self.hash = hashlib.blake2b(digest_size=16)

    def source(self) -> list[Any]:
        piece = self.piece
        return [_text(piece.name), piece.start, piece.stop, self.kept, len(self.bad), self.hash.hexdigest()]

    def quarantine(self, source: str, unit: int, reason: str) -> None:
        self.bad.append([_text(source), unit, _text(reason)[:REASON_CHARS]])


class _Unit(NamedTuple):
    """A good unit: its rows, and whose it is."""

    account: _Account
    number: int
    """Within its slice."""
    rows: list[Row]


def _units(
    found: Iterable[tuple[int, Row | list[Row] | Bad | Filtered | Joined, bytes]],
    selection: Selection,
    first: int,
    piece: Slice,
    account: _Account,
) -> Iterator[_Unit]:
    """The good units of a slice. The others are accounted for here, and so are those that did not come."""
    count = piece.stop - piece.start
    expected = selection.wanted_before(first + count) - selection.wanted_before(first)
    last, came = -1, 0
    for unit, row, fingerprint in found:
        if not last < unit < count or not selection.wanted(first + unit):
            raise Failed(
                f"{piece.name}: its corpus gave unit {unit} after {last} of {count}; it was not asked for there."
            )
        last, came = unit, came + 1
        account.hash.update(b"%d %d " % (unit, len(fingerprint)) + fingerprint)
        if isinstance(row, Bad):
            account.quarantine(row.source, piece.start + unit, row.reason)
        elif isinstance(row, Filtered):
            account.filtered[row.setting] += 1
        elif isinstance(row, Joined):
            account.kept += 1
        elif isinstance(row, Row):
            yield _Unit(account, unit, [row])
        elif row:
            yield _Unit(account, unit, row)
        else:
            raise Failed(f"{piece.name}: its corpus gave unit {unit} without a row and without saying why.")
    if came != expected:
        raise Failed(f"{piece.name}: its corpus gave {came} of {expected} units without saying why; none may vanish.")
    if count > expected:
        account.filtered["limit"] += count - expected


def _grouped(units: Iterable[_Unit]) -> Iterator[list[_Unit]]:
    """Groups of whole units that are worth a record batch and, but for a unit of very many rows, fit into memory."""
    waiting: list[_Unit] = []
    count, size = 0, 0
    for unit in units:
        waiting.append(unit)
        count += len(unit.rows)
        size += sum(_weight(value) for row in unit.rows for value in row.values.values())
        if count >= BATCH_ROWS or size >= BATCH_BYTES:
            yield waiting
            waiting, count, size = [], 0, 0
    if waiting:
        yield waiting


def _weight(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, bytes | str):
        return len(value)
    return 8 * len(value) if isinstance(value, list | tuple) else 8


def _fitting(units: list[_Unit], schema: pa.Schema) -> tuple[pa.RecordBatch, list[_Unit]]:
    """The units whose values fit their columns. Others are quarantined: data must not be able to kill a job."""
    try:
        return _batch(units, schema), units
    except Failed:
        good = [unit for unit in units if _fits(unit, schema)]
    return _batch(good, schema), good


def _fits(unit: _Unit, schema: pa.Schema) -> bool:
    try:
        _batch([unit], schema)
    except Failed as error:
        piece = unit.account.piece
        unit.account.quarantine(piece.name, piece.start + unit.number, str(error))
        return False
    return True


def _batch(units: list[_Unit], schema: pa.Schema) -> pa.RecordBatch:
    return batch_of([row.values for unit in units for row in unit.rows], schema)


def _split(row: Row, selection: Selection, piece: Slice) -> str:
    if row.split not in (*SPLITS, NOT_TEST, None):
        raise Failed(f"{piece.name}: its corpus gave the split {row.split!r}; allowed: {', '.join(SPLITS)} or None.")
    return selection.split_of(row.group, row.split)


def _text(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode()
