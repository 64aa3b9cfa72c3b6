"""Every path is a URI: a local path, file:// or s3:// (through s3fs, which honours AWS_ENDPOINT_URL and AWS_*).

A file appears whole or not at all. A missing URI is Refused by name; what the disk or the network does later is Failed.
An object store that has answered before and now does not is asked again for $VQRAY_STORAGE_PATIENCE seconds (120).
Messages never carry credentials.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote, urlsplit

from pipelines.errors import Failed, Refused
from pipelines.patience import SECRETS, asked, told

MULTIPART_BYTES = 16 * 2**20
"""A file of twice as much or more goes to s3 in parts of this size, several at once."""


class Entry(NamedTuple):
    """One file below a URI."""

    name: str
    """Path relative to the URI that was listed, with `/`; bytes that are no UTF-8 are written as `\\xff`."""
    uri: str
    bytes: int


def normalise(uri: str) -> str:
    """The one spelling of a URI: an absolute local path, or s3://bucket/key without a slash at the end.

    Raises:
        Refused: unknown scheme, another host's file, or credentials inside the URI (not echoed).
    """
    if "://" not in uri:
        if not uri:
            raise Refused("an empty path was given; give a local path, file:///path or s3://bucket/key.")
        return os.path.abspath(os.path.expanduser(uri))
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise Refused(
            f"a {parts.scheme}:// URI with credentials in it was given; put them in {', '.join(SECRETS)} instead."
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise Refused(f"{uri} names the host {parts.netloc!r}; a local file is file:///path, with three slashes.")
        return os.path.abspath(unquote(parts.path))
    if parts.scheme != "s3":
        raise Refused(f"{uri} has the scheme {parts.scheme!r}; allowed: a local path, file:///path or s3://bucket/key.")
    if not parts.netloc:
        raise Refused(f"{uri} names no bucket; write s3://bucket/key.")
    # Not parts.path: a key may hold `?` and `#`.
    return "s3://" + uri.removeprefix("s3://").rstrip("/")


def is_local(uri: str) -> bool:
    return not normalise(uri).startswith("s3://")


def join(uri: str, *names: str) -> str:
    """The URI of something below `uri`; absolute names and `..` are refused, so a manifest cannot point outside."""
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or "://" in name:
            raise Refused(f"{name!r} does not lie below {uri}; names inside a directory are relative and without '..'.")
    return "/".join([normalise(uri).rstrip("/"), *(name.strip("/") for name in names)])


def exists(uri: str) -> bool:
    """Whether there is a file or a directory; on s3, whether any key begins with `uri/`."""
    uri = normalise(uri)
    if is_local(uri):
        with told(uri, "look for"):
            return os.path.exists(uri)
    return asked(uri, "look for", lambda: bool(_s3().exists(uri)))


def size(uri: str) -> int:
    """Bytes of one file."""
    uri = normalise(uri)
    if is_local(uri):
        with told(uri, "look at"):
            return os.stat(uri).st_size
    return asked(uri, "look at", lambda: int(_s3().info(uri)["size"]))


def list_files(uri: str) -> list[Entry]:
    """All files below a directory, or the one file that `uri` is, sorted by name.

    Links are followed, but not into a directory that holds them. A link that leads nowhere or to itself is listed with
    0 bytes, so that whoever reads it can say so; sockets, pipes and devices are not files.
    """
    uri = normalise(uri)
    with told(uri, "list"):
        if is_local(uri):
            about = os.stat(uri)
            alone = Entry(_shown(os.path.basename(uri)), uri, about.st_size)
            found = list(_walk(uri)) if stat.S_ISDIR(about.st_mode) else [alone]
        else:
            listed = asked(uri, "list", lambda: _s3().find(uri, detail=True))
            if not listed:
                raise FileNotFoundError(uri)
            top = uri.removeprefix("s3://")
            found = [
                Entry(key.removeprefix(top).strip("/") or top.rsplit("/", 1)[-1], "s3://" + key, int(info["size"] or 0))
                for key, info in listed.items()
                if not key.endswith("/")
            ]
    return sorted(found)


def read_bytes(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of a file; all of it by default."""
    uri = normalise(uri)
    if not is_local(uri):
        return asked(uri, "read", lambda: cast(bytes, _s3().cat_file(uri, start=start, end=stop)))
    with told(uri, "read"), open(uri, "rb") as file:
        file.seek(start or 0)
        return file.read() if stop is None else file.read(max(0, stop - (start or 0)))


def open_read(uri: str) -> BinaryIO:
    """A seekable binary file."""
    uri = normalise(uri)
    with told(uri, "open"):
        return cast(BinaryIO, open(uri, "rb") if is_local(uri) else _s3().open(uri, "rb"))


@contextmanager
def writing(uri: str, sync: bool = True) -> Iterator[Path]:
    """A local file to fill: it appears at `uri`, whole, when the block ends, and not at all when the block raises.

    Without `sync` it may be lost, or be empty, when the machine itself goes down.
    """
    uri = normalise(uri)
    local = is_local(uri)
    with told(uri, "write"):
        folder = Path(uri).parent if local else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
    # Hidden and not tempfile's: its files are 0600, and these must follow the umask.
    staged = folder / f".{uri.rsplit('/', 1)[-1][-64:]}.{uuid.uuid4().hex}.tmp"
    try:
        yield staged
        if not local:
            asked(uri, "write", lambda: _s3().put_file(str(staged), uri, chunksize=MULTIPART_BYTES))
            return
        with told(uri, "write"):
            if sync:
                _sync(staged)
            os.replace(staged, uri)
            if sync:
                _sync(folder)
    finally:
        staged.unlink(missing_ok=True)


def write_atomic(uri: str, data: bytes) -> None:
    """Write a small file; readers see the old one or the new one, never a part."""
    uri = normalise(uri)
    if is_local(uri):
        with writing(uri) as staged, told(uri, "write"):
            staged.write_bytes(data)
    else:
        asked(uri, "write", lambda: _s3().pipe_file(uri, data))


def upload(path: str | Path, uri: str) -> None:
    """Copy a local file to `uri`, atomically; the file itself stays."""
    with writing(uri) as staged, told(normalise(uri), "write"):
        shutil.copyfile(path, staged)


def local_copy(uri: str, sha256: str | None = None, cache: str | Path | None = None) -> Path:
    """A file that can be memory-mapped: the local file itself, or a download kept in this node's cache.

    Args:
        sha256: checked after a download, and part of the cache's key; without it the key is the store's own ETag.
        cache: directory; default $VQRAY_CACHE, else $XDG_CACHE_HOME/vqray, else ~/.cache/vqray.

    Raises:
        Failed: the download does not have the digest that was promised.
    """
    uri = normalise(uri)
    if is_local(uri):
        size(uri)
        return Path(uri)
    with told(uri, "download"):
        kept = _cached(uri, sha256, cache)
        if not kept.exists():
            with writing(str(kept)) as staged:
                asked(uri, "download", lambda: _s3().get_file(uri, str(staged)))
                found = sha256_of_file(staged) if sha256 else None
                if found != sha256:
                    raise Failed(
                        f"{uri} arrived with sha256 {found}, but {sha256} was recorded: it has changed or is damaged."
                    )
        return kept


def forget_copy(uri: str, sha256: str | None = None, cache: str | Path | None = None) -> None:
    """Drop a download from the cache (a damaged one), so that the next `local_copy` fetches it again."""
    if not is_local(uri):
        _cached(normalise(uri), sha256, cache).unlink(missing_ok=True)


def remove(uri: str) -> None:
    """Delete a file, or a directory with all it holds; nothing there is fine."""
    uri = normalise(uri)
    if not is_local(uri):
        if exists(uri):
            # Of a try whose answer was lost nothing may be left to delete.
            with suppress(Refused):
                asked(uri, "remove", lambda: _s3().rm(uri, recursive=True))
        return
    with told(uri, "remove"):
        if os.path.isdir(uri) and not os.path.islink(uri):
            shutil.rmtree(uri)
        else:
            Path(uri).unlink(missing_ok=True)


def remove_staged(uri: str) -> None:
    """Delete what killed writers left directly in a local directory; nothing may be writing there."""
    if is_local(uri):
        for path in Path(normalise(uri)).glob(".*.tmp"):
            path.unlink(missing_ok=True)


def canonical_json(value: Any) -> bytes:
    """One spelling per value: sorted keys, no spaces, ASCII, no NaN. What digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_json_atomic(uri: str, value: Any) -> None:
    """JSON for people and programs: sorted keys, indented by one."""
    write_atomic(uri, json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n")


def read_json(uri: str) -> Any:
    """The value in a JSON file.

    Raises:
        Refused: no such file, or it is no JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{normalise(uri)} is not JSON ({error}); it was damaged or is another kind of file.") from None


def sha256_of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _walk(top: str) -> Iterator[Entry]:
    """Without recursion: folders nest deeper than Python may call."""
    waiting: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(top, "", ())]
    while waiting:
        folder, prefix, above = waiting.pop()
        with told(folder, "list"):
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in above:
                continue
            with os.scandir(folder) as items:
                found = list(items)
        for item in found:
            about = _stat(item)
            if about is not None and stat.S_ISDIR(about.st_mode):
                waiting.append((item.path, f"{prefix}{item.name}/", (*above, (here.st_dev, here.st_ino))))
            elif about is None or stat.S_ISREG(about.st_mode):
                yield Entry(_shown(prefix + item.name), item.path, about.st_size if about else 0)


def _stat(item: os.DirEntry[str]) -> os.stat_result | None:
    """None for what leads nowhere: a dangling link, one that leads to itself, a file deleted since it was listed."""
    try:
        return item.stat()
    except OSError:
        return None


def _shown(name: str) -> str:
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def _cached(uri: str, sha256: str | None, cache: str | Path | None) -> Path:
    root = Path(cache or os.environ.get("VQRAY_CACHE") or _user_cache())
    state = sha256
    if state is None:
        info = asked(uri, "look at", lambda: _s3().info(uri))
        state = f"{info.get('ETag')} {info['size']} {info.get('LastModified')}"
    # The name is kept at the end: corpora recognise files by their suffix.
    return root / hashlib.sha256(f"{uri}\n{state}".encode()).hexdigest()[:32] / uri.rsplit("/", 1)[-1]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqray"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _s3() -> Any:
    # Imported late: half a second that local work need not pay. Listings are not cached: other processes write here.
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)
