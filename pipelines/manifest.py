"""manifest.json: what makes a directory of shards exist. It is written last, and its digest covers content only."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines import storage
from pipelines.errors import Refused

FORMAT = "vqray-shards"
VERSION = 1
FILE = "manifest.json"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class ShardRecord:
    """One immutable Arrow IPC file."""

    name: str
    rows: int
    bytes: int
    sha256: str
    splits: dict[str, int]
    """Split -> its rows in this shard."""


@dataclass(frozen=True)
class Units:
    """What an ingest read. read = kept + quarantined + the sum of filtered."""

    read: int
    kept: int
    quarantined: int
    filtered: dict[str, int]
    """Named setting or reason -> units it left out."""


@dataclass(frozen=True)
class Manifest:
    kind: str
    """Corpus kind, or `codes`."""
    settings: dict[str, Any]
    """How rows were prepared."""
    schema: dict[str, str]
    """Column -> Arrow type."""
    shards: tuple[ShardRecord, ...]
    units: Units
    files: dict[str, str] = field(default_factory=dict)
    """Other files of this directory (sources.arrow, quarantine.arrow) -> sha256."""
    context: dict[str, Any] = field(default_factory=dict)
    """What the corpus found out about the whole, such as class names."""
    parents: dict[str, str] = field(default_factory=dict)
    """What this was made from -> digest."""

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def digest(self) -> str:
        """sha256 of the content: no path, time or host takes part."""
        return storage.sha256_of_bytes(storage.canonical_json(self._content()))

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, uri: str) -> None:
        storage.write_json_atomic(storage.join(uri, FILE), {**self._content(), "digest": self.digest})


def load_manifest(uri: str) -> Manifest:
    """The manifest of a directory.

    Raises:
        Refused: no manifest, one of another version, or one whose content is not what its digest says.
    """
    home = storage.join(uri, FILE)
    if not storage.exists(home):
        begun = storage.exists(storage.join(uri, "request.json"))
        what = (
            "an unfinished one: run the command that began it again" if begun else "not one: `vqray ingest` makes them"
        )
        raise Refused(f"no {FILE} in {uri}. A directory of shards is whole only with it, and this is {what}.")
    record = storage.read_json(home)
    if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        given = f"{record.get('format')!r} version {record.get('version')!r}"
        raise Refused(
            f"{home} is {given}; this vqray reads {FORMAT!r} version {VERSION}. Ingest again, or update vqray."
        )
    digest = record.pop("digest", None)
    found = storage.sha256_of_bytes(storage.canonical_json(record))
    if digest != found:
        raise Refused(f"{home} was changed after it was written: its digest says {digest}, its content is {found}.")
    fields = {name: value for name, value in record.items() if name not in ("format", "version")}
    fields["shards"] = tuple(ShardRecord(**shard) for shard in fields["shards"])
    return Manifest(**{**fields, "units": Units(**fields["units"])})
