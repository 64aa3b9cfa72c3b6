"""Heads that turn a residue's decoded state into its place in space, and pairs of states into what is between them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from vqcore import frames
from vqcore.backbone_losses import DIRECTION_BINS, DIRECTION_PAIRS, DISTANCE_BINS

SCALE = 10.0
"""Angstrom that a 1 of the head's output moves a residue."""


class BackboneHead(nn.Module):
    """[B, L, D] -> N, CA and C [B, L, 3, 3] in Angstrom: a frame a residue from three numbers of place and six of
    rotation, with ideal atoms in it (Dense, GELU, LayerNorm, Linear; as in ESM3's decoder)."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.out = nn.Linear(width, 9)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L 3 3"]:
        place, six = self.out(self.hidden(x)).split((3, 6), -1)
        # Numbers near 0 are no direction at all; from here they are the identity.
        upright = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=six.dtype, device=six.device)
        return frames.placed(frames.rotation_of(six + upright), SCALE * place)


class PairHead(nn.Module):
    """[B, L, D] -> logits [B, L, L, 64] of distance bins and [B, L, L, 96] of direction bins, from products and
    differences of two halves of a projection to `inner` (ESM3's pairwise head, source 128, without its third output,
    which has no loss here).
    """

    def __init__(self, width: int, inner: int = 128):
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.mixed = nn.Linear(2 * (inner // 2), inner)
        bins = DISTANCE_BINS + DIRECTION_PAIRS * DIRECTION_BINS
        self.up = nn.Sequential(nn.GELU(), nn.LayerNorm(inner), nn.Linear(inner, bins))

    def forward(self, x: Float[Tensor, "B L D"]) -> tuple[Float[Tensor, "B L L 64"], Float[Tensor, "B L L 96"]]:
        query, key = self.down(x).chunk(2, -1)
        of_products, of_differences = self.mixed.weight.chunk(2, 1)
        products = linear(query.unsqueeze(2) * key.unsqueeze(1), of_products, self.mixed.bias)
        # Linear in the difference of i and j, it needs no product over pairs: half of the work.
        asked, told = linear(query, of_differences), linear(key, of_differences)
        logits = self.up(products + asked.unsqueeze(2) - told.unsqueeze(1))
        distance, direction = logits.split((DISTANCE_BINS, DIRECTION_PAIRS * DIRECTION_BINS), -1)
        return distance, direction


def residue_head(width: int, kinds: int) -> nn.Sequential:
    """[B, L, D] -> logits of residue types (Dense, GELU, LayerNorm, Linear)."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, kinds))
