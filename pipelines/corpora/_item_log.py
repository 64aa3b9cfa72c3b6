"""The log: who took which item when. Read whole, cleaned, cut into splits, and put in the order of time."""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.corpora import Bad
from pipelines.corpora import _text_tables as tables
from pipelines.corpora._item_files import LogFile, as_list, layout_of, quoted
from pipelines.errors import Refused
from pipelines.manifest import SPLITS
from pipelines.shards import split_of

LogSplit = Literal["auto", "official", "time", "leave_one_out"]
TRAIN, VALID, TEST = (SPLITS.index(split) for split in ("train", "valid", "test"))
UNKNOWN = -1

SCHEMA = pa.schema(
    [
        pa.field("user", pa.string(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        pa.field("time", pa.float64(), metadata={"unit": "seconds as given; missing where only the order is known"}),
        pa.field("rating", pa.float32()),
        pa.field("position", pa.int32(), nullable=False, metadata={"meaning": "place in the user's own sequence"}),
        pa.field("split", pa.int8(), nullable=False, metadata={"values": " ".join(SPLITS)}),
    ]
)


Numbers = npt.NDArray[np.int32]


@dataclass
class Log:
    """Events as columns; users and items as places in their lists of names."""

    users: Numbers
    items: Numbers
    times: npt.NDArray[np.float64]
    """NaN where unknown."""
    ratings: npt.NDArray[np.float32]
    splits: npt.NDArray[np.int8]
    user_names: list[str]
    """In the order they were first seen."""
    item_names: list[str]
    bad: list[tuple[int, Bad]]
    filtered: Counter[str]

    def keep(self, kept: npt.NDArray[np.bool_], reason: str) -> None:
        """Leave out the other events because of a named setting or reason."""
        if dropped := int((~kept).sum()):
            self.filtered[reason] += dropped
        self.take(kept)

    def take(self, rows: npt.NDArray[Any]) -> None:
        for name in ("users", "items", "times", "ratings", "splits"):
            setattr(self, name, getattr(self, name)[rows])

    @property
    def timed(self) -> bool:
        return bool(np.isfinite(self.times).all())


@dataclass(frozen=True)
class _Event:
    user: str
    item: str
    time: float
    rating: float
    history: list[str] | None


def build(
    files: list[LogFile], catalog: Set[str], *, core: int, split: LogSplit, holdout: float, cold_items: float
) -> Log:
    """The log of all files, of the items in `catalog` only, in the order of time, each event with its split.

    Args:
        core: users and items with fewer events are left out, until none is left (0: all stay).
        split: `auto` takes the files' own, else cuts by time, else leaves each user's last event out.
        holdout: of a cut by time, the share of events for test, and again for valid before it.
        cold_items: share of items of which only test events stay, as if they were new.

    Raises:
        Refused: a split that the data cannot give.
    """
    log = _read(files)
    log.keep(_those(log, lambda item: item in catalog), "item without text")
    log.keep(_core(log, core), "core")
    _in_order(log)
    log.splits = _splits(log, split, holdout)
    if cold_items:
        log.keep(~_those(log, lambda item: is_cold(item, cold_items)) | (log.splits == TEST), "cold_items")
    _in_order(log)
    return log


def _those(log: Log, belongs: Callable[[str], bool]) -> npt.NDArray[np.bool_]:
    """Which events are of an item that belongs."""
    return np.array([belongs(item) for item in log.item_names], bool)[log.items]


def is_cold(item: str, share: float) -> bool:
    """Whether an item is held out as if it were new: a hash of its id."""
    return split_of(f"cold item {item}", share / 2) != "train"


def first_splits(log: Log) -> dict[str, str]:
    """Item -> the earliest of train, valid and test that it occurs in."""
    found = {}
    for number in (TEST, VALID, TRAIN):
        for item in np.unique(log.items[log.splits == number]).tolist():
            found[log.item_names[item]] = SPLITS[number]
    return found


def table(log: Log) -> pa.Table:
    """The log as it is stored."""
    columns = [
        pa.array(log.user_names, pa.string()).take(pa.array(log.users)),
        pa.array(log.item_names, pa.string()).take(pa.array(log.items)),
        pa.array(log.times, pa.float64(), mask=np.isnan(log.times)),
        pa.array(log.ratings, pa.float32(), mask=np.isnan(log.ratings)),
        pa.array(_positions(log.users), pa.int32()),
        pa.array(log.splits, pa.int8()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _read(files: list[LogFile]) -> Log:
    """Events in the order of the files. Histories of one user are joined where they overlap."""
    users, items = _Names(), _Names()
    # Arrays of numbers: a list of Python objects would take ten times the memory.
    times, ratings, splits = array("d"), array("f"), array("b")
    bad: list[tuple[int, Bad]] = []
    sequences: dict[str, list[str]] = {}
    unit = 0
    for file in files:
        split = UNKNOWN if file.split is None else SPLITS.index(file.split)
        for found in _events(file):
            if isinstance(found, Bad):
                bad.append((unit, found))
            else:
                before = []
                if found.history is not None:
                    known = sequences.setdefault(found.user, [])
                    before = found.history[_overlap(known, found.history) :]
                    known += [*before, found.item]
                for item in (*before, found.item):
                    users.add(found.user)
                    items.add(item)
                times.extend([*[math.nan] * len(before), found.time])
                ratings.extend([*[math.nan] * len(before), found.rating])
                splits.extend([*[TRAIN] * len(before), split])
            unit += 1
    return Log(
        users.places(),
        items.places(),
        np.array(times, np.float64),
        np.array(ratings, np.float32),
        np.array(splits, np.int8),
        list(users.known),
        list(items.known),
        bad,
        Counter(),
    )


class _Names:
    """Names as numbers, in the order they were first seen."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self._places = array("i")

    def add(self, name: str) -> None:
        self._places.append(self.known.setdefault(name, len(self.known)))

    def places(self) -> Numbers:
        return np.array(self._places, np.int32)


def _overlap(known: list[str], history: list[str]) -> int:
    """How many of a history's first items are the last ones known already: windows of one sequence overlap."""
    most = min(len(known), len(history))
    return next((size for size in range(most, 0, -1) if known[-size:] == history[:size]), 0)


def _events(file: LogFile) -> Iterator[_Event | Bad]:
    columns = file.columns
    wanted = [columns.user, columns.item, columns.time, columns.rating, columns.history]
    taken = list(dict.fromkeys(name for name in wanted if name is not None))
    layout = layout_of(file.entry.name)
    assert layout is not None
    for piece in tables.of_table(file.entry, file.prefix, layout, taken, quoted=quoted(file.entry.name)):
        for unit, record, _ in tables.read_table(piece, lambda _: True):
            yield record if isinstance(record, Bad) else _event(tables.unit_name(piece, unit), record, file)


def _event(name: str, record: Mapping[str, Any], file: LogFile) -> _Event | Bad:
    columns = file.columns
    user, item = (_identity(record[column]) for column in (columns.user, columns.item) if column)
    if user is None or item is None:
        return Bad(name, "it has no user" if user is None else "it has no item")
    time = math.nan if columns.time is None else _seconds(record[columns.time])
    if columns.time is not None and not math.isfinite(time):
        return Bad(name, "its time is no number and no date")
    rating = math.nan
    if columns.rating is not None and str(record[columns.rating]).strip() not in ("", "None", "nan"):
        try:
            rating = float(record[columns.rating])
        except (TypeError, ValueError):
            return Bad(name, "its rating is no number")
        if not abs(rating) < 1e30:
            return Bad(name, "its rating is no number")
    history = None
    if columns.history is not None:
        history = _history(record[columns.history])
        if history is None:
            return Bad(name, "its history is no list of items")
    return _Event(user, item, time, rating, history)


def _identity(value: Any) -> str | None:
    text = "" if value is None or isinstance(value, list | dict | bytes) else str(value).strip()
    return text or None


def _seconds(value: Any) -> float:
    """A number as it is, a date as seconds since 1970 (UTC where it names no zone); NaN where it is neither."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        return _seconds(datetime.fromisoformat(str(value).strip()))
    except (ValueError, OverflowError):
        return math.nan


def _history(value: Any) -> list[str] | None:
    """`[1, 2]`, `['a', 'b']`, a list, or ids with blanks between them."""
    if isinstance(value, str):
        value = as_list(value) if value.strip().startswith("[") else value.split()
    if not isinstance(value, list):
        return None
    items = [_identity(item) for item in value]
    return None if None in items else [item for item in items if item is not None]


def _core(log: Log, least: int) -> npt.NDArray[np.bool_]:
    """Events that stay when users and items with fewer than `least` are taken out until all have them."""
    kept = np.ones(len(log.users), bool)
    while least > 1:
        rare = [np.bincount(side[kept], minlength=len(log.users))[side] < least for side in (log.users, log.items)]
        drop = kept & (rare[0] | rare[1])
        if not drop.any():
            break
        kept &= ~drop
    return kept


def _in_order(log: Log) -> None:
    """By time; where it is not known by split, then user. The order of the source decides between equals."""
    log.take(np.argsort(log.times, kind="stable") if log.timed else np.lexsort((log.users, np.maximum(log.splits, 0))))


def _splits(log: Log, asked: LogSplit, holdout: float) -> npt.NDArray[np.int8]:
    official = bool((log.splits > TRAIN).any())
    if asked == "official" and not official:
        raise Refused(
            "log_split=official was given, but no log is called valid.* or test.*; use time or leave_one_out."
        )
    if asked == "time" and not log.timed:
        raise Refused("log_split=time was given, but not every event has a time; use leave_one_out.")
    if asked == "official" or (asked == "auto" and official):
        return np.where(log.splits == UNKNOWN, TRAIN, log.splits).astype(np.int8)
    count = len(log.times)
    splits = np.full(count, TRAIN, np.int8)
    if asked == "time" or (asked == "auto" and log.timed):
        # Events of one moment are not parted.
        for split, share in ((VALID, 2 * holdout), (TEST, holdout)):
            if count and share:
                splits[log.times >= log.times[min(count - 1, int(count * (1 - share)))]] = split
        return splits
    last = _positions(log.users[::-1])[::-1]
    return np.where(last == 0, TEST, np.where(last == 1, VALID, TRAIN)).astype(np.int8)


def _positions(users: Numbers) -> npt.NDArray[np.int64]:
    """How many events of the same user come before each."""
    order = np.argsort(users, kind="stable")
    ordered = users[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(users) else np.empty(0, int)
    counts = np.diff(np.append(starts, len(users)))
    positions = np.empty(len(users), np.int64)
    positions[order] = np.arange(len(users)) - np.repeat(starts, counts)
    return positions
