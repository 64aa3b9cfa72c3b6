"""The report on structure tokens: StructTokenBench's four questions (Yuan et al. 2025), and reconstruction.

Efficiency and distinctiveness of the codebook, sensitivity to conformations, effectiveness on tasks, and how near
decoded backbones are, all on the split asked for, as `structure.html` and `structure.json`. Every section is kept in
`sections/` as soon as it is made, and is not made again after a kill.

A recipe of proteins takes it up with `Report(StructureReportSettings, write, FILES, refuse, given)`, where its `write`
calls this one with `tokens_of(job.trained)` and, where it can, latents and a decoder. `tokens=FILE vectors=FILE` judges
tokens made elsewhere by the same rules, and `beside=DIR,DIR` sets finished reports beside this one.
"""

import hashlib
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipelines import storage
from pipelines.corpora._protein_annotations import stem_of
from pipelines.errors import Refused
from pipelines.recipe import ReportJob
from pipelines.recipes import _sensitivity as sensitivity
from pipelines.recipes import _structure_tasks as tasks
from pipelines.recipes._cath_split import read_cath
from pipelines.recipes._protein_tokens import ProteinTokens, keys_of, read_tokens
from pipelines.recipes._structure_page import page_of
from pipelines.recipes._structure_sections import Sections, shards_of, tasks_of
from pipelines.shards import ShardReader

FILES = ("structure.html", "structure.json")
FORMAT, VERSION = "vqray-structure", 1


class StructureReportSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: str | None = Field(None, description="TOML file of tasks; default: every label of the shards")
    tokens: str | None = Field(None, description="table of codes made elsewhere, judged instead of the bundle's")
    vectors: str | None = Field(None, description="what these codes stand for, [K, D]: .npy or .safetensors")
    steps: int = Field(400, ge=1, description="of each probe (paper: 10000)")
    rates: tuple[float, ...] = Field(
        (1e-2, 1e-3, 1e-4), description="learning rates the valid split chooses from (paper: 0.1 to 1e-6, eight)"
    )
    chains: int = Field(8, ge=1, description="of a probe's batch")
    latents: bool = Field(True, description="ask the latents before the quantizer too")
    kmeans: bool = Field(True, description="ask k-means codes of the backbone's dihedrals too")
    pair_suffixes: tuple[str, ...] = Field(
        (), description="two: files whose names differ by them hold conformations of one protein, as _u,_b-matched"
    )
    pairs: str | None = Field(None, description="CSV of conformations: a, chain_a, b, chain_b")
    pairs_shards: str | None = Field(None, description="shards whose conformations are asked; default the report's")
    most_pairs: int = Field(1000, ge=3, description="pairs of conformations, at most")
    tm_seconds: float = Field(60.0, gt=0, description="for TM-align of one pair, at most")
    beside: tuple[str, ...] = Field((), description="directories of finished reports to show beside this one")
    seed: int = Field(42, ge=0, description="of CATH splits, k-means and probes")

    @field_validator("rates")
    @classmethod
    def _some_positive_rates(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not rates or not all(0 < rate < math.inf for rate in rates):
            raise ValueError("give one or more positive, finite learning rates")
        return rates

    @model_validator(mode="after")
    def _settings_go_together(self) -> "StructureReportSettings":
        if (self.tokens is None) != (self.vectors is None):
            raise ValueError("tokens and vectors go together: the codes, and what they stand for")
        if len(set(self.pair_suffixes)) not in (0, 2) or len(self.pair_suffixes) > 2:
            raise ValueError("pair_suffixes takes two different suffixes, as _u,_b-matched")
        return self


def refuse(job: ReportJob) -> None:
    """Raise Refused, before any work, for what cannot end well."""
    s = job.settings
    if job.reader.manifest.kind != "proteins":
        raise Refused(f"{job.reader.uri} holds {job.reader.manifest.kind}; this report is of protein structures.")
    for name, extra in (("biotite", "proteins"), ("sklearn", "proteins")):
        if importlib.util.find_spec(name) is None:
            raise Refused(f"this report needs {name}, which is not installed: pip install 'vqray[{extra}]'")
    if (s.pairs is not None or s.pairs_shards is not None or s.pair_suffixes) and importlib.util.find_spec(
        "tmtools"
    ) is None:
        raise Refused("TM-scores are computed by tmtools, which is not installed: pip install 'vqray[tmscore]'")
    if s.tokens is not None:
        read_tokens(s.tokens, s.vectors).on(job.reader)
    for task in tasks_of(job):
        reader = shards_of(job, task.shards)
        tasks.check_label(task, reader)
        _check_residues(job, reader)
        if task.cath is not None:
            _check_apart(job, task.name, reader)
            read_cath(task.cath)
    if s.pairs_shards is not None:
        reader = shards_of(job, s.pairs_shards)
        if reader.manifest.kind != "proteins":
            raise Refused(f"pairs_shards={s.pairs_shards} holds {reader.manifest.kind}; give shards of proteins.")
        _check_residues(job, reader)
    if s.pairs is not None:
        sensitivity.pairs_of_table(storage.normalise(s.pairs), [])
    for place in s.beside:
        _other(job, place)


def _check_apart(job: ReportJob, task: str, reader: ShardReader) -> None:
    """split = "cath" divides all rows anew: none of them may be one that the tokenizer was trained on."""
    known = {(stem_of(name), chain) for name, chain, *_ in keys_of(job.reader, "train")}
    shared = [(name, chain) for name, chain, *_ in keys_of(reader) if (stem_of(name), chain) in known]
    if shared:
        name, chain = shared[0]
        raise Refused(
            f'task {task!r}: split = "cath" divides all rows of {reader.uri} anew, and {len(shared):,} of them are'
            f" train rows of {job.reader.uri} (such as {name} chain {chain}): the tokenizer would be tested on what it"
            ' was trained with. Ingest other structures and give them as shards = "URI", or leave split out.'
        )


def given(job: ReportJob) -> dict[str, str]:
    """Digests of the files and shards that settings point to: what is in them is part of what the report is of."""
    s = job.settings
    found = {name: file_digest(uri) for name in ("tasks", "tokens", "vectors", "pairs") if (uri := getattr(s, name))}
    if s.pairs_shards is not None:
        found["pairs_shards"] = shards_of(job, s.pairs_shards).manifest.digest
    for place in s.beside:
        found[f"beside {place}"] = file_digest(storage.join(storage.normalise(place), FILES[1]))
    for task in tasks_of(job):
        if task.shards is not None:
            found[f"shards of task {task.name}"] = shards_of(job, task.shards).manifest.digest
        if task.cath is not None:
            found[f"cath of task {task.name}"] = file_digest(task.cath)
    return found


def file_digest(uri: str) -> str:
    return hashlib.sha256(storage.read_bytes(storage.normalise(uri))).hexdigest()


def _check_residues(job: ReportJob, reader: ShardReader) -> None:
    """Labels may differ between shards, but not which residues a chain has: the tokens were learned on such."""
    here, there = (one.manifest.settings["missing"] for one in (job.reader, reader))
    if here != there:
        raise Refused(
            f"{reader.uri} was ingested with missing={there}, and the report's shards with missing={here}: ingest"
            " both alike."
        )


def write(job: ReportJob, tokens: ProteinTokens) -> dict[str, float]:
    """Make the report's files; its metrics."""
    s = job.settings
    given = tokens if s.tokens is None else read_tokens(s.tokens, s.vectors)
    work = Sections(job, given.on(job.reader))
    found: dict[str, Any] = {
        "use": work.kept("use", {}, work.use),
        "sensitivity": work.kept("sensitivity", {}, work.sensitivity),
        "reconstruction": work.kept("reconstruction", {}, work.reconstruction),
        "effectiveness": work.effectiveness(),
    }
    about = {
        "format": FORMAT, "version": VERSION, "what": work.tokens.what, "bundle": job.trained.digest,
        "shards": job.reader.manifest.digest, "split": job.split, "rows_without_tokens": work.tokens.missing,
    }  # fmt: skip
    numbers = metrics_of(found)
    storage.write_json_atomic(storage.join(job.out, FILES[1]), {**about, "metrics": numbers, **found})
    others = [_other(job, place) for place in s.beside]
    page = page_of({**about, "metrics": numbers, **found}, others)
    storage.write_atomic(storage.join(job.out, FILES[0]), page.encode("utf-8"))
    return numbers


def metrics_of(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of all sections, with names for tables."""
    numbers: dict[str, float | None] = dict(found["use"]["efficiency"])
    for name, one in found["use"]["distinctiveness"].items():
        numbers[f"cosine_{name}"] = None if one is None else one["mean_absolute"]
    told = found["sensitivity"].get("correlations", {})
    numbers |= {f"sensitivity_{of}_{name}": value for of, each in told.items() for name, value in each.items()}
    for of, one in (found["reconstruction"].get("scores") or {}).items():
        numbers |= {f"{measure}_{tasks.word(of)}": one[measure] for measure in ("rmsd", "lddt")}
    for task in found["effectiveness"].get("tasks", []):
        for test, part in task.get("tests", {}).items():
            for method, answer in part["scores"].items():
                numbers[f"{tasks.word(task['name'])}_{test}_{task['metric']}_{method}"] = answer["score"]
    return {name: value for name, value in numbers.items() if value is not None}


def _other(job: ReportJob, place: str) -> dict[str, Any]:
    """The numbers of a finished report of the same rows."""
    home = storage.join(storage.normalise(place), FILES[1])
    if not storage.exists(home):
        raise Refused(f"beside={place} holds no {FILES[1]}; give the directory of a finished report.")
    found: dict[str, Any] = storage.read_json(home)
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise Refused(f"{home} is {found.get('format')} version {found.get('version')}; read is {FORMAT} {VERSION}.")
    if (found["shards"], found["split"]) != (job.reader.manifest.digest, job.split):
        raise Refused(
            f"the report in {place} is of split {found['split']} of shards {found['shards'][:16]}, and this one of"
            f" {job.split} of {job.reader.manifest.digest[:16]}: their numbers do not belong in one table."
        )
    return found
