"""One session of a search: which trials there are on disk, which are to run next, and what comes in."""

import sys
from collections import deque

from pipelines import storage, trial_run, trials
from pipelines.errors import Failed, nearest_names
from pipelines.search_plan import Plan
from pipelines.trial_run import Proposal
from pipelines.trials import Trial


class Session:
    """The trials of a search, from their directories; its state is theirs."""

    def __init__(self, plan: Plan):
        self.plan = plan
        if plan.request.retry_failed:
            self._forget_failed()
        self.records = {trial.number: trial for trial in trials.read_trials(plan.out)}
        self.proposals = {number: trial_run.read_proposal(plan.out, number) for number in _proposed(plan.out)}
        self.pending = deque(sorted(self.proposals.keys() - self.records.keys()))
        self.running: set[int] = set()
        self.deaths: dict[int, int] = {}
        """Number -> how often its process has died in this session."""
        self.sampler = plan.new_sampler()
        self.exhausted = False
        for index, group in sorted(self._groups().items()):
            self.sampler.restore(index, group[0].settings)
        for index in self._groups():
            self._tell(index)

    def remaining(self) -> int:
        """Trials that have not ended, among them those not yet proposed."""
        new = 0 if self.exhausted else max(0, self.plan.total - len(self.proposals))
        return len(self.proposals) - len(self.records) + new

    def next(self) -> int | None:
        """The number of a trial to run now; None when there is none left to hand out."""
        while (number := self._ready()) is None and self._may_propose():
            self._propose()
        if number is not None:
            self.pending.remove(number)
            self.running.add(number)
        return number

    def done(self) -> bool:
        """Whether every trial has ended, and the sampler has no other."""
        self._look_ahead()
        return not self.remaining()

    def _look_ahead(self) -> None:
        if not self.pending and self._may_propose():
            self._propose()

    def _may_propose(self) -> bool:
        return not self.exhausted and len(self.proposals) < self.plan.total

    def _ready(self) -> int | None:
        """The first trial that waits for no other, to grow from it or to be its first levels."""
        parents = {number: self.proposals[number].waits_for for number in self.pending}
        return next((n for n, parent in parents.items() if parent is None or parent in self.records), None)

    def end(self, number: int, error: str | None) -> Trial | None:
        """Take in a trial that no longer runs: by its own record, or else stopped early (no error), or dead.

        A dead one is put back to run next, as often as the request allows; then, and only then, None is returned.
        """
        self.running.discard(number)
        out, proposal, home = self.plan.out, self.proposals[number], trial_run.home_of(self.plan.out, number)
        if storage.exists(storage.join(home, trials.RECORD)):
            trial = Trial.from_json(storage.read_json(storage.join(home, trials.RECORD)))
        elif error is None:
            trial = trial_run.pruned(out, proposal)
            trials.write(home, trial)
        else:
            self.deaths[number] = self.deaths.get(number, 0) + 1
            if self.deaths[number] <= self.plan.request.restarts:
                self.pending.appendleft(number)
                return None
            trial = trial_run.failed(out, proposal, f"{error} (tried {self.deaths[number]} times)")
            trials.write(home, trial)
        self.records[number] = trial
        self._tell(proposal.index)
        return trial

    def _propose(self) -> None:
        """The next point's repeats, written before any of them runs."""
        repeats, seed = self.plan.request.repeats, self.plan.request.seed
        # A session killed between two repeats left a point whose others are still to be written.
        index, done = divmod(len(self.proposals), repeats)
        point = self.proposals[index * repeats].settings if done else self.sampler.propose(index)
        if point is None:
            self.exhausted = True
            print(f"no new point was found after {index} ({self.plan.sampler}): the search ends there", file=sys.stderr)
            return
        for repeat in range(done, repeats):
            smaller, deeper = (
                None if other is None else other * repeats + repeat
                for other in (self.plan.smaller.get(index), self.plan.deeper.get(index))
            )
            proposal = Proposal(index * repeats + repeat, index, point, repeat, seed + repeat, smaller, deeper)
            trial_run.propose(self.plan.out, proposal)
            self.proposals[proposal.number] = proposal
            self.pending.append(proposal.number)

    def _groups(self) -> dict[int, list[Proposal]]:
        groups: dict[int, list[Proposal]] = {}
        for number in sorted(self.proposals):
            groups.setdefault(self.proposals[number].index, []).append(self.proposals[number])
        return groups

    def _tell(self, index: int) -> None:
        """Tell the sampler of a point once all its repeats have ended: their mean, or that it failed."""
        repeats = self.plan.request.repeats
        ended = [self.records.get(number) for number in range(index * repeats, (index + 1) * repeats)]
        if any(trial is None for trial in ended):
            return
        good = [trial for trial in ended if trial is not None and trial.state == "finished"]
        means = [sum(value_of(trial, name) for trial in good) / len(good) for name, _ in self.plan.objectives if good]
        self.sampler.tell(index, means or None)

    def _forget_failed(self) -> None:
        for trial in trials.read_trials(self.plan.out):
            if trial.state == "failed":
                home = trial_run.home_of(self.plan.out, trial.number)
                storage.remove(storage.join(home, "run"))
                storage.remove(storage.join(home, trials.RECORD))


def value_of(trial: Trial, name: str) -> float:
    """A finished trial's value of an objective: a metric on valid, or its parameters, seconds or steps.

    Raises:
        Failed: no such metric; the message names the nearest.
    """
    values = trial.values()
    found = values.get(name)
    if found is None:
        raise Failed(
            f"trial {trial.number} has no metric {name!r}; {nearest_names(name, values)}."
            " Run the same command with another --objective; with --sampler adaptive or --asha also another --out."
        )
    return found


def _proposed(out: str) -> list[int]:
    home = storage.join(out, "trials")
    if not storage.exists(home):
        return []
    ends = f"/{trial_run.PROPOSAL}"
    return [
        int(e.name.removesuffix(ends))
        for e in storage.list_files(home)
        if e.name.endswith(ends) and e.name.count("/") == 1
    ]
