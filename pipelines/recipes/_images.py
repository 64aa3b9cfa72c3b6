"""What recipes over images share: pixels to network numbers and back, errors, the picture."""

import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.pictures import grid_over
from pipelines.recipe import Batch
from vqcore import losses
from vqcore.quantizers import Quantized


def scaled(batch: Batch, dtype: torch.dtype) -> Float[Tensor, "B C H W"]:
    """Pixels in [-1, 1]."""
    return batch.columns["image"].to(dtype) / 127.5 - 1


def stored(image: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
    """[-1, 1] to the 8-bit pixels that are written."""
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def error_sums(picture: UInt8[Tensor, "B C H W"], batch: Batch, quantized: Quantized) -> dict[str, Tensor]:
    """Sums over valid rows: squared error a pixel of the stored picture in [0, 1], and a dimension of the latents."""
    pixels = batch.columns["image"]
    return {
        "pixel": losses.squared_error(picture / 255.0, pixels / 255.0, batch.mask) / pixels[0].numel(),
        "quantization": quantized.squared_error / quantized.vectors.shape[-1],
        "vectors": quantized.valid.double(),
    }


def summary(sums: dict[str, Tensor]) -> dict[str, float]:
    """Mean squared error and PSNR of the stored pictures, and the quantization error a dimension."""
    pixel = float(sums["pixel"] / sums["rows"])
    return {
        "mse": pixel,
        "psnr": losses.psnr(pixel, peak=1.0),
        "quantization_error": float(sums["quantization"] / sums["vectors"]),
    }


def before_and_after(batch: Batch, restored: UInt8[Tensor, "B C H W"]) -> dict[str, Figure]:
    return {"reconstructions": grid_over(batch.columns["image"], restored, "original", "from its codes")}
