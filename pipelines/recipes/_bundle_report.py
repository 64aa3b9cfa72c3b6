"""The report on codes of bundles: what became of each bundle, what codes say of it, and what new codes decode to.

Files: `bundles.html` and `bundles.json`, and `bundles.png` with the bundles seen from three sides. With `source=` also
`decoded/`, every bundle of the split as a file of the kind it came from, with that file's header. All on the split that
is asked for; what is learned (probes, code tables) is learned from train rows alone. The measures are those of
DVQ-VAE's code where it has one (BUAN at 0.05 of scaled coordinates, the shift of latents), and ours elsewhere.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from pipelines import storage
from pipelines.encode import seen_batches
from pipelines.errors import Refused
from pipelines.recipe import Batch, ReportJob
from pipelines.recipes import _bundle_files as bundle_files
from pipelines.recipes import _bundle_page as pages
from pipelines.recipes import _bundle_probes as probes
from pipelines.recipes import _bundle_scores as scores
from pipelines.recipes import _bundle_views as views
from pipelines.recipes._bundle_model import BundleModel, Chunk
from pipelines.shards import ShardReader
from vqcore import polylines

FILES = ("bundles.html", "bundles.png", "bundles.json")
FORMAT, VERSION = "vqray-bundles", 1
SHIFT = 0.5
"""Of every number of the latents, times alpha, as in the source."""


class BundleReportSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    shifted: int = Field(16, ge=1, description="chunks whose latents are shifted, at most")
    synthesised: int = Field(2, ge=1, description="chunks of each bundle that are interpolated, and draws of codes")
    seed: int = Field(42, ge=0, description="of which chunks are taken and of drawn codes")
    source: tuple[str, ...] = Field(
        (), exclude=True, description="the files the shards were made from: decoded ones are written with their headers"
    )
    written: Literal["mixture", "codes"] = Field(
        "mixture", description="what is decoded into files: what evaluation decodes, or the codes alone"
    )

    @field_validator("source", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def write(job: ReportJob, model: BundleModel) -> dict[str, float]:
    """Make the report's files; its metrics."""
    names: list[str] = job.reader.manifest.context["bundles"]
    found = list(chunks_of(job.reader, job.split, model))
    train = list(chunks_of(job.reader, "train", model))
    to_mm = float((model.millimetres(torch.ones(1)) - model.millimetres(torch.zeros(1))).item())
    sections = {
        "bundles": scores.per_bundle(found, names, to_mm),
        "rate": [] if model.apportioned is None else scores.rate(found, model.apportioned, model, to_mm),
        "shift": shifted(found[:: max(1, len(found) // job.settings.shifted)][: job.settings.shifted], model),
        "recognition": probes.recognition(train, found, model.num_codes),
        "synthesis": probes.synthesis(train, found, model, job.settings.synthesised, job.settings.seed),
    }
    about = {
        "format": FORMAT, "version": VERSION, "what": model.what, "bundle": job.trained.digest,
        "shards": job.reader.manifest.digest, "split": job.split,
    }  # fmt: skip
    numbers = metrics_of(sections)
    if job.settings.source:
        numbers["files"] = float(written(job, model))
    storage.write_json_atomic(storage.join(job.out, FILES[2]), {**about, "metrics": numbers, **sections})
    picture = views.views([views.Drawn(names[one.label], *_both(one, model)) for one in _largest(found)])
    with storage.writing(storage.join(job.out, FILES[1])) as staged:
        picture.savefig(staged, format="png")
    page = pages.page_of({**about, "metrics": numbers, **sections}, picture)
    storage.write_atomic(storage.join(job.out, FILES[0]), page.encode("utf-8"))
    return numbers


def refuse(job: ReportJob) -> None:
    """Raise Refused, before any work, for what cannot end well."""
    if job.split in ("train", "all"):
        raise Refused(f"split={job.split} was given; probes learn from train rows, so name valid or test.")
    if job.settings.source:
        bundle_files.check_sources(job.reader, job.split, job.settings.source)
    if job.settings.written == "codes" and not job.trained.recipe.codebooks(job.trained.settings):
        raise Refused("written=codes was given, and this model has no codebook; allowed here is written=mixture.")
    if job.reader.rows("train") == 0:
        raise Refused("the shards have no train rows, and bundles are recognised by what is learned from them.")


def written(job: ReportJob, model: BundleModel) -> int:
    """Decoded bundles below `decoded/`; how many files."""
    alone = job.settings.written == "codes"

    def decoded(batch: Batch) -> Iterator[tuple[int, Tensor]]:
        points, real, keys = model.chunks(batch)
        if alone and model.codes is not None and model.look_up is not None:
            made = model.render(model.look_up(model.codes(points, real)), real)
        else:
            made = model.render(model.latents(points, real, keys), real)
        rows = model.rows(batch)
        for row in rows.unique().tolist():
            # Chunks of a row that hold nothing come last, and are not among these.
            yield row, model.millimetres(made[rows == row].flatten(0, 1))

    return bundle_files.write_decoded(job.reader, job.split, job.settings.source, decoded, job.out)


def chunks_of(reader: ShardReader, split: str, model: BundleModel) -> Iterator[Chunk]:
    """Every chunk of a split with what became of it."""
    for shard in range(len(reader.manifest.shards)):
        for batch, _, _ in seen_batches(reader, shard, split):
            with torch.inference_mode():
                points, real, keys = model.chunks(batch)
                latents = model.latents(points, real, keys)
                made = model.render(latents, real)
                codes = None if model.codes is None else model.codes(points, real)
                stored = None if model.look_up is None or codes is None else model.render(model.look_up(codes), real)
                places = model.places(real)
            labels = batch.columns["label"][model.rows(batch)].tolist()
            for place, label in enumerate(labels):
                yield Chunk(
                    label,
                    points[place],
                    real[place],
                    latents[place],
                    made[place],
                    places[place],
                    None if codes is None else codes[place],
                    None if stored is None else stored[place],
                )


def shifted(found: list[Chunk], model: BundleModel) -> list[dict[str, float]]:
    """What a shift of all latents by alpha / 2 does: how far points move, and how much streamlines bend (scaled)."""
    rows = []
    for alpha in np.linspace(-1, 1, 9).tolist():
        moved, bent = [], []
        for one in found:
            with torch.inference_mode():
                made = model.render(one.latents.unsqueeze(0) + alpha * SHIFT, one.real.unsqueeze(0))[0][one.real]
            moved.append((made - one.made[one.real]).norm(dim=-1).mean())
            bent.append(polylines.bending(made).mean())
        rows.append(
            {"alpha": alpha, "moved": float(torch.stack(moved).mean()), "bending": float(torch.stack(bent).mean())}
        )
    return rows


def metrics_of(sections: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of all sections, with names for tables."""
    whole = sections["bundles"][-1]
    numbers = {name: value for name, value in whole.items() if isinstance(value, float)}
    worst = min(sections["bundles"][:-1], key=lambda one: one["buan"])
    numbers["buan_of_the_worst_bundle"] = worst["buan"]
    numbers |= {
        f"shift_{key}": float(np.mean([sections["shift"][n][key] for n in (0, -1)])) for key in ("moved", "bending")
    }
    numbers |= {f"recognised_by_{name}": value for name, value in sections["recognition"]["accuracy"].items()}
    numbers |= {f"buan_of_{one['draws']}_codes": one["buan"] for one in sections["rate"]}
    for name, one in sections["synthesis"].items():
        numbers |= {f"{name}_{key}": value for key, value in one.items() if isinstance(value, float)}
    return numbers


def _largest(found: list[Chunk]) -> list[Chunk]:
    """The largest chunk of each of a few bundles."""
    best: dict[int, Chunk] = {}
    for one in found:
        if one.label not in best or int(one.real.sum()) > int(best[one.label].real.sum()):
            best[one.label] = one
    return sorted(best.values(), key=lambda one: -int(one.real.sum()))[: views.MOST_BUNDLES]


def _both(one: Chunk, model: BundleModel) -> tuple[Tensor, Tensor]:
    return model.millimetres(one.lines), model.millimetres(one.made[one.real])
