"""Plain VQ: vectors in, codes out, no network; of an image, the vectors are its patches. `levels` makes it residual.

Source: Gray, "Vector Quantization", IEEE ASSP Magazine 1984, with the codebook moved by an exponential moving average
over mini-batches (van den Oord et al., "Neural Discrete Representation Learning", 2017, appendix A.1); of several
levels, Juang and Gray, "Multiple stage vector quantization", ICASSP 1982. The floor that a learned encoder has to beat.
Run:    vqray train --recipe plain_vq --shards shards/ --out runs/plain [--set patch=8 num_codes=1024 levels=4]
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, UInt8
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pipelines.errors import Refused
from pipelines.recipe import Batch, Losses, Measured, Prefix, Recipe, Settings, Share, Stage
from pipelines.recipes import _images as images
from vqcore import losses, seeding
from vqcore.codebook import Codebook
from vqcore.quantizers import Quantized, ResidualQuantizer, VectorBatch, VectorQuantizer

SEEDINGS = {"kmeans++": seeding.kmeans_plus_plus, "random_rows": seeding.random_rows}


class PlainSettings(Settings):
    num_codes: int = Field(1024, ge=2, description="K, codes in the codebook, or of every level's")
    levels: int = Field(1, ge=1, description="L; each level quantizes what those before it left over")
    column: str | None = Field(None, description="what is quantized, such as layer_6; follows where there is but one")
    patch: int | None = Field(None, ge=1, description="side of a square patch of an image (8); D = channels x patch^2")
    metric: Literal["euclidean", "cosine"] = "euclidean"
    decay: float | None = Field(0.99, gt=0, lt=1, description="EMA decay; `none` learns the codebook by gradient")
    seeding: Literal["kmeans++", "random_rows"] = "kmeans++"
    revive_below: float = Field(0.0, ge=0, description="EMA count under which a code is dead and drawn anew; 0 never")
    learning_rate: float = Field(1e-2, gt=0, description="used only with decay=none")
    steps: int = Field(1000, ge=1)

    shape: tuple[int, ...] | None = Field(None, description="of one row's column; follows from the shards")


PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "small": {"num_codes": 256, "steps": 200}}
PATCH = 8
IMAGE = "image"


def resolve(settings: PlainSettings, columns: dict[str, Any]) -> PlainSettings:
    """Fill in what is quantized and its shape; check that patches tile an image."""
    if settings.levels > 1 and settings.metric != "euclidean":
        raise Refused(f"levels={settings.levels} with metric={settings.metric}: what is left over is a difference;"
                      " use metric=euclidean, or levels=1.")  # fmt: skip
    column = settings.column or _only(columns)
    if column not in columns:
        raise Refused(f"the shards have no column {column!r}; allowed: column={' or '.join(columns)}.")
    shape = columns[column]
    if shape is None:
        raise Refused(f"rows of {column} are of mixed sizes, and this recipe needs one size; ingest images with"
                      " `--set size=64`, others with a fixed shape.")  # fmt: skip
    patch = None
    if column == IMAGE:
        patch = settings.patch or PATCH
        if shape[1] % patch or shape[2] % patch:
            raise Refused(
                f"patches of {patch} x {patch} do not tile images of {shape[1]} x {shape[2]};"
                f" choose a patch that divides {math.gcd(shape[1], shape[2])}."
            )
    return settings.model_copy(update={"column": column, "shape": tuple(shape), "patch": patch})


def _only(columns: dict[str, Any]) -> str:
    if len(columns) > 1:
        raise Refused(f"say which column is quantized: --set column={' or column='.join(columns)}.")
    return next(iter(columns))


class Vectors(nn.Module):
    """A quantizer over the last dimension of a column [B, ..., D]: each of a row's other places has a code a level."""

    def __init__(self, s: PlainSettings):
        super().__init__()
        if s.shape is None or s.column is None:
            raise ValueError("the rows' shape is not known: resolve the settings against a manifest first")
        self.column, self.shape = s.column, s.shape
        self.grid, self.code_dim = self._places(s)
        self.positions = math.prod(self.grid)
        self.seeding_steps = math.ceil(64 * s.num_codes / (self.positions * s.batch_size))
        how: dict[str, Any] = {"decay": s.decay, "seeding": SEEDINGS[s.seeding], "revive_below": s.revive_below}
        self.quantizer: VectorQuantizer | ResidualQuantizer
        if s.levels == 1:
            self.quantizer = VectorQuantizer(s.num_codes, self.code_dim, metric=s.metric, **how)
        else:
            self.quantizer = ResidualQuantizer(s.num_codes, self.code_dim, levels=s.levels, **how)

    def _places(self, s: PlainSettings) -> tuple[tuple[int, ...], int]:
        """(shape of a row's places, D)"""
        *places, dim = self.shape
        return tuple(places) or (1,), dim

    def books(self) -> list[Codebook]:
        """One a level."""
        one = self.quantizer
        if isinstance(one, ResidualQuantizer):
            return [one.book_of(level) for level in range(one.levels)]
        return [one.codebook]

    def dtype(self) -> torch.dtype:
        return self.books()[0].vectors.dtype

    def cut(self, batch: Batch) -> Float[Tensor, "B *grid D"]:
        """Rows as vectors."""
        return batch.columns[self.column].to(self.dtype()).reshape(-1, *self.grid, self.code_dim)

    def joined(self, vectors: Float[Tensor, "B *grid D"]) -> Tensor:
        """Vectors as rows; inverts `cut`."""
        return vectors.reshape(-1, *self.shape)

    def vectors(self, batch: Batch) -> VectorBatch:
        return VectorBatch(self.cut(batch), *batch.places(self.grid))

    def errors(self, batch: Batch, quantized: Quantized) -> dict[str, Tensor]:
        """Sums over valid rows, from which come the error and what part of the variance it is."""
        x = self.cut(batch)[batch.mask].double().flatten(0, -2)
        return {
            "squared": quantized.squared_error / self.code_dim,
            "vectors": quantized.valid.double(),
            "sum": x.sum(0),
            "square": x.square().sum(),
        }


class Patches(Vectors):
    """The same over the square patches of an image; pixels in [-1, 1]."""

    def _places(self, s: PlainSettings) -> tuple[tuple[int, ...], int]:
        channels, height, width = self.shape
        self.patch = s.patch or PATCH
        return (height // self.patch, width // self.patch), channels * self.patch**2

    def cut(self, batch: Batch) -> Float[Tensor, "B h w D"]:
        (channels, *_), p, (rows, columns) = self.shape, self.patch, self.grid
        x = images.scaled(batch, self.dtype()).view(-1, channels, rows, p, columns, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def joined(self, vectors: Float[Tensor, "B h w D"]) -> UInt8[Tensor, "B C H W"]:
        (channels, *_), p, (rows, columns) = self.shape, self.patch, self.grid
        tiles = vectors.view(-1, rows, columns, channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return images.stored(tiles.reshape(-1, *self.shape))

    def errors(self, batch: Batch, quantized: Quantized) -> dict[str, Tensor]:
        picture = self.joined(self.quantizer.look_up(quantized.codes))
        return images.error_sums(picture, batch, quantized)


def train_losses(model: Vectors, batch: Batch, share: Share) -> Losses:
    """With an EMA codebook there is nothing to descend: the loss is what the codebook's update lowers."""
    quantized = model.quantizer(*model.vectors(batch))
    error = share.mean(quantized.squared_error / model.code_dim, "vectors")
    return Losses({"model": quantized.loss}, {"quantization_error": error})


def counts(model: Vectors, batch: Batch) -> dict[str, int]:
    rows = int(batch.mask.sum())
    return {"rows": rows, "vectors": rows * model.positions}


def seed(model: Vectors, batches: Iterable[Batch]) -> str:
    """Codes from about 64 vectors a code."""
    return model.quantizer.seed(model.vectors(batch) for batch in itertools.islice(batches, model.seeding_steps))


def optimiser(s: PlainSettings, group: str, parameters: list[nn.Parameter]) -> Optimizer:
    return Adam(parameters, lr=s.learning_rate)


def build(settings: PlainSettings, previous: nn.Module | None) -> Vectors:
    return Patches(settings) if settings.column == IMAGE else Vectors(settings)


def stages(s: PlainSettings) -> tuple[Stage, ...]:
    return (Stage("codebook", s.steps, build, train_losses, optimiser, counts=counts, seed=seed),)


def codebooks(s: PlainSettings) -> list[tuple[int, int]]:
    shape = s.shape or (3, 64, 64)
    dim = shape[0] * (s.patch or PATCH) ** 2 if s.column in (IMAGE, None) else shape[-1]
    return [(s.num_codes, dim)] * s.levels


def encode(model: Vectors, batch: Batch) -> Int64[Tensor, "B ..."]:
    x, mask, _ = model.vectors(batch)
    return model.quantizer.assign(x, mask)


def decode(model: Vectors, codes: Int64[Tensor, "B ..."]) -> dict[str, Tensor]:
    return {model.column: model.joined(model.quantizer.look_up(codes))}


def measure(model: Vectors, batch: Batch) -> Measured:
    x, mask, _ = model.vectors(batch)
    quantized = model.quantizer(x, mask)
    return Measured(quantized.codes, model.errors(batch, quantized))


def summarise(sums: dict[str, Tensor]) -> dict[str, float]:
    """Of images, the errors of the stored pictures; of vectors, the mean squared error a dimension and the share of the
    rows' variance that codes explain."""
    found = images.summary(sums) if "pixel" in sums else {}
    if "squared" in sums:
        mse = float(sums["squared"] / sums["vectors"])
        mean, square = sums["sum"] / sums["vectors"], sums["square"] / sums["vectors"]
        found |= {"mse": mse, "explained": losses.explained(mse, mean, square)}
    return found


def first_levels(model: Vectors, settings: PlainSettings) -> Vectors:
    """No level sees those after it, so the first ones stand alone."""
    made = build(settings, None)
    for own, book in zip(made.books(), model.books(), strict=False):
        own.load_state_dict(book.state_dict(), strict=True)
    return made


def pictures(model: Vectors, batch: Batch) -> dict[str, Figure]:
    if not isinstance(model, Patches):
        return {}
    return images.before_and_after(batch, decode(model, encode(model, batch))[IMAGE])


recipe = Recipe(
    corpus=("images", "vectors", "activations", "items"),
    Settings=PlainSettings,
    presets=PRESETS,
    resolve=resolve,
    stages=stages,
    codebooks=codebooks,
    encode=encode,
    decode=decode,
    measure=measure,
    summarise=summarise,
    space={"num_codes": "choice:64,128,256,512,1024,2048,4096", "patch": "choice:2,4,8,16"},
    prefix=Prefix("levels", first_levels),
    pictures=pictures,
)
