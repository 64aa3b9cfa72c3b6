"""Who may import what, read from the syntax tree of every file: the layers of the design, kept by a machine."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("vqcore", "pipelines", "jobs", "tests")
STORAGE_AND_CLUSTER = {"ray", "mlflow", "pyarrow", "s3fs", "fsspec"}
RAY_MODULES = {
    "ingest",
    "encode",
    "group",
    "tune",
    "decode",
    "evaluate",
    "parts",
    "cluster",
    "mailbox",
    "jobs_api",
    "cluster_file",
}
MLFLOW_MODULES = {"tracking", "registry"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNPICKLING = {"pickle.load", "pickle.loads", "pickle.Unpickler"}
IMPORTERS = {"importlib.import_module", "import_module", "__import__"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}


def sources(*packages: str) -> list[Path]:
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert found, f"no Python file under {packages}: is {ROOT} the root?"
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported by a literal name, at any depth; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import cannot leave its package's root, so only its tail can name something forbidden.
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in IMPORTERS:
            yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def _name(node: ast.expr) -> str:
    """`a.b.c` for an attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        parent = _name(node.value)
        return f"{parent}.{node.attr}" if parent else ""
    return ""


def forbidden_imports(tree: ast.AST, roots: set[str]) -> list[tuple[int, str]]:
    return [(line, name) for line, name in imports(tree) if name.split(".")[0] in roots]


def unsafe_loads(tree: ast.AST) -> list[tuple[int, str]]:
    """Calls that can unpickle: torch.load without weights_only=True, anything with allow_pickle=True, pickle's own."""
    bad = []
    torch_load = {"torch.load"} | {"load" for _, name in imports(tree) if name == "torch.load"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        literal = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        given = {k.arg for k in node.keywords}
        if _name(node.func) in torch_load and literal.get("weights_only") is not True:
            bad.append((node.lineno, "torch.load without weights_only=True"))
        if _name(node.func) in UNPICKLING:
            bad.append((node.lineno, _name(node.func)))
        if "allow_pickle" in given and literal.get("allow_pickle") is not False:
            bad.append((node.lineno, "allow_pickle"))
    return bad


def recipe_names_in(tree: ast.AST, names: set[str]) -> list[tuple[int, str]]:
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]


def complain(path: Path, found: list[tuple[int, str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in found]


def test_vqcore_knows_no_cluster_and_no_storage() -> None:
    roots = STORAGE_AND_CLUSTER | {"pipelines", "jobs"}
    assert not [line for path in sources("vqcore") for line in complain(path, forbidden_imports(parse(path), roots))]


def test_pipelines_never_imports_jobs() -> None:
    assert not [
        line for path in sources("pipelines") for line in complain(path, forbidden_imports(parse(path), {"jobs"}))
    ]


def test_no_product_code_imports_tests() -> None:
    paths = sources("vqcore", "pipelines", "jobs")
    assert not [line for path in paths for line in complain(path, forbidden_imports(parse(path), {"tests"}))]


@pytest.mark.parametrize(("root", "allowed"), [("ray", RAY_MODULES), ("mlflow", MLFLOW_MODULES)])
def test_only_named_modules_of_pipelines_know_ray_and_mlflow(root: str, allowed: set[str]) -> None:
    at_home = {ROOT / "pipelines" / f"{name}.py" for name in allowed}
    strangers = [path for path in sources("vqcore", "pipelines", "jobs") if path not in at_home]
    assert not [line for path in strangers for line in complain(path, forbidden_imports(parse(path), {root}))]


def test_nothing_unpickles() -> None:
    for path in sources(*PACKAGES):
        tree = parse(path)
        # Tests write pickles, to plant them.
        plants = path.is_relative_to(ROOT / "tests")
        forbidden = forbidden_imports(tree, UNPICKLERS - {"pickle"} if plants else UNPICKLERS)
        assert not complain(path, forbidden + unsafe_loads(tree))


def test_no_module_is_named_after_nothing() -> None:
    vague = [p for p in sources(*PACKAGES) if p.stem in VAGUE or VAGUE & set(p.relative_to(ROOT).parts)]
    assert not vague, f"a module is named for what it holds: {vague}"


def test_recipes_are_found_by_name_never_listed() -> None:
    """A tenth recipe must need no edit elsewhere, so no other file may spell a recipe's name as a string."""
    recipes = {
        path.stem: path for path in (ROOT / "pipelines" / "recipes").glob("*.py") if not path.stem.startswith("_")
    }
    for path in sources("vqcore", "pipelines", "jobs"):
        elsewhere = {name for name, home in recipes.items() if home != path}
        if path != ROOT / "jobs" / "demo.py":  # the default of `vqray demo`
            assert not complain(path, recipe_names_in(parse(path), elsewhere))


@pytest.mark.parametrize(
    "code",
    [
        "import ray",
        "import ray.data as rd",
        "from ray import train",
        "def f():\n    from ray.train import Checkpoint",
        "if True:\n    import os, ray",
        "import importlib\nimportlib.import_module('ray.tune')",
        "__import__('ray')",
    ],
)
def test_the_walk_sees_every_way_to_import(code: str) -> None:
    assert forbidden_imports(ast.parse(code), {"ray"})
    assert not forbidden_imports(ast.parse(code.replace("ray", "rays")), {"ray"})


def test_the_walk_sees_every_unsafe_load() -> None:
    for bad in (
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "from torch import load\nload(p)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "pickle.loads(data)",
        "pickle.Unpickler(file)",
    ):
        assert unsafe_loads(ast.parse(bad)), bad
    for good in (
        "torch.load(p, weights_only=True)",
        "json.load(f)",
        "np.load(p, allow_pickle=False)",
        "load(p)",
        "pickle.dumps(trap)",
    ):
        assert not unsafe_loads(ast.parse(good)), good
    assert recipe_names_in(ast.parse("x = {'some_recipe': 1}"), {"some_recipe"}) == [(1, "some_recipe")]
    assert not recipe_names_in(ast.parse("'''about some_recipe'''\nimport some_recipe"), {"some_recipe"})
