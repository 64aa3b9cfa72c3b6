"""Chains one at a time, and long ones window by window: what takes L x L numbers, of a batch takes gigabytes."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipelines.recipes._rebuilding import compared
from vqcore import superposition

Decode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(vectors [1, L, D], mask [1, L]) -> (N, CA and C [1, L, 3, 3], logits of residue types [1, L, R])."""


def rebuilt(
    decode: Decode, vectors: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"], most: int
) -> tuple[Float[Tensor, "B L 3 3"], Float[Tensor, "B L R"]]:
    """What `decode` makes of every chain, which sees at most `most` residues together; 0 where there is none."""
    found = [
        _chain(decode, vectors[row : row + 1, :length], mask[row : row + 1, :length], most)
        for row, length in enumerate(_lengths(mask))
    ]
    backbones, kinds = (
        torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*found, strict=True)
    )
    spare = mask.shape[1] - backbones.shape[1]
    return torch.nn.functional.pad(backbones, (0, 0, 0, 0, 0, spare)), torch.nn.functional.pad(kinds, (0, 0, 0, spare))


def _lengths(mask: Bool[Tensor, "B L"]) -> list[int]:
    """One more than the place of the last residue, and at least 1."""
    places = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    found: list[int] = places.amax(1).clamp(min=1).tolist()
    return found


def _chain(
    decode: Decode, vectors: Float[Tensor, "1 L D"], mask: Bool[Tensor, "1 L"], most: int
) -> tuple[Float[Tensor, "L 3 3"], Float[Tensor, "L R"]]:
    """Each window is half over the one before, and laid over it there."""
    backbone, kinds = decode(vectors[:, :most], mask[:, :most])
    for start in range(most // 2, max(mask.shape[1] - most // 2, 0), most // 2):
        part = slice(start, start + most)
        found, more = decode(vectors[:, part], mask[:, part])
        both = backbone.shape[1] - start
        over = mask[:, start : start + both].repeat_interleave(3, 1)
        motion = superposition.superpose(found[:, :both].flatten(1, 2), backbone[:, start:].flatten(1, 2), over)
        laid = motion.move(found.flatten(1, 2)).unflatten(1, (-1, 3)).to(backbone.dtype)
        backbone = torch.cat([backbone, laid[:, both:]], 1)
        kinds = torch.cat([kinds, more[:, both:]], 1)
    return backbone[0], kinds[0]


def likeness(
    found: Float[Tensor, "B L 3 3"], true: Float[Tensor, "B L 3 3"], mask: Bool[Tensor, "B L"]
) -> dict[str, Tensor]:
    """Sums over chains of backbone RMSD and CA-lDDT, a chain at a time (each takes L x L numbers)."""
    sums = {name: torch.zeros((), dtype=torch.float64, device=mask.device) for name in ("rmsd", "lddt")}
    for row, length in enumerate(_lengths(mask)):
        if mask[row].any():
            one = slice(row, row + 1), slice(0, length)
            for name, values in compared(found[one], true[one], mask[one]).items():
                sums[name] += values.sum()
    return sums
