"""Searches over a recipe's settings. The trials' own directories are the truth; Ray Tune only schedules.

A search is a list of proposals, each a directory below `<out>/trials` that says by its files how far it is (see
trial_run). Every session of a search, the first or the one after a kill, hands Tune the proposals that have not ended,
then new ones from the sampler; nothing of Tune's own state is kept. A sampler's history and the early stopper's rungs
are read from the same files.
"""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from pipelines import cluster, group, search_report, storage, tracking, trial_run
from pipelines.champion import Conclusion, conclude
from pipelines.claims import claim
from pipelines.errors import Failed
from pipelines.mailbox import Outbox, mailbox_here
from pipelines.request import Prepared, Request
from pipelines.search_log import SearchLog
from pipelines.search_plan import REDUCTION, Plan, Search
from pipelines.search_session import Session
from pipelines.trial_run import Common
from pipelines.trials import Trial

SEARCH_FILE = "search.json"
STEP = "step"


@dataclass(frozen=True)
class Searched:
    """All trials of a search, ended."""

    out: str
    digest: str
    """Of the trials' settings and bundles."""
    skipped: bool
    trials: list[Trial]
    run_id: str | None
    objectives: list[tuple[str, str]]
    """(metric, min or max)"""
    conclusion: Conclusion
    """Its front and champion."""


def search(request: Search) -> Searched:
    """Run every trial of a search that has not ended yet, below `<out>/trials`; then its front, report and champion.

    Raises:
        Refused: a mistake in the request, before anything is started.
        Failed: the search ended early. Trials that ended are kept; the same command goes on.
    """
    plan = Plan(request)
    plan.check()
    claim(plan.out, SEARCH_FILE, plan.about, "a search")
    session = Session(plan)
    if session.done():
        return _searched(session, skipped=True, run_id=_recorded_run(plan.out))
    cluster.connect()
    cluster.require_shared(plan.out, request.shards, tracked=True)
    slots = _slots(request, session.remaining())
    run = tracking.start_run(
        experiment=request.recipe,
        name=os.path.basename(plan.out.rstrip("/")),
        settings={**plan.space.given, **plan.space.fixed, "sampler": plan.sampler, "repeats": request.repeats},
        tags={"kind": "tune", "shards_digest": plan.reader.manifest.digest},
        resume_run_id=_recorded_run(plan.out),
    )
    storage.write_json_atomic(storage.join(plan.out, "tracking.json"), {"run_id": run.id})
    try:
        _schedule(session, slots, run)
        storage.remove(storage.join(plan.out, "ray"))
        searched = _searched(session, skipped=False, run_id=run.id)
        _log_conclusion(run, searched)
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")
    return searched


def _searched(session: Session, *, skipped: bool, run_id: str | None) -> Searched:
    ended = [session.records[number] for number in sorted(session.records)]
    about = [[trial.number, trial.settings, trial.repeat, trial.state, trial.bundle_digest] for trial in ended]
    digest = storage.sha256_of_bytes(storage.canonical_json(about))
    found = conclude(session.plan, ended, digest)
    skipped = skipped and found.skipped
    return Searched(session.plan.out, digest, skipped, ended, run_id, session.plan.objectives, found)


def _log_conclusion(run: tracking.Run, searched: Searched) -> None:
    """The search's own run shows its front, and how the champion does on test."""
    champion = searched.conclusion.champion
    run.tags({"champion": str(champion["trial"]), "bundle_digest": champion["bundle_digest"]})
    if champion["test"]:
        run.log_metrics([(0, {f"test/{name}": value for name, value in champion["test"].items()})])
    plot = storage.join(searched.out, search_report.PLOT)
    if storage.is_local(plot):
        run.log_picture(plot)


class _Proposals(Searcher):
    """Hands Tune the session's trials by number. Its state is the session's directory, so Tune has none to keep."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        number = self.session.next()
        if number is not None:
            return {"number": number}
        # What runs may die and come back, and FINISHED is for good: None asks Tune to look again later.
        return None if self.session.running else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        return None

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of what it is given, for a restart that is never asked of it.
        return {}

    def save(self, checkpoint_path: str) -> None:
        return None

    def restore(self, checkpoint_path: str) -> None:
        return None


class _Ended(tune.Callback):
    """Passes every end that Tune sees on to the session and the log.

    What that raises is kept until the step ends: Tune would take it for a failure of the trial, and go on.
    """

    def __init__(self, session: Session, log: SearchLog):
        self.session, self.log = session, log
        self.fault: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.fault is not None:
            raise self.fault
        self.log.check()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial.config["number"], None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        self._end(trial.config["number"], str(error) if error else "its process died")

    def _end(self, number: int, error: str | None) -> None:
        try:
            trial = self.session.end(number, error)
            if trial is not None:
                self.log.end(trial)
            else:
                deaths = self.session.deaths[number]
                again = f"({deaths} of {self.session.plan.request.restarts} times)"
                self.log.say(f"trial {number}: its process died; it goes on from its newest checkpoint {again}")
        except Exception as fault:
            self.fault = fault


def _schedule(session: Session, slots: int, run: tracking.Run) -> None:
    """Let Tune run what is left, `slots` trials at a time."""
    plan, request = session.plan, session.plan.request
    _quiet_tune()
    mailbox = mailbox_here()
    body = tune.with_parameters(
        _trial,
        out=plan.out,
        common=asdict(plan.common),
        mailbox=mailbox,
        threads=int(os.environ.get("OMP_NUM_THREADS") or 1),
    )
    log = SearchLog(
        plan.out,
        experiment=request.recipe,
        parent=run.id,
        tags={"shards_digest": plan.reader.manifest.digest},
        take=lambda: ray.get(mailbox.take.remote()),
        total=plan.total,
        columns=[name for name, _ in plan.objectives],
    )
    log.before = len(session.records)
    ended = _Ended(session, log)
    for trial in session.records.values():
        log.keep(trial)
    storage.remove(storage.join(plan.out, "ray"))
    tuner = tune.Tuner(
        tune.with_resources(body, _resources(request)),
        tune_config=tune.TuneConfig(
            search_alg=_Proposals(session),
            scheduler=_early_stopper(plan, session.records),
            num_samples=session.remaining() * (1 + request.restarts),
            max_concurrent_trials=slots,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage.join(plan.out, "ray"),
            verbose=0,
            callbacks=[ended],
        ),
    )
    with log:
        tuner.fit()
    if ended.fault is not None:
        raise ended.fault
    log.sum_up(slots)
    if missing := session.remaining():
        raise Failed(f"{missing} trials have not ended; run the same command again to go on with them.")


def _trial(config: dict[str, Any], *, out: str, common: dict[str, Any], mailbox: Any, threads: int) -> None:
    """Runs in one of Tune's processes."""
    torch.set_num_threads(threads)
    shared = Common(**common)
    proposal = trial_run.read_proposal(out, config["number"])
    outbox = Outbox(mailbox, trial=proposal.number)
    outbox.tell({"kind": "begin"})

    def on_workers(request: Request, prepared: Prepared, tell: Any) -> None:
        own = mailbox_here()
        group.carry_out_on_workers(request, prepared, own, mailbox, trial=proposal.number)

    def rung(step: int, metrics: dict[str, float]) -> None:
        outbox.flush()
        tune.report({STEP: step, **metrics})

    body = on_workers if shared.workers > 1 else trial_run.train_here
    ended = trial_run.run_trial(out, shared, proposal, body, outbox.tell, rung)
    # Waited for: the driver must not hear of the end before it hears of what came before.
    ray.get(outbox.flush())
    tune.report({STEP: ended.steps, **ended.metrics})


def _early_stopper(plan: Plan, records: Mapping[int, Trial]) -> Any:
    """ASHA that has seen the rungs of the trials that ended in earlier sessions; None where nothing is stopped."""
    if not plan.request.asha:
        return None
    ((name, direction),) = plan.objectives
    asha = ASHAScheduler(
        time_attr=STEP, metric=name, mode=direction, max_t=plan.steps[0], grace_period=plan.rungs[0],
        reduction_factor=REDUCTION,
    )  # fmt: skip
    for number in sorted(records):
        stand_in = SimpleNamespace(trial_id=f"ended {number}")
        asha.on_trial_add(None, stand_in)
        for step, metrics in sorted(trial_run.read_rungs(trial_run.home_of(plan.out, number)).items()):
            asha.on_trial_result(None, stand_in, {STEP: step, **metrics})
    return asha


def _resources(request: Search) -> dict[str, float]:
    """What Tune holds for a trial: what it computes with. The driver of a trial of several workers waits only, and must
    take no CPU from them; one byte of memory, since Ray refuses to hold nothing.
    """
    if request.workers > 1:
        return {"memory": 1}
    return {"CPU": 1.0, **({"GPU": request.gpus_per_worker} if request.gpus_per_worker else {})}


def _slots(request: Search, remaining: int) -> int:
    """Trials at a time: never more than the cluster can hold whole, so that none waits holding what another needs.

    Raises:
        Refused: the cluster holds not even one.
    """
    group.check_room(request.workers, request.gpus_per_worker)
    cpus = int(cluster.most("CPU"))
    room = cpus // request.workers
    if request.gpus_per_worker:
        room = min(room, int(cluster.most("GPU") / (request.workers * request.gpus_per_worker)))
    if request.concurrent is not None and request.concurrent > room:
        each = f" of {request.workers} workers" if request.workers > 1 else ""
        print(
            f"{request.concurrent} trials at a time were asked for; this cluster of {cpus} CPUs holds {room}{each}",
            file=sys.stderr,
        )
    return max(1, min(request.concurrent or room, room, remaining))


def _quiet_tune() -> None:
    """Tune reads these when it starts. Its loggers would write files nobody reads, and its reports tear our table
    apart; Ctrl-C is ours, and ends at once.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # It misses those loggers' files at the end.
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)


def _recorded_run(out: str) -> str | None:
    home = storage.join(out, "tracking.json")
    return str(storage.read_json(home)["run_id"]) if storage.exists(home) else None
