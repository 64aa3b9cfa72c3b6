"""The README is true: its example runs, its tree names every module, and its verbs are those there are."""

import re
from pathlib import Path

import pytest

import jobs
import pipelines
import vqcore
from jobs import cli

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_the_example_runs_and_learns_codes():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.strip().splitlines()) <= 18
    made: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), made)
    codes = made["codes"]
    assert codes.shape == (5,)
    assert made["loss"] < 3.0
    assert ((codes >= 0) & (codes < 64)).all()


@pytest.mark.parametrize("package", [vqcore, pipelines])
def test_the_tree_names_every_module(package):
    home = Path(package.__path__[0])
    for path in home.rglob("*.py"):
        if not path.name.startswith("_"):
            assert path.name in TEXT or path.stem in TEXT, f"{path.relative_to(home.parent)} is not in the README"


def test_every_verb_is_shown():
    assert Path(jobs.__path__[0]).is_dir()
    for verb in cli.verbs():
        assert f"vqray {verb}" in TEXT, verb


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]{3,}@", TEXT)
