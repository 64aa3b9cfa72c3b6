"""What a recipe tells of a bundle beyond metrics: it writes files, this claims their directory."""

from dataclasses import dataclass
from typing import Any

from pipelines import recipe, registry, storage, tracking
from pipelines.claims import claim
from pipelines.encode import REQUEST, opened_for
from pipelines.errors import Refused
from pipelines.options import validated
from pipelines.recipe import ReportJob

RECORD = "report.json"


@dataclass(frozen=True)
class Told:
    out: str
    digest: str
    """Of the bundle."""
    metrics: dict[str, float]
    files: list[str]
    skipped: bool


def able() -> list[str]:
    """Recipes that have a report."""
    return [name for name in recipe.names() if recipe.load(name).report is not None]


def report(bundle: str, shards: str, out: str, split: str = "test", overrides: dict[str, Any] | None = None) -> Told:
    """Write the report of a bundle on one split (or `all`) of a manifest.

    Raises:
        Refused: the recipe has none, the shards were prepared otherwise than the bundle's training data, a mistake in
            the settings, or an `out` that holds something else.
    """
    out, directory = storage.normalise(out), registry.local_bundle(bundle)
    opened, reader = opened_for(directory, shards, split)
    told = opened.recipe.report
    if told is None:
        raise Refused(f"recipe {opened.recipe.name!r} has no report; these have: {', '.join(able()) or '(none)'}.")
    settings = validated(told.Settings, overrides or {}, f"the report of {opened.recipe.name!r}")
    job = ReportJob(opened, directory, reader, split, settings, out)
    if told.refuse is not None:
        told.refuse(job)
    about = {"bundle": opened.digest, "shards": reader.manifest.digest, "split": split}
    # Where something lies may change between runs; whether anything was given decides what is in the report.
    located = {name for name, info in told.Settings.model_fields.items() if info.exclude}
    given = bool(located & (overrides or {}).keys())
    contents = {} if told.given is None else told.given(job)
    request = {"report": {**about, "settings": settings.model_dump(mode="json"), "located": given, "given": contents}}
    claim(out, REQUEST, request, "a report")
    home = storage.join(out, RECORD)
    if storage.exists(home):
        record = storage.read_json(home)
        return Told(out, opened.digest, record["metrics"], _uris(out, record["files"]), skipped=True)
    metrics = told.write(job)
    files = [name for name in told.files if storage.exists(storage.join(out, name))]
    tags = {"kind": "report", "bundle_digest": opened.digest, "shards_digest": reader.manifest.digest}
    run = tracking.start_run(opened.recipe.name, f"report {opened.digest[:12]} on {split}", about, tags)
    run.log_metrics([(0, {f"{split}/report/{name}": value for name, value in metrics.items()})])
    run.finish("FINISHED")
    storage.write_json_atomic(home, {"metrics": metrics, "files": files})
    return Told(out, opened.digest, metrics, _uris(out, files), skipped=False)


def _uris(out: str, names: list[str]) -> list[str]:
    return [storage.join(out, name) for name in names]
