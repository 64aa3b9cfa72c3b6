"""Lines as a set: each is seen by itself and beside the mean of all, so that none knows which place it has.

Ours, not a paper's. A layer adds to what a line says of itself what the mean of the set says: the permutation
equivariant layer of Deep Sets (Zaheer et al. 2017, arXiv 1703.06114). Lines in another order give the same latents in
that order, so the latents of a set, as a set, do not depend on it; and lines that are not real change nothing.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

PIECE = 16
"""Points of a line that become one position: with one line a row as many numbers as 4 x 4 places of a grid."""


class SetLayer(nn.Module):
    """x + out(relu(near(relu(x)) + whole(mean of relu(x) over real lines))); `near` sees both neighbours on a line."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.near = nn.Linear(width, 3 * inner)
        self.whole = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "C S p W"], real: Bool[Tensor, "C S"]) -> Float[Tensor, "C S p W"]:
        seen = F.relu(x)
        # A convolution of three positions as one product and two shifts: on lines of few positions much the faster way.
        before, near, behind = self.near(seen).chunk(3, -1)
        near = near + F.pad(before, (0, 0, 1, 0))[:, :, :-1] + F.pad(behind, (0, 0, 0, 1))[:, :, 1:]
        # Filled and not multiplied: what is no line may hold anything, NaN too.
        total = seen.masked_fill(~real[:, :, None, None], 0.0).sum(1, keepdim=True)
        whole = self.whole(total / real.sum(1).clamp(min=1)[:, None, None, None])
        return x + self.out(F.relu(near + whole))


class SetEncoder(nn.Module):
    """Lines [C, S, n, 3] -> latents [C, S, n / 16, out_dim]; those of lines that are not real mean nothing."""

    def __init__(self, width: int, inner: int, layers: int, out_dim: int) -> None:
        super().__init__()
        self.take = nn.Linear(3 * PIECE, width)
        self.layers = nn.ModuleList(SetLayer(width, inner) for _ in range(layers))
        self.project = nn.Linear(width, out_dim)

    def forward(self, lines: Float[Tensor, "C S n 3"], real: Bool[Tensor, "C S"]) -> Float[Tensor, "C S p D"]:
        """Raises ValueError where the number of points is not a multiple of 16."""
        if lines.shape[2] % PIECE:
            raise ValueError(f"lines of {lines.shape[2]} points: their number must be a multiple of {PIECE}.")
        x = self.take(lines.unflatten(2, (-1, PIECE)).flatten(3))
        for layer in self.layers:
            x = layer(x, real)
        out: Tensor = self.project(x)
        return out


class SetDecoder(nn.Module):
    """Latents [C, S, p, in_dim] -> lines [C, S, 16 p, 3], of pieces that go over into each other."""

    def __init__(self, in_dim: int, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.take = nn.Linear(in_dim, width)
        self.layers = nn.ModuleList(SetLayer(width, inner) for _ in range(layers))
        self.give = nn.Linear(width, 3 * PIECE)
        self.waves: Tensor
        self.register_buffer("waves", _waves(), persistent=False)

    def forward(self, latents: Float[Tensor, "C S p D"], real: Bool[Tensor, "C S"]) -> Float[Tensor, "C S n 3"]:
        x = self.take(latents)
        for layer in self.layers:
            x = layer(x, real)
        return _joined(self.give(x).unflatten(3, (3, PIECE)) @ self.waves.to(x.dtype))


def _waves() -> Float[Tensor, "f i"]:
    """Cosines (DCT-II) over twice a piece, each weaker the faster it is, faded in and out: lines begin smooth, and what
    is rough is learned last. Said point by point, decoded streamlines trembled."""
    f, i = torch.arange(PIECE, dtype=torch.float64).unsqueeze(1), torch.arange(2 * PIECE)
    waves = torch.cos(math.pi * (i + 0.5) * f / (2 * PIECE))
    return waves / (1 + f) * _fade()


def _fade() -> Float[Tensor, " i"]:
    """Over twice a piece; with that of the next piece, half of it later, it adds up to 1."""
    return (math.pi * (torch.arange(2 * PIECE, dtype=torch.float64) + 0.5) / (2 * PIECE)).sin().square()


def _joined(pieces: Float[Tensor, "C S p 3 i"]) -> Float[Tensor, "C S n 3"]:
    """Pieces that reach half a piece into their neighbours, added up; the ends have one piece and are made up to it."""
    count, half = pieces.shape[2], PIECE // 2
    first, second = pieces.transpose(2, 3).split(PIECE, dim=-1)
    added = F.pad(first.flatten(3), (0, PIECE)) + F.pad(second.flatten(3), (PIECE, 0))
    line = added[..., half : half + count * PIECE]
    weight = line.new_ones(count * PIECE)
    fade = _fade().to(line)
    weight[:half], weight[-half:] = fade[half:PIECE], fade[PIECE : PIECE + half]
    return (line / weight).transpose(2, 3)
