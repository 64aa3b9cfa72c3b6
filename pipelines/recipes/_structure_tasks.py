"""What structure tokens are asked to predict: tasks are data, in a TOML file (`tasks=FILE`).

    [[task]]
    name = "BindInt"
    label = "binding_site"        a label of the shards: contact, secondary, b_factors, a column of the ingest's table
    kind = "binary"               or regression, classes
    level = "residue"             or chain: vectors are averaged first, and the chain's residues share one value
    scale = 1.0                   multiplies the target of a regression
    classes = { H = "helix", "*" = "other" }    of a stored value, or a letter of DSSP; "*" is all others
    least = 1                     classes with fewer train examples are left out
    shards = "URI"                default: those of the report
    split = "cath"                or shards: the splits that ingest decided. cath needs shards of its own
    cath = "cath.csv"             file, chain, code (C.A.T.H in full)
    shares = [0.4, 0.2, 0.2]      of that split: see `_cath_split.py`

Without a file every label of the shards is a task: `contact` binary, `secondary` as helix, strand and other,
`b_factors` a regression, and a column of the table binary where it holds 0 and 1 only, else a regression.

The twelve public tasks of StructTokenBench (Yuan et al. 2025) are a folder of structures each, ingested with its table
(`--set table=labels.csv values=LABEL`; one row a residue, zeros too), and a definition. All are `level = "residue"`
unless said; `split = "cath"` gives their fold and superfamily tests:

    BindInt, CatInt, Con, Rep   InterPro sites, ranges as rows   kind = "binary"        split = "cath"
    BindBio, CatBio             BioLIP2                          kind = "binary"        split = "cath"
    BindShake                   ProteinShake                     kind = "binary"        split = "shards"
    Ept                         ProteinGLUE epitopes             kind = "binary"        split = "cath"
                                                                 shares = [0.5, 0.2, 0.4]
    FlexRMSF                    ATLAS                            kind = "regression"    split = "cath"
    FlexBFactor                 ATLAS, label = "b_factors"       kind = "regression"    scale = 0.01   split = "cath"
    FlexNEQ                     ATLAS                            kind = "regression"    scale = 0.1    split = "cath"
    Homo                        TAPE remote homology, fold       kind = "classes"       level = "chain"   least = 50

(Homo has three tests, by fold, superfamily and family, of which one ingest holds one.)
"""

import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipelines import storage
from pipelines.corpora._protein_annotations import SECONDARY
from pipelines.errors import Refused, nearest_names
from pipelines.recipes._cath_split import SHARES, Division, codes_for, divide, read_cath
from pipelines.recipes._structure_chains import Chains, Floats, Ints
from pipelines.shards import ShardReader

FACTORS = "b_factors"
OTHERS = "*"
HELIX_STRAND_OTHER = {"H": "helix", "G": "helix", "I": "helix", "E": "strand", "B": "strand", OTHERS: "other"}


class Skipped(Exception):
    """Why a task cannot be measured on this data; the report says so and goes on."""


class Task(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    label: str
    kind: Literal["binary", "regression", "classes"]
    level: Literal["residue", "chain"] = "residue"
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    classes: dict[str, Annotated[str, BeforeValidator(str)]] | None = None
    least: int = Field(1, ge=1)
    shards: str | None = None
    split: Literal["shards", "cath"] = "shards"
    cath: str | None = None
    shares: tuple[float, float, float] = SHARES

    @model_validator(mode="after")
    def _settings_go_together(self) -> "Task":
        if (self.split == "cath") != (self.cath is not None):
            raise ValueError('split = "cath" and cath = "FILE" go together')
        if not all(0 < share < 1 for share in self.shares):
            raise ValueError("shares are three numbers between 0 and 1")
        if self.classes is not None and self.kind != "classes":
            raise ValueError(f'classes are for kind = "classes", and this task is {self.kind}')
        if self.scale != 1.0 and self.kind != "regression":
            raise ValueError(f'scale is for kind = "regression", and this task is {self.kind}')
        return self


class TaskFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    task: tuple[Task, ...] = Field(min_length=1)


def read_tasks(uri: str) -> tuple[Task, ...]:
    """
    Raises:
        Refused: no such file, no TOML, a mistake in a definition, two tasks of one name.
    """
    uri = storage.normalise(uri)
    if not storage.exists(uri):
        raise Refused(f"tasks={uri} does not exist; give a TOML file of [[task]] tables.")
    try:
        tasks = TaskFile.model_validate(tomllib.loads(storage.read_bytes(uri).decode())).task
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as trouble:
        raise Refused(f"tasks={uri} is no TOML file: {trouble}.") from None
    except ValidationError as error:
        mistakes = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()
        )
        raise Refused(f"tasks={uri} defines tasks wrongly: {mistakes}.") from None
    names = [word(task.name) for task in tasks]
    if twice := sorted({task.name for task in tasks if names.count(word(task.name)) > 1}):
        raise Refused(
            f"tasks={uri} has tasks whose names are alike but for signs: {', '.join(twice)}; give each one of its own."
        )
    return tasks


def word(name: str) -> str:
    """A name as it stands in those of metrics."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def labels_in(reader: ShardReader) -> list[str]:
    """Names of the columns of these shards that a task may predict."""
    settings = reader.manifest.settings
    beside = [name for name, key in (("contact", "contacts"), ("secondary", "strings")) if settings[key] is not None]
    return [*beside, FACTORS, *settings["values"]]


def default_tasks(reader: ShardReader) -> tuple[Task, ...]:
    """A task of every label; see the module's docstring."""
    known: dict[str, dict[str, Any]] = {
        "contact": {"kind": "binary"},
        "secondary": {"kind": "classes", "classes": HELIX_STRAND_OTHER},
        FACTORS: {"kind": "regression", "scale": 0.01},
    }
    return tuple(
        Task(name=label, label=label, **known.get(label) or {"kind": _kind_of(reader, label)})
        for label in labels_in(reader)
    )


def _kind_of(reader: ShardReader, label: str) -> str:
    rows = np.arange(reader.rows("train"))
    values = [np.asarray(row) for row in reader.values("train", rows, [label])[label]] if len(rows) else []
    held = np.unique(np.concatenate(values)) if values else np.zeros(0)
    return "binary" if set(held[~np.isnan(held)].tolist()) <= {0.0, 1.0} else "regression"


def check_label(task: Task, reader: ShardReader) -> None:
    """Raise Refused where the shards have no such label, or are no proteins."""
    if reader.manifest.kind != "proteins":
        raise Refused(f"task {task.name!r}: {reader.uri} holds {reader.manifest.kind}, not proteins.")
    if task.label not in labels_in(reader):
        raise Refused(
            f"task {task.name!r} predicts {task.label!r}, which {reader.uri} does not have;"
            f" {nearest_names(task.label, labels_in(reader))}. Ingest with contacts=, strings= or table= and values=."
        )


# Targets


def targets_of(task: Task, chains: Chains) -> tuple[Floats, Sequence[str]]:
    """([N] or, at the level of chains, [C]; NaN where there is none) and the names of classes.

    A class is its place among the names; a binary target is 0 or 1.

    Raises:
        Skipped: a value that is neither 0 nor 1, or has no name.
    """
    values = chains.labels[task.label].astype(np.float32)
    if task.level == "chain":
        values = np.array([_shared(values[chains.places(chain)]) for chain in range(len(chains))], np.float32)
    held = np.unique(values[~np.isnan(values)])
    if task.kind == "regression":
        return values * np.float32(task.scale), ()
    if task.kind == "binary":
        if strange := sorted(set(held.tolist()) - {0.0, 1.0}):
            raise Skipped(f"{task.label} holds {strange[0]:g}, and a binary label is 0 or 1; use another kind.")
        return values, ()
    named = {float(value): _class_of(task, float(value)) for value in held}
    names = sorted({name for name in named.values() if name is not None})
    found = np.full(len(values), np.nan, np.float32)
    for value, name in named.items():
        if name is not None:
            found[values == value] = names.index(name)
    return found, names


def _shared(values: npt.NDArray[np.float32]) -> float:
    """The value of all residues that have one; NaN where they differ."""
    held = np.unique(values[~np.isnan(values)])
    return float(held[0]) if len(held) == 1 else np.nan


def _class_of(task: Task, value: float) -> str | None:
    """Name of a stored value's class, None for one that is left out."""
    letter = SECONDARY[int(value)] if task.label == "secondary" else f"{value:g}"
    if task.classes is None:
        return letter
    return task.classes.get(letter, task.classes.get(OTHERS))


# Who is trained on, and who is asked


def division_of(task: Task, chains: Chains, sizes: Mapping[str, int], seed: int) -> Division:
    """Chains of train, and of each test and its valid part.

    Args:
        chains: of the splits of `sizes` one after another: train, valid, test.

    Raises:
        Skipped: a part without chains.
    """
    if task.cath is not None:
        places = [(name, chain) for name, chain, _, _ in chains.keys]
        division = divide(places, codes_for(places, read_cath(task.cath)), seed, task.shares)
        tests = {name: pair for name, pair in division.tests.items() if all(pair)}
        division = Division(division.train, tests)
    else:
        ends = np.cumsum([0, *(sizes[split] for split in ("train", "valid", "test"))]).tolist()
        train, valid, test = (list(range(*pair)) for pair in pairwise(ends))
        division = Division(train, {"test": (valid, test)} if valid and test else {})
    if not division.train or not division.tests:
        raise Skipped(
            "there are too few chains for train, valid and test; give more, or another split"
            " (a probe is fitted on train and its learning rate is chosen on valid)."
        )
    return division


def units_of(task: Task, chains: Chains, members: Sequence[int], targets: Floats) -> Ints:
    """The residues (or, at the level of chains, the chains) of these chains that have a code and a target."""
    coded = chains.codes >= 0
    if task.level == "chain":
        held = [chain for chain in members if coded[chains.places(chain)].any() and not np.isnan(targets[chain])]
        return np.array(held, np.int64)
    good = coded & ~np.isnan(targets)
    places = [np.arange(*chains.offsets[[chain, chain + 1]]) for chain in members]
    found = np.concatenate(places) if places else np.zeros(0, np.int64)
    return found[good[found]]
