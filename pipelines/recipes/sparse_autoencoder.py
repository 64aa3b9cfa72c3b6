"""Sparse autoencoder between two layers: a row's code is its most active neuron. The baseline of CLVQ-VAE.

Sources: ReLU with an L1 penalty, Cunningham et al., arXiv 2309.08600; top-k, Gao et al., arXiv 2406.04093. From a layer
         to a later one as in the code of CLVQ-VAE (agarg-dev/CLVQVAE: 4,096 neurons, L1 weight 1e-4, the concept of a
         token is its most active neuron), which says no more of its training; the rest here is chosen.
Run:     vqray train --recipe sparse_autoencoder --shards shards --out runs/sae --set activation=top_k active=32
         vqray report --bundle runs/sae --shards shards --out concepts-sae --set model=models/minilm source=news/
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pipelines.recipe import Batch, Losses, Measured, Recipe, Report, ReportJob, Settings, Share, Stage
from pipelines.recipes import _activations as activations
from pipelines.recipes import _concept_report as reports
from pipelines.recipes._concepts import ConceptModel
from vqcore import losses, metrics


class SparseSettings(Settings):
    num_codes: int = Field(4096, ge=2, description="neurons")
    layer_in: int | None = Field(None, description="layer that is encoded; default the lowest of the shards")
    layer_out: int | None = Field(None, description="layer that is decoded, may be the same; default the highest")
    activation: Literal["relu", "top_k"] = "relu"
    sparsity_weight: float = Field(1e-4, ge=0, description="of the L1 penalty, with relu")
    active: int = Field(32, ge=1, description="neurons that stay active, with top_k")

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(1024, ge=1, description="rows of one global step, over all workers")
    steps: int = Field(5000, ge=1)

    width_in: int | None = Field(None, description="follows from the shards")
    width_out: int | None = Field(None, description="follows from the shards")


PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "small": {"num_codes": 2048, "batch_size": 512, "steps": 1500}}


def resolve(settings: SparseSettings, columns: dict[str, Any]) -> SparseSettings:
    """Fill in layers and widths."""
    layer_in, layer_out = activations.two_layers(settings.layer_in, settings.layer_out, columns)
    (width_in,), (width_out,) = columns[f"layer_{layer_in}"], columns[f"layer_{layer_out}"]
    found = {"layer_in": layer_in, "layer_out": layer_out, "width_in": width_in, "width_out": width_out}
    return settings.model_copy(update=found)


class Sparse(nn.Module):
    """a = W x + b; relu: z = max(a, 0), top_k: the `active` largest of it; x_out = V z + c."""

    def __init__(self, s: SparseSettings):
        super().__init__()
        if s.width_in is None or s.width_out is None:
            raise ValueError("the layers' widths are not known: resolve the settings against a manifest first")
        self.settings = s
        self.column_in, self.column_out = f"layer_{s.layer_in}", f"layer_{s.layer_out}"
        self.encoder = nn.Linear(s.width_in, s.num_codes)
        self.decoder = nn.Linear(s.num_codes, s.width_out)
        nn.init.zeros_(self.encoder.bias)
        nn.init.normal_(self.encoder.weight, std=1 / math.sqrt(s.width_in))
        nn.init.normal_(self.decoder.weight, std=1 / math.sqrt(s.num_codes))

    def read(self, batch: Batch, column: str) -> Float[Tensor, "B D"]:
        return batch.columns[column].to(self.encoder.weight.dtype)

    def codes(self, a: Float[Tensor, "B K"], batch: Batch) -> Int64[Tensor, " B"]:
        """The most active neuron of each row, also where none is above 0."""
        return a.argmax(-1).masked_fill(~batch.mask, -1)

    def sparse(self, a: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        z = torch.relu(a)
        if self.settings.activation == "relu":
            return z
        kept = z.topk(min(self.settings.active, z.shape[-1]), dim=-1)
        return torch.zeros_like(z).scatter(-1, kept.indices, kept.values)


def train_losses(model: Sparse, batch: Batch, share: Share) -> Losses:
    """mean (x_out - V z - c)^2, and with relu + lambda mean |z|_1."""
    s = model.settings
    target = model.read(batch, model.column_out)
    z = model.sparse(model.encoder(model.read(batch, model.column_in)))
    error = share.mean(losses.squared_error(model.decoder(z), target, batch.mask) / target.shape[-1])
    seen = z[batch.mask]
    penalty = share.mean(seen.sum().double()) if s.activation == "relu" else error.new_zeros(())
    logs = {"reconstruction": error.detach(), "active": share.mean((seen > 0).sum().double())}
    return Losses({"model": error + s.sparsity_weight * penalty}, logs)


def optimiser(s: SparseSettings, group: str, parameters: list[nn.Parameter]) -> Optimizer:
    return Adam(parameters, lr=s.learning_rate)


def build(settings: SparseSettings, previous: nn.Module | None) -> Sparse:
    return Sparse(settings)


def stages(s: SparseSettings) -> tuple[Stage, ...]:
    return (Stage("neurons", s.steps, build, train_losses, optimiser),)


def encode(model: Sparse, batch: Batch) -> Int64[Tensor, " B"]:
    return model.codes(model.encoder(model.read(batch, model.column_in)), batch)


def decode(model: Sparse, codes: Int64[Tensor, " B"]) -> dict[str, Tensor]:
    """What one neuron adds at activity 1: how active it was is not in its code."""
    rows = model.decoder.weight.T[codes.clamp(min=0)] * (codes >= 0).unsqueeze(-1) + model.decoder.bias
    return {model.column_out: activations.as_stored(rows)}


def measure(model: Sparse, batch: Batch) -> Measured:
    a = model.encoder(model.read(batch, model.column_in))
    z, target = model.sparse(a), model.read(batch, model.column_out)
    valid = target[batch.mask].double()
    return Measured(
        model.codes(a, batch),
        {
            "error": losses.squared_error(model.decoder(z), target, batch.mask) / target.shape[-1],
            "active": (z[batch.mask] > 0).sum().double(),
            "target": valid.sum(0),
            "target_square": valid.square().sum(),
        },
    )


def summarise(sums: dict[str, Tensor]) -> dict[str, float]:
    """`mse` a dimension, `explained` of the later layer's variance, `active` neurons a row."""
    return {**activations.explained(sums), "active": float(sums["active"] / sums["rows"])}


def geometry(model: Sparse, counts: Float[Tensor, "1 K"]) -> dict[str, float]:
    return metrics.alikeness(model.encoder.weight[counts[0] > 0])


class SparseReportSettings(reports.ConceptReportSettings):
    neurons: int = Field(1, ge=1, description="the most active, whose encoder vectors span what is taken out")


def write_report(job: ReportJob) -> dict[str, float]:
    model: Sparse = job.trained.model
    s, weight = model.settings, model.encoder.weight.detach()

    def directions(rows: Float[Tensor, "N D"]) -> Float[Tensor, "N R D"]:
        with torch.no_grad():
            return weight[model.encoder(rows.to(weight)).topk(job.settings.neurons, dim=-1).indices]

    what = f"a sparse autoencoder ({s.activation}), layers {s.layer_in} to {s.layer_out}"
    return reports.write(job, ConceptModel(weight, directions, s.layer_in or 0, what))


recipe = Recipe(
    corpus=("activations",),
    Settings=SparseSettings,
    presets=PRESETS,
    resolve=resolve,
    stages=stages,
    codebooks=lambda s: [(s.num_codes, s.width_in or 1)],
    encode=encode,
    decode=decode,
    measure=measure,
    summarise=summarise,
    geometry=geometry,
    report=Report(SparseReportSettings, write_report, reports.FILES, reports.refuse),
    space={
        "num_codes": "choice:1024,2048,4096,8192",
        "sparsity_weight": "1e-5..1e-2:log",
        "learning_rate": "3e-4..3e-3:log",
    },
)
