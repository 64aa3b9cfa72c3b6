"""manifest.json makes a directory of shards exist. It is written last, and its digest covers content only."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.claims import NAMES as REQUESTS
from pipelines.errors import Refused

FORMAT = "vqray-shards"
VERSIONS = (1, 2)
"""2 has side tables as well. What has none is written as 1, so digests made before there were any stay true."""
NAME = "manifest.json"
SPLITS = ("train", "valid", "test")
"""The values 0, 1, 2 of the `split` column."""
TABLE_NAME = re.compile(r"[a-z][a-z0-9_]*")
SHARD_NAME = re.compile(r"shard-\d{5,}-\d{3,}\.arrow")


@dataclass(frozen=True)
class Column:
    """One column of the shards, without the platform's own row_id and split."""

    type: str
    """For tensors and numbers the element type in NumPy's words (`float16`, and `bfloat16`); else Arrow's
    (`list<item: float>`)."""
    shape: tuple[int, ...] | None
    """Shape of one row's value where it is fixed (() for a number); None for text, bytes and lists."""


@dataclass(frozen=True)
class ShardRecord:
    """One immutable shard."""

    name: str
    """File name below the directory of the manifest."""
    rows: int
    bytes: int
    sha256: str
    splits: dict[str, int]
    """Rows of train, valid and test; they add up to `rows`."""


@dataclass(frozen=True)
class Units:
    """What became of everything the sources held: read = kept + quarantined + all of filtered."""

    read: int
    kept: int
    """Units that are in the rows. Shards count rows: a unit may have many (a document's tokens)."""
    quarantined: int
    filtered: dict[str, int]
    """Named setting or reason (`limit`, `other files`) -> units left out because of it."""

    def __post_init__(self) -> None:
        accounted = self.kept + self.quarantined + sum(self.filtered.values())
        if self.read != accounted:
            raise RuntimeError(
                f"{self.read} units read, but {accounted} kept, quarantined or filtered: some were lost."
            )


@dataclass(frozen=True)
class TableRecord:
    """One side table, kept as `<name>.arrow` beside the manifest."""

    name: str
    rows: int
    bytes: int
    sha256: str
    units: Units
    """Its own: they are not in the manifest's."""

    @property
    def file(self) -> str:
        return f"{self.name}.arrow"


@dataclass(frozen=True)
class Manifest:
    """A finished directory of shards. Rows are in the order of `shards`."""

    kind: str
    """Corpus kind, or `codes`."""
    settings: dict[str, Any]
    """The corpus's settings."""
    selection: dict[str, Any]
    """How rows were chosen: `limit`, `holdout`."""
    columns: dict[str, Column]
    shards: tuple[ShardRecord, ...]
    units: Units
    sources: str
    """sha256 of sources.arrow beside the manifest: names relative to the source URI, and fingerprints.

    Empty where rows were made from rows."""
    parents: dict[str, str] = field(default_factory=dict)
    """What it was made from: name (`shards`, `bundle`) -> digest. Empty after an ingest."""
    context: dict[str, Any] = field(default_factory=dict)
    """JSON values the corpus shares between rows, such as class names."""
    tables: tuple[TableRecord, ...] = ()
    """Further tables of the corpus, such as the log beside its items."""

    @property
    def digest(self) -> str:
        """sha256 of the content: no absolute paths, times or hosts, so two runs of one ingest agree."""
        return hashlib.sha256(storage.canonical_json(to_json(self))).hexdigest()

    def rows(self, split: str = "all") -> int:
        """Rows of `train`, `valid`, `test` or `all`."""
        check_split(split)
        return sum(shard.rows if split == "all" else shard.splits[split] for shard in self.shards)


def check_split(split: str) -> None:
    if split not in (*SPLITS, "all"):
        raise Refused(f"there is no split {split!r}; allowed: {', '.join(SPLITS)}, all.")


def record_uri(uri: str, part: int) -> str:
    """What a part writes last: its record, with the shards it made."""
    return storage.join(uri, "parts", f"part-{part:05d}.json")


def part_of(shard: str) -> int:
    """The number of the part that wrote a shard, from its name."""
    return int(shard.split("-")[1])


def describe(schema: pa.Schema) -> dict[str, Column]:
    """Arrow schema -> what a manifest says of it."""
    return {item.name: _column(item) for item in schema}


def to_json(manifest: Manifest) -> dict[str, Any]:
    """What is written and digested; the digest itself is added by `save_manifest`."""
    content = {"format": FORMAT, "version": 2 if manifest.tables else 1, **asdict(manifest)}
    if not manifest.tables:
        del content["tables"]
    return content


def save_manifest(manifest: Manifest, uri: str) -> None:
    """Write manifest.json into a directory whose shards are all there: from now on it exists."""
    storage.write_json_atomic(storage.join(uri, NAME), {**to_json(manifest), "digest": manifest.digest})


def is_finished(uri: str) -> bool:
    """Whether the directory has its manifest."""
    return storage.exists(storage.join(uri, NAME))


def load_manifest(uri: str) -> Manifest:
    """The manifest of a directory.

    Raises:
        Refused: no manifest, another format or version, or content that does not fit its digest.
    """
    uri = storage.normalise(uri)
    if not is_finished(uri):
        begun = any(storage.exists(storage.join(uri, name)) for name in (*REQUESTS, "parts"))
        hint = (
            "rerun the command that began it to complete it"
            if begun
            else "give the --out of a finished ingest or encode"
        )
        raise Refused(f"no {NAME} in {uri}: not a finished vqray directory; {hint}.")
    where = storage.join(uri, NAME)
    return from_json(storage.read_json(where), where)


def from_json(value: Any, where: str) -> Manifest:
    """The manifest that `save_manifest` wrote; `where` is for messages."""
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, Mapping) else type(value).__name__
        raise Refused(f"{where} is not a {FORMAT} manifest (format: {found!r}).")
    if value.get("version") not in VERSIONS:
        raise Refused(
            f"{where} has format version {value.get('version')!r}; this vqray reads "
            f"{' and '.join(map(str, VERSIONS))}. Read it with the vqray that wrote it, or ingest again."
        )
    content = {name: item for name, item in value.items() if name != "digest"}
    found = hashlib.sha256(storage.canonical_json(content)).hexdigest()
    if found != value.get("digest"):
        raise Refused(
            f"{where} says digest {value.get('digest')!r}, but its content has {found}: it was edited or damaged."
        )
    try:
        return _parsed(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{where} is not a version {value['version']} manifest: {error!r}.") from None


def _parsed(content: dict[str, Any]) -> Manifest:
    fields = {name: item for name, item in content.items() if name not in ("format", "version")}
    shards = tuple(ShardRecord(**shard) for shard in fields.pop("shards"))
    for shard in shards:
        # A name is joined to the directory and opened, so it must not lead anywhere else.
        if not SHARD_NAME.fullmatch(shard.name):
            raise TypeError(f"shard name {shard.name!r}")
    columns = {
        name: Column(column["type"], None if column["shape"] is None else tuple(column["shape"]))
        for name, column in fields.pop("columns").items()
    }
    tables = tuple(TableRecord(**{**table, "units": Units(**table["units"])}) for table in fields.pop("tables", ()))
    for table in tables:
        if not TABLE_NAME.fullmatch(table.name):
            raise TypeError(f"table name {table.name!r}")
    return Manifest(shards=shards, columns=columns, units=Units(**fields.pop("units")), tables=tables, **fields)


def _column(item: pa.Field) -> Column:
    kind = item.type
    if isinstance(kind, pa.FixedShapeTensorType):
        said = (item.metadata or {}).get(b"dtype")
        return Column(said.decode() if said else _numpy_name(kind.value_type), tuple(kind.shape))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return Column(_numpy_name(kind), ())
    return Column(str(kind), None)


def _numpy_name(kind: pa.DataType) -> str:
    return np.dtype(kind.to_pandas_dtype()).name
