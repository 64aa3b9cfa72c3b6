"""One trial, wherever it runs: an ordinary training run below the search's directory, scored on the valid split.

What is on disk says how far it is: proposal.json (it is to be made), run/ (checkpoints, then the bundle), rungs.json
(scores at early steps, where the search stops trials early), trial.json (it has ended). So whoever runs it again goes
on from there, after any death.
"""

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from pipelines import checkpoint, evaluate, group, recipe, registry, storage, train, trained, trials
from pipelines.checkpoint import Checkpoints
from pipelines.loop import Event
from pipelines.request import Prepared, Request, prepare
from pipelines.shards import ShardReader
from pipelines.trained import Trained
from pipelines.trials import Trial
from vqcore.quantizers.contract import quantizers_in

PROPOSAL = "proposal.json"
RUNGS = "rungs.json"
SPLIT = "valid"

Train = Callable[[Request, Prepared, Callable[[Event], None]], None]
"""Makes the bundle of a prepared run."""
Rung = Callable[[int, dict[str, float]], None]
"""Is told the valid metrics at an early step; does not return where the trial is stopped there."""


@dataclass(frozen=True)
class Proposal:
    """A trial that is to be made. Written before anything else of it, so that no proposal is lost or made twice."""

    number: int
    index: int
    """Of its point: repeats share it."""
    settings: dict[str, Any]
    repeat: int
    seed: int
    grown_from: int | None = None
    """Number of the trial whose codebook this one is to grow from, once that has ended."""
    prefix_of: int | None = None
    """Number of the trial whose first levels this one is, once that has ended."""

    @property
    def waits_for(self) -> int | None:
        return self.grown_from if self.prefix_of is None else self.prefix_of


@dataclass(frozen=True)
class Common:
    """What all trials of a search share, as JSON values: it travels to workers."""

    recipe: str
    preset: str
    fixed: dict[str, Any]
    shards: str
    workers: int
    gpus_per_worker: float
    checkpoint_every: int
    restarts: int
    rungs: list[int]
    """Steps at which a trial is scored and may be stopped; ascending."""
    grown_steps: int | None = None
    """Steps of a trial whose codebook grew from a smaller one."""


def home_of(out: str, number: int) -> str:
    """The directory of one trial of the search in `out`."""
    return storage.join(out, "trials", f"{number:05d}")


def propose(out: str, proposal: Proposal) -> None:
    storage.write_json_atomic(storage.join(home_of(out, proposal.number), PROPOSAL), asdict(proposal))


def read_proposal(out: str, number: int) -> Proposal:
    return Proposal(**storage.read_json(storage.join(home_of(out, number), PROPOSAL)))


def request_of(common: Common, proposal: Proposal, out: str) -> Request:
    """The training request that this trial is: `vqray train` with it gives the same bundle."""
    parent = bundled(out, proposal.grown_from)
    grown = {"steps": common.grown_steps} if parent is not None else {}
    return Request(
        recipe=common.recipe,
        shards=common.shards,
        out=storage.join(home_of(out, proposal.number), "run"),
        preset=common.preset,
        overrides={**common.fixed, **proposal.settings, **grown},
        seed=proposal.seed,
        workers=common.workers,
        gpus_per_worker=common.gpus_per_worker,
        checkpoint_every=common.checkpoint_every,
        restarts=common.restarts,
        warm_from=None if parent is None else storage.join(home_of(out, parent), "run"),
    )


def bundled(out: str, number: int | None) -> int | None:
    """The number, where there is such a trial and it has a bundle to start from; else None: one trains from scratch."""
    if number is None:
        return None
    record = storage.join(home_of(out, number), trials.RECORD)
    ended = storage.exists(record) and Trial.from_json(storage.read_json(record)).state == "finished"
    return number if ended else None


def run_trial(
    out: str, common: Common, proposal: Proposal, train_it: Train, tell: Callable[[Event], None], rung: Rung
) -> Trial:
    """Make one trial, or what is missing of it, and leave its record.

    An exception ends the trial as a failed one with its traceback; only OSError, which another try may mend, is passed
    on, as is whatever kills the process.
    """
    home = home_of(out, proposal.number)
    if storage.exists(storage.join(home, trials.RECORD)):
        return Trial.from_json(storage.read_json(storage.join(home, trials.RECORD)))
    try:
        request = request_of(common, proposal, out)
        prepared = prepare(request)
        train.claim_run(prepared)
        if common.rungs:
            # What is told of a checkpoint is scored there and then.
            prepared = replace(prepared, spec=replace(prepared.spec, write_behind=False))
        deeper = bundled(out, proposal.prefix_of)
        if not train.has_bundle(prepared.spec.out) and deeper is not None:
            _cut(storage.join(home_of(out, deeper), "run"), prepared)
        elif not train.has_bundle(prepared.spec.out):
            train_it(request, prepared, _with_rungs(home, common, prepared, tell, rung))
        trial = _finished(out, proposal, prepared)
    except OSError:
        raise
    except Exception as error:
        trial = failed(out, proposal, "".join(traceback.format_exception(error)))
    trials.write(home, trial)
    return trial


def train_here(request: Request, prepared: Prepared, tell: Callable[[Event], None]) -> None:
    """Train in this process, on its GPU where the request has one."""
    group.carry_out(prepared, torch.device("cuda" if request.gpus_per_worker else "cpu"), tell)


def _cut(deeper: str, prepared: Prepared) -> None:
    """Leave the bundle of a run whose levels are the first of another's, which has ended."""
    found = recipe.load(prepared.spec.recipe)
    if found.prefix is None:
        raise ValueError(f"recipe {found.name!r} does not say how a run is cut to fewer levels")
    whole = trained.open_trained(registry.local_bundle(deeper))
    model = found.prefix.cut(whole.model, found.Settings.model_validate(prepared.spec.settings))
    parents = {**prepared.about["parents"], "prefix_of": whole.digest}
    trained.write_trained(prepared.spec.out, model, {**prepared.about, "parents": parents, "metrics": {}})


def failed(out: str, proposal: Proposal, error: str) -> Trial:
    """The record of a trial that ended without a bundle."""
    return _record(out, proposal, "failed", {}, error=error)


def pruned(out: str, proposal: Proposal) -> Trial:
    """The record of a trial that was stopped early: its metrics are those of its last rung."""
    rungs = read_rungs(home_of(out, proposal.number))
    step = max(rungs, default=0)
    return _record(out, proposal, "pruned", rungs.get(step, {}))


def read_rungs(home: str) -> dict[int, dict[str, float]]:
    """Step -> valid metrics, of the rungs that a trial has passed."""
    uri = storage.join(home, RUNGS)
    return {int(step): values for step, values in storage.read_json(uri).items()} if storage.exists(uri) else {}


def _record(
    out: str,
    proposal: Proposal,
    state: Literal["finished", "failed", "pruned"],
    metrics: dict[str, float],
    *,
    bundle_digest: str | None = None,
    error: str | None = None,
    parameters: int | None = None,
) -> Trial:
    run = storage.join(home_of(out, proposal.number), "run")
    totals = Checkpoints(run).totals()
    return Trial(
        number=proposal.number,
        settings=proposal.settings,
        repeat=proposal.repeat,
        seed=proposal.seed,
        state=state,
        metrics=metrics,
        bits_per_row=metrics.get("bits_per_row"),
        parameters=parameters,
        seconds=totals.get("seconds", 0.0),
        steps=totals.get("steps", 0),
        out=run,
        bundle_digest=bundle_digest,
        error=error,
        grown_from=bundled(out, proposal.grown_from),
        prefix_of=bundled(out, proposal.prefix_of),
    )


def _finished(out: str, proposal: Proposal, prepared: Prepared) -> Trial:
    spec = prepared.spec
    model = trained.open_trained(registry.local_bundle(spec.out))
    metrics = score(model, ShardReader(spec.shards))
    return _record(out, proposal, "finished", metrics, bundle_digest=model.digest, parameters=_parameters(model))


def score(model: Trained, reader: ShardReader) -> dict[str, float]:
    """Metrics on the valid split, with `distortion` for the recipe's own.

    Raises:
        ValueError: a metric is not finite: the run diverged.
    """
    metrics = evaluate.measure(model, reader, SPLIT)
    if broken := {name: value for name, value in metrics.items() if math.isnan(value)}:
        raise ValueError(f"the trained model's metrics on {SPLIT} are not numbers: {', '.join(sorted(broken))}")
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    named = model.recipe.distortion
    return {**finite, **({"distortion": finite[named]} if named in finite else {})}


def _parameters(model: Trained) -> int:
    """Numbers that were learned: weights, and codebooks that moving averages hold outside the weights."""
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    averaged = {
        id(buffer): buffer.numel()
        for _, quantizer in quantizers_in(model.model)
        if isinstance(quantizer, torch.nn.Module)
        for name, buffer in quantizer.named_buffers()
        if name.rsplit(".", 1)[-1] == "vectors"
    }
    return weights + sum(averaged.values())


def _with_rungs(
    home: str, common: Common, prepared: Prepared, tell: Callable[[Event], None], rung: Rung
) -> Callable[[Event], None]:
    """`tell`, which at the search's rungs also scores the checkpoint just written and reports it."""
    passed: Mapping[int, dict[str, float]] = read_rungs(home)
    for step, metrics in sorted(passed.items()):
        rung(step, metrics)
    scores = dict(passed)

    def telling(event: Event) -> None:
        tell(event)
        if event["kind"] != "checkpoint" or event["run_step"] not in common.rungs or event["run_step"] in scores:
            return
        scores[event["run_step"]] = score(_newest(prepared), ShardReader(prepared.spec.shards))
        storage.write_json_atomic(storage.join(home, RUNGS), {str(step): found for step, found in scores.items()})
        rung(event["run_step"], scores[event["run_step"]])

    return telling


def _newest(prepared: Prepared) -> Trained:
    """The model of the newest checkpoint, for use; the one being trained stays as it is."""
    store = Checkpoints(prepared.spec.out)
    saved = store.load(*store.complete()[-1])
    found = recipe.load(prepared.spec.recipe)
    settings = found.Settings.model_validate(prepared.spec.settings)
    model = trained.rebuild(found, settings)
    checkpoint.unpack(saved, model, {})
    return Trained(found, settings, model.eval(), {}, "")
