"""Registry packages: nothing is opened whose digest is not the expected one, nothing is written outside its folder."""

import hashlib
import zipfile

import pytest

from pipelines.errors import Failed, Refused
from pipelines.packages import fetch, unpack


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/images/a.png", b"a")
        archive.writestr("data/images/deep/b.png", b"b")
        archive.writestr("data/other.py", b"print()")
    return path


def test_only_the_named_folder_is_unpacked(wheel, tmp_path):
    home = unpack(wheel, "data/images", tmp_path / "out")
    assert {p.relative_to(home).as_posix() for p in home.rglob("*.png")} == {"a.png", "deep/b.png"}
    assert not (tmp_path / "out" / "data" / "other.py").exists()


def test_unpacking_again_keeps_what_is_there(wheel, tmp_path):
    home = unpack(wheel, "data/images", tmp_path / "out")
    (home / "a.png").write_bytes(b"changed")
    assert (unpack(wheel, "data/images", tmp_path / "out") / "a.png").read_bytes() == b"changed"


def test_member_that_climbs_out_is_refused(tmp_path):
    path = tmp_path / "evil-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/images/../../../escaped.txt", b"x")
    with pytest.raises(Refused, match="climbs out"):
        unpack(path, "data/images", tmp_path / "out")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_folder_that_is_not_there_is_refused(wheel, tmp_path):
    with pytest.raises(Refused, match="no folder 'nothing'"):
        unpack(wheel, "nothing", tmp_path / "out")


def test_a_wheel_already_here_is_not_downloaded_again(wheel):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert fetch("no-such-package-anywhere", "1.0", digest, wheel.parent) == wheel


def test_a_download_that_fails_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(Failed, match=r"pip could not download nothing-at-all==1\.0: .*No matching distribution"):
        fetch("nothing-at-all", "1.0", "0" * 64, tmp_path)
