"""The chains of a split end to end: their codes, labels and geometry as flat arrays over residues, N in all.

About 60 bytes a residue: the 10 million residues of 40,000 chains take 0.6 GB. Latents go to a file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool
from torch import Tensor

from pipelines.encode import seen_batches
from pipelines.recipe import Batch
from pipelines.recipes._protein_tokens import KEY_COLUMNS, Key, ProteinTokens
from pipelines.shards import ShardReader
from vqcore.frames import frames_of
from vqcore.superposition import dihedrals

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Chains:
    keys: list[Key]
    offsets: Ints
    """[C + 1]: chain c has the residues offsets[c] to offsets[c + 1]."""
    codes: Ints
    """[N], -1 where a residue has none."""
    angles: Floats
    """[N, 6]: sine and cosine of phi, psi and omega; both 0 where an angle does not exist."""
    alphas: Floats
    """[N, 3]: CA in Angstrom, NaN where it is missing."""
    labels: dict[str, Floats]
    """[N], NaN where a residue has none."""

    def __len__(self) -> int:
        return len(self.keys)

    def places(self, chain: int) -> slice:
        return slice(int(self.offsets[chain]), int(self.offsets[chain + 1]))


def gather(reader: ShardReader, split: str, tokens: ProteinTokens, labels: Sequence[str] = ()) -> Chains:
    """All chains of a split in the order of the shards.

    Args:
        labels: of the shards' columns, one number a residue: labels of the ingest, or `b_factors`.
    """
    keys: list[Key] = []
    lengths: list[int] = []
    flat: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("codes", "angles", "alphas", *labels)}
    for batch, stored in walk(reader, split):
        real, mask = batch.columns["residue_mask"], whole_residues(batch)
        turns, there = dihedrals(batch.columns["backbone"], mask)
        turns = torch.stack([turns.sin(), turns.cos()], -1).masked_fill(~there.unsqueeze(-1), 0.0).flatten(2)
        codes = tokens.codes(batch)
        keys += zip(*(stored[name] for name in KEY_COLUMNS), strict=True)
        lengths += real.sum(1).tolist()
        flat["codes"].append(codes[real].numpy())
        flat["angles"].append(turns[real].float().numpy())
        alphas = batch.columns["backbone"][..., 1, :]
        alphas = alphas.masked_fill(~batch.columns["atom_mask"][..., 1:2], torch.nan)
        flat["alphas"].append(alphas[real].float().numpy())
        for name in labels:
            flat[name] += [np.asarray(row, np.float32) for row in stored[name]]
    shapes = {"angles": (0, 6), "alphas": (0, 3)}
    whole = {name: np.concatenate(parts or [np.zeros(shapes.get(name, (0,)))]) for name, parts in flat.items()}
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    floats = {name: values.astype(np.float32) for name, values in whole.items() if name != "codes"}
    found = {name: floats[name] for name in labels}
    named = [(str(name), str(chain), int(copy), int(model)) for name, chain, copy, model in keys]
    return Chains(named, offsets, whole["codes"].astype(np.int64), floats["angles"], floats["alphas"], found)


def whole_residues(batch: Batch) -> Bool[Tensor, "B L"]:
    """Those whose N, CA and C are there and make a frame. Placeholders (9999, 0) do not."""
    real: Tensor = batch.columns["residue_mask"] & batch.columns["atom_mask"][..., :3].all(-1)
    return real & frames_of(batch.columns["backbone"])[2]


def joined(parts: Sequence[Chains]) -> Chains:
    """Chains of several splits as one."""
    offsets = [parts[0].offsets]
    for part in parts[1:]:
        offsets.append(part.offsets[1:] + offsets[-1][-1])
    return Chains(
        [key for part in parts for key in part.keys],
        np.concatenate(offsets),
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.angles for part in parts]),
        np.concatenate([part.alphas for part in parts]),
        {name: np.concatenate([part.labels[name] for part in parts]) for name in parts[0].labels},
    )


def latents_of(reader: ShardReader, splits: Sequence[str], tokens: ProteinTokens, residues: int, file: Path) -> Floats:
    """[N, D]: the latents of `residues` residues of these splits, in the order of `gather`, kept in a file."""
    if tokens.latents is None:
        raise ValueError("these tokens have no latents")
    found: Floats | None = None
    begin = 0
    for split in splits:
        for batch, _ in walk(reader, split):
            with torch.inference_mode():
                rows = tokens.latents(batch).float().cpu()[batch.columns["residue_mask"]].numpy()
            if found is None:
                found = np.memmap(file, np.float32, "w+", shape=(residues, rows.shape[1]))
            found[begin : begin + len(rows)] = rows
            begin += len(rows)
    return np.zeros((0, 1), np.float32) if found is None else found


def walk(reader: ShardReader, split: str) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """(batch, its rows as stored) of a whole split, without rows that are not finite (they have no codes)."""
    for shard in range(len(reader.manifest.shards)):
        for batch, lost, stored in seen_batches(reader, shard, split):
            if not lost:
                yield batch, stored
                continue
            keep = batch.mask.numpy().nonzero()[0]
            columns = {name: column[batch.mask] for name, column in batch.columns.items()}
            left = {name: [values[place] for place in keep] for name, values in stored.items()}
            if len(keep):
                yield Batch(columns, batch.mask[batch.mask], batch.keys[batch.mask]), left
