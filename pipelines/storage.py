"""Every path is a URI: local, or s3:// through s3fs. Writes are atomic: no name ever holds half its content."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from pipelines.errors import Refused


@dataclass(frozen=True)
class Entry:
    """One file below a directory."""

    name: str
    """Path relative to the listed URI, with forward slashes."""
    uri: str
    bytes: int


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def normalise(uri: str | Path) -> str:
    """An absolute local path, or the remote URI without a trailing slash."""
    text = str(uri)
    if is_local(text):
        return os.path.abspath(os.path.expanduser(text.removeprefix("file://")))
    return text.rstrip("/")


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def exists(uri: str) -> bool:
    if is_local(uri):
        return os.path.exists(normalise(uri))
    return bool(_remote(uri).exists(uri))


def size(uri: str) -> int:
    return os.path.getsize(normalise(uri)) if is_local(uri) else int(_remote(uri).size(uri))


def list_files(uri: str) -> list[Entry]:
    """Every file below a directory, sorted by name; a file lists itself under its own name.

    Directories reached through symbolic links are not entered, so a loop of links ends.

    Raises:
        Refused: there is nothing at that URI.
    """
    if not exists(uri):
        raise Refused(f"there is nothing at {uri!r}; give a file or directory that exists, or an s3:// URI.")
    if not is_local(uri):
        return _list_remote(uri)
    root = normalise(uri)
    if os.path.isfile(root):
        return [Entry(os.path.basename(root), root, os.path.getsize(root))]
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                found.append(Entry(os.path.relpath(path, root).replace(os.sep, "/"), path, os.path.getsize(path)))
    return sorted(found, key=lambda entry: entry.name)


def _list_remote(uri: str) -> list[Entry]:
    files = _remote(uri).find(uri, detail=True)
    scheme, _, bare = uri.rstrip("/").partition("://")
    entries = [
        Entry(path.removeprefix(bare).lstrip("/") or path.rpartition("/")[2], f"{scheme}://{path}", int(info["size"]))
        for path, info in files.items()
    ]
    return sorted(entries, key=lambda entry: entry.name)


@contextmanager
def open_read(uri: str) -> Iterator[IO[bytes]]:
    """A seekable binary file."""
    if not exists(uri):
        raise Refused(f"there is nothing at {uri!r}.")
    with open(normalise(uri), "rb") if is_local(uri) else _remote(uri).open(uri, "rb") as file:
        yield file


def read_bytes(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of a file, or all of them."""
    with open_read(uri) as file:
        file.seek(start or 0)
        return file.read() if stop is None else file.read(stop - (start or 0))


def write_atomic(uri: str, data: bytes) -> None:
    """Write a whole file at once; readers see the old content or the new, never a part."""
    if not is_local(uri):
        _remote(uri).pipe_file(uri, data)
        return
    with open_write(uri) as file:
        file.write(data)


@contextmanager
def open_write(uri: str) -> Iterator[IO[bytes]]:
    """A local-backed file that takes its name only when the block ends without an exception."""
    local = is_local(uri)
    folder = os.path.dirname(normalise(uri)) if local else None
    if folder:
        os.makedirs(folder, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix=".part-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if local:
            os.chmod(path, 0o644)
            os.replace(path, normalise(uri))
        else:
            _remote(uri).put_file(path, uri)
    finally:
        if os.path.exists(path):
            os.unlink(path)


def upload(path: str | Path, uri: str) -> None:
    """Copy a local file to a URI, atomically."""
    with open(path, "rb") as source, open_write(uri) as target:
        shutil.copyfileobj(source, target, 1 << 20)


def local_copy(uri: str, sha256: str) -> Path:
    """A local file with the content of `uri`: itself, or a download kept in this node's cache under its digest."""
    if is_local(uri):
        return Path(normalise(uri))
    home = Path(os.environ.get("VQRAY_CACHE", Path(tempfile.gettempdir()) / f"vqray-cache-{os.getuid()}"))
    path = home / sha256
    if not path.exists():
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_read(uri) as source, open_write(str(path)) as target:
            shutil.copyfileobj(source, target, 1 << 22)
    return path


def remove(uri: str) -> None:
    """Delete a file or a whole directory; nothing there is fine."""
    if not is_local(uri):
        if _remote(uri).exists(uri):
            _remote(uri).rm(uri, recursive=True)
        return
    path = normalise(uri)
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces. What digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_json_atomic(uri: str, value: Any) -> None:
    write_atomic(uri, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(uri: str) -> Any:
    """Raises Refused where the file is missing or is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{uri} is not JSON ({error}); it was not written by vqray, or it is damaged.") from None


def sha256_of_bytes(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remote(uri: str) -> Any:
    """The file system of a URI. Its credentials come from the environment and are never put into a message."""
    scheme = uri.partition("://")[0]
    if scheme != "s3":
        raise Refused(f"{uri!r} begins with {scheme}://; allowed are local paths, file:// and s3://.")
    # Listings are cached per instance; another worker's new files must be seen.
    return fsspec.filesystem("s3", use_listings_cache=False)
