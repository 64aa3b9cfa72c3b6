"""The DCGAN generator: noise to images by transposed convolutions, with the maps on the way.

Radford, Metz & Chintala, "Unsupervised representation learning with deep convolutional generative adversarial
networks", ICLR 2016. Layers and their names in the state dict are those of PyTorch's DCGAN example (`main.0` ...), in
which most trained weights come.
"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn


class DCGANGenerator(nn.Module):
    """z [B, latent_dim] -> images [B, out_channels, 2^(n + 1), 2^(n + 1)] in (-1, 1), for n widths.

    Args:
        latent_dim: size of z.
        widths: channels of the maps on the way, the 4 x 4 one first; each has twice the side of the one before.
        out_channels: channels of an image.

    Raises:
        ValueError: an empty or non-positive argument.
    """

    def __init__(self, latent_dim: int, widths: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        if not widths or min(latent_dim, out_channels, *widths) < 1:
            raise ValueError(
                f"latent_dim={latent_dim}, widths={widths}, out_channels={out_channels}: all must be at least 1, and "
                "there must be at least one width."
            )
        self.latent_dim = latent_dim
        self.num_layers = len(widths) + 1
        layers: list[nn.Module] = []
        before = latent_dim
        for width in widths:
            stride, padding = (2, 1) if layers else (1, 0)
            layers.append(nn.ConvTranspose2d(before, width, 4, stride, padding, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(before, out_channels, 4, 2, 1, bias=False), nn.Tanh())

    @classmethod
    def shaped_like(cls, state: Mapping[str, Tensor]) -> "DCGANGenerator":
        """An untrained network that `state` fits, sized by the kernels in it.

        Raises:
            ValueError: `state` holds no such kernels.
        """
        kernels = [
            state[name] for name in sorted(state, key=_place) if name.endswith("weight") and state[name].ndim == 4
        ]
        if len(kernels) < 2:
            raise ValueError(f"{len(kernels)} kernels of convolutions in the state; a DCGAN generator has at least 2")
        return cls(kernels[0].shape[0], tuple(kernel.shape[1] for kernel in kernels[:-1]), kernels[-1].shape[1])

    def forward(self, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B C H W"]:
        return self.features(z, self.num_layers)

    def features(self, z: Float[Tensor, "B Z"], layer: int) -> Float[Tensor, "B C H W"]:
        """What layer number `layer` gives: 1 is the 4 x 4 map (after its ReLU), `num_layers` the image.

        Raises:
            ValueError: no such layer.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"layer {layer} was asked for; there are 1 to {self.num_layers}")
        # Each layer is three modules, but the last is two.
        x: Tensor = self.main[: 3 * layer](z[:, :, None, None])
        return x


def _place(name: str) -> tuple[int, str]:
    number = name.split(".")[1] if name.count(".") > 1 else ""
    return int(number) if number.isdigit() else -1, name
