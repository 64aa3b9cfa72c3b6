"""The registry: bundles as versions of a name, aliases that point at them. Plain files in MLflow's store, no pickle."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import storage, tracking
from pipelines.errors import Failed, Refused, nearest_names
from vqcore.bundle import BundleError, read_bundle, read_card

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
VERSION = re.compile(r"v([1-9][0-9]*)")
FOLDER = "bundle"


@dataclass(frozen=True)
class Published:
    name: str
    version: int
    digest: str
    skipped: bool
    """The name had this very bundle already."""


@dataclass(frozen=True)
class Pulled:
    out: str
    digest: str
    registered: str
    skipped: bool


@dataclass(frozen=True)
class Promoted:
    out: str
    digest: str
    registered: str
    skipped: bool


@dataclass(frozen=True)
class Entry:
    """One version of one name."""

    name: str
    version: int
    aliases: list[str]
    recipe: str
    codebooks: str
    digest: str

    def __str__(self) -> str:
        aliases = " ".join(f"@{alias}" for alias in self.aliases)
        return f"{self.name}@v{self.version:<4} {self.codebooks:<14} {self.recipe:<18} {self.digest[:12]}  {aliases}"


def check_name(name: str, what: str = "a registry name") -> None:
    """Refuse what would not make a readable reference."""
    if not NAME.fullmatch(name):
        raise Refused(f"{name!r} cannot be {what}: it takes letters, digits, `_`, `.` and `-`, at most 128 of them.")
    if what == "an alias" and VERSION.fullmatch(name):
        raise Refused(f"{name!r} cannot be an alias: it reads as a version number.")


def publish(directory: Path, name: str, run_id: str | None = None) -> Published:
    """Make a verified local bundle the next version of `name`; a bundle that is there already keeps its version.

    The files are logged before anything is registered, so that a registered version is always whole.
    """
    check_name(name)
    bundle = _verified(directory)
    client = tracking.client()
    for entry in list_entries(name, missing_ok=True):
        if entry.digest == bundle.digest:
            return Published(name, entry.version, bundle.digest, skipped=True)
    run = tracking.find_run(run_id) if run_id else None
    own = run is None
    if run is None:
        tags = {"kind": "publish", "bundle_digest": bundle.digest}
        run = tracking.start_run(bundle.card["recipe"], f"publish {name}", bundle.card["settings"], tags)
    run.log_directory(directory, FOLDER)
    if own:
        run.finish("FINISHED")
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name, source=run.artifact_uri(FOLDER), run_id=run.id, tags=_tags(bundle.card, bundle.digest)
    )
    return Published(name, int(version.version), bundle.digest, skipped=False)


def _tags(card: dict[str, Any], digest: str) -> dict[str, str]:
    books = " + ".join(f"{book['num_codes']} x {book['code_dim']}" for book in card["codebooks"])
    parents = {f"parent_{name}": value for name, value in card.get("parents", {}).items()}
    return {"digest": digest, "recipe": card["recipe"], "codebooks": books, **parents}


def list_entries(name: str | None = None, missing_ok: bool = False) -> list[Entry]:
    """Every version of one name or of all, by name, newest version first.

    Raises:
        Refused: there is no such name; the message names the nearest ones.
    """
    client = tracking.client()
    models = {model.name: model for model in client.search_registered_models(max_results=1000)}
    if name is not None and name not in models:
        if missing_ok:
            return []
        raise Refused(f"the registry has no {name!r}; {nearest_names(name, models)}")
    entries = []
    for model_name in sorted(models if name is None else [name]):
        aliases: dict[int, list[str]] = {}
        for alias, version in client.get_registered_model(model_name).aliases.items():
            aliases.setdefault(int(version), []).append(alias)
        for found in client.search_model_versions(f"name = '{model_name}'", max_results=1000):
            number, tags = int(found.version), found.tags
            if "digest" in tags:
                entries.append(
                    Entry(
                        model_name, number, sorted(aliases.get(number, [])), tags["recipe"], tags["codebooks"],
                        tags["digest"],
                    )
                )  # fmt: skip
    return sorted(entries, key=lambda entry: (entry.name, -entry.version))


def find(ref: str) -> Entry:
    """The version that NAME@v3 or NAME@ALIAS means.

    Raises:
        Refused: not a reference, or nothing it could mean; the message says what there is.
    """
    name, at, which = ref.partition("@")
    if not at or not name or not which:
        raise Refused(f"{ref!r} is not a registry reference; write NAME@v3 or NAME@ALIAS.")
    entries = list_entries(name)
    number = VERSION.fullmatch(which)
    for entry in entries:
        if (number and entry.version == int(number[1])) or which in entry.aliases:
            return entry
    there = [f"v{entry.version}" for entry in entries] + [alias for entry in entries for alias in entry.aliases]
    raise Refused(f"{name!r} has no {which!r}; {nearest_names(which, there)}")


def pull(ref: str, out: str) -> Pulled:
    """Fetch a version into a directory, verified against its card and against the registry's digest.

    Raises:
        Refused: an unknown reference, or an `out` that holds something else.
        Failed: what the store holds is not what was published.
    """
    entry = find(ref)
    registered = f"{entry.name}@v{entry.version}"
    if not storage.is_local(out):
        raise Refused(f"pull writes to a local directory; {out!r} is not one.")
    target = Path(storage.normalise(out))
    if target.exists() and any(target.iterdir()):
        if (target / "card.json").exists() and _verified(target).digest == entry.digest:
            return Pulled(str(target), entry.digest, registered, skipped=True)
        raise Refused(f"{target} holds something else than {registered}; give an empty --out.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as scratch:
        fetched = tracking.download(f"models:/{entry.name}/{entry.version}", Path(scratch))
        try:
            digest = read_bundle(fetched).digest
        except BundleError as trouble:
            raise Failed(f"{registered} in the registry's store is not a whole bundle: {trouble}") from None
        if digest != entry.digest:
            raise Failed(
                f"{registered} was published as {entry.digest[:16]}..., and the store now holds {digest[:16]}...:"
                " it was replaced after publication, so it was not taken."
            )
        if target.exists():
            target.rmdir()
        shutil.move(str(fetched), target)
    return Pulled(str(target), entry.digest, registered, skipped=False)


def promote(ref: str, alias: str) -> Promoted:
    """Point an alias at a version."""
    check_name(alias, "an alias")
    entry = find(ref)
    registered = f"{entry.name}@v{entry.version}"
    if alias in entry.aliases:
        return Promoted(f"{entry.name}@{alias}", entry.digest, registered, skipped=True)
    tracking.client().set_registered_model_alias(entry.name, alias, str(entry.version))
    return Promoted(f"{entry.name}@{alias}", entry.digest, registered, skipped=False)


def local_bundle(ref: str | Path) -> Path:
    """A local, verified bundle directory for a run or bundle directory, a URI, NAME@ALIAS or NAME@v3."""
    text = str(ref)
    for home in (text, storage.join(text, FOLDER)):
        if storage.exists(storage.join(home, "card.json")):
            return _fetched(home)
    if "@" in text and "/" not in text:
        entry = find(text)
        home = str(Path(tempfile.gettempdir()) / f"vqray-bundles-{_user()}" / entry.digest)
        return Path(pull(f"{entry.name}@v{entry.version}", home).out)
    raise Refused(
        f"{text!r} is no bundle: there is no card.json in it, and a registry reference reads NAME@ALIAS or NAME@v3."
    )


def _fetched(home: str) -> Path:
    if storage.is_local(home):
        directory = Path(storage.normalise(home))
        _verified(directory)
        return directory
    card = storage.read_json(storage.join(home, "card.json"))
    target = Path(tempfile.gettempdir()) / f"vqray-bundles-{_user()}" / str(card["digest"])
    if not (target / "card.json").exists():
        for name in (*card["files"], "card.json"):
            storage.write_atomic(str(target / Path(name).name), storage.read_bytes(storage.join(home, name)))
    _verified(target)
    return target


def _verified(directory: Path) -> Any:
    try:
        read_card(directory)
        return read_bundle(directory)
    except BundleError as trouble:
        raise Refused(str(trouble)) from None


def _user() -> str:
    import getpass

    return re.sub(r"[^A-Za-z0-9_-]", "_", getpass.getuser())
