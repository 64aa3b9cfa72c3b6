"""What probes read from tokens, beside what they read from the latents before the quantizer and from plain geometry.

Four answers to every task: `codes`, the vectors of tokens; `latents`, what no codebook can beat; `dihedrals`, k-means
codes of the backbone's dihedrals (sine and cosine of phi, psi and omega), fitted on the task's train chains, as many as
the tokenizer has (or as many as there are residues, which is then said); and `control`, a constant or the most frequent
class. All four are asked about the same residues: those with a token and a target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.recipes import _structure_probe as probes
from pipelines.recipes import _structure_tasks as tasks
from pipelines.recipes._protein_tokens import ProteinTokens
from pipelines.recipes._structure_chains import Chains, Floats, Ints, gather, joined, latents_of
from pipelines.recipes._structure_probe import Goal, Plan, Residues
from pipelines.recipes._structure_tasks import Skipped, Task
from pipelines.shards import ShardReader
from vqcore import assign, seeding

SPLITS = ("train", "valid", "test")
CLUSTERED = 65_536
"""Train residues that k-means is fitted to."""


@dataclass(frozen=True)
class Asked:
    """All chains of some shards, as tasks need them."""

    tokens: ProteinTokens
    chains: Chains
    """Train, valid and test, one after another."""
    sizes: dict[str, int]
    latents: Floats | None
    clusters: dict[bytes, Residues] = field(default_factory=dict)
    """By the train chains they were fitted on."""


def ask(reader: ShardReader, tokens: ProteinTokens, labels: Sequence[str], *, latents: bool, scratch: Path) -> Asked:
    """
    Args:
        latents: whether to compute the tokens' latents, if they have any. They are 4 D bytes a residue.
        scratch: a new file for them.
    """
    parts = {split: gather(reader, split, tokens, labels) for split in SPLITS}
    whole = joined(list(parts.values()))
    held = None
    if latents and tokens.latents is not None:
        held = latents_of(reader, SPLITS, tokens, len(whole.codes), scratch)
    return Asked(tokens, whole, {split: len(part) for split, part in parts.items()}, held)


def effectiveness(task: Task, asked: Asked, plan: Plan, *, kmeans: bool, seed: int) -> dict[str, Any]:
    """A task's answers on each of its tests, as JSON values; or why it was skipped.

    Args:
        seed: of the CATH split and of k-means; the probes' is the plan's.
    """
    head = {"name": task.name, "kind": task.kind, "level": task.level, "metric": probes.METRIC[task.kind]}
    try:
        return {**head, **_answers(task, asked, plan, kmeans, seed)}
    except Skipped as reason:
        return {**head, "skipped": str(reason)}


def _answers(task: Task, asked: Asked, plan: Plan, kmeans: bool, seed: int) -> dict[str, Any]:
    targets, names = tasks.targets_of(task, asked.chains)
    division = tasks.division_of(task, asked.chains, asked.sizes, seed)
    train = tasks.units_of(task, asked.chains, division.train, targets)
    targets, names, dropped = _learnable(task, targets, names, train)
    train = train[~np.isnan(targets[train])]
    tests: dict[str, tuple[Ints, Ints]] = {}
    for name, pair in division.tests.items():
        valid, test = (tasks.units_of(task, asked.chains, part, targets) for part in pair)
        tests[name] = valid, test
    goal = Goal(task.kind, targets, max(1, len(names)), task.level == "chain")
    tests, lost = _askable(goal, tests)
    methods = {"codes": _of_codes(asked, asked.chains.codes >= 0), **_others(asked, division.train, kmeans, seed)}
    found: dict[str, dict[str, Any]] = {
        name: {"train": len(train), "valid": len(valid), "test": len(test), "scores": {}}
        for name, (valid, test) in tests.items()
    }
    diverged: list[str] = []
    for method, residues in methods.items():
        for name, answer in probes.probed(residues, goal, train, tests, plan).items():
            found[name]["scores"][method] = asdict(answer)
            if answer.valid is None:
                diverged.append(f"the probe of {method} diverged at every learning rate; give smaller rates=.")
    for name, (_, test) in tests.items():
        found[name]["scores"]["control"] = {"score": probes.control(goal, train, test)}
    notes = [f"classes left out for want of train examples: {', '.join(dropped)}"] if dropped else []
    notes += [*lost, *dict.fromkeys(diverged)]
    if "dihedrals" in methods:
        notes += _fewer(asked, division.train)
    return {"tests": found, "classes": list(names), "notes": notes}


def _learnable(
    task: Task, targets: Floats, names: Sequence[str], train: Ints
) -> tuple[Floats, Sequence[str], Sequence[str]]:
    """Targets without the classes that train has too few of, the classes that stay, and those that do not.

    Raises:
        Skipped: the train split holds one class, or one value, only.
    """
    if task.kind == "classes":
        counts = np.bincount(targets[train].astype(int), minlength=len(names))
        kept = [place for place in range(len(names)) if counts[place] >= task.least]
        found = np.full_like(targets, np.nan)
        for new, old in enumerate(kept):
            found[targets == old] = new
        dropped = [name for place, name in enumerate(names) if place not in kept]
        targets, names, held = found, [names[place] for place in kept], len(kept)
    else:
        dropped, held = [], len(np.unique(targets[train]))
    if held < 2:
        what = "class" if task.kind != "regression" else "value"
        raise Skipped(f"the train chains hold {held} {what} of {task.label}; two or more are needed to learn from.")
    return targets, names, dropped


def _askable(goal: Goal, tests: Mapping[str, tuple[Ints, Ints]]) -> tuple[dict[str, tuple[Ints, Ints]], list[str]]:
    """The tests whose metric is defined on both parts, and why others are not among them.

    Raises:
        Skipped: there is none.
    """
    lost: dict[str, str] = {}
    for name, pair in tests.items():
        for part, units in zip(("valid", "test"), pair, strict=True):
            held = len(np.unique(goal.targets[units]))
            if not held or (goal.kind != "classes" and held < 2):
                lost[name] = (
                    f"the {part} part of {name} has {len(units)} examples of {held} different values, of which"
                    f" {probes.METRIC[goal.kind]} is undefined; more chains are needed."
                )
    if len(lost) == len(tests):
        raise Skipped(" ".join(lost.values()))
    return {name: pair for name, pair in tests.items() if name not in lost}, list(lost.values())


def _of_codes(asked: Asked, coded: npt.NDArray[np.bool_]) -> Residues:
    vectors, codes = asked.tokens.vectors, asked.chains.codes

    def look_up(places: Ints) -> torch.Tensor:
        own = torch.from_numpy(codes[places])
        return vectors[own.clamp(min=0)].masked_fill((own < 0).unsqueeze(1), 0.0)

    return Residues(asked.chains.offsets, look_up, vectors.shape[1], coded)


def _others(asked: Asked, train: Sequence[int], kmeans: bool, seed: int) -> dict[str, Residues]:
    found: dict[str, Residues] = {}
    if asked.latents is not None:
        held = asked.latents
        found["latents"] = Residues(
            asked.chains.offsets,
            lambda places: torch.from_numpy(np.asarray(held[places])),
            held.shape[1],
            asked.chains.codes >= 0,
        )
    if kmeans:
        key = np.asarray(train, np.int64).tobytes()
        if key not in asked.clusters:
            asked.clusters[key] = _clustered(asked, train, seed)
        found["dihedrals"] = asked.clusters[key]
    return found


def _residues_of(asked: Asked, train: Sequence[int]) -> Ints:
    return np.concatenate([np.arange(*asked.chains.offsets[[chain, chain + 1]]) for chain in train])


def _clustered(asked: Asked, train: Sequence[int], seed: int) -> Residues:
    """k-means codes of all residues' dihedrals, from the residues of the train chains."""
    places = _residues_of(asked, train)
    shuffled = np.random.default_rng(seed).permutation(places)[:CLUSTERED]
    rows = torch.from_numpy(asked.chains.angles[shuffled])
    count = min(len(asked.tokens.vectors), len(rows))
    centres = seeding.kmeans_plus_plus(rows, count, metric="euclidean", seed=seed, iterations=30)
    codes = assign.nearest(torch.from_numpy(asked.chains.angles), centres).numpy()
    of_codes = replace(asked, tokens=replace(asked.tokens, vectors=centres), chains=replace(asked.chains, codes=codes))
    return _of_codes(of_codes, asked.chains.codes >= 0)


def _fewer(asked: Asked, train: Sequence[int]) -> list[str]:
    count, wanted = len(_residues_of(asked, train)), len(asked.tokens.vectors)
    return [f"k-means has {count:,} codes, one a train residue, and the tokens {wanted:,}"] if count < wanted else []
