"""The end of a search: its front and report, the champion by the rule, its metrics on test, and its place in the
registry. Nothing here trains: with another rule or name, a finished search is concluded anew.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import evaluate, front, registry, search_report, storage, trial_run
from pipelines.errors import Failed
from pipelines.front import Point
from pipelines.importance import importance
from pipelines.search_log import TRACKING
from pipelines.search_plan import Plan
from pipelines.trials import Trial

RESULT = "front.json"
ALIAS = "champion"


@dataclass(frozen=True)
class Conclusion:
    """What a search found."""

    front: list[dict[str, Any]]
    """Points of the front, the cheapest first: trials, settings, means and spreads on valid."""
    champion: dict[str, Any]
    """The champion's point, its trial, why it was picked, its bundle and its metrics on test."""
    registered: str | None
    """NAME@v3, where a name was asked for."""
    skipped: bool


def conclude(plan: Plan, trials: Sequence[Trial], digest: str) -> Conclusion:
    """Report a finished search to `<out>`: trials.parquet, front.png, and front.json last; publish its champion.

    Args:
        digest: of the search.

    Raises:
        Failed: no trial finished, or no point keeps within the rule's limits; the message says what to change.
    """
    request = {
        "search": digest,
        "objectives": [f"{direction}:{name}" for name, direction in plan.objectives],
        "pick": str(plan.rule),
    }
    home = storage.join(plan.out, RESULT)
    record = storage.read_json(home) if storage.exists(home) else {}
    skipped = record.get("request") == request
    if not skipped:
        new = record.get("request", {}).get("search") != digest
        record = {"request": request, **_concluded(plan, trials, new), "registered": {}}
        storage.write_json_atomic(home, record)
    for line in record["report"]:
        print(line, file=sys.stderr)
    registered = None
    if (name := plan.request.register) is not None:
        registered = _publish(plan, name, record)
        if record["registered"].get(name) != registered:
            registry.promote(registered, ALIAS)
            record["registered"][name] = registered
            storage.write_json_atomic(home, record)
            print(f"registered as {registered}, which is now {name}@{ALIAS}", file=sys.stderr)
            skipped = False
    return Conclusion(record["front"], record["champion"], registered, skipped)


def _concluded(plan: Plan, trials: Sequence[Trial], new: bool) -> dict[str, Any]:
    points = front.points_of(trials)
    best = front.pareto(points, plan.objectives)

    def draw(champion: Point | None) -> None:
        labels = {**search_report.UNITS, "distortion": f"distortion on valid ({plan.found.distortion})"}
        title = f"{plan.request.recipe}: {len(trials)} trials"
        on_front = {trial.number for point in best for trial in point.trials}
        search_report.write_table(plan.out, trials, on_front)
        search_report.write_plot(plan.out, trials, best, champion, plan.objectives, title, labels)

    try:
        if not points:
            raise Failed(_empty(trials, plan.out))
        chosen, why = front.pick(plan.rule, points, plan.objectives)
    except Failed:
        # What was concluded of these trials before stays as it is, with its champion in the plot.
        if new:
            draw(None)
        raise
    draw(chosen)
    shares = {name: importance(trials, (name, direction)) for name, direction in plan.objectives}
    tied = plan.feasibility.limit if plan.feasibility.limited else None
    report = search_report.lines_of(trials, points, best, chosen, why, plan.objectives, shares, tied)
    champion = _champion(plan, chosen, why)
    report.append(_said_of_test(champion, [name for name, _ in plan.objectives]))
    report.append(f"every trial in {storage.join(plan.out, search_report.TABLE)}, drawn in {search_report.PLOT}")
    return {
        "front": [_point(point) for point in best],
        "champion": champion,
        "importance": shares,
        "report": report,
    }


def _champion(plan: Plan, point: Point, why: str) -> dict[str, Any]:
    """The champion, measured on test: the only bundle of the search that sees it."""
    trial = front.best_repeat(point, plan.rule.objective or plan.objectives[0])
    test = None
    if plan.reader.rows("test"):
        out = storage.join(plan.out, "champion", str(trial.bundle_digest)[:16])
        metrics = evaluate.evaluate(trial.out, plan.reader.uri, out, "test").metrics
        named = plan.found.distortion
        test = {**metrics, **({"distortion": metrics[named]} if named in metrics else {})}
    return {
        **_point(point),
        "trial": trial.number,
        "why": why,
        "bundle": storage.join(trial.out, "bundle"),
        "bundle_digest": trial.bundle_digest,
        "test": test,
    }


def _publish(plan: Plan, name: str, record: dict[str, Any]) -> str:
    """Its bundle as a version of `name`, with where it comes from; a bundle that is there keeps its version."""
    champion = record["champion"]
    tracked = storage.join(trial_run.home_of(plan.out, champion["trial"]), TRACKING)
    published = registry.publish(
        registry.local_bundle(champion["bundle"]),
        name,
        run_id=storage.read_json(tracked)["run_id"] if storage.exists(tracked) else None,
        tags={
            "search": plan.out,
            "search_digest": record["request"]["search"],
            "search_trial": str(champion["trial"]),
            "search_pick": record["request"]["pick"],
            "shards_digest": plan.reader.manifest.digest,
        },
    )
    return f"{published.name}@v{published.version}"


def _point(point: Point) -> dict[str, Any]:
    return {
        "trials": [trial.number for trial in point.trials],
        "settings": point.settings,
        "valid": dict(point.values),
        "spread": None if len(point.trials) == 1 else dict(point.spreads),
    }


def _said_of_test(champion: dict[str, Any], names: Sequence[str]) -> str:
    if champion["test"] is None:
        return "the shards have no test split, so the champion was measured on valid only"
    shown = ["distortion", "usage", "perplexity", *names]
    found = {name: champion["test"][name] for name in dict.fromkeys(shown) if name in champion["test"]}
    listed = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    rows, repeats = champion["test"]["rows"], len(champion["trials"])
    which = f"trial {champion['trial']}, the best of its {repeats} repeats on valid," if repeats > 1 else "it"
    return f"on test, {rows:,.0f} rows that only champions are measured on, {which} has {listed}"


def _empty(trials: Sequence[Trial], out: str) -> str:
    failed = [trial for trial in trials if trial.state == "failed"]
    if not failed:
        return f"the front is empty: all {len(trials)} trials were stopped early. Search without --asha."
    last = (failed[0].error or "").strip().splitlines()[-1:]
    return (
        f"the front is empty: of {len(trials)} trials none finished, {len(failed)} failed. Trial {failed[0].number}:"
        f" {''.join(last)}. Whole tracebacks are in {storage.join(out, search_report.TABLE)}. Mend the cause and run"
        " the same command with --retry-failed, or search other values with --set and another --out."
    )
