"""What a code stands for: the words that get it, where they occur, of which labels, and which codes are near."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipelines import trained
from pipelines.encode import seen_batches, shard_parts
from pipelines.parts import run_parts
from pipelines.shards import ShardReader
from pipelines.trained import Trained

FORMAT, VERSION = "vqray-concepts", 1
WORDS, CONTEXTS, NEAREST = 24, 8, 5
"""Kept of each concept."""
AROUND = 6
"""Rows shown on each side of a context's own."""
NO_LABEL = "(no label)"

Directions = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N R D"]]
"""Rows of the lower layer -> the directions of their concepts, in that layer's space."""


@dataclass(frozen=True)
class ConceptModel:
    """What a recipe says of a trained model for its report."""

    vectors: Float[Tensor, "K D"]
    """What says which codes are near."""
    directions: Directions
    layer_in: int
    what: str
    """In a few words: `CLVQ-VAE, layers 3 to 6`."""


def gather(directory: Path, reader: ShardReader, split: str, out: str) -> dict[int, dict[str, Any]]:
    """Code -> {rows, words, labels, contexts} over a whole split, in parts below `out`."""
    work, setup = partial(_of_shard, reader.uri, split), partial(trained.open_trained, directory)
    records = run_parts(shard_parts(reader, split), work, out, label="concepts", unit="rows", setup=setup)
    return merged(record["codes"] for record in records)


def _of_shard(shards: str, split: str, shard: int, payload: None, model: Trained) -> dict[str, Any]:
    reader = ShardReader(shards)
    codes: list[int] = []
    rows: dict[str, list[Any]] = {name: [] for name in ("row_id", "word", "token", "position", "document", "label")}
    for batch, _, stored in seen_batches(reader, shard, split):
        with torch.inference_mode():
            codes += model.recipe.encode(model.model, batch).tolist()
        for name, values in rows.items():
            values += list(stored[name])
    return {"codes": {str(code): found for code, found in tally(codes, rows).items()}}


def tally(codes: Sequence[int], rows: Mapping[str, Sequence[Any]]) -> dict[int, dict[str, Any]]:
    """The same of rows in the order of their documents. Of contexts those with the smallest draws are kept: a uniform
    choice that does not depend on how rows are spread over shards."""
    found: dict[int, dict[str, Any]] = {}
    words = [str(word or token) for word, token in zip(rows["word"], rows["token"], strict=True)]
    draws = _draws(rows["row_id"])
    for place, code in enumerate(codes):
        if code < 0:
            continue
        one = found.setdefault(code, {"rows": 0, "words": Counter(), "labels": Counter(), "contexts": []})
        one["rows"] += 1
        one["words"][words[place]] += 1
        label = rows["label"][place]
        one["labels"][NO_LABEL if label is None else str(label)] += 1
        one["contexts"].append((draws[place], place))
    for one in found.values():
        one["contexts"] = [[draw, _context(place, words, rows)] for draw, place in sorted(one["contexts"])[:CONTEXTS]]
    return found


def _draws(row_ids: Sequence[int]) -> list[int]:
    """A pseudo-random number a row, by its id alone (Fibonacci hashing)."""
    mixed = np.array(row_ids, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(11)).tolist()


def _context(place: int, words: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """A row's word among its neighbours in the document; … where a filter left some out."""
    document, positions = rows["document"], rows["position"]

    def walk(step: int) -> list[str]:
        seen: list[str] = []
        at = place
        while len(seen) < AROUND and 0 <= at + step < len(words) and document[at + step] == document[place]:
            if abs(int(positions[at + step]) - int(positions[at])) > 1:
                seen.append("…")
            seen.append(words[at + step])
            at += step
        return seen

    label = rows["label"][place]
    return {
        "document": document[place],
        "label": NO_LABEL if label is None else str(label),
        "left": " ".join(reversed(walk(-1))),
        "word": words[place],
        "right": " ".join(walk(1)),
    }


def merged(parts: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[int, dict[str, Any]]:
    """Parts of a split as one."""
    found: dict[int, dict[str, Any]] = {}
    for part in parts:
        for name, more in part.items():
            one = found.setdefault(int(name), {"rows": 0, "words": Counter(), "labels": Counter(), "contexts": []})
            one["rows"] += more["rows"]
            one["words"].update(more["words"])
            one["labels"].update(more["labels"])
            one["contexts"] = sorted([*one["contexts"], *more["contexts"]], key=lambda pair: pair[0])[:CONTEXTS]
    return found


def described(found: Mapping[int, Mapping[str, Any]], vectors: Float[Tensor, "K D"]) -> list[dict[str, Any]]:
    """Concepts as JSON values, most rows first.

    Words are ranked by count x log of how much more of the concept's rows they are than of all rows, so that what is
    everywhere ranks low; counts are beside them. `named` are the first three.
    """
    every: Counter[str] = Counter()
    for one in found.values():
        every.update(one["words"])
    total = sum(every.values())
    near = _nearest(sorted(found), vectors)
    concepts = []
    for code, one in sorted(found.items(), key=lambda item: (-item[1]["rows"], item[0])):
        rows = one["rows"]

        def score(word: str, count: int, rows: int = rows) -> float:
            return count * math.log(count * total / (rows * every[word]))

        ranked = sorted(one["words"].items(), key=lambda pair: (-score(*pair), pair[0]))
        labels = sorted(one["labels"].items(), key=lambda pair: (-pair[1], pair[0]))
        concepts.append(
            {
                "code": code,
                "named": [word for word, _ in ranked[:3]],
                "rows": rows,
                "share": rows / total,
                "different_words": len(one["words"]),
                "words": [{"word": word, "count": count, "of": every[word]} for word, count in ranked[:WORDS]],
                "labels": [{"label": label, "count": count, "share": count / rows} for label, count in labels],
                "contexts": [context for _, context in one["contexts"]],
                "nearest": near[code],
            }
        )
    return concepts


def _nearest(codes: Sequence[int], vectors: Float[Tensor, "K D"]) -> dict[int, list[dict[str, Any]]]:
    """For each code in use, the others in use that are nearest, with distance and cosine."""
    used = vectors[list(codes)].double().cpu()
    unit = torch.nn.functional.normalize(used, dim=-1)
    found = {}
    for row, code in enumerate(codes):
        distances = (used - used[row]).square().sum(-1).sqrt()
        distances[row] = torch.inf
        order = distances.argsort(stable=True)[: min(NEAREST, len(codes) - 1)].tolist()
        found[code] = [
            {"code": codes[other], "distance": float(distances[other]), "cosine": float(unit[other] @ unit[row])}
            for other in order
        ]
    return found


def label_mix(concepts: Sequence[Mapping[str, Any]]) -> list[str]:
    """All labels, most frequent first."""
    counted: Counter[str] = Counter()
    for concept in concepts:
        for entry in concept["labels"]:
            counted[entry["label"]] += entry["count"]
    return [label for label, _ in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))]
