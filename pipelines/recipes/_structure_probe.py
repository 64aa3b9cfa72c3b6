"""The frozen probe of StructTokenBench (Yuan et al. 2025): how much a small network reads from vectors of residues.

Vector + learned position embedding -> LayerNorm -> dropout 0.1 -> Linear(D, 512) -> ReLU -> dropout 0.1 -> Linear; for
chains the mean over residues comes first. Binary targets: cross-entropy with both classes weighing the same in every
batch; regressions: squared error; classes: cross-entropy. AdamW, batches of 8 chains (authors: 64 where chains are
classified), warmup over 2 % of the steps, 10 % at the full rate, cosine to 10 % of it, gradients clipped at 1.0. The
authors make 10,000 steps (`steps=10000`) at every learning rate of 0.1, 0.01, 1e-3, 1e-4, 5e-5, 1e-5, 5e-6 and 1e-6.

Where this departs from the authors' code: metrics are pooled over all residues of a split, where they average over
batches of 8 proteins (a batch without positives has no AUROC); and what chooses the learning rate on the valid split is
the metric that is reported, where they take F1 for classes. And vectors are divided by their root mean square, one
number for all: the optimiser moves positions by the learning rate at each step, so codes of small norm would drown in
them, and tokenizers would be compared by the length of their vectors. Test rows are neither fitted nor tuned on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from pipelines.recipes._structure_chains import Floats, Ints

Kind = Literal["binary", "regression", "classes"]
METRIC: dict[Kind, str] = {"binary": "auroc", "regression": "spearman", "classes": "macro_f1"}
POSITIONS = 700
"""Residues beyond share the last position."""
ROWS_AT_ONCE = 8192
SCALED_BY = 4096
"""Residues that say how long vectors are."""


@dataclass(frozen=True)
class Residues:
    """What a probe sees of all chains."""

    offsets: Ints
    """[C + 1]"""
    look_up: Callable[[Ints], Float[Tensor, "n D"]]
    """Places of residues -> their vectors."""
    width: int
    coded: npt.NDArray[np.bool_]
    """[N]: residues that have a token. Of a chain these alone are averaged."""

    def span(self, chain: int) -> Ints:
        """Places of a chain's residues that have a token."""
        places = np.arange(*self.offsets[[chain, chain + 1]])
        found: Ints = places[self.coded[places]]
        return found


@dataclass(frozen=True)
class Goal:
    """What it is to tell."""

    kind: Kind
    targets: Floats
    """[N] of residues, or [C] of chains."""
    outputs: int
    """Number of classes; 1 for the other kinds."""
    of_chains: bool = False


@dataclass(frozen=True)
class Plan:
    steps: int = 400
    rates: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
    chains: int = 8
    hidden: int = 512
    seed: int = 1234


class Probe(nn.Module):
    def __init__(self, width: int, outputs: int, hidden: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.positions = nn.Parameter(torch.zeros(POSITIONS, width))
        self.norm = nn.LayerNorm(width)
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, outputs)

    def forward(
        self, vectors: Float[Tensor, "n D"], positions: Int64[Tensor, " n"], chains: Int64[Tensor, " n"] | None
    ) -> Float[Tensor, "m O"]:
        """[n, O], or with `chains` (the number of each residue's chain, 0 to m - 1) [m, O]."""
        x = vectors / self.scale + self.positions[positions.clamp(max=POSITIONS - 1)]
        if chains is not None:
            size = int(chains[-1]) + 1
            sums = x.new_zeros(size, x.shape[1]).index_add(0, chains, x)
            x = sums / torch.bincount(chains, minlength=size).unsqueeze(1)
        x = functional.dropout(self.norm(x), 0.1, self.training)
        out: Tensor = self.last(functional.dropout(self.first(x).relu(), 0.1, self.training))
        return out


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: warmup over 2 %, 10 % at 1, then cosine to 0.1."""
    warm, flat = max(1, steps // 50), steps // 10
    if step < warm:
        return (step + 1) / warm
    along = max(0, step - warm - flat) / max(1, steps - warm - flat)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, along)))


def loss_of(kind: Kind, outputs: Float[Tensor, "n O"], targets: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    if kind == "classes":
        return functional.cross_entropy(outputs, targets.long())
    found = outputs.squeeze(-1)
    if kind == "regression":
        return functional.mse_loss(found, targets)
    positives = targets.sum()
    # N / (2 N_pos) and N / (2 N_neg); where the batch has one class only, the other weight meets nothing.
    negatives = len(targets) - positives
    half = 0.5 * len(targets)
    weights = torch.where(targets > 0.5, half / positives.clamp(min=1), half / negatives.clamp(min=1))
    return functional.binary_cross_entropy_with_logits(found, targets, weights)


def score(kind: Kind, targets: Floats, outputs: Floats) -> float | None:
    """The pooled metric: AUROC, Spearman's rho or macro F1; None where the targets leave it undefined.

    Outputs that are all the same have a rho of 0. Macro F1 is over the classes that occur among the targets or outputs.
    """
    if not len(targets) or (kind != "classes" and len(np.unique(targets)) < 2):
        return None
    if not np.isfinite(outputs).all():
        return -math.inf
    if kind == "binary":
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(targets, outputs[:, 0]))
    if kind == "regression":
        from scipy.stats import spearmanr

        return float(spearmanr(targets, outputs[:, 0]).statistic) if len(np.unique(outputs)) > 1 else 0.0
    from sklearn.metrics import f1_score

    return float(f1_score(targets.astype(int), outputs.argmax(1), average="macro", zero_division=0))


def fitted(residues: Residues, goal: Goal, units: Ints, rate: float, plan: Plan) -> Probe:
    """A probe trained on these units (residues, or chains) at one learning rate. A function of its arguments alone."""
    drawn = torch.Generator().manual_seed(plan.seed)
    groups = by_chain(residues.offsets, units, goal.of_chains)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        probe = Probe(residues.width, goal.outputs, plan.hidden, _scale(residues, goal, units))
        optimiser = torch.optim.AdamW(probe.parameters(), lr=rate)
        follow = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule(step, plan.steps))
        order: list[int] = []
        for _ in range(plan.steps):
            if not order:
                order = torch.randperm(len(groups), generator=drawn).tolist()
            taken, order = order[: plan.chains], order[plan.chains :]
            outputs, targets = _asked(probe, residues, goal, [groups[n] for n in taken])
            optimiser.zero_grad()
            loss_of(goal.kind, outputs, targets).backward()
            nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            optimiser.step()
            follow.step()
    return probe.eval()


def _scale(residues: Residues, goal: Goal, units: Ints) -> float:
    """Root mean square of vectors, over some of the units; 1 where all are 0."""
    places = np.concatenate([residues.span(chain) for chain in units]) if goal.of_chains else units
    some = places[np.unique(np.linspace(0, len(places) - 1, SCALED_BY).astype(int))]
    vectors = residues.look_up(some)
    return float(vectors.double().square().mean().sqrt()) or 1.0


@torch.no_grad()
def outputs_of(probe: Probe, residues: Residues, goal: Goal, units: Ints) -> Floats:
    """[U, O] of these units, in their order."""
    groups, found = by_chain(residues.offsets, units, goal.of_chains), []
    waiting: list[Ints] = []
    for group in groups:
        waiting.append(group)
        if sum(map(len, waiting)) >= (ROWS_AT_ONCE // 256 if goal.of_chains else ROWS_AT_ONCE):
            found.append(_asked(probe, residues, goal, waiting)[0].numpy())
            waiting = []
    if waiting:
        found.append(_asked(probe, residues, goal, waiting)[0].numpy())
    return np.concatenate(found) if found else np.zeros((0, goal.outputs), np.float32)


def by_chain(offsets: Ints, units: Ints, of_chains: bool) -> list[Ints]:
    """Units, which are in the order of their chains, a group for every chain."""
    if of_chains:
        return [units[n : n + 1] for n in range(len(units))]
    chains = np.searchsorted(offsets, units, side="right")
    return np.split(units, np.flatnonzero(np.diff(chains)) + 1) if len(units) else []


def _asked(probe: Probe, residues: Residues, goal: Goal, groups: Sequence[Ints]) -> tuple[Tensor, Tensor]:
    """(outputs, targets) of some groups of units."""
    units = np.concatenate(groups)
    targets = torch.from_numpy(goal.targets[units])
    if not goal.of_chains:
        begins = residues.offsets[np.searchsorted(residues.offsets, units, side="right") - 1]
        return probe(residues.look_up(units), torch.from_numpy(units - begins), None), targets
    spans = [residues.span(chain) for chain in units]
    positions = np.concatenate([span - residues.offsets[chain] for chain, span in zip(units, spans, strict=True)])
    owners = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
    vectors = residues.look_up(np.concatenate(spans))
    return probe(vectors, torch.from_numpy(positions), torch.from_numpy(owners)), targets


@dataclass(frozen=True)
class Answer:
    score: float | None
    """On the test part; None where its targets leave the metric undefined."""
    valid: float | None
    """None where probes of all learning rates diverged."""
    rate: float
    """The learning rate that the valid part chose."""
    units: int


def probed(
    residues: Residues, goal: Goal, train: Ints, tests: Mapping[str, tuple[Ints, Ints]], plan: Plan
) -> dict[str, Answer]:
    """Fit a probe at each learning rate on the train units; for each test the valid part chooses which one is asked.

    Args:
        tests: name -> (valid units, test units).
    """
    best: dict[str, tuple[float, float, Floats]] = {}
    for rate in plan.rates:
        probe = fitted(residues, goal, train, rate, plan)
        for name, (valid, test) in tests.items():
            reached = score(goal.kind, goal.targets[valid], outputs_of(probe, residues, goal, valid))
            reached = -math.inf if reached is None else reached
            if name not in best or reached > best[name][0]:
                best[name] = (reached, rate, outputs_of(probe, residues, goal, test))
    found = {}
    for name, (reached, rate, outputs) in best.items():
        reached_on_test = score(goal.kind, goal.targets[tests[name][1]], outputs)
        found[name] = Answer(_finite(reached_on_test), _finite(reached), rate, len(outputs))
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def control(goal: Goal, train: Ints, test: Ints) -> float | None:
    """The score of the most frequent class or of a constant: what one gets without looking."""
    outputs = np.zeros((len(test), goal.outputs), np.float32)
    if goal.kind == "classes":
        outputs[:, np.bincount(goal.targets[train].astype(int)).argmax()] = 1.0
    return score(goal.kind, goal.targets[test], outputs)
