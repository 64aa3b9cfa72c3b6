"""The registry: bundles as versions of a name, aliases that point at them. Plain files in MLflow's store, no pickle.

A version's files are logged before it is registered, so a version that exists is whole; it carries the bundle's digest,
and what is fetched must have that digest. References read NAME@v3 or NAME@ALIAS.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines import storage, tracking
from pipelines.errors import Failed, Refused, nearest_names
from vqcore.bundle import CARD, WEIGHTS, Bundle, BundleError, read_bundle

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
VERSION = re.compile(r"v([1-9][0-9]{0,8})")
DIGEST = re.compile(r"[0-9a-f]{64}")
OUR_TAGS = ("digest", "recipe", "num_codes", "code_dim")
PAGE = 200


@dataclass(frozen=True)
class Published:
    name: str
    version: int
    digest: str
    skipped: bool
    """The name had this very bundle already; `version` is the one that has it."""


@dataclass(frozen=True)
class Pulled:
    out: str
    """The directory with the bundle."""
    digest: str
    registered: str
    """NAME@v3, also where an alias was asked for."""
    skipped: bool


@dataclass(frozen=True)
class Promoted:
    out: str
    """NAME@ALIAS."""
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
    num_codes: list[int]
    """K of each level."""
    code_dim: list[int]
    """D of each level."""
    digest: str
    created: str
    """UTC, ISO 8601."""

    @property
    def registered(self) -> str:
        return f"{self.name}@v{self.version}"

    def __str__(self) -> str:
        books = " + ".join(f"{k} x {d}" for k, d in zip(self.num_codes, self.code_dim, strict=False))
        aliases = " ".join(f"@{alias}" for alias in self.aliases)
        return f"{self.registered:<24} {books:<14} {self.recipe:<18} {self.digest[:12]} {self.created[:16]} {aliases}"


def check_name(name: str) -> None:
    """Refuse a registry name that would not make a readable reference."""
    if not NAME.fullmatch(name):
        raise Refused(
            f"{name!r} cannot be a registry name: it begins with a letter or digit, and takes letters, digits, "
            "`_`, `.` and `-`, at most 128 in all."
        )


def check_alias(alias: str) -> None:
    """Refuse what cannot be an alias, among it all that reads like a version."""
    if not ALIAS.fullmatch(alias):
        raise Refused(
            f"{alias!r} cannot be an alias: it begins with a letter or digit, and takes letters, digits, `_` and `-`, "
            "at most 128 in all."
        )
    if alias.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", alias):
        raise Refused(f"{alias!r} cannot be an alias: it reads as a version. Use a word such as `champion`.")


def publish(
    directory: Path, name: str, *, run_id: str | None = None, tags: Mapping[str, str] | None = None
) -> Published:
    """Make a local bundle the next version of `name`; a bundle that is there already keeps its version.

    Args:
        directory: a bundle; it is verified first.
        run_id: the MLflow run that made it, and that takes its files; without one, a run is made for them.
        tags: kept with the version, beside the digest, the recipe and K x D.

    Raises:
        Refused: an impossible name or tag, or a directory that is no whole bundle.
        Failed: the store does not answer. Nothing was registered.
    """
    check_name(name)
    if taken := sorted(set(tags or {}) & set(OUR_TAGS)):
        raise Refused(f"the tags {', '.join(map(repr, taken))} are the registry's own; choose other names.")
    bundle = _verified(directory)
    for entry in _entries(name):
        if entry.digest == bundle.digest:
            return Published(name, entry.version, bundle.digest, skipped=True)
    run = tracking.find_run(run_id) if run_id else None
    made = run is None
    if run is None:
        about = {"kind": "publish", "bundle_digest": bundle.digest}
        settings = bundle.card.get("settings", {})
        run = tracking.start_run(bundle.card.get("recipe", name), f"publish {name}", settings, about)
    # Named by the digest: a second bundle of the same run must not write over the first one's files.
    folder = f"bundle-{bundle.digest[:16]}"
    try:
        run.log_files(directory, folder)
    except BaseException:
        if made:
            run.finish("FAILED")
        raise
    version = _register(name, run, folder, {**_about(bundle), **(tags or {})})
    if made:
        run.finish("FINISHED")
    return Published(name, version, bundle.digest, skipped=False)


def list_entries(name: str | None = None) -> list[Entry]:
    """Every version of one name or of all, by name, newest version first.

    Raises:
        Refused: there is no such name; the message names the nearest ones.
    """
    entries = _entries(name)
    if name is not None and not entries:
        known = sorted({entry.name for entry in _entries(None)})
        raise Refused(f"the registry at {tracking.where()} has no {name!r}; {nearest_names(name, known)}.")
    return entries


def find(ref: str) -> Entry:
    """The version that NAME@v3 or NAME@ALIAS means.

    Raises:
        Refused: not a reference, or nothing it could mean; the message says what there is.
    """
    name, at, which = ref.partition("@")
    if not at or not NAME.fullmatch(name) or not ALIAS.fullmatch(which):
        raise Refused(f"{ref!r} is not a registry reference; write NAME@v3 or NAME@ALIAS.")
    entries = list_entries(name)
    number = VERSION.fullmatch(which)
    for entry in entries:
        if (number and entry.version == int(number[1])) or which in entry.aliases:
            return entry
    there = [f"v{entry.version}" for entry in entries] + [alias for entry in entries for alias in entry.aliases]
    raise Refused(f"{name!r} has no {which!r}; {nearest_names(which, there)}.")


def resolve(ref: str) -> tuple[str, int]:
    """(name, version) that a reference means."""
    entry = find(ref)
    return entry.name, entry.version


def promote(ref: str, alias: str) -> Promoted:
    """Point an alias at a version; it leaves the version it pointed at before."""
    check_alias(alias)
    entry = find(ref)
    skipped = alias in entry.aliases
    if not skipped:
        with tracking.told(f"set the alias {alias!r}"):
            tracking.client().set_registered_model_alias(entry.name, alias, str(entry.version))
    return Promoted(f"{entry.name}@{alias}", entry.digest, entry.registered, skipped)


def pull(ref: str, out: str | Path) -> Pulled:
    """Fetch a version into a local directory, which appears whole and verified or not at all.

    Raises:
        Refused: an unknown reference, or an `out` that is not local or holds something else.
        Failed: what the store holds is not what was published. Nothing was written.
    """
    entry = find(ref)
    if not storage.is_local(str(out)):
        raise Refused(f"pull writes to a local directory; {str(out)!r} is not one.")
    target = Path(storage.normalise(str(out)))
    if target.exists() and not target.is_dir():
        raise Refused(f"{target} is a file; give a directory that is empty or does not exist.")
    if target.exists() and any(target.iterdir()):
        if (target / CARD).exists() and _verified(target).digest == entry.digest:
            return Pulled(str(target), entry.digest, entry.registered, skipped=True)
        raise Refused(f"{target} holds something else than {entry.registered}; give an --out that is empty.")
    # Asked of the client, since a models:/ address goes to a registry set globally.
    with tracking.told(f"find the files of {entry.registered}"):
        source = tracking.client().get_model_version_download_uri(entry.name, str(entry.version))
    _install(target, entry.digest, entry.registered, lambda scratch: tracking.download(source, scratch))
    return Pulled(str(target), entry.digest, entry.registered, skipped=False)


def local_bundle(ref: str | Path) -> Path:
    """A local, verified bundle directory for a bundle or run directory, a URI of one, NAME@v3 or NAME@ALIAS.

    What is not local is fetched once into this machine's cache, under its digest.

    Raises:
        Refused: none of these, or a bundle that is not whole.
        Failed: what was fetched is not what its card or the registry promises.
    """
    text = str(ref)
    for home in (text, storage.join(text, "bundle")):
        if storage.exists(storage.join(home, CARD)):
            return _local(home)
    if not storage.exists(text) and "@" in text and "/" not in text:
        entry = find(text)
        return Path(pull(entry.registered, _cache() / entry.digest).out)
    raise Refused(
        f"{text!r} is no bundle: there is no {CARD} in it, nor in a `bundle` below it. "
        "Give the directory of a finished run or bundle, a URI of one, NAME@v3 or NAME@ALIAS."
    )


def _register(name: str, run: tracking.Run, folder: str, tags: Mapping[str, str]) -> int:
    """Make the version. Last of all: what fails before it leaves no version behind."""
    source = run.artifact_uri(folder)
    with tracking.told(f"register {name!r}"):
        client = tracking.client()
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return int(client.create_model_version(name, source=source, run_id=run.id, tags=dict(tags)).version)


def _about(bundle: Bundle) -> dict[str, str]:
    """The registry's own tags, and those of the bundle's parents."""
    books = bundle.card.get("codebooks", [])
    return {
        "digest": bundle.digest,
        "recipe": str(bundle.card.get("recipe", "")),
        "num_codes": ",".join(str(book["num_codes"]) for book in books),
        "code_dim": ",".join(str(book["code_dim"]) for book in books),
        **{f"parent_{name}": str(value) for name, value in bundle.card.get("parents", {}).items()},
    }


def _entries(name: str | None) -> list[Entry]:
    """Versions that carry a digest; others in the same MLflow are not bundles."""
    if name is not None and not NAME.fullmatch(name):
        return []
    client = tracking.client()
    chosen = f"name = '{name}'" if name is not None else None
    with tracking.told("list the registry"):
        models = _all_pages(client.search_registered_models, chosen)
        versions = _all_pages(client.search_model_versions, chosen)
    aliases: dict[tuple[str, int], list[str]] = {}
    for model in models:
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, int(version)), []).append(alias)
    entries = [_entry(found, aliases) for found in versions if found.status == "READY" and "digest" in found.tags]
    return sorted(entries, key=lambda entry: (entry.name, -entry.version))


def _entry(found: Any, aliases: Mapping[tuple[str, int], list[str]]) -> Entry:
    def numbers(tag: str) -> list[int]:
        return [int(part) for part in found.tags.get(tag, "").split(",") if part.isdigit()]

    return Entry(
        name=found.name,
        version=int(found.version),
        aliases=sorted(aliases.get((found.name, int(found.version)), [])),
        recipe=found.tags.get("recipe", ""),
        num_codes=numbers("num_codes"),
        code_dim=numbers("code_dim"),
        digest=found.tags["digest"],
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
    )


def _all_pages(search: Callable[..., Any], chosen: str | None) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = search(filter_string=chosen, max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _local(home: str) -> Path:
    """The verified directory at a URI that has a card, fetched if it is not local."""
    if storage.is_local(home):
        directory = Path(storage.normalise(home))
        _verified(directory)
        return directory
    card = storage.read_json(storage.join(home, CARD))
    digest = card.get("digest") if isinstance(card, dict) else None
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise Refused(f"{storage.join(home, CARD)} is not the card of a bundle: it has no digest.")
    names = {entry.name for entry in storage.list_files(home)}
    if strange := sorted(names - {CARD, WEIGHTS}):
        raise Refused(f"{home} holds {strange[0]!r}, which is no part of a bundle. Find out why, and remove it.")
    target = _cache() / digest
    if not target.exists():
        _install(target, digest, home, lambda scratch: _copied(home, sorted(names), scratch))
    if _verified(target).digest != digest:
        raise Failed(f"the cached copy {target} is not {digest[:16]}...: remove it and run the command again.")
    return target


def _copied(home: str, names: list[str], scratch: Path) -> Path:
    for name in names:
        with storage.open_read(storage.join(home, name)) as source, (scratch / name).open("wb") as kept:
            shutil.copyfileobj(source, kept, 1 << 22)
    return scratch


def _install(target: Path, digest: str, what: str, fetch: Callable[[Path], Path]) -> None:
    """Fetch into a directory beside `target`, verify, rename. Several processes may do so at once; one wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:64]}."))
    try:
        inner = scratch / "bundle"
        inner.mkdir()
        fetched = fetch(inner)
        try:
            found = read_bundle(fetched).digest
        except BundleError as trouble:
            raise Failed(f"what is stored of {what} is not a whole bundle, so it was not taken: {trouble}") from None
        if found != digest:
            raise Failed(
                f"{what} was published as {digest[:16]}..., and the store now holds {found[:16]}...: "
                "it was replaced after publication, so it was not taken."
            )
        try:
            os.rename(fetched, target)
        except OSError:
            if not (target / CARD).exists() or _verified(target).digest != digest:
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _verified(directory: Path) -> Bundle:
    try:
        return read_bundle(directory)
    except BundleError as trouble:
        raise Refused(str(trouble)) from None


def _cache() -> Path:
    """Where bundles that are not local are kept, under the same root as other downloads."""
    root = os.environ.get("VQRAY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqray"
    return Path(root) / "bundles"
