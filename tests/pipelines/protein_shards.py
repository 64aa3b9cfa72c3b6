"""Tiny proteins as finished shards: grown chains of several lengths, with residue types that go with their shape."""

from pathlib import Path

import numpy as np

from pipelines import corpora
from pipelines.columns import batch_of
from pipelines.manifest import SPLITS, Manifest, Units, describe, save_manifest
from pipelines.shards import ShardWriter, split_of
from tests.vqcore.chains import chain
from vqcore import frames


def make_protein_shards(home: Path, chains: int = 30, parts: int = 2, shortest: int = 20, longest: int = 45) -> str:
    """`chains` rows; residues of even type have a B factor of 10, of odd type of 20."""
    corpus = corpora.load("proteins")
    settings = corpus.Settings()
    drawn = np.random.default_rng(0)
    records = []
    for part in range(parts):
        with ShardWriter(str(home), part, corpus.schema(settings)) as writer:
            values, splits = [], []
            for row in range(part * chains // parts, (part + 1) * chains // parts):
                length = int(drawn.integers(shortest, longest + 1))
                kinds = drawn.integers(0, 20, length)
                name = f"{row:03d}.pdb"
                values.append(
                    {
                        "name": name, "chain": "A", "copy": 0, "model": 1, "length": length,
                        "backbone": frames.with_oxygen(chain(length, row)).float().numpy(),
                        "atoms": np.ones((length, 4), np.uint8),
                        "residues": kinds.astype(np.int8), "numbers": np.arange(1, length + 1, dtype=np.int32),
                        "insertions": np.zeros(length, np.uint8),
                        "b_factors": np.where(kinds % 2, 20, 10).astype(np.float32),
                        "unmatched": 0, "notes": "",
                    }
                )  # fmt: skip
                splits.append(SPLITS.index(split_of(name, 0.2)))
            writer.write(batch_of(values, corpus.schema(settings)), np.array(splits, np.int8))
        records += writer.records
    columns = describe(corpus.schema(settings))
    save_manifest(
        Manifest(
            "proteins", settings.model_dump(mode="json"), {"limit": None, "holdout": 0.2}, columns, tuple(records),
            Units(chains, chains, 0, {}), "",
        ),
        str(home),
    )  # fmt: skip
    return str(home)
