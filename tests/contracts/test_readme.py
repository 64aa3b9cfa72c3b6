"""The README is true: its example runs, its tree names every module, and its verbs are those there are."""

import re
from pathlib import Path

from jobs import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_learns_codes():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.strip().splitlines()) <= 18
    made: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), made)
    codes = made["codes"]
    assert codes.shape == (5,)
    assert made["loss"] < 3.0
    assert ((codes >= 0) & (codes < 64)).all()


def tree() -> set[str]:
    """Paths of the Python files that the README's tree names, from its indentation."""
    (drawn,) = re.findall(r"```\n(vqcore/ .*?)```", TEXT, re.DOTALL)
    paths, folders = set(), []
    for line in drawn.splitlines():
        name, *phrase = line.split()
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        if name.endswith(".py"):
            assert phrase, f"{name} has no phrase"
            paths.add("".join(folders))
    return paths


def test_the_tree_names_every_module_and_no_other():
    found = [path for package in ("vqcore", "pipelines", "jobs") for path in (ROOT / package).rglob("*.py")]
    modules = {path.relative_to(ROOT).as_posix() for path in found if path.name != "__init__.py"}
    assert not tree() - modules
    # A new verb, recipe or quantizer is one new file: no line elsewhere has to change for it.
    free = ("jobs/", "pipelines/recipes/", "vqcore/quantizers/")
    assert not {path for path in modules - tree() if not path.startswith(free)}


def test_every_verb_is_shown():
    for verb in cli.verbs():
        assert f"vqray {verb}" in TEXT, verb


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]{3,}@", TEXT)
