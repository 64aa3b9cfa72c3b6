"""The program itself as one archive, so that a job runs what is installed here. Data never travels in it."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import Refused

PACKAGES = ("vqcore", "pipelines", "jobs")
BESIDE = ("pyproject.toml", "constraints.txt")
LIMIT = 20 * 2**20
"""Bytes before compression: twenty times what the program has, far below what Ray's head takes."""
EPOCH = (1980, 1, 1, 0, 0, 0)
JOB = "VQRAY_JOB"
"""An environment variable of a process that such an archive was unpacked for: the job's id."""
RUNS = "VQRAY_RUNS"
"""An environment variable: where runs go that are given no --out."""


class Package(NamedTuple):
    path: Path
    files: int
    bytes: int
    """Of the files."""
    packed: int
    """Of the archive."""


def pack(archive: Path, root: Path | None = None, limit: int = LIMIT) -> Package:
    """Write the packages below `root` (default: where this one was imported from) into a zip.

    The same files give the same bytes, so Ray uploads them once.

    Raises:
        Refused: more than `limit` bytes; the largest files are named.
    """
    root = root or Path(__file__).parents[1]
    found = {name: path.stat().st_size for name, path in _files(root)}
    total = sum(found.values())
    if total > limit:
        largest = sorted(found.items(), key=lambda item: -item[1])[:5]
        raise Refused(
            f"the program at {root} has {mebibytes(total)}, and at most {mebibytes(limit)} travel with a job; the"
            f" largest files: {', '.join(f'{name} ({mebibytes(size)})' for name, size in largest)}."
            " Data belongs in s3:// or on the cluster's disks: move it out of the packages."
        )
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as written:
        for name in found:
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            written.writestr(entry, (root / name).read_bytes())
    return Package(archive, len(found), total, archive.stat().st_size)


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for name in BESIDE:
        if (root / name).is_file():
            yield name, root / name
    for package in PACKAGES:
        for folder, below, names in os.walk(root / package):
            below[:] = sorted(name for name in below if name != "__pycache__" and not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix != ".pyc" and not name.startswith(".") and path.is_file():
                    yield path.relative_to(root).as_posix(), path
