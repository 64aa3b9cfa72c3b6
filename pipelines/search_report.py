"""What a search leaves for people: a table of all trials, a plot of them with the front, and lines that claim no more
than the repeats allow.
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from pipelines import front, storage
from pipelines.front import Objective, Point
from pipelines.pictures import Panel, front_plot
from pipelines.search_log import shown
from pipelines.trials import Trial

TABLE, PLOT = "trials.parquet", "front.png"
UNITS = {
    "bits_per_row": "bits per row",
    "seconds": "seconds of training",
    "steps": "steps of training",
    "parameters": "parameters",
    "usage": "share of codes used",
    "perplexity": "perplexity of codes",
}
MOST = 12
"""Lines of one kind; further ones are counted."""


def write_table(out: str, trials: Sequence[Trial], on_front: set[int]) -> str:
    """Every trial, also failed ones, as a row of `<out>/trials.parquet`.

    Columns: number, `setting/NAME`, repeat, seed, state, `valid/METRIC`, bits_per_row, parameters, seconds, steps,
    on_front, grown_from, prefix_of, bundle_digest, error.
    """
    columns: dict[str, list[Any]] = {"number": [trial.number for trial in trials]}
    for key in dict.fromkeys(key for trial in trials for key in trial.settings):
        columns[f"setting/{key}"] = [trial.settings.get(key) for trial in trials]
    for name in ("repeat", "seed", "state"):
        columns[name] = [getattr(trial, name) for trial in trials]
    for name in dict.fromkeys(name for trial in trials for name in trial.metrics):
        columns[f"valid/{name}"] = [trial.metrics.get(name) for trial in trials]
    for name in ("bits_per_row", "parameters", "seconds", "steps"):
        columns[name] = [getattr(trial, name) for trial in trials]
    columns["on_front"] = [trial.number in on_front for trial in trials]
    for name in ("grown_from", "prefix_of", "bundle_digest", "error"):
        columns[name] = [getattr(trial, name) for trial in trials]
    uri = storage.join(out, TABLE)
    with storage.writing(uri) as staged:
        parquet.write_table(pa.table({name: _column(values) for name, values in columns.items()}), str(staged))
    return uri


def write_plot(
    out: str, trials: Sequence[Trial], best: Sequence[Point], champion: Point | None, axes: Sequence[Objective],
    title: str, labels: Mapping[str, str],
) -> str:  # fmt: skip
    """Every trial that has a place on the axes, the front and the champion, as `<out>/front.png`.

    Args:
        axes: the objectives; the first is drawn over each of the others, or over bits a row where it is the only one.
        labels: metric -> what its axis is called.
    """
    y, *others = axes
    panels = [
        _panel(trials, best, champion, x, y, labels, stepped=len(others) == 1)
        for x in others or [("bits_per_row", "min")]
    ]
    uri = storage.join(out, PLOT)
    with storage.writing(uri) as staged:
        front_plot(panels, title).savefig(staged, format="png")
    return uri


def _panel(
    trials: Sequence[Trial], best: Sequence[Point], champion: Point | None, x: Objective, y: Objective,
    labels: Mapping[str, str], stepped: bool,
) -> Panel:  # fmt: skip
    placed: dict[str, list[tuple[float, float]]] = {}
    for trial in trials:
        values = trial.values()
        if x[0] in values and y[0] in values:
            placed.setdefault(trial.state, []).append((values[x[0]], values[y[0]]))
    missing = Counter(str(trial.state) for trial in trials)
    missing.subtract({state: len(found) for state, found in placed.items()})
    return Panel(
        names=(labels.get(x[0], x[0]), labels.get(y[0], y[0])),
        placed=placed,
        best=[(point.values[x[0]], point.values[y[0]], f"#{point.number}") for point in best],
        champion=(champion.values[x[0]], champion.values[y[0]]) if champion else None,
        missing=+missing,
        # Of more objectives than two, a front seen from one side is no line.
        step=None if not stepped else "post" if x[1] == "min" else "pre",
        falling=y[1] == "min",
    )


def lines_of(
    trials: Sequence[Trial], points: Sequence[Point], best: Sequence[Point], champion: Point, why: str,
    objectives: Sequence[Objective], shares: Mapping[str, Any], tied: str | None,
) -> list[str]:  # fmt: skip
    """The report that people read.

    Args:
        shares: objective -> what `importance` says of it.
        tied: the limit by which settings follow from each other, if there is one.
    """
    names = [name for name, _ in objectives]
    states = Counter(str(trial.state) for trial in trials)
    counted = ", ".join(f"{states[state]} {word}" for state, word in _WORDS.items() if states[state])
    directions = " and ".join(f"{direction} {name}" for name, direction in objectives)
    front_of = f"front of {directions}: {len(best)} of {len(points)} points ({counted})"
    return [
        front_of,
        *_front_table(best, champion, names),
        *_said_of_spread(points, best, objectives),
        *_said_of_importance(shares, tied),
        *_said_of_growth(trials),
        *_said_of_prefixes(trials),
        f"champion: trial {champion.number} ({_settings(champion)}): {why}",
    ]


_WORDS = {"finished": "trials finished", "failed": "failed", "pruned": "stopped early"}


def _front_table(best: Sequence[Point], champion: Point, names: Sequence[str]) -> list[str]:
    keys = list(best[0].settings)
    further = [name for name in ("bits_per_row", "usage", "seconds") if name not in names]
    rows = [["trial", *keys, *names, *(name for name in further if name in best[0].values), ""]]
    for point in best[: 2 * MOST]:
        mark = "<- champion" if point.number == champion.number else ""
        values = [_value(point, name) for name in (*names, *further) if name in best[0].values]
        rows.append([str(point.number), *(shown(point.settings.get(key)) for key in keys), *values, mark])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}"
        for row in rows
    ]
    left = [f"  and {len(best) - 2 * MOST} more, in {TABLE}"] if len(best) > 2 * MOST else []
    return [line.rstrip() for line in lines] + left


def _said_of_spread(points: Sequence[Point], best: Sequence[Point], objectives: Sequence[Objective]) -> list[str]:
    counts = {len(point.trials) for point in points}
    if max(counts) == 1:
        return [
            "one run a point: the spread is unknown, so no difference between points is known to be real;"
            " --repeats 3 (another --out) would tell"
        ]
    lines = [
        "a difference is called real where it is larger than the sum of both standard deviations over repeats"
        + ("; two repeats show a spread only roughly" if max(counts) == 2 else "")
    ]
    lines += [
        f"  {a.number} -> {b.number}: " + "; ".join(_compared(a, b, name) for name, _ in objectives)
        for a, b in list(itertools.pairwise(best))[:MOST]
    ]
    if near := front.within_spread(points, best, objectives):
        named = ", ".join(str(point.number) for point in near[:MOST]) + (", ..." if len(near) > MOST else "")
        lines.append(f"off the front by less than the spread, so as good as it for all that is known: trials {named}")
    return lines


def _compared(a: Point, b: Point, name: str) -> str:
    values = f"{name} {shown(a.values[name])} -> {shown(b.values[name])}"
    if a.values[name] == b.values[name]:
        return f"{values}, the same"
    verdict = {True: "real", False: "inside the spread, no difference", None: "one run only, spread unknown"}
    return f"{values}, {verdict[front.differs(a, b, name)]}"


def _said_of_importance(shares: Mapping[str, Any], tied: str | None) -> list[str]:
    lines = []
    for name, found in shares.items():
        said = found if isinstance(found, str) else ", ".join(f"{key} {share:.0%}" for key, share in found.items())
        lines.append(f"what matters for {name}: {said}")
    if tied and any(not isinstance(found, str) for found in shares.values()):
        lines.append(f"  (with --{tied} settings follow from each other, so their shares cannot be told apart)")
    return lines


def _said_of_growth(trials: Sequence[Trial]) -> list[str]:
    """What warm starts saved: steps and seconds of a trial that grew, beside those of the trials that started cold."""
    grown = [trial for trial in trials if trial.state == "finished" and trial.grown_from is not None]
    cold = [trial for trial in trials if trial.state == "finished" and trial.grown_from is None]
    if not grown or not cold:
        return []
    each, before = grown[0].steps, cold[0].steps
    spent, saved = sum(trial.steps for trial in (*grown, *cold)), len(grown) * (before - each)
    return [
        f"{len(grown)} trials grew from the next smaller codebook in {each:,} steps instead of {before:,}:"
        f" {saved / (spent + saved):.0%} of the search's steps saved. How they would do cold, this search cannot tell."
    ]


def _said_of_prefixes(trials: Sequence[Trial]) -> list[str]:
    """What one run that serves several depths saved."""
    made = {trial.number: trial for trial in trials if trial.state == "finished"}
    cut = [trial for trial in made.values() if trial.prefix_of is not None]
    if not cut:
        return []
    spent, saved = sum(t.steps for t in made.values()), sum(made[t.prefix_of].steps for t in cut if t.prefix_of in made)
    deep = len({trial.prefix_of for trial in cut})
    return [
        f"{len(cut)} trials are the first levels of {deep} deeper ones, to the bit what they would have learned:"
        f" {spent:,} steps made instead of {spent + saved:,}, {saved / (spent + saved):.0%} saved."
    ]


def _value(point: Point, name: str) -> str:
    if name == "seconds" and all(trial.prefix_of is not None for trial in point.trials):
        return f"in #{point.trials[0].prefix_of}"
    if name not in point.values:
        return "-"
    spread = point.spreads[name]
    return shown(point.values[name]) + (f" ±{spread:.2g}" if spread else "")


def _settings(point: Point) -> str:
    return " ".join(f"{key}={shown(value)}" for key, value in point.settings.items())


def _column(values: list[Any]) -> pa.Array:
    """As Arrow infers it; what no one type holds as JSON text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([json.dumps(value) for value in values])
