"""Ray Train around the training loop: workers, restarts, and the driver that shows and records what they say."""

import os
import sys
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines import cluster, loop, recipe, storage, tracking, trained, warm
from pipelines.claims import claim
from pipelines.errors import Failed, Refused
from pipelines.feed import Feed, columns_of
from pipelines.loop import Event, RunSpec
from pipelines.mailbox import Listener, Mailbox, Outbox
from pipelines.options import validated
from pipelines.plan import lanes_for
from pipelines.shards import ShardReader
from vqcore.reduction import resolve

RUN = "vqray-run"
RUN_FILE = "run.json"
VERSION = 1


@dataclass(frozen=True)
class Request:
    """What the user asked for. Only `recipe`, `preset`, `overrides` and `seed`, with the shards, change the result."""

    recipe: str
    shards: str
    out: str
    preset: str | None = None
    """None: `paper` where there is CUDA, else `small`."""
    overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    workers: int = 1
    gpus_per_worker: float = 0.0
    checkpoint_every: int = 500
    restarts: int = 3
    """How often the worker group is started again from its newest checkpoint after a worker died."""
    warm_from: str | None = None
    """A bundle with fewer codes that the run starts from. It changes the result."""


@dataclass(frozen=True)
class Outcome:
    out: str
    digest: str
    """The bundle's."""
    skipped: bool
    metrics: dict[str, float | None]
    run_id: str | None


def train(request: Request) -> Outcome:
    """Train a recipe on the train split of a manifest and leave a bundle in `<out>/bundle`.

    Rerunning the same request resumes it, or does nothing when its bundle exists; another request for the same `out`
    is refused. Checkpoints go to `<out>/checkpoints`.

    Raises:
        Refused: a mistake in the request, before anything is started.
        Failed: training ended early; everything up to the newest checkpoint is kept.
    """
    prepared = prepare(request)
    out = prepared.spec.out
    if storage.exists(storage.join(out, RUN_FILE)):
        claim_run(prepared)
        if has_bundle(out):
            return _finished(out)
    cluster.connect()
    cluster.require_shared(out, request.shards)
    check_room(request.workers, request.gpus_per_worker)
    claim_run(prepared)
    run = tracking.start_run(
        experiment=request.recipe,
        name=os.path.basename(out.rstrip("/")),
        settings=prepared.about["settings"],
        tags={
            "kind": "train",
            "shards_digest": prepared.about["parents"]["shards"],
            "workers": str(request.workers),
        },
        resume_run_id=_recorded_run(out),
    )
    storage.write_json_atomic(storage.join(out, "tracking.json"), {"run_id": run.id})
    try:
        # Made here and not by the workers: it outlives them all.
        mailbox = Mailbox.remote()  # type: ignore[attr-defined]
        with Listener(mailbox, run):
            carry_out_on_workers(request, prepared, mailbox)
    except BaseException:
        run.finish("FAILED")
        raise
    run.tags({"bundle_digest": _finished(out).digest})
    run.finish("FINISHED")
    return Outcome(**{**asdict(_finished(out)), "skipped": False, "run_id": run.id})


@dataclass(frozen=True)
class Prepared:
    """A request whose settings were checked against its recipe and shards."""

    spec: RunSpec
    about: dict[str, Any]
    """What the result depends on: what reruns must repeat, and what the card tells."""


def prepare(request: Request) -> Prepared:
    """Check a request against its recipe and shards. Nothing is written or started.

    Raises:
        Refused: a mistake in the request.
    """
    reader = ShardReader(storage.normalise(request.shards))
    spec, preset = _spec(request, reader, storage.normalise(request.out))
    return Prepared(spec, _about(spec, preset, reader))


def claim_run(prepared: Prepared) -> None:
    """Make the output directory this run's, or find that it is. Raises Refused where it is another's."""
    claim(prepared.spec.out, RUN_FILE, {"format": RUN, "version": VERSION, **prepared.about}, "a run")


def has_bundle(out: str) -> bool:
    return storage.exists(storage.join(out, "bundle", "card.json"))


def carry_out(prepared: Prepared, device: torch.device, tell: Callable[[Event], None]) -> None:
    """Train in this process, as one worker of the group there may be; rank 0 leaves the bundle."""
    spec = prepared.spec
    model, totals = loop.train(spec, Feed(ShardReader(spec.shards)), device, tell)
    if resolve(None).rank == 0:
        trained.write_trained(spec.out, model, {**prepared.about, "metrics": totals.latest})


def _spec(request: Request, reader: ShardReader, out: str) -> tuple[RunSpec, str]:
    found = recipe.load(request.recipe)
    manifest = reader.manifest
    if manifest.kind not in found.corpus:
        raise Refused(
            f"recipe {request.recipe!r} trains on {' or '.join(found.corpus)}; {reader.uri} holds {manifest.kind}."
        )
    preset = request.preset or ("paper" if torch.cuda.is_available() else "small")
    if preset not in found.presets:
        raise Refused(f"recipe {request.recipe!r} has no preset {preset!r}; allowed: {', '.join(found.presets)}.")
    if request.preset is None:
        print(f"preset {preset!r} ({'CUDA found' if preset == 'paper' else 'no CUDA here'})", file=sys.stderr)
    settings = validated(found.Settings, {**found.presets[preset], **request.overrides}, f"recipe {request.recipe!r}")
    resolved = found.resolve(settings, columns_of(manifest))
    for key in request.overrides:
        if getattr(settings, key) != getattr(resolved, key):
            raise Refused(f"{key} follows from the shards ({getattr(resolved, key)}); leave it out of --set.")
    if reader.rows("train") == 0:
        raise Refused(
            f"{reader.uri} has no rows in its train split ({manifest.rows()} in all): ingest more files"
            " or a smaller holdout."
        )
    if request.seed < 0 or request.checkpoint_every < 1:
        raise Refused(
            f"--seed {request.seed} and --checkpoint-every {request.checkpoint_every} were given; a seed is 0 or more,"
            " and there is a checkpoint every 1 or more steps."
        )
    lanes = _recorded_lanes(out) or lanes_for(resolved.batch_size, request.workers)
    if request.workers > lanes:
        raise Refused(
            f"this run was begun with {lanes} lanes, so it takes at most {lanes} workers, not {request.workers}."
        )
    settings_json = resolved.model_dump(mode="json")
    spec = RunSpec(
        request.recipe, settings_json, reader.uri, request.seed, lanes, out, checkpoint_every=request.checkpoint_every,
        warm_from=request.warm_from,
    )  # fmt: skip
    return spec, preset


def _about(spec: RunSpec, preset: str, reader: ShardReader) -> dict[str, Any]:
    found = recipe.load(spec.recipe)
    books = found.codebooks(found.Settings(**spec.settings))
    return {
        "recipe": spec.recipe,
        "preset": preset,
        "settings": spec.settings,
        "seed": spec.seed,
        "lanes": spec.lanes,
        "corpus": {"kind": reader.manifest.kind, "settings": reader.manifest.settings},
        "codebooks": [{"num_codes": k, "code_dim": d} for k, d in books],
        "fitted_on": {"split": "train", "rows": reader.rows("train")},
        "parents": {
            "shards": reader.manifest.digest,
            **({"grown_from": warm.digest_of(spec.warm_from)} if spec.warm_from else {}),
        },
    }


def _recorded_lanes(out: str) -> int | None:
    home = storage.join(out, RUN_FILE)
    return int(storage.read_json(home)["lanes"]) if storage.exists(home) else None


def _recorded_run(out: str) -> str | None:
    home = storage.join(out, "tracking.json")
    return str(storage.read_json(home)["run_id"]) if storage.exists(home) else None


def _finished(out: str) -> Outcome:
    card = storage.read_json(storage.join(out, "bundle", "card.json"))
    return Outcome(out, card["digest"], True, card["metrics"], _recorded_run(out))


def check_room(workers: int, gpus_per_worker: float) -> None:
    """A worker group that can never start would wait for ever, so it is refused at once."""
    cpus = cluster.cpus()
    if workers < 1 or workers > cpus:
        raise Refused(
            f"--workers {workers} needs as many CPUs; this cluster has {cpus}."
            f" Use --workers 1 to {cpus}, or connect to a larger cluster with RAY_ADDRESS."
        )
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if workers * gpus_per_worker > gpus:
        raise Refused(
            f"--workers {workers} x --gpus-per-worker {gpus_per_worker:g} needs"
            f" {workers * gpus_per_worker:g} GPUs; this cluster has {gpus:g}."
        )


def _worker(config: dict[str, Any]) -> None:
    """Runs on every worker. What torch.distributed and storage raise may be a fault that a restart mends (as is a
    worker that dies); any other exception would only come again, so it ends the run for good.
    """
    mailbox = config["mailbox"]
    if ray.get(mailbox.failure.remote()):
        return
    torch.set_num_threads(config["threads"])
    prepared = Prepared(RunSpec(**config["spec"]), config["about"])
    outbox = Outbox(config["events"], **config["label"])
    try:
        device = torch.device("cuda", torch.cuda.current_device()) if config["gpu"] else torch.device("cpu")
        carry_out(prepared, device, outbox.tell)
        outbox.flush()
    except (RuntimeError, OSError) as error:
        if not isinstance(error, Failed):
            raise
        _give_up(mailbox, outbox, str(error))
        raise
    except Exception as error:
        ours = isinstance(error, (Refused, ValueError))
        _give_up(mailbox, outbox, str(error) if ours else "".join(traceback.format_exception(error)))
        raise


def _give_up(mailbox: Any, outbox: Outbox, text: str) -> None:
    outbox.flush()
    ray.get(mailbox.fail.remote(text))


def carry_out_on_workers(request: Request, prepared: Prepared, mailbox: Any, events: Any = None, **label: Any) -> None:
    """Train with Ray Train's workers. Returns when the bundle is there.

    Args:
        mailbox: this run's own, which keeps an error that no restart mends.
        events: the mailbox that is told what the workers do, each event with the keys of `label`; default `mailbox`.

    Raises:
        Failed: no restart mends it; checkpoints are kept.
    """
    spec = prepared.spec
    # The controller looks at its workers this often; its default of 2 s would add that much to every start and end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    config = {
        "mailbox": mailbox,
        "events": mailbox if events is None else events,
        "label": label,
        "spec": asdict(spec),
        "about": prepared.about,
        # The user's own word on threads wins; results repeat to the bit only at one thread count.
        "threads": int(os.environ.get("OMP_NUM_THREADS") or max(1, cluster.cpus() // request.workers)),
        "gpu": request.gpus_per_worker > 0,
    }
    resources = {"CPU": 1.0, **({"GPU": request.gpus_per_worker} if request.gpus_per_worker else {})}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if request.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=request.workers, use_gpu=request.gpus_per_worker > 0, resources_per_worker=resources
        ),
        # Ray would continue an old run of the same name from its own checkpoints; ours are in `out`, so names are new.
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=storage.join(spec.out, "ray"),
            failure_config=FailureConfig(max_failures=request.restarts),
        ),
    )
    fault: TrainingFailedError | None = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        fault = error
    if failure := ray.get(mailbox.failure.remote()):
        raise Failed(f"{failure} (checkpoints so far are in {spec.out})")
    if fault is not None:
        last = str(fault).strip().splitlines()[-1] if str(fault).strip() else type(fault).__name__
        raise Failed(
            f"training stopped after {request.restarts} restarts: {last}."
            f" Run the same command again to go on from the newest checkpoint in {spec.out}."
        ) from fault
    storage.remove(storage.join(spec.out, "ray"))
