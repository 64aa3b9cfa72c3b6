"""Tiny activations as finished shards: clusters of directions of varied length, two layers, documents."""

from pathlib import Path

import numpy as np

from pipelines import corpora
from pipelines.columns import batch_of
from pipelines.manifest import SPLITS, Manifest, Units, describe, save_manifest
from pipelines.shards import ShardWriter, split_of

WIDTH, TOPICS = 8, 3


def make_activation_shards(
    home: Path, documents: int = 60, parts: int = 2, words: int = 7, seed: int = 0, broken: int = 0
) -> str:
    """Documents of 1 to 2 x `words` rows; in the first `broken` of them the first row holds NaNs.

    A row's cluster is its word; layer 2 is a rotation of layer 1.
    """
    corpus = corpora.load("activations")
    settings = corpus.Settings(layers=(1, 2), width=WIDTH, words="mean", max_tokens=64)
    drawn = np.random.default_rng(seed)
    centres = drawn.normal(size=(12, WIDTH))
    turn = np.linalg.qr(drawn.normal(size=(WIDTH, WIDTH)))[0]
    records = []
    for part in range(parts):
        with ShardWriter(str(home), part, corpus.schema(settings)) as writer:
            values, splits = [], []
            for document in range(part * documents // parts, (part + 1) * documents // parts):
                name, topic = f"{document:03d}.txt", document % TOPICS
                split = SPLITS.index(split_of(name, 0.2))
                for position in range(drawn.integers(1, 2 * words + 1)):
                    word = int(drawn.integers(4)) * TOPICS + topic
                    low = (np.nan if position == 0 and document < broken else 1) * centres[word] * drawn.uniform(
                        1, 2
                    ) + 0.1 * drawn.normal(size=WIDTH)
                    values.append(
                        {
                            "layer_1": low.astype(np.float16), "layer_2": (low @ turn).astype(np.float16),
                            "token": f"w{word}", "word": f"w{word}", "position": position,
                            "document": name, "label": f"topic {topic}",
                        }
                    )  # fmt: skip
                    splits.append(split)
            writer.write(batch_of(values, corpus.schema(settings)), np.array(splits, np.int8))
        records += writer.records
    columns = describe(corpus.schema(settings))
    save_manifest(
        Manifest(
            "activations", settings.model_dump(mode="json"), {"limit": None, "holdout": 0.2}, columns, tuple(records),
            Units(documents, documents, 0, {}), "",
        ),
        str(home),
    )  # fmt: skip
    return str(home)
