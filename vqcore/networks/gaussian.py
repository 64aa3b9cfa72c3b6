"""A grid of latents through a few normal variables and back: the VAE that DVQ-VAE's code compares with."""

import math

from jaxtyping import Float
from torch import Tensor, nn

WIDTH = 20
"""Normal variables of a grid."""
FACTOR = 4
"""How many positions of a side become one."""


class GaussianBottleneck(nn.Module):
    """Two strides, 20 numbers, and back, with a tanh at the end (drewrl3v/diff-vq-vae, `models.py`).

    Both sides of the grid have to be multiples of 4.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = (grid[0] // FACTOR, grid[1] // FACTOR)
        flat = 256 * math.prod(self.grid)
        self.down = nn.Sequential(
            nn.Conv2d(dim, 128, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 256, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.mean, self.log_variance = nn.Linear(flat, WIDTH), nn.Linear(flat, WIDTH)
        self.back = nn.Linear(WIDTH, flat)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(256, 128, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(128, dim, 3, stride=2, padding=1, output_padding=1),
            nn.Tanh(),
        )

    def forward(
        self, z: Float[Tensor, "B D h w"], draw: Float[Tensor, "B 20"] | None
    ) -> tuple[Float[Tensor, "B D h w"], Float[Tensor, " B"]]:
        """(latents, divergence from N(0, I)); without a draw the mean."""
        hidden = self.down(z).flatten(1)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
        code = mean if draw is None else mean + draw.to(mean) * (0.5 * log_variance).exp()
        return self.up(self.back(code).unflatten(1, (256, *self.grid))), divergence
