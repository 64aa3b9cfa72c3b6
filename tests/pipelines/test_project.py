"""The archive that goes with a job."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipelines import project
from pipelines.errors import Refused

ROOT = Path(__file__).parents[2]


def test_the_unpacked_archive_runs_by_itself(tmp_path):
    made = project.pack(tmp_path / "vqray.zip")
    with zipfile.ZipFile(made.path) as archive:
        archive.extractall(tmp_path / "there")
    there = {"cwd": tmp_path / "there", "capture_output": True, "text": True, "timeout": 60}
    script = "import pipelines.options, vqcore; print(pipelines.__file__, vqcore.__file__)"
    where = subprocess.run([sys.executable, "-c", script], **there)
    assert where.stdout.split() == [str(tmp_path / f"there/{name}/__init__.py") for name in ("pipelines", "vqcore")]
    told = subprocess.run([sys.executable, "-m", "jobs.cli"], **there)
    assert told.returncode == 0, told.stderr
    assert "train" in told.stdout
    assert made.files == sum(path.is_file() for path in (tmp_path / "there").rglob("*.*"))
    assert made.packed == made.path.stat().st_size < made.bytes < project.LIMIT / 5


def test_it_holds_the_packages_and_the_versions_and_nothing_else(tmp_path):
    with zipfile.ZipFile(project.pack(tmp_path / "vqray.zip").path) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "vqcore",
        "pipelines",
        "jobs",
        "pyproject.toml",
        "constraints.txt",
    }
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc") or "/." in name]
    for package in project.PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names


def test_the_same_files_are_the_same_bytes(tmp_path):
    first, second = (project.pack(tmp_path / f"{n}.zip").path.read_bytes() for n in range(2))
    assert first == second


def test_data_among_the_program_is_refused_by_name_before_anything_is_written(tmp_path):
    for package, size in (("vqcore", 10), ("pipelines", 3_000_000), ("jobs", 2_000_000)):
        (tmp_path / package).mkdir()
        (tmp_path / package / "weights.safetensors").write_bytes(bytes(size))
    expected = (
        r"has 4\.8 MiB, and at most 1\.0 MiB .* pipelines/weights\.safetensors \(2\.9 MiB\),"
        r" jobs/weights\.safetensors \(1\.9 MiB\)"
    )
    with pytest.raises(Refused, match=expected):
        project.pack(tmp_path / "vqray.zip", root=tmp_path, limit=2**20)
    assert not (tmp_path / "vqray.zip").exists()
