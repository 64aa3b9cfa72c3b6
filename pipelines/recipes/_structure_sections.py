"""The sections of the report on structure tokens, each kept as JSON as soon as it is made."""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines import storage
from pipelines.recipe import ReportJob
from pipelines.recipes import _code_use as use
from pipelines.recipes import _effectiveness as effects
from pipelines.recipes import _sensitivity as sensitivity
from pipelines.recipes import _structure_tasks as tasks
from pipelines.recipes._protein_tokens import ProteinTokens
from pipelines.recipes._rebuilding import reconstruction
from pipelines.recipes._sensitivity import Pair
from pipelines.recipes._structure_chains import Chains, Floats, Ints, gather, latents_of
from pipelines.recipes._structure_probe import Plan
from pipelines.shards import ShardReader
from vqcore import metrics

SHOWN_COUNTS = 200
"""Points of the curve of usage."""


def tasks_of(job: ReportJob) -> tuple[tasks.Task, ...]:
    """Those of the file given, or one of every label."""
    file = job.settings.tasks
    return tasks.default_tasks(job.reader) if file is None else tasks.read_tasks(file)


def shards_of(job: ReportJob, uri: str | None) -> ShardReader:
    """The shards named, or the report's own."""
    reader: ShardReader = job.reader if uri is None else ShardReader(uri)
    return reader


class Sections:
    """The sections of one report. Chains are read when the first section asks for them."""

    def __init__(self, job: ReportJob, tokens: ProteinTokens) -> None:
        self.job, self.tokens = job, tokens

    @cached_property
    def chains(self) -> Chains:
        return gather(self.job.reader, self.job.split, self.tokens)

    def kept(self, name: str, of: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A section as it was made before a kill, or made now and kept. Settings are the claim's to compare."""
        home = storage.join(self.job.out, "sections", f"{name}.json")
        if storage.exists(home):
            record: dict[str, Any] = storage.read_json(home)
            if record["of"] == of:
                return record["found"]
        begun = time.monotonic()
        found = {**make(), "seconds": round(time.monotonic() - begun, 2)}
        storage.write_json_atomic(home, {"of": of, "found": found})
        return found

    def use(self) -> dict[str, Any]:
        counts = metrics.counts_of(torch.from_numpy(self.chains.codes), len(self.tokens.vectors))
        ordered = counts.sort(descending=True).values.double() / max(1, int(counts.sum()))
        places = torch.linspace(0, len(ordered) - 1, min(len(ordered), SHOWN_COUNTS)).long()
        return {
            "chains": len(self.chains),
            "residues_without_code": int((self.chains.codes < 0).sum()),
            "efficiency": use.efficiency(counts),
            "distinctiveness": use.distinctiveness(self.tokens.vectors, counts),
            "shares": ordered[places].tolist(),
        }

    def reconstruction(self) -> dict[str, Any]:
        scores = reconstruction(self.job.reader, self.job.split, self.tokens)
        return {"skipped": "these tokens come without a decoder."} if scores is None else {"scores": scores}

    def sensitivity(self) -> dict[str, Any]:
        s = self.job.settings
        pairs: list[Pair] = []
        lost, reader, split, chains = 0, self.job.reader, self.job.split, self.chains
        if s.pairs_shards is not None:
            reader, split = shards_of(self.job, s.pairs_shards), "all"
            chains = gather(reader, split, self.tokens.on(reader))
        if s.pair_suffixes:
            pairs += sensitivity.pairs_by_suffix(chains.keys, s.pair_suffixes)
        if s.pairs is not None:
            listed, lost = sensitivity.pairs_of_table(storage.normalise(s.pairs), chains.keys)
            pairs += listed
        pairs += sensitivity.pairs_of_models(chains.keys)
        if not pairs:
            return {
                "skipped": "there are no two conformations of one chain: say pair_suffixes=, give pairs=CSV, or ingest"
                " with models=all.",
                "not_there": lost,
            }
        if importlib.util.find_spec("tmtools") is None:
            return {"skipped": "tmtools is not installed: pip install 'vqray[tmscore]'", "not_there": lost}
        chosen = sensitivity.spread(pairs, s.most_pairs)
        return {**self._similarities(chosen, reader, split, chains), "found": len(pairs), "not_there": lost}

    def _similarities(self, pairs: list[Pair], reader: ShardReader, split: str, chains: Chains) -> dict[str, Any]:
        tokens = self.tokens.on(reader)
        book, coded = tokens.vectors.numpy(), (chains.codes >= 0) & ~np.isnan(chains.alphas).any(1)
        chosen = {chain for pair in pairs for chain in pair[:2]}
        with tempfile.TemporaryDirectory() as scratch:
            vectors = {"codes": _cut(chains, chosen, lambda kept: book[chains.codes[kept]], coded)}
            if self.job.settings.latents and tokens.latents is not None:
                held = latents_of(reader, (split,), tokens, len(coded), Path(scratch) / "latents")
                vectors["latents"] = _cut(chains, chosen, lambda kept: held[kept], coded)
        alphas = _cut(chains, chosen, lambda kept: chains.alphas[kept], coded)
        return sensitivity.similarities(pairs, vectors, alphas, self.job.settings.tm_seconds)

    def effectiveness(self) -> dict[str, Any]:
        if self.job.split != "test":
            return {
                "skipped": f"probes learn from train and are chosen on valid, so split {self.job.split!r} holds rows"
                " that they know; report --split test."
            }
        found: dict[str, dict[str, Any]] = {}
        groups: dict[str | None, list[tasks.Task]] = {}
        given = tasks_of(self.job)
        for task in given:
            groups.setdefault(task.shards, []).append(task)
        for uri, group in groups.items():
            found |= self._answers(uri, group, {task.name: n for n, task in enumerate(given)})
        return {"tasks": [found[task.name] for task in given]}

    def _answers(self, uri: str | None, group: list[tasks.Task], numbers: Mapping[str, int]) -> dict[str, Any]:
        """The answers to all tasks of the same shards, whose chains are read once, and only if a task is left."""
        s = self.job.settings
        plan = Plan(steps=s.steps, rates=s.rates, chains=s.chains, seed=s.seed)
        asked: list[effects.Asked] = []
        with tempfile.TemporaryDirectory() as scratch:

            def answer(task: tasks.Task) -> dict[str, Any]:
                if not asked:
                    reader = shards_of(self.job, uri)
                    labels = sorted({one.label for one in group})
                    file = Path(scratch) / "latents"
                    tokens = self.tokens.on(reader)
                    asked.append(effects.ask(reader, tokens, labels, latents=s.latents, scratch=file))
                return effects.effectiveness(task, asked[0], plan, kmeans=s.kmeans, seed=s.seed)

            return {
                task.name: self.kept(
                    f"task-{numbers[task.name]:03d}", task.model_dump(mode="json"), partial(answer, task)
                )
                for task in group
            }


def _cut(
    chains: Chains, chosen: Iterable[int], values: Callable[[Ints], Floats], keep: npt.NDArray[np.bool_]
) -> dict[int, Floats]:
    """Chain -> the values of those of its residues that are kept."""
    found = {}
    for chain in chosen:
        span = np.arange(*chains.offsets[[chain, chain + 1]])
        found[chain] = np.array(values(span[keep[span]]))
    return found
