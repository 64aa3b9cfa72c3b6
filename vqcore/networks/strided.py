"""The small convolutional encoder and decoder of VQ-VAE (van den Oord et al. 2017, section 4.1) as DVQ-VAE's code has
them (drewrl3v/diff-vq-vae, `models.py`): two strides of 2, a stack of residual layers, no normalisation."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FACTOR = 4
"""How many places of a side become one position."""


class ResidualStack(nn.Module):
    """`layers` times: x = relu(x); x + conv1x1(relu(conv3x3(x))). Then a last relu.

    That the sum takes up relu(x) and not x is the source's: its first ReLU works in place.
    """

    def __init__(self, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(inner, width, 1, bias=False)
            )
            for _ in range(layers)
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        for layer in self.layers:
            x = F.relu(x)
            x = x + layer(x)
        return F.relu(x)


class StridedEncoder(nn.Module):
    """[B, in_channels, H, W] -> [B, out_dim, H / 4, W / 4]; the last 1x1 convolution is the source's projection."""

    def __init__(self, in_channels: int, width: int, inner: int, layers: int, out_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            ResidualStack(width, inner, layers),
        )
        self.project = nn.Conv2d(width, out_dim, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Raises ValueError where height or width is not a multiple of 4."""
        if x.shape[-2] % FACTOR or x.shape[-1] % FACTOR:
            raise ValueError(
                f"a grid of {x.shape[-2]} x {x.shape[-1]} places: both sides must be multiples of {FACTOR}."
            )
        out: Tensor = self.project(self.body(x))
        return out


class StridedDecoder(nn.Module):
    """[B, in_dim, h, w] -> [B, out_channels, 4 h, 4 w]. No activation at the end, as in the source."""

    def __init__(self, in_dim: int, width: int, inner: int, layers: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_dim, width, 3, padding=1),
            ResidualStack(width, inner, layers),
            nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, out_channels, 4, stride=2, padding=1),
        )

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B C H W"]:
        out: Tensor = self.body(x)
        return out
