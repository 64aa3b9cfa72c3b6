"""A trained model as its report sees it, and one chunk of a split with what became of it."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipelines.recipe import Batch


@dataclass(frozen=True)
class BundleModel:
    """What a recipe says of a trained model for its report. Chunks are [C, S, n, 3], scaled; latents [C, h, w, D]."""

    chunks: Callable[[Batch], tuple[Tensor, Tensor, Tensor]]
    """A batch -> (points, which streamlines are real, keys) of its chunks that hold something."""
    rows: Callable[[Batch], Int64[Tensor, " C"]]
    """The row of the batch that each of these comes from."""
    latents: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(points, real, keys) -> what the decoder is given."""
    render: Callable[[Tensor, Tensor], Tensor]
    """(latents, real) -> points."""
    places: Callable[[Tensor], Tensor]
    """real -> positions [C, h, w] with a real streamline."""
    stored: Callable[[Tensor], Tensor]
    """real -> positions [C, h, w] that decoding needs."""
    apart: bool
    """Whether each streamline has latents of its own, h of them."""
    codes: Callable[[Tensor, Tensor], Tensor] | None
    """(points, real) -> codes [C, h, w], all that decoding needs; None without a codebook."""
    coded_lines: Callable[[Tensor], Tensor]
    """codes -> which streamlines they are of."""
    look_up: Callable[[Tensor], Tensor] | None
    apportioned: Callable[[Tensor, Tensor, int], Tensor] | None
    """(points, real, draws) -> latents as that many codes a position tell them; None where there is no mixture."""
    num_codes: int
    millimetres: Callable[[Tensor], Tensor]
    what: str


@dataclass(frozen=True)
class Chunk:
    """One chunk of the split."""

    label: int
    points: Float[Tensor, "S n 3"]
    real: Bool[Tensor, " S"]
    latents: Float[Tensor, "h w D"]
    made: Float[Tensor, "S n 3"]
    places: Bool[Tensor, "h w"]
    """With a real streamline."""
    codes: Int64[Tensor, "h w"] | None
    of_codes: Float[Tensor, "S n 3"] | None
    """What the codes alone decode to."""

    @property
    def lines(self) -> Float[Tensor, "R n 3"]:
        return self.points[self.real]
