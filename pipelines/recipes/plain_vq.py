"""Plain VQ: vectors in, codes out, no network; of an image, the vectors are its patches.

Source: Gray, "Vector Quantization", IEEE ASSP Magazine 1984, with the codebook moved by an exponential moving average
over mini-batches (van den Oord et al., "Neural Discrete Representation Learning", 2017, appendix A.1). The floor that
a learned encoder has to beat.
Run:    vqray train --recipe plain_vq --shards shards/ --out runs/plain [--set patch=8 num_codes=1024]
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal

from jaxtyping import Float, Int64
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from pipelines.errors import Refused
from pipelines.recipe import Batch, Losses, Measured, Recipe, Settings, Share, Stage
from pipelines.recipes import _images as images
from vqcore import seeding
from vqcore.quantizers import VectorBatch, VectorQuantizer

SEEDINGS = {"kmeans++": seeding.kmeans_plus_plus, "random_rows": seeding.random_rows}


class PlainSettings(Settings):
    num_codes: int = Field(1024, ge=2, description="K, codes in the codebook")
    patch: int = Field(8, ge=1, description="side of a square patch; D = channels x patch x patch")
    metric: Literal["euclidean", "cosine"] = "euclidean"
    decay: float | None = Field(0.99, gt=0, lt=1, description="EMA decay; `none` learns the codebook by gradient")
    seeding: Literal["kmeans++", "random_rows"] = "kmeans++"
    revive_below: float = Field(0.0, ge=0, description="EMA count under which a code is dead and drawn anew; 0 never")
    learning_rate: float = Field(1e-2, gt=0, description="used only with decay=none")
    steps: int = Field(1000, ge=1)

    image_shape: tuple[int, int, int] | None = Field(None, description="C, H, W; follows from the shards")


PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "small": {"num_codes": 256, "steps": 200}}


def resolve(settings: PlainSettings, columns: dict[str, Any]) -> PlainSettings:
    """Fill in the image's shape and check that patches tile it."""
    shape = columns["image"]
    if shape is None:
        raise Refused("this recipe needs images of one size; the shards hold mixed sizes. Ingest with `--set size=64`.")
    if shape[1] % settings.patch or shape[2] % settings.patch:
        raise Refused(
            f"patches of {settings.patch} x {settings.patch} do not tile images of {shape[1]} x {shape[2]};"
            f" choose a patch that divides {math.gcd(shape[1], shape[2])}."
        )
    return settings.model_copy(update={"image_shape": tuple(shape)})


class Patches(nn.Module):
    """A quantizer over the patches of an image; pixels in [-1, 1]."""

    def __init__(self, s: PlainSettings):
        super().__init__()
        if s.image_shape is None:
            raise ValueError("the image's shape is not known: resolve the settings against a manifest first")
        self.image_shape, self.patch = s.image_shape, s.patch
        channels, height, width = s.image_shape
        self.grid = (height // s.patch, width // s.patch)
        self.positions = self.grid[0] * self.grid[1]
        self.seeding_steps = math.ceil(64 * s.num_codes / (self.positions * s.batch_size))
        self.quantizer = VectorQuantizer(
            s.num_codes,
            channels * s.patch**2,
            metric=s.metric,
            decay=s.decay,
            seeding=SEEDINGS[s.seeding],
            revive_below=s.revive_below,
        )

    def vectors(self, batch: Batch) -> VectorBatch:
        """One vector per patch, with the masks and keys of its row."""
        pixels = images.scaled(batch, self.quantizer.codebook.vectors.dtype)
        channels, p, (rows, columns) = self.image_shape[0], self.patch, self.grid
        x = pixels.view(-1, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return VectorBatch(x, *images.places(batch, self.grid))

    def render(self, vectors: Float[Tensor, "B h w D"]) -> Float[Tensor, "B C H W"]:
        channels, p, (rows, columns) = self.image_shape[0], self.patch, self.grid
        tiles = vectors.view(-1, rows, columns, channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(-1, *self.image_shape)


def train_losses(model: Patches, batch: Batch, share: Share) -> Losses:
    """With an EMA codebook there is nothing to descend: the loss is what the codebook's update lowers."""
    quantized = model.quantizer(*model.vectors(batch))
    dim = model.quantizer.codebook.vectors.shape[1]
    return Losses(
        {"model": quantized.loss}, {"quantization_error": share.mean(quantized.squared_error / dim, "vectors")}
    )


def counts(model: Patches, batch: Batch) -> dict[str, int]:
    rows = int(batch.mask.sum())
    return {"rows": rows, "vectors": rows * model.positions}


def seed(model: Patches, batches: Iterable[Batch]) -> str:
    """Codes from about 64 vectors a code."""
    return model.quantizer.seed(model.vectors(batch) for batch in itertools.islice(batches, model.seeding_steps))


def optimiser(s: PlainSettings, group: str, parameters: list[nn.Parameter]) -> Optimizer:
    return Adam(parameters, lr=s.learning_rate)


def build(settings: PlainSettings, previous: nn.Module | None) -> Patches:
    return Patches(settings)


def stages(s: PlainSettings) -> tuple[Stage, ...]:
    return (Stage("codebook", s.steps, build, train_losses, optimiser, counts=counts, seed=seed),)


def codebooks(s: PlainSettings) -> list[tuple[int, int]]:
    channels = s.image_shape[0] if s.image_shape else 3
    return [(s.num_codes, channels * s.patch**2)]


def encode(model: Patches, batch: Batch) -> Int64[Tensor, "B h w"]:
    x, mask, _ = model.vectors(batch)
    return model.quantizer.assign(x, mask)


def decode(model: Patches, codes: Int64[Tensor, "B h w"]) -> dict[str, Tensor]:
    return {"image": images.stored(model.render(model.quantizer.look_up(codes)))}


def measure(model: Patches, batch: Batch) -> Measured:
    x, mask, _ = model.vectors(batch)
    quantized = model.quantizer(x, mask)
    picture = decode(model, quantized.codes)["image"]
    return Measured(quantized.codes, images.error_sums(picture, batch, quantized))


def pictures(model: Patches, batch: Batch) -> dict[str, Figure]:
    return images.before_and_after(batch, decode(model, encode(model, batch))["image"])


recipe = Recipe(
    corpus=("images",),
    Settings=PlainSettings,
    presets=PRESETS,
    resolve=resolve,
    stages=stages,
    codebooks=codebooks,
    encode=encode,
    decode=decode,
    measure=measure,
    summarise=images.summary,
    space={"num_codes": "choice:64,128,256,512,1024,2048,4096", "patch": "choice:2,4,8,16"},
    pictures=pictures,
)
