"""How arrays become rows."""

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pipelines.corpora import CorpusSettings


class VectorSettings(CorpusSettings):
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of the stored vectors")
    rows: Literal["vectors", "samples"] = Field(
        "vectors", description="[N, L, D]: each of the N x L vectors is a row; samples: each [L, D] is one"
    )
    axis: int = Field(-1, description="along which a vector runs; 1 for maps [N, C, H, W]")
    position: int | None = Field(
        None, ge=0, description="of [N, L, D] take this one vector of each sample (W of a W+ file: 0)"
    )
    key: str | None = Field(
        None, description="array of .npz, .pt, .safetensors or column of Parquet; needed where several could be it"
    )
    label: str | None = Field(
        "auto", description="array, column or file beside; auto finds label(s), y, target(s); none takes none"
    )

    generator: Literal["dcgan", "stylegan2_mapping"] | None = Field(
        None, description="the source is the weights of this network: draw samples from it"
    )
    samples: int = Field(0, ge=0, le=2**40, description="with generator: how many to draw")
    layer: int | None = Field(
        None,
        ge=1,
        description="with generator: whose output is kept; default dcgan 1 (4 x 4 maps), mapping its last (w)",
    )
    pool: Literal["mean", "positions"] = Field("mean", description="with generator: a map's mean, or all its vectors")
    seed: int = Field(0, description="with generator: sample n is a function of (seed, n)")
    device: Literal["cpu", "cuda"] = Field("cpu", description="with generator: where it runs")

    dim: int | None = Field(None, ge=1, description="D; follows from the data")
    positions: int | None = Field(None, ge=1, description="L of rows=samples; follows from the data")

    @model_validator(mode="after")
    def _generator_and_samples(self) -> "VectorSettings":
        if self.generator and not self.samples:
            raise ValueError(f"generator={self.generator} draws as many as you say: set samples=100000 (or another)")
        if self.samples and not self.generator:
            raise ValueError("samples=N goes with generator=dcgan or stylegan2_mapping, whose weights are the source")
        if self.axis == 0:
            raise ValueError("axis=0 numbers the samples; a vector runs along another one (1 for maps, -1 is the last)")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row.

        Raises:
            ValueError: it is not known before the data is.
        """
        if self.dim is None:
            raise ValueError("the length of the vectors is not known: take the settings that the survey completed")
        return (self.dim,) if self.positions is None else (self.positions, self.dim)

    @property
    def stored(self) -> np.dtype:
        """What NumPy holds a row in; bfloat16 as its bits."""
        return np.dtype({"bfloat16": "uint16"}.get(self.dtype, self.dtype))
