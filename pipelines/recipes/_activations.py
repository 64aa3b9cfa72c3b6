"""What recipes over activations share: layers, explained variance, directions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.errors import Refused
from vqcore import assign, losses

LAYER = "layer_"


def layers_of(columns: Mapping[str, Any]) -> list[int]:
    """The layers that shards hold, lowest first."""
    return sorted(int(name.removeprefix(LAYER)) for name in columns if name.startswith(LAYER))


def two_layers(low: int | None, high: int | None, columns: Mapping[str, Any]) -> tuple[int, int]:
    """(layer that is encoded, layer that is decoded): as asked for, else the lowest and the highest of the shards.

    Raises:
        Refused: a layer the shards do not hold, only one where none was asked for, or the later one first.
    """
    held = layers_of(columns)
    names = ", ".join(map(str, held))
    for key, layer in (("layer_in", low), ("layer_out", high)):
        if layer is not None and layer not in held:
            raise Refused(
                f"{key}={layer} was given; these shards hold layers {names}. Ingest with --set layers={layer},..."
            )
    if len(held) == 1 and low is None and high is None:
        raise Refused(
            f"these shards hold layer {names} alone, and concepts lie between two: ingest with --set layers=3,6 (two of"
            f" the model's), or say --set layer_in={names} layer_out={names} for those of one layer."
        )
    low, high = held[0] if low is None else low, held[-1] if high is None else high
    if low > high:
        raise Refused(
            f"layer_in={low} lies above layer_out={high}: concepts are read from a layer to a later one, or the same."
        )
    return low, high


def explained(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """`mse` a dimension and the share of the variance that it leaves explained, from sums over `rows`: `error` (already
    a dimension), `target` [D] and `target_square`."""
    mean, square = sums["target"] / sums["rows"], sums["target_square"] / sums["rows"]
    mse = float(sums["error"] / sums["rows"])
    return {"mse": mse, "explained": losses.explained(mse, mean, square)}


def as_stored(vectors: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """In float16, as most shards hold them; what lies beyond its range is brought to its end."""
    most = torch.finfo(torch.float16).max
    return vectors.clamp(-most, most).half()


def nearest_directions(vectors: Float[Tensor, "K D"]) -> Callable[[Float[Tensor, "N D"]], Float[Tensor, "N 1 D"]]:
    """Rows -> the one of `vectors` that is nearest to each."""

    def directions(rows: Float[Tensor, "N D"]) -> Float[Tensor, "N 1 D"]:
        return vectors[assign.nearest(rows.to(vectors), vectors)].unsqueeze(1)

    return directions
