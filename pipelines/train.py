"""A training run from the driver's side: claimed, shown, recorded, and stopped in good order when asked."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import cluster, storage, tracking
from pipelines.alongside import Alongside, delete_used
from pipelines.claims import claim
from pipelines.group import carry_out_on_workers, check_room
from pipelines.ingest_request import REQUEST, Asked
from pipelines.loop import Stopped
from pipelines.mailbox import Listener, mailbox_here
from pipelines.manifest import is_finished
from pipelines.request import RUN_FILE, Prepared, Request, prepare

RUN = "vqray-run"
VERSION = 1


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
    is refused. Checkpoints go to `<out>/checkpoints`. SIGTERM writes one more and ends.

    Raises:
        Refused: a mistake in the request, before anything is started.
        Failed: training ended early; everything up to the newest checkpoint is kept.
    """
    prepared = prepare(request)
    out, asked = prepared.spec.out, prepared.asked
    if storage.exists(storage.join(out, RUN_FILE)):
        claim_run(prepared)
        if has_bundle(out):
            if prepared.spec.stream and prepared.spec.stream["once"]:
                # The driver may have died between the bundle and this.
                delete_used(prepared.spec.shards, out)
            return _finished(out)
    cluster.connect()
    cluster.require_shared(out, request.shards, *(asked.sources if asked else ()), tracked=True)
    room = _room(request, asked)
    if asked:
        claim(asked.out, REQUEST, asked.request, "an ingest", "--shards")
    claim_run(prepared)
    run = tracking.start_run(
        experiment=request.recipe,
        name=os.path.basename(out.rstrip("/")),
        settings=prepared.about["settings"],
        tags={"kind": "train", **_shards_tag(prepared.about), "workers": str(request.workers)},
        resume_run_id=_recorded_run(out),
    )
    storage.write_json_atomic(storage.join(out, "tracking.json"), {"run_id": run.id})
    try:
        _carry_out(request, prepared, run, room)
    except Stopped:
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    card = storage.read_json(storage.join(out, "bundle", "card.json"))
    run.tags({"bundle_digest": card["digest"], **_shards_tag(card)})
    run.finish("FINISHED")
    return Outcome(**{**asdict(_finished(out)), "skipped": False, "run_id": run.id})


def _carry_out(request: Request, prepared: Prepared, run: tracking.Run, room: int) -> None:
    """The workers, and beside them what hears them and the ingest of a streamed run."""
    spec = prepared.spec
    # Made here and not by the workers: it outlives them all.
    mailbox = mailbox_here()
    if spec.stream is None:
        with Listener(mailbox, run) as listener, _stopping_on_sigterm(listener):
            carry_out_on_workers(request, prepared, mailbox)
        return

    def fail(text: str) -> None:
        mailbox.fail.remote(text)
        mailbox.stop.remote()

    deletes = spec.stream["once"]
    beside = Alongside(prepared.asked, spec.shards, spec.out, deletes=deletes, at_once=room, fail=fail)
    with beside, Listener(mailbox, run, also=beside.hear) as listener, _stopping_on_sigterm(listener):
        carry_out_on_workers(request, prepared, mailbox)
        beside.join()


def _room(request: Request, asked: Asked | None) -> int:
    """Refuse more workers than can be had; how many processes of an ingest there is room for beside them."""
    if asked is None or is_finished(asked.out):
        return check_room(request.at_least or request.workers, request.gpus_per_worker)
    devices = asked.corpus.gpus(asked.settings) if asked.corpus.setup else 0
    return check_room(request.workers, request.gpus_per_worker, devices)


def _shards_tag(about: dict[str, Any]) -> dict[str, str]:
    """Of a streamed run it is known at the end."""
    return {"shards_digest": about["parents"]["shards"]} if "shards" in about["parents"] else {}


def claim_run(prepared: Prepared) -> None:
    """Make the output directory this run's, or find that it is. Raises Refused where it is another's."""
    claim(prepared.spec.out, RUN_FILE, {"format": RUN, "version": VERSION, **prepared.about}, "a run")


def has_bundle(out: str) -> bool:
    return storage.exists(storage.join(out, "bundle", "card.json"))


@contextmanager
def _stopping_on_sigterm(listener: Listener) -> Iterator[None]:
    """The first SIGTERM asks the workers to save and end; the second does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: Any) -> None:
        listener.stop_wished.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _recorded_run(out: str) -> str | None:
    home = storage.join(out, "tracking.json")
    return str(storage.read_json(home)["run_id"]) if storage.exists(home) else None


def _finished(out: str) -> Outcome:
    card = storage.read_json(storage.join(out, "bundle", "card.json"))
    return Outcome(out, card["digest"], True, card["metrics"], _recorded_run(out))
