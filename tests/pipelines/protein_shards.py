"""Tiny protein chains as finished shards: random walks whose labels follow from their residues."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import corpora
from pipelines.columns import batch_of
from pipelines.manifest import SPLITS, Manifest, Units, describe, save_manifest
from pipelines.shards import ShardWriter

CODES = 8
SUFFIXES = ("_u", "_b-matched")


def backbone_of(drawn: np.random.Generator, length: int) -> np.ndarray:
    """[L, 4, 3]: CA atoms 3.8 Angstrom apart in a walk that turns slowly; N, C and O beside them."""
    steps = drawn.normal(size=(length, 3))
    for place in range(1, length):
        steps[place] = 0.6 * steps[place - 1] + 0.8 * steps[place] / np.linalg.norm(steps[place])
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    alphas = 3.8 * steps.cumsum(0)
    aside = 0.4 * drawn.normal(size=(length, 3))
    return np.stack([alphas - 1.3 * steps + aside, alphas, alphas + 1.3 * steps, alphas + 1.3 * steps + aside], 1)


def protein(name: str, drawn: np.random.Generator, length: int, **more: Any) -> dict[str, Any]:
    """One row. Residues below 4 are in contact; the secondary structure and B-factor follow from the residue too."""
    residues = drawn.integers(CODES, size=length)
    return {
        "name": name, "chain": "A", "copy": 0, "model": 1, "length": length,
        "backbone": backbone_of(drawn, length).astype(np.float32), "atoms": np.ones((length, 4), np.uint8),
        "residues": residues.astype(np.int8), "numbers": np.arange(1, length + 1, dtype=np.int32),
        "insertions": np.zeros(length, np.uint8),
        "unmatched": 0, "notes": "",
        **labels_of(residues), **more,
    }  # fmt: skip


def labels_of(residues: np.ndarray) -> dict[str, np.ndarray]:
    found = {"contact": residues < 4, "secondary": residues % 3, "b_factors": 10 * residues}
    return {name: values.astype(np.float32) for name, values in found.items()}


def make_protein_shards(home: Path, rows: list[tuple[str, Mapping[str, Any]]], **settings: Any) -> str:
    """(split, row) pairs, in two shards."""
    corpus = corpora.load("proteins")
    given = corpus.Settings(group="folder", contacts="contacts.txt", strings=".dssp", **settings)
    schema = corpus.schema(given)
    records = []
    for part, some in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        with ShardWriter(str(home), part, schema) as writer:
            splits = np.array([SPLITS.index(split) for split, _ in some], np.int8)
            writer.write(batch_of([row for _, row in some], schema), splits)
        records += writer.records
    units = Units(len(rows), len(rows), 0, {})
    selection = {"limit": None, "holdout": 0.2}
    manifest = Manifest(
        "proteins", given.model_dump(mode="json"), selection, describe(schema), tuple(records), units, ""
    )
    save_manifest(manifest, str(home))
    return str(home)


def complexes(count: int = 12, seed: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """Each of two conformations: the bound one is the unbound one, moved by noise that grows with the complex."""
    drawn = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        split = ("train", "train", "valid", "test")[number % 4]
        first = protein(f"c{number:02d}/c{number:02d}{SUFFIXES[0]}.pdb", drawn, int(drawn.integers(20, 31)))
        # Residues move as they are: shaken atom by atom they would make no frame.
        noise = 0.5 * number * drawn.normal(size=(first["length"], 1, 3))
        residues = np.where(drawn.uniform(size=first["length"]) < number / count, 0, first["residues"])
        second = {
            **first, "name": f"c{number:02d}/c{number:02d}{SUFFIXES[1]}.pdb",
            "backbone": (first["backbone"] + noise).astype(np.float32), "residues": residues.astype(np.int8),
            **labels_of(residues),
        }  # fmt: skip
        rows += [(split, first), (split, second)]
    return rows
