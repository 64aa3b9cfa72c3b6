"""CLVQ-VAE: concepts of a language model, as the codes between one of its layers and a later one.

Paper: Garg, Yu, Hassan, Kahou, "Cross-Layer Discrete Concept Discovery for Interpreting Language Models", TMLR 2026,
       arXiv 2506.20040. Its text was not to be had here: what follows is the authors' code (agarg-dev/CLVQVAE on
       GitHub), in its first version (v1) and its last (v3).
Run:   vqray ingest --corpus activations --source news/ --out shards --set model=models/minilm layers=3,6 words=mean
       vqray train --recipe clvq_vae --shards shards --out runs/concepts
       vqray report --bundle runs/concepts --shards shards --out concepts --set model=models/minilm source=news/

Settings where the source gives none, or where it is not followed by default:
- `schedule`: the source halves the rate where validation loss stalls and keeps the best of 50 to 100 epochs; here a
  warm-up over 10 % of the steps and half a cosine (an option of v3), and the last step counts.
- `sequence`: the source pads every sentence to the longest (61). Here a document gives groups of `sequence` rows, drawn
  anew each epoch: the decoder has no positions, so which rows come together is context and their order is nothing.
- seeding takes train rows only (the source: validation too), and centroids get unit length before they are scaled, as
  in v1 (v3 leaves that out).
- no attention mask (v1's lets each position see itself and *later* ones; v3 has none).
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pipelines.errors import Refused
from pipelines.recipe import Batch, Grouping, Losses, Measured, Recipe, Report, ReportJob, Settings, Share, Stage
from pipelines.recipes import _activations as activations
from pipelines.recipes import _clvq_claims as paper
from pipelines.recipes import _concept_report as reports
from pipelines.recipes._concepts import ConceptModel
from vqcore import losses, metrics, seeding
from vqcore.assign import Metric
from vqcore.quantizers import Quantized, TemperedQuantizer, VectorBatch


def spherical(rows: Float[Tensor, "R D"], num_codes: int, *, metric: Metric, seed: int) -> Float[Tensor, "K D"]:
    """Scaled-spherical k-means++, the best of 5 as in v1."""
    return seeding.scaled_spherical(rows, num_codes, metric=metric, seed=seed, restarts=5)


SEEDINGS: dict[str, seeding.Seeding] = {
    "spherical": spherical,
    "kmeans++": seeding.kmeans_plus_plus,
    "random": seeding.random_rows,
}


class ConceptSettings(Settings):
    num_codes: int = Field(400, ge=2, description="K, concepts")
    layer_in: int | None = Field(None, description="layer that is encoded; default the lowest of the shards")
    layer_out: int | None = Field(None, description="layer that is decoded, may be the same; default the highest")
    sequence: int = Field(64, ge=1, description="rows of one document that the decoder sees together")

    mix: float | None = Field(None, ge=0, le=1, description="fixed; the mix is half of it. Default: learned")
    encoder_start: Literal["identity", "default"] = Field("identity", description="first W of the encoder (v1, v3)")
    top_k: int = Field(5, ge=1, description="nearest codes that training draws from; 1 is argmin")
    temperature: float = Field(1.0, gt=0, description="T of the draw, in units of squared distance")
    relative: bool = Field(False, description="T in units of each vector's mean gap to its top_k codes instead")
    ema: Literal["source", "standard"] = Field(
        "source", description="source: update, then look up, smoothing written back; standard: look up first"
    )
    decay: float = Field(0.99, ge=0, lt=1)
    commitment_weight: float = Field(0.1, ge=0)
    seeding: Literal["spherical", "kmeans++", "random"] = "spherical"

    memory: Literal["source", "strict"] = Field(
        "source", description="what the decoder attends to: source, the continuous z_e; strict, code vectors alone"
    )
    decoder_layers: int = Field(6, ge=1)
    heads: int = Field(8, ge=1)
    feedforward: int = Field(2048, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)

    learning_rate: float = Field(5e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0, description="of matrices, in Adam's own form; biases and norms have none")
    schedule: Literal["cosine", "constant"] = "cosine"
    batch_size: int = Field(128, ge=1, description="groups of `sequence` rows of one global step, over all workers")
    clip: float | None = Field(2.0, gt=0, description="largest norm of the gradient (v3; v1 has no limit)")
    steps: int = Field(4900, ge=1, description="the source's logs: 50 epochs of 98 steps")

    width_in: int | None = Field(None, description="follows from the shards")
    width_out: int | None = Field(None, description="follows from the shards")


PRESETS: dict[str, dict[str, Any]] = {
    # The source's logs: RoBERTa, layers 8 -> 12, K 400, T 1, top_k 5.
    "paper": {},
    # Two cores: a third of the decoder's depth, a quarter of its inner width, fewer rows a step.
    "small": {
        "decoder_layers": 2,
        "feedforward": 512,
        "sequence": 16,
        "batch_size": 32,
        "steps": 1000,
    },
}


def resolve(settings: ConceptSettings, columns: dict[str, Any]) -> ConceptSettings:
    """Fill in layers and widths, and check that heads divide the width."""
    layer_in, layer_out = activations.two_layers(settings.layer_in, settings.layer_out, columns)
    (width_in,), (width_out,) = columns[f"layer_{layer_in}"], columns[f"layer_{layer_out}"]
    if width_in % settings.heads:
        divisors = [n for n in range(1, 33) if width_in % n == 0]
        raise Refused(
            f"heads={settings.heads} do not divide the width {width_in} of layer {layer_in}; "
            f"these do: {', '.join(map(str, divisors))}."
        )
    found = {"layer_in": layer_in, "layer_out": layer_out, "width_in": width_in, "width_out": width_out}
    return settings.model_copy(update=found)


class AdaptiveResidual(nn.Module):
    """z_e = (1 - m) x + m LayerNorm(W x + b) with m = sigmoid(alpha) / 2, so that m stays in (0, 1/2).

    alpha starts at 0.2 and is learned; where `fixed` is given, m is half of that.
    """

    def __init__(self, width: int, fixed: float | None, start: Literal["identity", "default"]):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.fixed = fixed
        if fixed is None:
            self.alpha = nn.Parameter(torch.tensor(0.2))
        if start == "identity":
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    @property
    def mix(self) -> Tensor | float:
        return 0.5 * (torch.sigmoid(self.alpha) if self.fixed is None else self.fixed)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return (1 - self.mix) * x + self.mix * self.norm(self.linear(x))


class CrossLayer(nn.Module):
    """Encoder, quantizer, transformer decoder over the rows of a group, linear map to the later layer."""

    def __init__(self, s: ConceptSettings):
        super().__init__()
        if s.width_in is None or s.width_out is None:
            raise ValueError("the layers' widths are not known: resolve the settings against a manifest first")
        self.settings = s
        self.column_in, self.column_out = f"layer_{s.layer_in}", f"layer_{s.layer_out}"
        self.encoder = AdaptiveResidual(s.width_in, s.mix, s.encoder_start)
        self.quantizer = TemperedQuantizer(
            s.num_codes,
            s.width_in,
            top_k=s.top_k,
            temperature=s.temperature,
            relative=s.relative,
            ema=s.ema,
            decay=s.decay,
            commitment_weight=s.commitment_weight,
            seeding=SEEDINGS[s.seeding],
        )
        block = nn.TransformerDecoderLayer(s.width_in, s.heads, s.feedforward, s.dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(block, s.decoder_layers)
        self.head = nn.Linear(s.width_in, s.width_out)

    def inputs(self, batch: Batch) -> VectorBatch:
        """The lower layer as it is stored: what seeding sees."""
        x = batch.columns[self.column_in].to(self.head.weight.dtype)
        return VectorBatch(x, batch.mask, batch.keys)

    def target(self, batch: Batch) -> Float[Tensor, "B D"]:
        return batch.columns[self.column_out].to(self.head.weight.dtype)

    def latents(self, batch: Batch) -> VectorBatch:
        """z_e of every row."""
        x, mask, keys = self.inputs(batch)
        return VectorBatch(self.encoder(x), mask, keys)

    def render(
        self,
        vectors: Float[Tensor, "B D"],
        latents: Float[Tensor, "B D"],
        mask: Bool[Tensor, " B"],
        together: int | None = None,
    ) -> Float[Tensor, "B D2"]:
        """The later layer of groups of `together` rows (default `sequence`): tgt = z_q; memory = z_e, or in the strict
        form z_q too. Masked rows are seen by none; what comes out at them means nothing."""
        memory = latents if self.settings.memory == "source" else vectors
        size = together or self.settings.sequence
        hidden = ~mask.view(-1, size)
        # A group of masked rows alone would be a softmax over nothing, and NaN.
        hidden = hidden & ~hidden.all(1, keepdim=True)
        masks = {"tgt_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
        seen = torch.where(mask.unsqueeze(-1), memory, 0.0)
        decoded = self.decoder(vectors.unflatten(0, (-1, size)), seen.unflatten(0, (-1, size)), **masks)
        out: Tensor = self.head(decoded.flatten(0, 1))
        return out


def train_losses(model: CrossLayer, batch: Batch, share: Share) -> Losses:
    """L = mean (x_out - decoder(z_q, z_e))^2 + beta mean (z_e - sg(z_q))^2, beta inside the quantizer's loss.

    `nearest` is the share of rows whose drawn code is their nearest: 1 where T is too small to draw anything else.
    """
    z, mask, keys = model.latents(batch)
    nearest = model.quantizer.assign(z, mask)
    quantized = model.quantizer(z, mask, keys)
    target = model.target(batch)
    error = losses.squared_error(model.render(quantized.vectors, z, batch.mask), target, mask)
    reconstruction = share.mean(error / target.shape[-1])
    drawn_nearest = ((quantized.codes == nearest) & batch.mask).sum().double()
    return Losses(
        {"model": reconstruction + quantized.loss},
        {
            "reconstruction": reconstruction.detach(),
            "quantization_error": share.mean(quantized.squared_error / z.shape[-1]),
            "nearest": share.mean(drawn_nearest),
        },
    )


def seed(model: CrossLayer, batches: Iterable[Batch]) -> str:
    """Codes from the lower layer itself, not from the encoder's output, as in the source."""
    s = model.settings
    wanted = 2 * seeding.sample_size(s.num_codes, s.width_in or 1)
    some = itertools.islice(batches, math.ceil(wanted / (s.batch_size * s.sequence)))
    return model.quantizer.seed(model.inputs(batch) for batch in some)


def optimiser(s: ConceptSettings, group: str, parameters: list[nn.Parameter]) -> Optimizer:
    decayed = [p for p in parameters if p.dim() > 1]
    rest = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return Adam(groups, lr=s.learning_rate)


def schedule(s: ConceptSettings, step: int) -> float:
    """A tenth of the steps up, then half a cosine down to 0."""
    if s.schedule == "constant":
        return 1.0
    warm_up = max(1, s.steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, s.steps - warm_up))


def build(settings: ConceptSettings, previous: nn.Module | None) -> CrossLayer:
    return CrossLayer(settings)


def stages(s: ConceptSettings) -> tuple[Stage, ...]:
    groups = Grouping("document", s.sequence)
    return (Stage("concepts", s.steps, build, train_losses, optimiser, schedule=schedule, seed=seed, grouping=groups),)


def encode(model: CrossLayer, batch: Batch) -> Int64[Tensor, " B"]:
    x, mask, _ = model.latents(batch)
    return model.quantizer.assign(x, mask)


def decode(model: CrossLayer, codes: Int64[Tensor, " B"]) -> dict[str, Tensor]:
    """What each code says of the later layer by itself: a code does not tell its neighbours, nor z_e in the source form
    (which then has the code vector in its place)."""
    vectors = model.quantizer.look_up(codes)
    out = model.render(vectors, vectors, codes != -1, together=1)
    return {model.column_out: activations.as_stored(out)}


def measure(model: CrossLayer, batch: Batch) -> Measured:
    z, mask, _ = model.latents(batch)
    quantized = model.quantizer(z, mask)
    target = model.target(batch)

    def error(out: Tensor) -> Tensor:
        return losses.squared_error(out, target, batch.mask) / target.shape[-1]

    valid = target[batch.mask].double()
    return Measured(
        quantized.codes,
        {
            "error": error(model.render(quantized.vectors, z, batch.mask)),
            "error_of_other_codes": error(model.render(_dealt_out(quantized, batch.mask), z, batch.mask)),
            "error_alone": error(decode(model, quantized.codes)[model.column_out].to(target.dtype)),
            "quantization": quantized.squared_error / z.shape[-1],
            "target": valid.sum(0),
            "target_square": valid.square().sum(),
        },
    )


def _dealt_out(quantized: Quantized, mask: Bool[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """The code vectors of a batch with each valid row holding that of a row half the batch away."""
    valid = quantized.vectors[mask]
    dealt = quantized.vectors.clone()
    dealt[mask] = valid.roll(len(valid) // 2, 0)
    return dealt


def summarise(sums: dict[str, Tensor]) -> dict[str, float]:
    """`mse` a dimension of the later layer; `explained` of its variance; `mse_other_codes` where every row is given
    another row's code: the nearer it is to `mse`, the less the decoder listens to codes; `mse_alone` of `decode`."""
    rows = sums["rows"]
    return {
        **activations.explained(sums),
        "mse_other_codes": float(sums["error_of_other_codes"] / rows),
        "mse_alone": float(sums["error_alone"] / rows),
        "quantization_error": float(sums["quantization"] / rows),
    }


def geometry(model: CrossLayer, counts: Float[Tensor, "1 K"]) -> dict[str, float]:
    """How alike the codes are that the split uses."""
    return metrics.alikeness(model.quantizer.codebook.vectors[counts[0] > 0])


def concept_model(model: CrossLayer) -> ConceptModel:
    """Codes as directions of the lower layer: that of a row is the vector of the code nearest to its z_e."""
    s, book = model.settings, model.quantizer.codebook.vectors

    def directions(rows: Float[Tensor, "N D"]) -> Float[Tensor, "N 1 D"]:
        with torch.no_grad():
            return book[model.quantizer.assign(model.encoder(rows.to(book)))].unsqueeze(1)

    memory = "" if s.memory == "source" else ", strict"
    return ConceptModel(book, directions, s.layer_in or 0, f"layers {s.layer_in} to {s.layer_out}{memory}")


def write_report(job: ReportJob) -> dict[str, float]:
    return reports.write(job, concept_model(job.trained.model))


recipe = Recipe(
    corpus=("activations",),
    Settings=ConceptSettings,
    presets=PRESETS,
    resolve=resolve,
    stages=stages,
    codebooks=lambda s: [(s.num_codes, s.width_in or 1)],
    encode=encode,
    decode=decode,
    measure=measure,
    summarise=summarise,
    geometry=geometry,
    claims=paper.claims,
    report=Report(reports.ConceptReportSettings, write_report, reports.FILES, reports.refuse),
    space={
        "num_codes": "choice:50,100,200,400,800,1200",
        "temperature": "choice:0.5,1,2,3",
        "top_k": "choice:1,5,10,50,100",
        "seeding": "choice:random,kmeans++,spherical",
    },
)
