"""Structure encoder of protein residues: each residue's nearest neighbours as a set, seen from its own frame.

An independent build of the encoder of ESM3's structure tokenizer (Hayes et al. 2025), as the authors of AminoAseed
reproduce it. Frames are taken relative to the residue whose neighbourhood it is, before anything is computed: what
comes out does not change with rotation and translation but for rounding, however far from the origin a chain lies.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from vqcore import frames

RESIDUES_AT_ONCE = 256
"""Neighbourhoods encoded at a time where no gradient is wanted, so that memory beyond the result stays the same."""


class SwiGLU(nn.Module):
    """LayerNorm, then W3 (silu(W1 x) * W2 x); no residual."""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inwards = nn.Linear(width, 2 * inner, bias=bias)
        self.outwards = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        gate, value = self.inwards(self.norm(x)).chunk(2, -1)
        out: Tensor = self.outwards(silu(gate) * value)
        return out


class GeometricAttention(nn.Module):
    """Attention whose queries, keys and values are vectors in space.

        logit_ij = softplus(w_r) q_i . k_j / sqrt 3 - softplus(w_d) |p_i - s_j| / sqrt 3

    q, k and values turn with their residues' frames; p and s also move with them. What a residue gathers is turned back
    into its own frame. Each head has one weight of each kind.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.keyed = nn.Linear(width, heads * 9)
        self.queried = nn.Linear(width, heads * 6)
        self.out = nn.Linear(heads * 3, width)
        self.rotation_weight = nn.Parameter(torch.zeros(heads))
        self.distance_weight = nn.Parameter(torch.zeros(heads))

    def forward(
        self,
        x: Float[Tensor, "N S D"],
        rotation: Float[Tensor, "N S 3 3"],
        origin: Float[Tensor, "N S 3"],
        valid: Bool[Tensor, "N S"],
        queries: int,
    ) -> Float[Tensor, "N Q D"]:
        """What the first `queries` of each set gather from its valid ones, [N, Q, D]."""
        seen = self.norm(x)
        turned = self._turned(self.keyed(seen), rotation, 3)
        keys, places, values = turned.unbind(2)
        asked = self._turned(self.queried(seen[:, :queries]), rotation[:, :queries], 2)
        wanted, stands = asked.unbind(2)
        places = places + origin.unsqueeze(2)
        stands = stands + origin[:, :queries].unsqueeze(2)
        scale = 1.0 / math.sqrt(3.0)
        alike = torch.einsum("nqhx,nkhx->nhqk", wanted, keys)
        apart = torch.cdist(stands.transpose(1, 2), places.transpose(1, 2), compute_mode="donot_use_mm_for_euclid_dist")
        logits = softplus(self.rotation_weight).view(-1, 1, 1) * alike * scale
        logits = logits - softplus(self.distance_weight).view(-1, 1, 1) * apart * scale
        shares = logits.masked_fill(~valid[:, None, None, :], -torch.inf).softmax(-1)
        gathered = torch.einsum("nhqk,nkhx->nqhx", shares, values)
        back = torch.einsum("nqyx,nqhy->nqhx", rotation[:, :queries], gathered)
        out: Tensor = self.out(back.flatten(2))
        return out

    def _turned(self, flat: Tensor, rotation: Float[Tensor, "N S 3 3"], kinds: int) -> Float[Tensor, "N S kinds H 3"]:
        local = flat.unflatten(-1, (kinds * self.heads, 3))
        return torch.einsum("nsxy,nshy->nshx", rotation, local).unflatten(2, (kinds, self.heads))


class GeometricBlock(nn.Module):
    """Geometric attention and SwiGLU, each added to what came in."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.attention = GeometricAttention(width, heads)
        self.feedforward = SwiGLU(width, inner, bias=True)

    def forward(
        self, x: Float[Tensor, "N S D"], rotation: Tensor, origin: Tensor, valid: Tensor, queries: int
    ) -> Float[Tensor, "N Q D"]:
        x = x[:, :queries] + self.attention(x, rotation, origin, valid, queries)
        out: Tensor = x + self.feedforward(x)
        return out


class StructureEncoder(nn.Module):
    """[B, L] residues with backbones -> [B, L, out] vectors, one a residue, that do not change with its chain's pose.

    A neighbourhood's only input is how far its residues are from the middle one along the chain (clipped to +-`reach`);
    all else comes in through frames. Only the middle residue's vector is read, so the last block computes no other.

    Arguments:
        width, blocks, heads, inner: of the attention blocks (source: 1024, 2, 128 and 4096).
        out: D of the code vectors.
        neighbours: residues of a set, with the middle one (source: 16).
    """

    def __init__(
        self, width: int, out: int, *, blocks: int, heads: int, inner: int, neighbours: int = 16, reach: int = 32
    ):
        super().__init__()
        self.neighbours, self.reach = neighbours, reach
        self.offsets = nn.Embedding(2 * reach + 1, width)
        nn.init.normal_(self.offsets.weight, std=0.02)
        self.blocks = nn.ModuleList(GeometricBlock(width, heads, inner) for _ in range(blocks))
        self.out = nn.Linear(width, out)

    def forward(
        self,
        backbone: Float[Tensor, "B L A 3"],
        mask: Bool[Tensor, "B L"],
        index: Int64[Tensor, "B L"],
    ) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """(vectors, 0 where there is none; where there is one: residues of `mask` whose atoms make a frame).

        `index` numbers residues along the chain, so that gaps show.
        """
        rotation, origin, framed = frames.frames_of(backbone)
        mask = mask & framed
        # A short chain has places that are not real: what they point to is weighed with 0, and 0 x NaN is NaN.
        rotation = torch.where(mask[..., None, None], rotation, torch.eye(3).to(rotation))
        origin = torch.where(mask.unsqueeze(-1), origin, 0.0)
        places, real = frames.neighbours(origin, mask, self.neighbours)
        row, middle = mask.nonzero(as_tuple=True)
        sizes = len(row) if torch.is_grad_enabled() else RESIDUES_AT_ONCE
        found = [
            self._encoded(rotation, origin, index, places[b, i], real[b, i], b, i)
            for b, i in zip(row.split(max(1, sizes)), middle.split(max(1, sizes)), strict=True)
        ]
        flat = torch.cat(found)
        vectors = flat.new_zeros(*mask.shape, flat.shape[-1])
        return vectors.index_put((row, middle), flat), mask

    def _encoded(
        self,
        rotation: Tensor,
        origin: Tensor,
        index: Tensor,
        places: Int64[Tensor, "N S"],
        valid: Bool[Tensor, "N S"],
        row: Int64[Tensor, " N"],
        middle: Int64[Tensor, " N"],
    ) -> Float[Tensor, "N D"]:
        own, others = (row, middle), (row.unsqueeze(1), places)
        back = rotation[own].transpose(-1, -2)
        turned = back.unsqueeze(1) @ rotation[others]
        moved = torch.einsum("nxy,nsy->nsx", back, origin[others] - origin[own].unsqueeze(1))
        offset = (index[others] - index[own].unsqueeze(1)).clamp(-self.reach, self.reach) + self.reach
        x = self.offsets(offset)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x = block(x, turned, moved, valid, 1 if number == last else x.shape[1])
        out: Tensor = self.out(x[:, 0])
        return out
