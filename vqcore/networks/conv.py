"""Convolutional encoder and decoder of the VQGAN kind (Esser et al. 2021, taming-transformers `Encoder` and `Decoder`).

Encoder: 3x3 conv; per level `blocks` residual blocks and, but for the last level, a stride-2 conv; a middle of block,
attention, block; GroupNorm, swish, 3x3 conv. The decoder mirrors it, with one residual block more in every level.
Normalisation is over the channels and pixels of one row, so rows of a batch never mix.
"""

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MAX_GROUPS = 32
MIN_GROUP_CHANNELS = 4


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with eps 1e-6: as many groups as divide `channels`, at most 32 and of at least 4 channels if possible.

    From 128 channels up this is the papers' GroupNorm(32). With 32 groups of one channel each, a narrow network would
    lose every channel's mean and scale at every norm.
    """
    most = max(1, min(MAX_GROUPS, channels // MIN_GROUP_CHANNELS))
    groups = next(n for n in range(most, 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 conv on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H W"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut: Tensor = self.shortcut(x)
        return shortcut + h


class Attention(nn.Module):
    """One head of self-attention over the H W positions of each row, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        projected = self.query_key_value(self.norm(x)).flatten(2).transpose(1, 2)
        query, key, value = projected.unsqueeze(1).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.squeeze(1).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.out(attended)
        return out


class Downsample(nn.Module):
    """Halves height and width: one row and column of zeros right and below, then a 3x3 conv of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles height and width: each pixel twice, then a 3x3 conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class ConvEncoder(nn.Module):
    """Images [B, in_channels, H, W] -> features [B, out_dim, H / factor, W / factor].

    Args:
        in_channels: channels of an image.
        channels: width of the first level.
        multipliers: width of each level over `channels`, finest first. There is one down-sampling fewer than levels:
            (1, 1, 2, 2, 4) turns 256 x 256 into 16 x 16.
        blocks: residual blocks per level.
        out_dim: channels of the result.
        attention: one attention block in the middle, at the coarsest resolution.
        attention_levels: levels (0 = finest, -1 = coarsest) with attention after every residual block as well.
        patch: 1 is the papers' network. At p, each p x p square of pixels becomes channels before the first conv, so
            the finest level, where nearly all the time goes, is p x p times smaller: what small machines train.

    Raises:
        ValueError: an empty or non-positive argument, or an attention level that does not exist.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        out_dim: int,
        attention: bool = True,
        attention_levels: tuple[int, ...] = (),
        patch: int = 1,
    ) -> None:
        super().__init__()
        attended = _check(channels, multipliers, blocks, attention_levels, patch)
        self.factor = patch * 2 ** (len(multipliers) - 1)
        """How many pixels of a side become one position."""
        widths = [channels * m for m in multipliers]
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(patch),
            nn.Conv2d(in_channels * patch**2, channels, 3, padding=1),
        ]
        for level, (before, width) in enumerate(pairwise([channels, *widths])):
            layers += _level(before, width, blocks, level in attended)
            if level < len(widths) - 1:
                layers.append(Downsample(width))
        layers += _middle(widths[-1], attention)
        self.body = nn.Sequential(*layers)
        self.norm = group_norm(widths[-1])
        self.out = nn.Conv2d(widths[-1], out_dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Raises ValueError where height or width is not a multiple of `factor`."""
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(
                f"images of {x.shape[-2]} x {x.shape[-1]} pixels do not fit this encoder: both sides must be multiples "
                f"of {self.factor}, patch times 2 for each multiplier but one. Resize them or use fewer multipliers."
            )
        out: Tensor = self.out(F.silu(self.norm(self.body(x))))
        return out


class ConvDecoder(nn.Module):
    """Features [B, in_dim, h, w] -> images [B, out_channels, h factor, w factor]; the mirror of `ConvEncoder`.

    Arguments as there, `multipliers` and `attention_levels` finest first too. Each level has `blocks` + 1 residual
    blocks, as in the source. `out` is the last layer: what VQGAN's adaptive weight takes gradients at.
    """

    def __init__(
        self,
        in_dim: int,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        out_channels: int,
        attention: bool = True,
        attention_levels: tuple[int, ...] = (),
        patch: int = 1,
    ) -> None:
        super().__init__()
        attended = _check(channels, multipliers, blocks, attention_levels, patch)
        self.factor = patch * 2 ** (len(multipliers) - 1)
        widths = [channels * m for m in multipliers]
        layers: list[nn.Module] = [nn.Conv2d(in_dim, widths[-1], 3, padding=1), *_middle(widths[-1], attention)]
        before = widths[-1]
        for level in reversed(range(len(widths))):
            layers += _level(before, widths[level], blocks + 1, level in attended)
            before = widths[level]
            if level > 0:
                layers.append(Upsample(before))
        self.body = nn.Sequential(*layers)
        self.norm = group_norm(widths[0])
        self.out = nn.Conv2d(widths[0], out_channels * patch**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(patch)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B C H W"]:
        out: Tensor = self.unfold(self.out(F.silu(self.norm(self.body(x)))))
        return out


def _level(before: int, width: int, blocks: int, attended: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index in range(blocks):
        layers.append(ResidualBlock(before if index == 0 else width, width))
        if attended:
            layers.append(Attention(width))
    return layers


def _middle(width: int, attention: bool) -> list[nn.Module]:
    middle: list[nn.Module] = [Attention(width)] if attention else []
    return [ResidualBlock(width, width), *middle, ResidualBlock(width, width)]


def _check(
    channels: int, multipliers: tuple[int, ...], blocks: int, attention_levels: tuple[int, ...], patch: int
) -> set[int]:
    """The attended levels as non-negative numbers."""
    if min(channels, blocks, patch) < 1 or not multipliers or min(multipliers) < 1:
        raise ValueError(
            f"channels={channels}, blocks={blocks}, patch={patch}, multipliers={multipliers}: all must be at least 1, "
            "and there must be at least one multiplier."
        )
    levels = len(multipliers)
    if wrong := [level for level in attention_levels if not -levels <= level < levels]:
        raise ValueError(f"attention_levels holds {wrong[0]}; there are {levels} levels, 0 (finest) to {levels - 1}.")
    return {level % levels for level in attention_levels}
