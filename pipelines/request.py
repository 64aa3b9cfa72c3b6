"""A training run as it was asked for, checked against its recipe and its shards before anything is started."""

import os
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from pipelines import recipe, storage, trained, warm
from pipelines.errors import Refused
from pipelines.feed import columns_of
from pipelines.ingest_request import Asked
from pipelines.loop import PRECISIONS, RunSpec
from pipelines.options import validated
from pipelines.plan import lanes_for
from pipelines.project import RUNS
from pipelines.recipe import Recipe, Settings
from pipelines.shards import ShardReader
from pipelines.stream_request import Stream, Streamed, check_stream, stream_of
from vqcore.quantizers.contract import quantizers_in

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Only `recipe`, `preset`, `overrides`, `seed`, `precision` and `warm_from`, with the shards, change the result.
    """

    recipe: str
    shards: str
    out: str | None = None
    """None: a directory named after what changes the result, so that the same request finds its run again."""
    preset: str | None = None
    """None: `paper` where there is CUDA, else `small`."""
    overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    workers: int = 1
    at_least: int | None = None
    """With fewer workers than `workers`, down to this many, the run begins and goes on too. None: it waits for all."""
    gpus_per_worker: float = 0.0
    micro_batches: int = 1
    """Forwards a step of each of `workers` workers; there is one update all the same."""
    precision: str = "float32"
    checkpoint_every: int = 500
    patience: float = 600.0
    """Seconds without one written checkpoint after which the run ends."""
    hang_after: float = 600.0
    """Seconds that workers wait for one of them before they call it hung and start again."""
    restarts: int = 3
    """How often in a row, without a new checkpoint in between, workers are started again after one died."""
    warm_from: str | None = None
    """A bundle with fewer codes that the run starts from."""
    stream: Streamed | None = None
    """The shards are made meanwhile; None: they are finished."""


@dataclass(frozen=True)
class Prepared:
    """A request whose settings were checked against its recipe and shards."""

    spec: RunSpec
    about: dict[str, Any]
    """What the result depends on: what reruns must repeat, and what the card tells."""
    asked: Asked | None = None
    """The ingest that goes on beside a streamed run."""


class Data(NamedTuple):
    """The rows of a run, as far as they are known before it begins."""

    uri: str
    kind: str
    settings: dict[str, Any]
    """The corpus's."""
    fitted_on: dict[str, Any]
    """What of `about` says which rows they are."""
    parents: dict[str, str]


def prepare(request: Request) -> Prepared:
    """Check a request against its recipe and shards. Nothing is written or started.

    Raises:
        Refused: a mistake in the request.
    """
    found = recipe.load(request.recipe)
    stream = stream_of(request.stream, found, request.shards) if request.stream else None
    data = _streamed(request, stream) if stream else _stored(request)
    preset = _preset(request, found)
    settings = _settings(request, found, preset, data)
    _check(request)
    about = _about(request, found, preset, settings, data)
    out = storage.normalise(request.out or storage.join(os.environ.get(RUNS) or "runs", _name(about)))
    if request.out is None:
        print(f"run in {out}", file=sys.stderr)
    if stream:
        check_stream(stream, found.stages(settings), data.uri, out)
    lanes = _recorded_lanes(out) or lanes_for(settings.batch_size, request.workers)
    if request.workers > lanes:
        raise Refused(
            f"this run was begun with {lanes} lanes, so it takes at most {lanes} workers, not {request.workers}."
        )
    spec = RunSpec(
        request.recipe,
        about["settings"],
        data.uri,
        request.seed,
        lanes,
        out,
        checkpoint_every=request.checkpoint_every,
        micro_batches=request.micro_batches,
        most_workers=request.workers,
        precision=request.precision,
        patience=request.patience,
        warm_from=request.warm_from,
        stream={"kind": data.kind, "settings": data.settings, "once": stream.once} if stream else None,
    )
    if request.micro_batches > 1:
        _check_accumulation(request, found, settings)
    return Prepared(spec, {**about, "lanes": lanes}, stream.asked if stream else None)


def _stored(request: Request) -> Data:
    """Of finished shards."""
    reader = ShardReader(storage.normalise(request.shards))
    manifest, rows = reader.manifest, reader.rows("train")
    if rows == 0:
        raise Refused(
            f"{reader.uri} has no rows in its train split ({manifest.rows()} in all): ingest more files"
            " or a smaller holdout."
        )
    fitted_on = {"fitted_on": {"split": "train", "rows": rows}}
    return Data(reader.uri, manifest.kind, manifest.settings, fitted_on, {"shards": manifest.digest})


def _streamed(request: Request, stream: Stream) -> Data:
    """Of shards that are not all there: how many rows and which digest they have is known at the end, and then said in
    the card."""
    home = storage.normalise(request.shards)
    return Data(home, stream.kind, stream.settings, {"stream": {"ingest": stream.digest}}, {})


def _preset(request: Request, found: Recipe) -> str:
    preset = request.preset or ("paper" if torch.cuda.is_available() else "small")
    if preset not in found.presets:
        raise Refused(f"recipe {request.recipe!r} has no preset {preset!r}; allowed: {', '.join(found.presets)}.")
    if request.preset is None:
        print(f"preset {preset!r} ({'CUDA found' if preset == 'paper' else 'no CUDA here'})", file=sys.stderr)
    return preset


def _settings(request: Request, found: Recipe, preset: str, data: Data) -> Settings:
    if data.kind not in found.corpus:
        raise Refused(f"recipe {request.recipe!r} trains on {' or '.join(found.corpus)}; {data.uri} holds {data.kind}.")
    settings = validated(found.Settings, {**found.presets[preset], **request.overrides}, f"recipe {request.recipe!r}")
    resolved: Settings = found.resolve(settings, columns_of(data))
    for key in request.overrides:
        if getattr(settings, key) != getattr(resolved, key):
            raise Refused(f"{key} follows from the shards ({getattr(resolved, key)}); leave it out of --set.")
    return resolved


def _check(request: Request) -> None:
    if request.seed < 0 or request.checkpoint_every < 1:
        raise Refused(
            f"--seed {request.seed} and --checkpoint-every {request.checkpoint_every} were given; a seed is 0 or more,"
            " and there is a checkpoint every 1 or more steps."
        )
    if request.at_least is not None and not 1 <= request.at_least <= request.workers:
        raise Refused(
            f"--workers {request.at_least}..{request.workers} was given; write the fewest first, 1 or more: 2..8."
        )
    if request.precision not in PRECISIONS:
        raise Refused(f"--precision {request.precision!r} was given; allowed: {', '.join(PRECISIONS)}.")
    if request.micro_batches < 1 or request.patience < 0 or request.hang_after <= 0 or request.restarts < 0:
        raise Refused(
            f"--micro-batches {request.micro_batches}, --patience {request.patience:g}, --hang-after "
            f"{request.hang_after:g} and {request.restarts} restarts were given; allowed: at least 1 micro-batch, "
            "0 or more seconds of patience, more than 0 seconds until a worker counts as hung, 0 or more restarts."
        )


def _check_accumulation(request: Request, found: Recipe, settings: Settings) -> None:
    """Built here only to be asked: the loop would refuse it later, when workers have been started."""
    model = trained.rebuild(found, settings)
    if stubborn := [name for name, quantizer in quantizers_in(model) if not quantizer.accumulates]:
        raise Refused(
            f"--micro-batches {request.micro_batches} was given, and {', '.join(stubborn)} of recipe "
            f"{request.recipe!r} updates at every forward; leave it at 1."
        )


def _about(request: Request, found: Recipe, preset: str, settings: Settings, data: Data) -> dict[str, Any]:
    """What the result depends on, but for the lanes."""
    return {
        "recipe": request.recipe,
        "preset": preset,
        "settings": settings.model_dump(mode="json"),
        "seed": request.seed,
        # Not there as a rule, so that runs from before there was a choice go on.
        **({"precision": request.precision} if request.precision != "float32" else {}),
        "corpus": {"kind": data.kind, "settings": data.settings},
        "codebooks": [{"num_codes": k, "code_dim": d} for k, d in found.codebooks(settings)],
        **data.fitted_on,
        "parents": {
            **data.parents,
            **({"grown_from": warm.digest_of(request.warm_from)} if request.warm_from else {}),
        },
    }


def _name(about: dict[str, Any]) -> str:
    """Lanes stay out of it: they are recorded in the run, and another number of workers is to find the same run."""
    return f"{about['recipe']}-{storage.sha256_of_bytes(storage.canonical_json(about))[:12]}"


def _recorded_lanes(out: str) -> int | None:
    home = storage.join(out, RUN_FILE)
    return int(storage.read_json(home)["lanes"]) if storage.exists(home) else None
