"""StyleGAN2's mapping network: noise z to the intermediate latents w, whose space SFVQ reads.

Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020. Without labels and truncation.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LEARNING_RATE_MULTIPLIER = 0.01
"""Weights are kept at 1 / this of their effect, so that Adam moves them a hundred times less."""


class MappingNetwork(nn.Module):
    """z [B, latent_dim] -> w [B, D].

    Args:
        sizes: latent_dim, then the outputs of each layer; (512, 512, ..., 512) with 8 layers in the paper.
        lr_multiplier: what the weights and biases of every layer are scaled by.

    Raises:
        ValueError: no layer, or a size below 1.
    """

    def __init__(self, sizes: tuple[int, ...], lr_multiplier: float = LEARNING_RATE_MULTIPLIER) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes={sizes}: there must be at least one layer, and every size at least 1.")
        self.latent_dim = sizes[0]
        self.num_layers = len(sizes) - 1
        self.lr_multiplier = lr_multiplier
        for place, (inputs, outputs) in enumerate(pairwise(sizes)):
            layer = nn.Linear(inputs, outputs)
            nn.init.normal_(layer.weight, std=1 / lr_multiplier)
            nn.init.zeros_(layer.bias)
            self.add_module(f"fc{place}", layer)

    @classmethod
    def shaped_like(cls, state: Mapping[str, Tensor]) -> "MappingNetwork":
        """An untrained network that `state` (fc0.weight ...) fits.

        Raises:
            ValueError: `state` holds no such layers.
        """
        weights: list[Tensor] = []
        while (name := f"fc{len(weights)}.weight") in state:
            weights.append(state[name])
        if not weights:
            raise ValueError("no fc0.weight in the state")
        return cls((weights[0].shape[1], *(weight.shape[0] for weight in weights)))

    def forward(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B D"]:
        return self.features(z, self.num_layers)

    def features(self, z: Float[Tensor, "B Z"], layer: int) -> Float[Tensor, "B D"]:
        """What layer number `layer` gives, from 1 to `num_layers` (w).

        Raises:
            ValueError: no such layer.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"layer {layer} was asked for; there are 1 to {self.num_layers}")
        x = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for place in range(layer):
            linear = self.get_submodule(f"fc{place}")
            assert isinstance(linear, nn.Linear)
            scale = self.lr_multiplier / linear.in_features**0.5
            x = F.leaky_relu(F.linear(x, linear.weight * scale, linear.bias * self.lr_multiplier), 0.2) * 2**0.5
        return x
