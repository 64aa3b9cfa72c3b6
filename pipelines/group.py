"""The worker group: Ray Train around the loop, started again after deaths, with fewer workers where that is allowed."""

import os
import tempfile
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines import cluster, loop, trained
from pipelines.checkpoint import Checkpoints
from pipelines.errors import Failed, Refused
from pipelines.loop import Event, RunSpec
from pipelines.mailbox import Outbox
from pipelines.patience import Unanswered
from pipelines.request import Prepared, Request
from pipelines.step import Wish
from pipelines.stream import completed, feed_of
from vqcore.reduction import resolve

SAVE_SECONDS = 60.0
"""How long a change of the group's size waits for a checkpoint of the step it interrupts."""


def carry_out(
    prepared: Prepared,
    device: torch.device,
    tell: Callable[[Event], None],
    wish: Callable[[], Wish] = lambda: Wish.NOTHING,
) -> None:
    """Train in this process, as one worker of the group there may be; rank 0 leaves the bundle."""
    spec, about = prepared.spec, prepared.about
    model, totals = loop.train(spec, feed_of(spec), device, tell, wish)
    if resolve(None).rank == 0:
        if spec.stream is not None:
            about = completed(about, spec, tell, wish)
        trained.write_trained(spec.out, model, {**about, "metrics": totals.latest})


def check_room(workers: int, gpus_per_worker: float, ingest_gpus: float | None = None) -> int:
    """A worker group that can never start would wait for ever, so it is refused at once.

    Args:
        ingest_gpus: CUDA devices of each process of an ingest beside it; None: there is no ingest.

    Returns:
        How many processes of an ingest there is room for.
    """
    cpus, gpus = cluster.most("CPU"), cluster.most("GPU")
    if workers < 1 or workers > cpus:
        raise Refused(
            f"--workers {workers} needs as many CPUs; this cluster has {cpus:g}."
            f" Use --workers 1 to {cpus:g}, or connect to a larger cluster with RAY_ADDRESS."
        )
    if workers * gpus_per_worker > gpus:
        raise Refused(
            f"--workers {workers} x --gpus-per-worker {gpus_per_worker:g} needs"
            f" {workers * gpus_per_worker:g} GPUs; this cluster has {gpus:g}."
        )
    room = int(cpus - workers)
    if ingest_gpus:
        room = min(room, int((gpus - workers * gpus_per_worker) / ingest_gpus))
    if ingest_gpus is not None and room < 1:
        raise Refused(
            f"--workers {workers} leaves no CPU{' with a CUDA device' if ingest_gpus else ''} to the ingest beside it; "
            f"this cluster has {cpus:g} CPUs and {gpus:g} CUDA devices. Use fewer workers, or a larger cluster."
        )
    return room


def carry_out_on_workers(request: Request, prepared: Prepared, mailbox: Any, events: Any = None, **label: Any) -> None:
    """Train with Ray Train's workers. Returns when the bundle is there.

    Args:
        mailbox: this run's own, which keeps an error that no restart mends.
        events: the mailbox that is told what the workers do, each event with the keys of `label`; default `mailbox`.

    Raises:
        Stopped: it was asked for by way of the mailbox; the newest checkpoint is of that step.
        Failed: no restart mends it; checkpoints are kept.
    """
    spec, store = prepared.spec, Checkpoints(prepared.spec.out)
    config = {
        "mailbox": mailbox,
        "events": mailbox if events is None else events,
        "label": label,
        "spec": asdict(spec),
        "about": prepared.about,
        # The user's own word on threads wins; results repeat to the bit only at one thread count.
        "threads": int(os.environ.get("OMP_NUM_THREADS") or _threads(request)),
        "gpu": request.gpus_per_worker > 0,
    }
    while True:
        before = store.complete()[-1:]
        fault = _fit(request, config)
        failure, stopped = ray.get([mailbox.failure.remote(), mailbox.stopped.remote()])
        if failure:
            raise Failed(f"{failure} (checkpoints so far are in {spec.out})")
        if stopped:
            raise loop.Stopped(stopped)
        if fault is None:
            return
        if store.complete()[-1:] == before:
            last = str(fault).strip().splitlines()[-1] if str(fault).strip() else type(fault).__name__
            raise Failed(
                f"training stopped after {request.restarts} restarts without a new checkpoint: {last}."
                f" Run the same command again to go on from the newest checkpoint in {spec.out}."
            ) from fault


def _threads(request: Request) -> int:
    """Of each worker. An ingest beside them takes the other CPUs, and when it is done bits must not change."""
    return 1 if request.stream else max(1, cluster.cpus() // request.workers)


def _fit(request: Request, config: dict[str, Any]) -> TrainingFailedError | None:
    """One worker group and its restarts; what it ended with."""
    # The controller looks at its workers this often; its default of 2 s would add that much to every start and end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    workers: int | tuple[int, int] = request.workers
    if request.at_least is not None:
        workers = (request.at_least, request.workers)
        # After a node is lost Ray first believes in it, and waits this long for each start that cannot succeed.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    resources = {"CPU": 1.0, **({"GPU": request.gpus_per_worker} if request.gpus_per_worker else {})}
    # Ray keeps notes of its own there; none of our workers reads or reports to it, so it need not be shared.
    with tempfile.TemporaryDirectory(prefix="vqray-train-") as scratch:
        trainer = TorchTrainer(
            _worker,
            train_loop_config=config,
            torch_config=TorchConfig(
                backend="nccl" if request.gpus_per_worker else "gloo", timeout_s=int(max(1, request.hang_after))
            ),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=request.gpus_per_worker > 0, resources_per_worker=resources
            ),
            # Ray would continue an old run of the same name from its own checkpoints; ours are in `out`.
            run_config=RunConfig(
                name=uuid.uuid4().hex,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=request.restarts),
                callbacks=[SaveFirst(config["mailbox"])] if request.at_least is not None else None,
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            return error
    return None


class SaveFirst(ControllerCallback):
    """Before the group's size changes, its workers save: a change must not cost the steps since the last checkpoint."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox, self.running = mailbox, False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        before, now = type(previous_state).__name__, type(current_state).__name__
        # A group that runs stays until its successor is started: running, resizing, scheduling.
        self.running = now in ("RunningState", "ResizingState") or (now == "SchedulingState" and "Resizing" in before)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if self.running:
            ray.wait([self.mailbox.save.remote(SAVE_SECONDS)], timeout=SAVE_SECONDS)


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
        if resolve(None).rank == 0 and resolve(None).world != prepared.spec.most_workers:
            outbox.tell({"kind": "log", "text": f"{resolve(None).world} of {prepared.spec.most_workers} workers"})
        carry_out(prepared, device, outbox.tell, Wishes(outbox))
        ray.get(outbox.flush())
    except loop.Stopped as stopped:
        ray.get([outbox.flush(), mailbox.stop_with.remote(str(stopped))])
    except Unanswered as error:
        _start_again(outbox, error)
        raise
    except (RuntimeError, OSError) as error:
        if not isinstance(error, Failed):
            _start_again(outbox, error)
            raise
        _give_up(mailbox, outbox, str(error))
        raise
    except Exception as error:
        ours = isinstance(error, (Refused, ValueError))
        _give_up(mailbox, outbox, str(error) if ours else "".join(traceback.format_exception(error)))
        raise


class Wishes:
    """What a worker is asked for from outside: by the driver, or by the machine that is about to be taken away."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox, self.warned = outbox, False

    def __call__(self) -> Wish:
        # The public question is a barrier of all workers, through an actor; this is the note it would read.
        if not self.warned and get_train_context().preemption_context.preemption_info is not None:
            self.warned = True
            return Wish.SAVE
        return self.outbox.wish()


def _start_again(outbox: Outbox, error: Exception) -> None:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    outbox.tell({"kind": "log", "text": f"{reason} The workers start again from the newest checkpoint."})
    ray.get(outbox.flush())


def _give_up(mailbox: Any, outbox: Outbox, text: str) -> None:
    outbox.flush()
    ray.get(mailbox.fail.remote(text))
