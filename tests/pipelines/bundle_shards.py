"""Tiny bundles as finished shards: arcs about a curve of their own, in chunks, the last of them filled up."""

from pathlib import Path

import numpy as np

from pipelines import corpora
from pipelines.columns import batch_of
from pipelines.manifest import SPLITS, Manifest, Units, describe, save_manifest
from pipelines.shards import ShardWriter

POINTS, CHUNK = 16, 16
BUNDLES = (37, 5, 20)
"""Streamlines of each."""


def bundle(drawn: np.random.Generator, count: int) -> np.ndarray:
    """[count, POINTS, 3] mm: one arc, shifted and shaken for each streamline."""
    t = np.linspace(0, np.pi, POINTS)
    arc = 30 * np.stack([np.cos(t), np.sin(t), 0.3 * t], 1) @ np.linalg.qr(drawn.normal(size=(3, 3)))[0]
    return arc + 3 * drawn.normal(size=(count, 1, 3)) + 0.2 * drawn.normal(size=(count, POINTS, 3))


def make_bundle_shards(home: Path, subjects: int = 6, seed: int = 0) -> str:
    """Each subject has every bundle; the last two are valid and test."""
    corpus = corpora.load("streamlines")
    settings = corpus.Settings(rows="chunks", num_points=POINTS, chunk=CHUNK)
    schema = corpus.schema(settings)
    drawn = np.random.default_rng(seed)
    records = []
    for part, half in enumerate((range(subjects // 2), range(subjects // 2, subjects))):
        values, splits = [], []
        for subject in half:
            for label, count in enumerate(BUNDLES):
                lines = bundle(np.random.default_rng(label), count) + drawn.normal(size=3)
                for first in range(0, count, CHUNK):
                    places = np.arange(first, first + CHUNK)
                    values.append(
                        {
                            "points": lines[places % count].astype(np.float32),
                            "real": (places < count).astype(np.uint8),
                            "length": np.ones(CHUNK, np.float32), "index": places % count,
                            "label": label, "group": len(BUNDLES) * subject + label,
                            "bundle": f"b{label}", "subject": f"s{subject}", "name": f"s{subject}/b{label}#0+{first}",
                        }
                    )  # fmt: skip
                    splits.append(SPLITS.index({subjects - 2: "valid", subjects - 1: "test"}.get(subject, "train")))
        with ShardWriter(str(home), part, schema) as writer:
            writer.write(batch_of(values, schema), np.array(splits, np.int8))
        records += writer.records
    rows = sum(record.rows for record in records)
    save_manifest(
        Manifest(
            "streamlines", settings.model_dump(mode="json"), {"limit": None, "holdout": 0.2}, describe(schema),
            tuple(records), Units(rows, rows, 0, {}), "", {}, {"bundles": ["b0", "b1", "b2"]},
        ),
        str(home),
    )  # fmt: skip
    return str(home)
