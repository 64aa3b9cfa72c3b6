"""Files of items and of what users did with them: which is which, and the records of items."""

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from pipelines import storage
from pipelines.corpora import Bad, Slice, _sources
from pipelines.corpora import _text_records as scan
from pipelines.corpora import _text_tables as tables
from pipelines.errors import Failed, Refused, nearest_names
from pipelines.storage import Entry

USERS = ("user_id", "user", "userid", "reviewerid", "reviewer_id", "uid", "session_id", "customer_id")
ITEMS = ("item_id", "item", "itemid", "movieid", "movie_id", "asin", "parent_asin", "product_id", "productid", "iid")
TIMES = ("timestamp", "time", "unixreviewtime", "datetime", "date")
RATINGS = ("rating", "overall", "score", "stars")
HISTORIES = ("history_item_id", "item_id_list", "history")
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "test": "test"}
ATOMIC = (".inter", ".item")
JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson")
SLICE_BYTES = 128 << 10
"""Some hundred items: enough to batch by length, few enough that all CPUs have some."""
COST = 64
"""A sentence model takes far longer for a byte than its size says; parts are cut by what it says."""
MOST_JSON_BYTES = 256 << 20
JSON_SLICE_ITEMS = 256
DAMAGE = (ValueError, RecursionError, OSError, Refused, Failed)


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called; None where there is none of that meaning."""

    user: str | None
    item: str | None
    time: str | None
    rating: str | None
    history: str | None
    others: tuple[str, ...]

    @property
    def is_log(self) -> bool:
        return self.user is not None and self.item is not None

    @property
    def is_items(self) -> bool:
        return self.user is None and self.item is not None and bool(self.others)


@dataclass(frozen=True)
class LogFile:
    entry: Entry
    prefix: str
    columns: Columns
    split: str | None
    """Official, from its name: train.csv, x.valid.inter."""


@dataclass(frozen=True)
class Files:
    """What there is below the sources."""

    items: list[Slice]
    logs: list[LogFile]
    ignored: Counter[str]


@dataclass(frozen=True)
class Item:
    """One record of an item."""

    name: str
    item: str
    text: str


def find(sources: Sequence[str], settings: Any) -> Files:
    """The files of items, as slices, and the logs.

    Raises:
        Refused: a source that holds no file of either, no items at all, or a column that is not there.
    """
    items: list[Slice] = []
    logs: list[LogFile] = []
    ignored: Counter[str] = Counter()
    for source, prefix in zip(sources, _sources.prefixes(list(sources)), strict=True):
        before = len(items) + len(logs)
        for entry in storage.list_files(source):
            if _sources.is_hidden(entry.name) or layout_of(entry.name) is None:
                ignored[_sources.why_ignored(entry.name, "a table")] += 1
            elif entry.name.lower().endswith((".json", *JSON_LINES)):
                items += _of_json(entry, prefix, settings)
            else:
                _sort_in(entry, prefix, settings, items, logs, ignored)
        if len(items) + len(logs) == before:
            held = ", ".join(f"{count:,} x {reason}" for reason, count in ignored.most_common(3)) or "nothing"
            raise Refused(
                f"there are no items in {source!r}; it holds {held}. Items are tables (.csv, .tsv, .parquet, .item, "
                ".json, .jsonl) with a column of item ids and columns of text; logs are tables (.csv, .tsv, .parquet, "
                ".inter) with columns of users and items. Name columns with --set user=... item=... text=..."
            )
    if not items:
        raise Refused(
            f"there are logs ({', '.join(log.entry.name for log in logs)}) but no table of items with their text: add "
            "it as a further --source, or name its columns with --set item=... text=..."
        )
    return Files(items, sorted(logs, key=_time_order), ignored)


def layout_of(name: str) -> tables.Layout | None:
    if name.lower().endswith(ATOMIC):
        return "tsv"
    if name.lower().endswith((".json", *JSON_LINES)):
        return "lines"
    layout = tables.layout_of(name)
    return None if layout == "lines" else layout


def quoted(name: str) -> bool | None:
    """RecBole's files have no quotes; other TSV has them where pandas or a spreadsheet wrote it."""
    return True if layout_of(name) == "tsv" and not name.lower().endswith(ATOMIC) else None


def read_items(piece: Slice, wanted: tables.Wanted) -> Iterator[tuple[int, Item | Bad, bytes]]:
    """Every wanted item of a slice: its id and its text, and the digest of its record."""
    if piece.meta["layout"] == "json":
        yield from _read_json(piece, wanted)
        return
    for unit, found, digest in tables.read_table(piece, wanted):
        if isinstance(found, Bad):
            yield unit, found, digest
            continue
        name = tables.unit_name(piece, unit)
        if piece.meta.get("json"):
            try:
                found = json.loads(found[tables.TEXT])
            except (ValueError, RecursionError):
                yield unit, Bad(name, "not a line of JSON"), digest
                continue
        yield unit, _item(name, found, piece.meta["item"], piece.meta["text"]), digest


def _item(name: str, record: Any, column: str, text: Sequence[str] | None) -> Item | Bad:
    if not isinstance(record, Mapping):
        return Bad(name, "not a record of an item")
    item = record.get(column)
    if item is None or isinstance(item, list | dict) or not str(item).strip():
        return Bad(name, "it has no item id")
    columns = [key for key in record if key != column] if text is None else text
    words = [plain for key in columns if (plain := plain_text(record.get(key)))]
    if not words:
        return Bad(name, "the item has no text")
    return Item(name, str(item).strip(), ". ".join(words))


def plain_text(value: Any) -> str:
    """A value as text: lists, also those written as text (`['a', 'b']`), as their parts; white space as one blank."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        value = as_list(value) or value
    if isinstance(value, list | tuple):
        value = " ".join(filter(None, map(plain_text, value)))
    if value is None or value != value or isinstance(value, bytes | dict):
        return ""
    return " ".join(str(value).split()).encode("utf-8", "replace").decode()


def as_list(text: str) -> list[Any] | None:
    """`[1, 2]` or `['a', 'b']` as a list; None where it is none."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, list) else None
    return None


def columns_of(entry: Entry, settings: Any) -> Columns | None:
    """None where the file cannot be read as a table."""
    layout = layout_of(entry.name)
    names = tables.columns_of(entry, layout, quoted=quoted(entry.name)) if layout else []
    # RecBole writes a type behind each name: `user_id:token`.
    base = {name: name.partition(":")[0].strip().lower() for name in names}

    def named(known: Sequence[str], asked: str | None) -> str | None:
        wanted = known if asked is None else (asked.lower(),)
        return next((name for word in wanted for name in names if base[name] == word), None)

    user, item = named(USERS, settings.user), named(ITEMS, settings.item)
    if item is None and user is None and settings.item is None:
        item = named(("id",), None)
    time, rating = named(TIMES, settings.time), named(RATINGS, settings.rating)
    history = named(HISTORIES, None)
    others = tuple(name for name in dict.fromkeys(names) if name and name != item)
    return Columns(user, item, time, rating, history, others) if names else None


def _sort_in(
    entry: Entry, prefix: str, settings: Any, items: list[Slice], logs: list[LogFile], ignored: Counter[str]
) -> None:
    columns = columns_of(entry, settings)
    layout = layout_of(entry.name)
    assert layout is not None
    if columns is None:
        # No table: one bad unit, as of items.
        items += tables.of_table(entry, prefix, layout)
    elif columns.is_log:
        logs.append(LogFile(entry, prefix, columns, _official(entry.name)))
    elif columns.is_items:
        assert columns.item is not None
        text = _text_columns(entry, columns, settings.text)
        taken, quotes = [columns.item, *text], quoted(entry.name)
        for piece in tables.of_table(entry, prefix, layout, taken, quoted=quotes, slice_bytes=SLICE_BYTES):
            meta = {**piece.meta, "item": columns.item, "text": text}
            items.append(replace(piece, bytes=piece.bytes * COST, meta=meta))
    else:
        ignored["a table without a column of items, or without text"] += 1


def _text_columns(entry: Entry, columns: Columns, asked: Sequence[str]) -> list[str]:
    if not asked:
        return list(columns.others)
    base = {name.partition(":")[0].strip().lower(): name for name in columns.others}
    for name in asked:
        if name.lower() not in base:
            raise Refused(f"{entry.uri} has no column {name!r} of text; {nearest_names(name, columns.others)}.")
    return [base[name.lower()] for name in asked]


def _of_json(entry: Entry, prefix: str, settings: Any) -> list[Slice]:
    text = list(settings.text) or None
    if entry.name.lower().endswith(JSON_LINES):
        item = settings.item or _json_id(entry)
        slices = tables.of_table(entry, prefix, "lines", slice_bytes=SLICE_BYTES)
        meta = {"json": True, "item": item, "text": text}
        return [replace(piece, bytes=piece.bytes * COST, meta={**piece.meta, **meta}) for piece in slices]
    try:
        records = _json_records(entry.uri)
    except DAMAGE as trouble:
        return tables.unreadable(entry, prefix, f"not JSON of items: {tables.first_line(trouble)}")
    item = settings.item or _id_of(records[0][1] if records else {})
    meta = {"layout": "json", "item": item, "text": text}
    size = COST * entry.bytes // max(1, len(records))
    return [
        Slice(entry.uri, prefix + entry.name, low, high, size * (high - low), meta)
        for low in range(0, len(records), JSON_SLICE_ITEMS)
        for high in [min(low + JSON_SLICE_ITEMS, len(records))]
    ]


def _read_json(piece: Slice, wanted: tables.Wanted) -> Iterator[tuple[int, Item | Bad, bytes]]:
    records: list[tuple[str | None, Any]] = []
    reason = "the file ends before this record"
    try:
        records = _json_records(piece.uri)
    except DAMAGE as trouble:
        reason = f"not JSON of items: {tables.first_line(trouble)}"
    for unit in filter(wanted, range(piece.stop - piece.start)):
        name = tables.unit_name(piece, unit)
        if piece.start + unit >= len(records):
            yield unit, Bad(name, reason), reason.encode()
            continue
        key, record = records[piece.start + unit]
        digest = hashlib.sha256(json.dumps([key, record]).encode()).digest()
        if key is not None and isinstance(record, Mapping):
            record = {**record, piece.meta["item"]: key}
        yield unit, _item(name, record, piece.meta["item"], piece.meta["text"]), digest


def _json_records(uri: str) -> list[tuple[str | None, Any]]:
    """`{"id": {...}, ...}` or `[{...}, ...]` -> (id where it is a key, record) in the order of the file."""
    if (size := storage.size(uri)) > MOST_JSON_BYTES:
        raise ValueError(f"{size:,} bytes are more than {MOST_JSON_BYTES:,}; write a record a line (.jsonl)")
    value = json.loads(storage.read_bytes(uri).decode("utf-8-sig"))
    if isinstance(value, list):
        return [(None, record) for record in value]
    if isinstance(value, dict):
        return list(value.items())
    raise ValueError("it is neither a list of items nor an object of them by id")


def _json_id(entry: Entry) -> str:
    first = next(scan.lines(entry.uri), None)
    try:
        return _id_of(json.loads(first[2] or b"") if first else {})
    except (ValueError, RecursionError):
        return ITEMS[0]


def _id_of(record: Any) -> str:
    """The key of a record's item id, or what it is called where the id stands outside it."""
    keys = {str(key).lower(): str(key) for key in record} if isinstance(record, Mapping) else {}
    return next((keys[name] for name in (*ITEMS, "id") if name in keys), ITEMS[0])


def _official(name: str) -> str | None:
    words = PurePosixPath(name.lower().removesuffix(".gz")).stem.split(".")
    return SPLITS.get(words[-1])


def _time_order(log: LogFile) -> tuple[int, str]:
    order = ["train", None, "valid", "test"]
    return order.index(log.split), log.prefix + log.entry.name
