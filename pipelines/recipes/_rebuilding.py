"""How near decoded backbones are to the true ones, beside what one gets without codes and without knowing the chain.

Backbone RMSD is over N, CA and C of all residues that have a code and a frame, after superposition; CA-lDDT over CA.
Both are of a chain, and their means and medians are over chains.

Two controls. `unquantized`: the same decoder on the latents, that is, what the codebook alone loses. `mean structure`:
train backbones in the frame of their first whole residue (CA at 0, C along x, N in the plane of x and y), averaged by
position in the chain; past the longest train chain its last position is repeated. It is what one says of a protein that
one has not seen.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from pipelines.recipe import Batch
from pipelines.recipes._protein_tokens import ProteinTokens
from pipelines.recipes._structure_chains import walk, whole_residues
from pipelines.shards import ShardReader
from vqcore.frames import frames_of
from vqcore.superposition import lddt, rmsd

CHAINS_AT_ONCE = 8
Guess = Callable[[Batch], Float[Tensor, "B L 3 3"]]


def reconstruction(reader: ShardReader, split: str, tokens: ProteinTokens) -> dict[str, Any] | None:
    """Scores of the codes and both controls on the chains of a split; None where the tokens cannot be decoded.

    Chains whose decoded coordinates are not finite are left out of their means and counted.
    """
    if tokens.rebuilt is None:
        return None
    guesses: dict[str, Guess] = {"codes": lambda batch: _from_codes(tokens, batch)}
    if tokens.latents is not None:
        guesses["unquantized"] = lambda batch: _from_latents(tokens, batch)
    mean = mean_backbone(reader)
    if mean is not None:
        known = mean
        guesses["mean structure"] = lambda batch: laid_out(known, batch.columns["backbone"])
    found: dict[str, dict[str, list[Tensor]]] = {name: {"rmsd": [], "lddt": []} for name in guesses}
    for whole, _ in walk(reader, split):
        for begin in range(0, len(whole.mask), CHAINS_AT_ONCE):
            batch = _some(whole, slice(begin, begin + CHAINS_AT_ONCE))
            mask = whole_residues(batch) & (tokens.codes(batch) >= 0)
            keep = mask.any(1)
            for name, guess in guesses.items():
                with torch.inference_mode():
                    scores = compared(guess(batch).cpu(), batch.columns["backbone"][:, :, :3], mask)
                for measure, values in scores.items():
                    found[name][measure].append(values[keep])
    return {
        name: _summary({measure: torch.cat([torch.zeros(0), *parts]) for measure, parts in of.items()})
        for name, of in found.items()
    }


def compared(
    guess: Float[Tensor, "B L 3 3"], truth: Float[Tensor, "B L 3 3"], mask: Bool[Tensor, "B L"]
) -> dict[str, Float64[Tensor, " B"]]:
    """RMSD of the backbone (Angstrom) and CA-lDDT; NaN where the guess is not finite."""
    sound = guess.flatten(2).isfinite().all(2).masked_fill(~mask, True).all(1)
    given = torch.where(mask[..., None, None] & sound[:, None, None, None], guess.double(), 0.0)
    atoms = mask.repeat_interleave(3, 1)
    apart = rmsd(given.flatten(1, 2), truth.flatten(1, 2), atoms)
    local = lddt(given[:, :, 1], truth[:, :, 1], mask)
    return {"rmsd": apart.masked_fill(~sound, torch.nan), "lddt": local.masked_fill(~sound, torch.nan)}


def mean_backbone(reader: ShardReader) -> Float64[Tensor, "L 3 3"] | None:
    """The mean structure of the train chains; None without any."""
    sums, counts = torch.zeros(0, 3, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for batch, _ in walk(reader, "train"):
        mask = whole_residues(batch)
        framed = in_first_frame(batch.columns["backbone"][:, :, :3].double(), mask)
        more = mask.shape[1] - len(counts)
        if more > 0:
            sums, counts = torch.cat([sums, sums.new_zeros(more, 3, 3)]), torch.cat([counts, counts.new_zeros(more)])
        sums[: mask.shape[1]] += torch.where(mask[..., None, None], framed, 0.0).sum(0)
        counts[: mask.shape[1]] += mask.sum(0)
    seen = int(counts.nonzero().max()) + 1 if bool(counts.any()) else 0
    if not seen:
        return None
    return sums[:seen] / counts[:seen].clamp(min=1)[:, None, None]


def in_first_frame(backbone: Float64[Tensor, "B L 3 3"], mask: Bool[Tensor, "B L"]) -> Float64[Tensor, "B L 3 3"]:
    """Turned and moved so that the mask's first residue has its CA at 0, C on the x axis and N in the x-y plane."""
    first = mask.long().argmax(1)
    rotation, origin, _ = frames_of(backbone[torch.arange(len(first)), first])
    return (backbone - origin[:, None, None]) @ rotation.unsqueeze(1)


def laid_out(mean: Float64[Tensor, "M 3 3"], backbone: Float[Tensor, "B L A 3"]) -> Float64[Tensor, "B L 3 3"]:
    """The mean structure for each chain of a batch."""
    places = torch.arange(backbone.shape[1]).clamp(max=len(mean) - 1)
    return mean[places].expand(len(backbone), -1, -1, -1)


def _from_codes(tokens: ProteinTokens, batch: Batch) -> Tensor:
    codes = tokens.codes(batch)
    vectors = tokens.vectors[codes.clamp(min=0)].masked_fill((codes < 0).unsqueeze(-1), 0.0)
    assert tokens.rebuilt is not None
    return tokens.rebuilt(vectors, codes >= 0)


def _from_latents(tokens: ProteinTokens, batch: Batch) -> Tensor:
    assert tokens.rebuilt is not None
    assert tokens.latents is not None
    return tokens.rebuilt(tokens.latents(batch), tokens.codes(batch) >= 0)


def _some(batch: Batch, rows: slice) -> Batch:
    """Some rows, cut to the longest of them."""
    length = int(batch.columns["residue_mask"][rows].sum(1).max())
    width = batch.columns["residue_mask"].shape[1]
    columns = {
        name: column[rows, :length] if column.dim() > 1 and column.shape[1] == width else column[rows]
        for name, column in batch.columns.items()
    }
    return Batch(columns, batch.mask[rows], batch.keys[rows])


def _summary(scores: Mapping[str, Float64[Tensor, " C"]]) -> dict[str, Any]:
    sound = scores["rmsd"].isfinite()
    found: dict[str, Any] = {"chains": int(sound.sum()), "not_finite": int((~sound).sum())}
    for measure, values in scores.items():
        held = values[sound].numpy()
        found[measure] = float(held.mean()) if len(held) else None
        found[f"{measure}_median"] = float(np.median(held)) if len(held) else None
    return found
