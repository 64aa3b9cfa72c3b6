"""Searches without Ray: sessions that are killed anywhere end like one that never was."""

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines import loop, search_plan, storage, trial_run, trials
from pipelines.errors import Failed, Refused
from pipelines.feed import Feed
from pipelines.request import Request
from pipelines.search_plan import Plan, Search
from pipelines.search_session import Session, value_of
from pipelines.shards import ShardReader
from tests.pipelines.loops import make_shards, spec_of
from vqcore.bundle import read_bundle

NAME = "plain_vq"
STEPS = 12
GRID = ("num_codes=choice:4,6,8", "patch=choice:2,4", "decay=choice:0.8,0.95")
FIXED = ("batch_size=8", f"steps={STEPS}")


class Killed(BaseException):
    """Stands for a death of the process: no handler of ours may see it."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"), rows=90)


def asked(shards: str, out: Path, *words: str, **changes) -> Search:
    words = (*(words or GRID), *FIXED)
    return Search(NAME, shards, str(out), preset="small", words=words, checkpoint_every=4, **changes)


def opened(request: Search) -> Session:
    plan = Plan(request)
    plan.check()
    return Session(plan)


def run_one(session: Session, number: int, deadly_step: int | None = None) -> trials.Trial:
    """What one of Tune's processes does; a death at a step of training if that is given."""

    def tell(event):
        if event["kind"] == "progress" and event["step"] == deadly_step:
            raise Killed

    plan = session.plan
    proposal = trial_run.read_proposal(plan.out, number)
    return trial_run.run_trial(plan.out, plan.common, proposal, trial_run.train_here, tell, lambda *_: None)


def run_all(session: Session) -> dict[int, trials.Trial]:
    while (number := session.next()) is not None:
        run_one(session, number)
        session.end(number, None)
    return session.records


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> dict[int, trials.Trial]:
    return run_all(opened(asked(shards, tmp_path_factory.mktemp("calm") / "search")))


def essence(records: dict[int, trials.Trial]) -> dict[int, tuple]:
    """All of a trial but where and how long."""
    return {n: (t.settings, t.seed, t.state, t.metrics, t.bundle_digest, t.steps) for n, t in records.items()}


def test_a_trial_is_the_run_that_train_would_have_made(shards, tmp_path, undisturbed):
    """Its weights are those of the plain loop with the same settings."""
    trial = undisturbed[5]
    spec = spec_of(NAME, shards, tmp_path / "run", **{**trial.settings, "batch_size": 8, "steps": STEPS})
    model, _ = loop.train(spec, Feed(ShardReader(shards)), torch.device("cpu"), lambda _: None)
    made = read_bundle(Path(trial.out) / "bundle")
    card, weights = made.card, model.state_dict()
    assert made.tensors.keys() == weights.keys()
    assert all(made.tensors[name].equal(tensor) for name, tensor in weights.items())
    assert card["settings"] == spec.settings
    assert card["seed"] == trial.seed == 0
    assert (Path(trial.out) / "run.json").exists()
    assert trial.metrics["bits_per_row"] == trial.bits_per_row > 0
    assert trial.metrics["distortion"] == trial.metrics["mse"]
    assert trial.metrics["rows"] == 10, "a ninth of the rows is valid, and trials are scored on those"
    assert trial.steps == STEPS
    assert trial.parameters == trial.settings["num_codes"] * trial.settings["patch"] ** 2


def test_sessions_killed_anywhere_end_with_the_trials_of_an_undisturbed_search(shards, tmp_path, undisturbed):
    """Each session is killed after a few trials, and one of its trials in the middle of its steps."""
    out, drawn, sessions = tmp_path / "search", random.Random(0), 0
    while True:
        session = opened(asked(shards, out))
        sessions += 1
        try:
            for _ in range(drawn.randint(2, 5)):
                number = session.next()
                if number is None:
                    break
                deadly = drawn.choice([None, None, 2, 7, STEPS])
                run_one(session, number, deadly)
                if drawn.random() < 0.3:
                    break  # the trial ended, and the driver died before it heard of it
                session.end(number, None)
            else:
                continue
        except Killed:
            continue
        if session.next() is None and not session.remaining():
            break
    assert sessions > 4
    assert len(undisturbed) == 12
    assert essence({t.number: t for t in trials.read_trials(str(out))}) == essence(undisturbed)


def test_a_trial_that_raises_is_recorded_with_its_traceback_and_stays_failed_until_asked(shards, tmp_path):
    out = tmp_path / "search"
    stray = out / "trials/00002/run/stray.txt"
    stray.parent.mkdir(parents=True)
    stray.write_text("not a run")
    records = run_all(opened(asked(shards, out)))
    assert Counter(trial.state for trial in records.values()) == {"finished": 11, "failed": 1}
    assert "Traceback" in records[2].error
    assert "holds other files" in records[2].error
    assert (records[2].metrics, records[2].bundle_digest) == ({}, None)

    again = opened(asked(shards, out))
    assert (again.remaining(), again.next()) == (0, None)
    retried = opened(asked(shards, out, retry_failed=True))
    assert retried.remaining() == 1
    assert run_all(retried)[2].state == "finished"


def test_a_process_that_dies_is_tried_again_and_at_last_a_failed_trial(shards, tmp_path):
    session = opened(asked(shards, tmp_path / "search", restarts=2))
    first, other = session.next(), session.next()
    for deadly in (2, 6):
        with pytest.raises(Killed):
            run_one(session, first, deadly)
        assert session.end(first, "the actor died") is None
        assert session.remaining() == 12
        assert session.next() == first, "what died runs next"
    with pytest.raises(Killed):
        run_one(session, first, deadly_step=7)
    trial = session.end(first, "the actor died")
    assert (trial.state, trial.error, trial.steps) == ("failed", "the actor died (tried 3 times)", 4)
    assert trials.read_trials(session.plan.out) == [trial]
    assert session.running == {other}
    assert session.next() not in (first, other)


def test_a_fault_of_the_disk_is_left_to_another_try(shards, tmp_path):
    session = opened(asked(shards, tmp_path / "search"))

    def broken(request: Request, *_):
        raise OSError("the disk is gone for a moment")

    proposal = trial_run.read_proposal(session.plan.out, session.next())
    with pytest.raises(OSError, match="for a moment"):
        trial_run.run_trial(session.plan.out, session.plan.common, proposal, broken, lambda _: None, lambda *_: None)
    assert trials.read_trials(session.plan.out) == []


def test_a_run_that_diverged_is_failed_and_says_which_metric(shards, tmp_path, monkeypatch):
    session = opened(asked(shards, tmp_path / "search"))
    measured = {"mse": float("nan"), "psnr": 3.0}
    monkeypatch.setattr(trial_run.evaluate, "measure", lambda *_: measured)
    trial = run_one(session, session.next())
    assert trial.state == "failed"
    assert "metrics on valid are not numbers: mse" in trial.error


@pytest.mark.parametrize("sampler", ["random", "adaptive"])
def test_samplers_lose_and_double_no_trial_over_kills(shards, tmp_path, sampler):
    """Killed sessions propose what one session proposes, each point once, whatever died on the way."""
    space = ("num_codes=4..40", "learning_rate=1e-3..1e-1:log")
    kind = {"sampler": sampler, "trials": 5, "repeats": 2}
    calm = run_all(opened(asked(shards, tmp_path / "calm", *space, **kind)))
    out = tmp_path / "killed"
    for ended in (0, 3, 4, 10):
        session = opened(asked(shards, out, *space, **kind))
        while len(session.records) < ended:
            number = session.next()
            run_one(session, number)
            session.end(number, None)
        session.next()  # proposed, and then the driver dies
    assert essence(session.records) == essence(calm)
    names = [(json.dumps(trial.settings), trial.repeat) for trial in session.records.values()]
    assert len(set(names)) == len(names) == 10
    assert {trial.seed for trial in session.records.values()} == {0, 1}


def test_a_session_killed_between_two_repeats_writes_the_others(shards, tmp_path):
    out = tmp_path / "search"
    session = opened(asked(shards, out, repeats=3))
    session.next()
    storage.remove(trial_run.home_of(str(out), 1))
    storage.remove(trial_run.home_of(str(out), 2))
    again = opened(asked(shards, out, repeats=3))
    numbers = [again.next() for _ in range(4)]
    assert numbers == [0, 1, 2, 3]
    proposals = [trial_run.read_proposal(str(out), number) for number in numbers]
    assert [proposal.repeat for proposal in proposals] == [0, 1, 2, 0]
    assert proposals[0].settings == proposals[1].settings == proposals[2].settings != proposals[3].settings


def test_more_trials_extend_a_search(shards, tmp_path):
    space = ("num_codes=4..40",)
    first = run_all(opened(asked(shards, tmp_path / "s", *space, sampler="random", trials=2)))
    more = opened(asked(shards, tmp_path / "s", *space, sampler="random", trials=4))
    assert more.remaining() == 2
    assert essence({n: t for n, t in run_all(more).items() if n < 2}) == essence(first)


def test_a_space_that_is_used_up_ends_the_search(shards, tmp_path, capsys):
    session = opened(asked(shards, tmp_path / "s", "num_codes=4..6", sampler="random", trials=20))
    assert {trial.settings["num_codes"] for trial in run_all(session).values()} == {4, 5, 6}
    assert session.done()
    assert "no new point was found after 3 (random): the search ends there" in capsys.readouterr().err
    again = opened(asked(shards, tmp_path / "s", "num_codes=4..6", sampler="random", trials=20))
    assert again.done()


def test_early_stopping_scores_rungs_on_valid_and_a_resumed_trial_tells_them_again(shards, tmp_path):
    request = asked(shards, tmp_path / "s", "num_codes=choice:4,8", asha=True)
    session = opened(request)
    plan = session.plan
    assert plan.rungs == [1, 3, 9]
    assert all(step % plan.common.checkpoint_every == 0 for step in plan.rungs)

    def made(number, stop_at=None):
        told = []

        def rung(step, metrics):
            told.append((step, metrics["distortion"]))
            if step == stop_at:
                raise Killed

        proposal = trial_run.read_proposal(plan.out, number)
        train = trial_run.train_here
        return trial_run.run_trial(plan.out, plan.common, proposal, train, lambda _: None, rung), told

    number = session.next()
    with pytest.raises(Killed):
        made(number, stop_at=3)
    kept = trial_run.read_rungs(trial_run.home_of(plan.out, number))
    assert list(kept) == [1, 3]
    trial, told = made(number)
    assert [step for step, _ in told] == [1, 3, 9]
    assert [told[0][1], told[1][1]] == [kept[1]["distortion"], kept[3]["distortion"]]
    assert trial.state == "finished"

    other = session.next()
    with pytest.raises(Killed):
        made(other, stop_at=3)
    stopped = session.end(other, None)
    assert (stopped.state, stopped.steps, stopped.bundle_digest) == ("pruned", 3, None)
    assert stopped.metrics == trial_run.read_rungs(trial_run.home_of(plan.out, other))[3]


def test_scoring_a_rung_does_not_change_the_run(shards, tmp_path):
    words = ("num_codes=choice:6",)
    (plain,) = run_all(opened(asked(shards, tmp_path / "plain", *words))).values()
    (scored,) = run_all(opened(asked(shards, tmp_path / "scored", *words, asha=True))).values()
    assert list(trial_run.read_rungs(str(tmp_path / "scored/trials/00000"))) == [1, 3, 9]
    weights, same = (read_bundle(Path(trial.out) / "bundle").tensors for trial in (plain, scored))
    assert all(same[name].equal(tensor) for name, tensor in weights.items())
    assert plain.metrics == scored.metrics


def test_objectives_are_metrics_of_valid_or_costs(shards, undisturbed):
    trial = undisturbed[0]
    assert value_of(trial, "distortion") == trial.metrics["mse"]
    assert value_of(trial, "seconds") == trial.seconds > 0
    assert value_of(trial, "parameters") == trial.parameters
    with pytest.raises(Failed, match=r"no metric 'mze'; did you mean 'mse'"):
        value_of(trial, "mze")


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (("num_code=choice:1,2",), {}, r"no setting 'num_code'; did you mean 'num_codes'"),
        (("num_codes=choice:4000,5000", "patch=4"), {}, r"num_codes=4000 is more than the \d+ vectors"),
        (("patch=choice:3,5",), {}, r"no point of the search space can be trained: patches of 3 x 3"),
        (("num_codes=choice:4,8",), {"objectives": ["mse"]}, r"mse says no direction; write min:NAME"),
        (("num_codes=choice:4,8",), {"sampler": "pbt"}, r"copies weights between running trials"),
        (("num_codes=choice:4,8",), {"sampler": "bayes"}, r"no sampler 'bayes'; allowed: grid, random, adaptive"),
        (("num_codes=4..400:log",), {"sampler": "grid"}, r"a grid needs a list of values, and num_codes=4\.\.400:log"),
        (GRID, {"sampler": "grid", "trials": 5}, r"the grid has 12 points and --trials 5"),
        (GRID, {"repeats": 0}, r"--repeats 0 was given; it takes 1 or more"),
        (GRID, {"concurrent": -1}, r"--concurrent -1 was given"),
        (GRID, {"capacity": 64, "bits": 8.0}, r"--capacity and --bits were both given"),
        (GRID, {"asha": True, "objectives": ["min:mse", "max:usage"]}, r"behind on one objective, and 2 were given"),
        (GRID, {"asha": True, "workers": 2}, r"a Ray Train job of its own, which Ray Tune cannot stop"),
        (GRID, {"asha": True, "repeats": 2}, r"repeats stopped at different steps"),
        (("num_codes=4..400:log", "patch=4"), {"capacity": 17, "sampler": "random"}, r"17 numbers cannot be shared"),
    ],
)
def test_what_cannot_end_well_is_refused_before_anything_is_written(shards, tmp_path, words, changes, said):
    with pytest.raises(Refused, match=said):
        Plan(asked(shards, tmp_path / "s", *words, **changes)).check()
    assert not (tmp_path / "s").exists()


def test_a_small_space_is_a_grid_and_others_are_learned(shards, tmp_path, monkeypatch):
    def sampler(*words, **changes):
        return Plan(asked(shards, tmp_path / "s", *words, **changes)).sampler

    assert sampler(*GRID) == "grid"
    assert sampler(*GRID, trials=12) == "grid"
    assert sampler(*GRID, trials=10) == "adaptive"
    assert sampler("learning_rate=1e-3..1e-1:log") == "adaptive"
    monkeypatch.setattr(search_plan, "LARGEST_GRID", 11)
    assert sampler(*GRID) == "adaptive"


def test_records_come_back_as_they_were_written(tmp_path, undisturbed):
    for number in (0, 5):
        trials.write(trial_run.home_of(str(tmp_path), number), undisturbed[number])
    assert trials.read_trials(str(tmp_path)) == [undisturbed[0], undisturbed[5]]
    assert trials.read_trials(str(tmp_path / "nowhere")) == []


def test_the_early_stopper_has_seen_what_ended_in_earlier_sessions(shards, tmp_path):
    """After a kill, a bad trial is stopped by the rungs of trials that no longer run."""
    from pipelines.tune import _early_stopper

    session = opened(asked(shards, tmp_path / "s", "num_codes=choice:4,6,8,10", asha=True))
    for number in [session.next() for _ in range(3)]:
        home = trial_run.home_of(session.plan.out, number)
        storage.write_json_atomic(f"{home}/rungs.json", {"1": {"distortion": 0.1 + number / 100}})
        session.end(number, None)
    fresh, taught = _early_stopper(session.plan, {}), _early_stopper(session.plan, session.records)
    bad = SimpleNamespace(trial_id="new")
    for stopper in (fresh, taught):
        stopper.on_trial_add(None, bad)
    assert fresh.on_trial_result(None, bad, {"step": 1, "distortion": 0.5}) == "CONTINUE"
    assert taught.on_trial_result(None, bad, {"step": 1, "distortion": 0.5}) == "STOP"


def test_asha_takes_the_points_of_a_grid_in_a_seeded_order(shards, tmp_path):
    plain, stopped, again, other = (
        Plan(asked(shards, tmp_path, objectives=("min:distortion",), **changes)).points
        for changes in ({}, {"asha": True}, {"asha": True}, {"asha": True, "seed": 1})
    )
    assert stopped == again
    assert len({str(points) for points in (plain, stopped, other)}) == 3
    assert sorted(map(str, plain)) == sorted(map(str, stopped)) == sorted(map(str, other))
