"""DVQ-VAE: chunks of a white-matter bundle as grids of codes, mixed softly so that all codes learn by gradient.

Paper: Lizarraga et al., "Differentiable VQ-VAE's for Robust White Matter Streamline Encodings", arXiv 2311.06212. Its
       text was not to be had here: what follows is the authors' code (drewrl3v/diff-vq-vae on GitHub, MIT).
Run:   vqray ingest --corpus streamlines --source bundles/ --out shards --set rows=chunks chunk=512
       vqray train --recipe streamline_dvqvae --shards shards --out runs/bundles
       vqray report --bundle runs/bundles --shards shards --out bundles-report

`--set bottleneck=ae|vae|vq|vq_ema|gumbel` are the source's five models: encoder and decoder are the same. AE and VAE
have no codes, so there is nothing to encode with them. `--set network=set` is ours: the streamlines of a chunk as a
set, each seen beside the mean of all, with as many codes a chunk as the source's grid of 4 x 4 places.

Where the source says nothing, or is not followed by default:
- Its preprocessing is not published. Here rows are chunks of the corpus (`chunk` of the ingest), and training draws
  `chunk` streamlines of each row anew at every step, in an order of that step. A small bundle is filled up with
  repeats, which are in no loss, no count and no metric.
- One scale for all: 2 (x - low) / (high - low) - 1 with the smallest and the largest coordinate of *train* rows (the
  source: of all). Both are kept with the weights and said in the card, so that decoding gives millimetres.
- Evaluation adds no Gumbel noise (`noise_in_eval`: as in the source).
- EMA smooths what it reads out, not the kept counts; VQ's loss is the codebook's and 0.25 of the commitment, as there.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pipelines.errors import Failed, Refused
from pipelines.recipe import Batch, Losses, Measured, Recipe, Report, ReportJob, Settings, Share, Stage
from pipelines.recipes import _bundle_chunks as chunking
from pipelines.recipes import _bundle_report as reports
from pipelines.recipes import _bundle_scores as scores
from pipelines.recipes import _bundle_views as bundle_views
from pipelines.recipes import _dvqvae_claims as paper
from pipelines.recipes._bundle_model import BundleModel
from vqcore import losses, mixture, noise
from vqcore.estimators import straight_through
from vqcore.networks import gaussian
from vqcore.networks.line_sets import PIECE, SetDecoder, SetEncoder
from vqcore.networks.strided import FACTOR, StridedDecoder, StridedEncoder
from vqcore.quantizers import GumbelQuantizer, VectorQuantizer
from vqcore.reduction import resolve as reduction

FACTORS = {"grid": (FACTOR, FACTOR), "set": (1, PIECE)}
"""Network -> streamlines and points that become one position."""


class StreamlineSettings(Settings):
    network: Literal["grid", "set"] = Field(
        "grid", description="grid is the paper's; set is ours: streamlines without an order, and cheaper"
    )
    bottleneck: Literal["ae", "vae", "vq", "vq_ema", "gumbel"] = Field(
        "gumbel", description="gumbel is the paper's; vq learns codes by gradient, vq_ema by moving averages"
    )
    num_codes: int = Field(512, ge=2, description="K")
    code_dim: int = Field(64, ge=1, description="D")
    temperature: float = Field(10.0, gt=0, description="tau, in units of squared distance")
    init_std: float = Field(2.0, gt=0, description="of the first codes, with gumbel")
    noise_in_eval: bool = Field(False, description="Gumbel noise in evaluation too, as in the source")
    commitment_weight: float = Field(0.25, ge=0, description="with vq and vq_ema")
    decay: float = Field(0.99, ge=0, lt=1, description="with vq_ema")
    revive_below: float = Field(
        0.0, ge=0, description="with vq and vq_ema: count under which a code is drawn anew; 0, as in the source: never"
    )
    kl_weight: float = Field(1e-7, ge=0, description="with vae, of the sum over chunks and dimensions")

    chunk: int = Field(64, ge=4, multiple_of=FACTOR, description="streamlines that the network sees together")
    width: int = Field(128, ge=2, multiple_of=2)
    residual_width: int = Field(32, ge=1)
    residual_layers: int = Field(2, ge=0)

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(256, ge=1, description="chunks of one global step, over all workers")
    steps: int = Field(30_000, ge=1)

    row_chunk: int | None = Field(None, description="streamlines of a row; follows from the shards")
    num_points: int | None = Field(None, description="of a streamline; follows from the shards")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # Two cores: half the width, fewer chunks a step.
    "small": {"width": 64, "batch_size": 32, "steps": 4000},
}


def resolve(settings: StreamlineSettings, columns: dict[str, Any]) -> StreamlineSettings:
    """Fill in the rows' shape, and check that the network takes it."""
    shape = columns["points"]
    if len(shape) != 3:
        raise Refused(
            "these shards hold single streamlines, and a row has to be a chunk: ingest with --set rows=chunks."
        )
    row_chunk, num_points, _ = shape
    if row_chunk % settings.chunk:
        raise Refused(
            f"chunk={settings.chunk} does not divide the {row_chunk} streamlines of a row; give a divisor that is a"
            f" multiple of {FACTOR}, or ingest with --set chunk={settings.chunk * 8}."
        )
    if settings.network == "set" and settings.bottleneck == "vae":
        raise Refused(
            "network=set keeps no order of streamlines, and bottleneck=vae is made of one: give network=grid, or"
            " bottleneck=ae, vq, vq_ema or gumbel."
        )
    across, along = FACTORS[settings.network]
    more = gaussian.FACTOR if settings.bottleneck == "vae" else 1
    for name, size, factor in (("num_points", num_points, along * more), ("chunk", settings.chunk, across * more)):
        if size % factor:
            nearest = sorted({max(size // factor, 1) * factor, (size // factor + 1) * factor})
            where = "ingest again with --set num_points=" if name == "num_points" else "train with --set chunk="
            raise Refused(
                f"{name}={size} is no multiple of {factor}, which network={settings.network} with"
                f" bottleneck={settings.bottleneck} needs: {where}{' or '.join(map(str, nearest))}."
            )
    return settings.model_copy(update={"row_chunk": row_chunk, "num_points": num_points})


class BundleAutoencoder(nn.Module):
    """Encoder, one of five bottlenecks, decoder. To the paper's network a chunk is a picture of streamlines x points in
    three channels; to ours it is a set of streamlines."""

    def __init__(self, s: StreamlineSettings):
        super().__init__()
        if s.row_chunk is None or s.num_points is None:
            raise ValueError("the rows' shape is not known: resolve the settings against a manifest first")
        self.settings = s
        self.chunks = s.row_chunk // s.chunk
        self.across, along = FACTORS[s.network]
        self.grid = (s.chunk // self.across, s.num_points // along)
        self.encoder: SetEncoder | StridedEncoder
        self.decoder: SetDecoder | StridedDecoder
        if s.network == "set":
            self.encoder = SetEncoder(s.width, s.residual_width, s.residual_layers, s.code_dim)
            self.decoder = SetDecoder(s.code_dim, s.width, s.residual_width, s.residual_layers)
        else:
            self.encoder = StridedEncoder(3, s.width, s.residual_width, s.residual_layers, s.code_dim)
            self.decoder = StridedDecoder(s.code_dim, s.width, s.residual_width, s.residual_layers, 3)
        self.quantizer = _quantizer(s)
        self.gaussian = gaussian.GaussianBottleneck(s.code_dim, self.grid) if s.bottleneck == "vae" else None
        self.extent: Tensor
        self.register_buffer("extent", torch.tensor([-1.0, 1.0]))
        """Smallest and largest coordinate of the train rows, mm."""

    @property
    def sees_repeats(self) -> bool:
        """Whether what fills up a chunk is seen beside its streamlines; if so, it has codes."""
        return self.settings.network == "grid"

    def scaled(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
        """mm to [-1, 1]."""
        low, high = self.extent
        return 2 * (points - low) / (high - low) - 1

    def millimetres(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
        low, high = self.extent
        return (points + 1) / 2 * (high - low) + low

    def latents(self, points: Float[Tensor, "C chunk n 3"], real: Bool[Tensor, "C chunk"]) -> Float[Tensor, "C h w D"]:
        if isinstance(self.encoder, SetEncoder):
            out: Tensor = self.encoder(points, real)
            return out
        return self.encoder(points.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def render(self, latents: Float[Tensor, "C h w D"], real: Bool[Tensor, "C chunk"]) -> Float[Tensor, "C chunk n 3"]:
        if isinstance(self.decoder, SetDecoder):
            out: Tensor = self.decoder(latents, real)
            return out
        return self.decoder(latents.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def places(self, real: Bool[Tensor, "C chunk"]) -> Bool[Tensor, "C h w"]:
        """Positions of the grid with a real streamline below them."""
        return real.unflatten(1, (-1, self.across)).any(2).unsqueeze(2).expand(-1, -1, self.grid[1])

    def stored(self, real: Bool[Tensor, "C chunk"]) -> Bool[Tensor, "C h w"]:
        """Positions that decoding needs: those of repeats too, where the decoder sees them."""
        if not self.sees_repeats:
            return self.places(real)
        return real.any(1).view(-1, 1, 1).expand(-1, *self.grid)

    def keys(self, chunks: Int64[Tensor, " C"]) -> Int64[Tensor, "C h w"]:
        """A key of each position, from one of its chunk."""
        positions = math.prod(self.grid)
        place = torch.arange(positions, device=chunks.device).view(self.grid)
        return chunks.view(-1, 1, 1) * positions + place

    def filled(
        self, z: Float[Tensor, "C h w D"], vectors: Float[Tensor, "C h w D"], real: Bool[Tensor, "C chunk"]
    ) -> Float[Tensor, "C h w D"]:
        """Quantized vectors with those of repeats too, which the quantizer has left out: the paper's decoder sees them
        beside the last real streamlines, and codes are stored of them. They have no Gumbel noise and no commitment."""
        repeats = ~self.places(real)
        if self.quantizer is None or not self.sees_repeats or not repeats.any():
            return vectors
        if isinstance(self.quantizer, GumbelQuantizer):
            found = mixture.mix(z[repeats], self.quantizer.codebook.vectors, self.settings.temperature)
        else:
            found = straight_through(z[repeats], self.quantizer.look_up(self.quantizer.assign(z[repeats])))
        return vectors.index_put((repeats,), found.to(vectors))

    def all_chunks(self, batch: Batch) -> tuple[Float[Tensor, "C chunk n 3"], Bool[Tensor, "C chunk"]]:
        """(scaled points, which streamlines are real) of every chunk of every row, in order."""
        points, real = chunking.every(batch, self.settings.chunk)
        return self.scaled(points.to(self.extent.dtype)), real

    def drawn(self, batch: Batch, share: Share) -> tuple[Float[Tensor, "B chunk n 3"], Bool[Tensor, "B chunk"]]:
        """(scaled points, which of them are real) of one chunk of each row, drawn for this step."""
        points, real = chunking.drawn(batch, self.settings.chunk, share)
        return self.scaled(points.to(self.extent.dtype)), real


def _quantizer(s: StreamlineSettings) -> VectorQuantizer | GumbelQuantizer | None:
    """The first codes are drawn as a layer's first weights are, so that they follow the run's seed."""
    made: VectorQuantizer | GumbelQuantizer
    if s.bottleneck == "gumbel":
        made = GumbelQuantizer(
            s.num_codes, s.code_dim, temperature=s.temperature, init_std=s.init_std, noise_in_eval=s.noise_in_eval
        )
        first = s.init_std * torch.randn(s.num_codes, s.code_dim)
    elif s.bottleneck in ("vq", "vq_ema"):
        decay = s.decay if s.bottleneck == "vq_ema" else None
        made = VectorQuantizer(
            s.num_codes,
            s.code_dim,
            decay=decay,
            commitment_weight=s.commitment_weight,
            revive_below=s.revive_below,
        )
        shape = (s.num_codes, s.code_dim)
        # The source's starts: U(-1/K, 1/K) where codes learn by gradient, N(0, 1) where they are means.
        first = torch.randn(shape) if decay is not None else (2 * torch.rand(shape) - 1) / s.num_codes
    else:
        return None
    made.codebook.set_vectors(first)
    return made


def counts(model: BundleAutoencoder, batch: Batch) -> dict[str, int]:
    """Chunks, their real streamlines, and positions of the grid that have one."""
    real = (batch.columns["real"] & batch.mask.unsqueeze(1)).sum(1).clamp(max=model.settings.chunk)
    vectors = (real + model.across - 1) // model.across * model.grid[1]
    return {"rows": int(batch.mask.sum()), "streamlines": int(real.sum()), "vectors": int(vectors.sum())}


def train_losses(model: BundleAutoencoder, batch: Batch, share: Share) -> Losses:
    """Mean (x - decoded)^2 over real streamlines, and what the bottleneck adds: nothing with gumbel and ae."""
    s = model.settings
    points, real = model.drawn(batch, share)
    z = model.latents(points, real)
    logs: dict[str, Tensor] = {}
    extra = z.new_zeros(())
    if model.quantizer is not None:
        quantized = model.quantizer(z, model.places(real), model.keys(batch.keys))
        latents, extra = model.filled(z, quantized.vectors, real), quantized.loss
        logs["quantization_error"] = share.mean(quantized.squared_error / s.code_dim, "vectors")
    elif model.gaussian is not None:
        draw = noise.normal(share.seed, share.step, batch.keys, draws=gaussian.WIDTH)
        grid, divergence = model.gaussian(z.permute(0, 3, 1, 2), draw)
        latents = grid.permute(0, 2, 3, 1)
        # A sum over the global batch, as in the source: the mean of workers times how many there are.
        extra = s.kl_weight * share.world * (divergence * batch.mask).sum()
    else:
        latents = z
    error = losses.squared_error(model.render(latents, real).flatten(0, 1), points.flatten(0, 1), real.flatten())
    reconstruction = share.mean(error / (3 * points.shape[2]), "streamlines")
    return Losses({"model": reconstruction + extra}, {"reconstruction": reconstruction.detach(), **logs})


def seed(model: BundleAutoencoder, batches: Iterable[Batch]) -> str:
    """The scale, from all train rows. Codes begin as the source's do, at random.

    Raises:
        Failed: rows whose coordinates are all one number.
    """
    low, high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    for batch in batches:
        real = batch.columns["real"] & batch.mask.unsqueeze(1)
        points = batch.columns["points"][real]
        if points.numel():
            low, high = torch.minimum(low, points.min()), torch.maximum(high, points.max())
    reduce = reduction(None)
    # A sum over workers of what each puts into its own place is everybody's list.
    every = torch.zeros(2, reduce.world, dtype=torch.float64)
    every[:, reduce.rank] = torch.stack([low, high]).double().nan_to_num(posinf=1e30, neginf=-1e30)
    reduce(every)
    low, high = every[0].min(), every[1].max()
    if low == 1e30:
        raise Failed("no train row holds a finite streamline, so there is no scale: look at the shards' train split.")
    if not low < high:
        raise Failed(f"all coordinates of the train rows are {float(low):g} mm, so there is nothing to learn.")
    model.extent.copy_(torch.stack([low, high]))
    return f"coordinates of the train rows, {float(low):.1f} to {float(high):.1f} mm, are scaled to -1 to 1"


def fitted(model: BundleAutoencoder) -> dict[str, float]:
    low, high = model.extent.tolist()
    return {"lowest_mm": low, "highest_mm": high}


def optimiser(s: StreamlineSettings, group: str, parameters: list[nn.Parameter]) -> Optimizer:
    return Adam(parameters, lr=s.learning_rate)


def build(settings: StreamlineSettings, previous: nn.Module | None) -> BundleAutoencoder:
    return BundleAutoencoder(settings)


def stages(s: StreamlineSettings) -> tuple[Stage, ...]:
    return (Stage("bundles", s.steps, build, train_losses, optimiser, counts=counts, seed=seed),)


def codebooks(s: StreamlineSettings) -> list[tuple[int, int]]:
    return [] if s.bottleneck in ("ae", "vae") else [(s.num_codes, s.code_dim)]


def encode(model: BundleAutoencoder, batch: Batch) -> Int64[Tensor, "B chunks h w"]:
    """The code of each position of each chunk's grid; -1 where a chunk, or with network=set a place of it, has no real
    streamline. With network=grid repeats have codes too: the decoder sees them beside the last real streamlines."""
    points, real = model.all_chunks(batch)
    held = real.any(1)
    return chunking.spread(_codes(model, points[held], real[held]), held, model.chunks)


def _codes(
    model: BundleAutoencoder, points: Float[Tensor, "C chunk n 3"], real: Bool[Tensor, "C chunk"]
) -> Int64[Tensor, "C h w"]:
    return _coded(model).assign(model.latents(points, real)).masked_fill(~model.stored(real), -1)


def decode(model: BundleAutoencoder, codes: Int64[Tensor, "B chunks h w"]) -> dict[str, Tensor]:
    """Points in mm, [B, row_chunk, n, 3], and which streamlines there are: those that have codes.

    With network=grid that is every one of a chunk, its repeats among them: codes do not say how many were real. The
    report's files, which know the shards, leave repeats out.
    """
    s, book = model.settings, _coded(model)
    flat = codes.flatten(0, 1)
    real = _coded_lines(model, flat)
    held = real.any(1)
    points = model.extent.new_zeros(len(flat), s.chunk, s.num_points or 0, 3)
    points[held] = model.millimetres(model.render(book.look_up(flat[held]), real[held]))
    points = points.masked_fill(~real[:, :, None, None], 0.0)
    return {
        "points": points.unflatten(0, (-1, model.chunks)).flatten(1, 2),
        "real": real.view(len(codes), model.chunks * s.chunk),
    }


def _coded_lines(model: BundleAutoencoder, codes: Int64[Tensor, "C h w"]) -> Bool[Tensor, "C chunk"]:
    return (codes != -1).any(2).repeat_interleave(model.across, 1)


def _coded(model: BundleAutoencoder) -> VectorQuantizer | GumbelQuantizer:
    if model.quantizer is None:
        raise Failed(f"bottleneck={model.settings.bottleneck} has no codes.")
    return model.quantizer


def rebuilt(
    model: BundleAutoencoder,
    points: Float[Tensor, "C chunk n 3"],
    real: Bool[Tensor, "C chunk"],
    keys: Int64[Tensor, " C"],
) -> Float[Tensor, "C chunk n 3"]:
    """Scaled chunks through the bottleneck and back, as evaluation does."""
    return model.render(_through(model, model.latents(points, real), real, keys), real)


def _through(
    model: BundleAutoencoder, z: Float[Tensor, "C h w D"], real: Tensor, keys: Tensor
) -> Float[Tensor, "C h w D"]:
    """What the decoder is given: the mixture or code vector, the mean of the VAE's 20 numbers carried back, or z."""
    if model.quantizer is not None:
        return model.filled(z, model.quantizer(z, model.places(real), model.keys(keys)).vectors, real)
    if model.gaussian is not None:
        return model.gaussian(z.permute(0, 3, 1, 2), None)[0].permute(0, 2, 3, 1)
    return z


def _apportioned(
    model: BundleAutoencoder, points: Float[Tensor, "C chunk n 3"], real: Bool[Tensor, "C chunk"], draws: int
) -> Float[Tensor, "C h w D"]:
    """The mixture as told by `draws` codes a position that may be the same: their mean."""
    book, z = _coded(model), model.latents(points, real)
    told = mixture.apportion(z.flatten(0, 2), book.codebook.vectors, model.settings.temperature, draws)
    return book.look_up(told).mean(1).view(z.shape)


def measure(model: BundleAutoencoder, batch: Batch) -> Measured:
    points, real = model.all_chunks(batch)
    held = real.any(1)
    points, real, codes = (
        points[held],
        real[held],
        torch.full((len(batch.keys), model.chunks, *model.grid), -1, device=batch.keys.device),
    )
    z, found = model.latents(points, real), {"streamlines": real.sum().double(), "chunks": held.sum().double()}
    positions, to_mm = model.stored(real).sum().double(), float(model.extent[1] - model.extent[0]) / 2
    if model.quantizer is not None:
        nearest = model.quantizer.assign(z)
        codes = chunking.spread(nearest.masked_fill(~model.places(real), -1), held, model.chunks)
        stored = model.render(model.quantizer.look_up(nearest), real)
        found |= {f"{name}_of_codes": value for name, value in scores.likeness(stored, points, real, to_mm).items()}
        found["bits_of_codes"] = positions * math.log2(model.settings.num_codes)
    if isinstance(model.quantizer, VectorQuantizer):
        found["bits"] = found["bits_of_codes"]
    elif model.gaussian is not None:
        found["bits"] = found["chunks"] * 32.0 * gaussian.WIDTH
    else:
        found["bits"] = positions * 32.0 * model.settings.code_dim
    made = model.render(_through(model, z, real, chunking.keys_of(batch, model.chunks)[held]), real)
    return Measured(codes, {**found, **scores.likeness(made, points, real, to_mm)})


def pictures(model: BundleAutoencoder, batch: Batch) -> dict[str, Figure]:
    """The largest chunks of these rows, from three sides."""
    points, real = model.all_chunks(batch)
    largest = real.sum(1).argsort(descending=True, stable=True)[: bundle_views.MOST_BUNDLES]
    made = model.millimetres(
        rebuilt(model, points[largest], real[largest], chunking.keys_of(batch, model.chunks)[largest])
    )
    drawn = []
    for place, chunk in enumerate(largest.tolist()):
        kept = real[chunk]
        name = f"bundle {int(batch.columns['label'][chunk // model.chunks])}"
        drawn.append(bundle_views.Drawn(name, model.millimetres(points[chunk][kept]), made[place][kept]))
    return {"bundles": bundle_views.views(drawn)}


def bundle_model(model: BundleAutoencoder) -> BundleModel:
    """The model as its report sees it: chunks that hold something, and what becomes of them."""

    def chunks(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        points, real = model.all_chunks(batch)
        held = real.any(1)
        return points[held], real[held], chunking.keys_of(batch, model.chunks)[held]

    def rows(batch: Batch) -> Int64[Tensor, " C"]:
        held = model.all_chunks(batch)[1].any(1)
        return torch.arange(len(held)).div(model.chunks, rounding_mode="floor")[held]

    s, book = model.settings, model.quantizer
    of = f"{s.bottleneck}, {s.num_codes} codes of {s.code_dim} dimensions" if book is not None else s.bottleneck
    return BundleModel(
        chunks=chunks,
        rows=rows,
        latents=lambda points, real, keys: _through(model, model.latents(points, real), real, keys),
        render=model.render,
        places=model.places,
        stored=model.stored,
        apart=not model.sees_repeats,
        codes=None if book is None else lambda points, real: _codes(model, points, real),
        coded_lines=lambda codes: _coded_lines(model, codes),
        look_up=None if book is None else book.look_up,
        apportioned=functools.partial(_apportioned, model) if s.bottleneck == "gumbel" else None,
        num_codes=s.num_codes,
        millimetres=model.millimetres,
        what=f"{'DVQ-VAE' if s.network == 'grid' else 'the set'}'s network, bottleneck {of}",
    )


def write_report(job: ReportJob) -> dict[str, float]:
    return reports.write(job, bundle_model(job.trained.model))


recipe = Recipe(
    corpus=("streamlines",),
    Settings=StreamlineSettings,
    presets=PRESETS,
    resolve=resolve,
    stages=stages,
    codebooks=codebooks,
    encode=encode,
    decode=decode,
    measure=measure,
    summarise=scores.summarise,
    fitted=fitted,
    pictures=pictures,
    claims=paper.claims,
    report=Report(reports.BundleReportSettings, write_report, reports.FILES, reports.refuse),
    space={
        "num_codes": "choice:64,128,256,512,1024",
        "code_dim": "choice:16,32,64,128",
        "temperature": "0.1..30:log",
    },
)
