"""Transformer over a sequence whose positions turn queries and keys (rotary embedding, Su et al. 2021)."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vqcore.networks.structure import SwiGLU


def turned(x: Float[Tensor, "B H L D"], base: float = 10_000.0) -> Float[Tensor, "B H L D"]:
    """Pair (x_i, x_{i + D/2}) of the vector at position p turned by p base^(-2i/D). D even."""
    length, half = x.shape[-2], x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = torch.arange(length, dtype=torch.float64, device=x.device).unsqueeze(1) * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class RotaryAttention(nn.Module):
    """LayerNorm, multi-head attention with layer-normed queries and keys, no bias; no residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.mixed = nn.Linear(width, 3 * width, bias=False)
        self.query_norm, self.key_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "B L D"], attended: Shaped[Tensor, "B 1 1 L"]) -> Float[Tensor, "B L D"]:
        query, key, value = self.mixed(self.norm(x)).chunk(3, -1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query_norm(query), self.key_norm(key), value)
        )
        gathered = scaled_dot_product_attention(turned(query), turned(key), value, attn_mask=attended)
        out: Tensor = self.out(gathered.transpose(1, 2).flatten(2))
        return out


class RotaryTransformer(nn.Module):
    """Pre-norm blocks of attention and SwiGLU, then LayerNorm; padding is attended by none.

    Arguments:
        width, blocks, heads, inner: (source of AminoAseed: 1024, 8, 16 and 2816); width / heads is even.
    """

    def __init__(self, width: int, *, blocks: int, heads: int, inner: int):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"{heads} heads do not divide a width of {width} into even parts")
        self.attentions = nn.ModuleList(RotaryAttention(width, heads) for _ in range(blocks))
        self.feedforwards = nn.ModuleList(SwiGLU(width, inner, bias=False) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"], bias: Float[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """What comes out where `mask` is False means nothing. With `bias` padding is not kept out: it is what is added
        to the logits of each position."""
        # A row without any residue would be a softmax over nothing, and NaN.
        seen = (mask | ~mask.any(1, keepdim=True)) if bias is None else bias
        attended = seen[:, None, None, :]
        for attention, feedforward in zip(self.attentions, self.feedforwards, strict=True):
            x = x + attention(x, attended)
            x = x + feedforward(x)
        out: Tensor = self.norm(x)
        return out
