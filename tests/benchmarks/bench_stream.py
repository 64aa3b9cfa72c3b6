"""A streamed run against a bare forward loop of the same model: tokens a second, the forward of both with one thread.

The stream is `vqray train --stream` in full: one process reads texts through the model, hashes, splits and writes two
layers, and beside it one worker trains on the finished parts. Its time begins with the first part that is finished
when the worker trains (without the starts of Ray, the model and the worker) and ends with the bundle; its tokens are
those of the parts after that one. The bare loop is that of bench_activations: it keeps one layer in memory, and has
the machine to itself. It goes once over all texts, sorted by length together, and once over chunks of 16 batches, as
it has to where texts do not fit into memory and as the kind does; a part of a small corpus holds fewer. All sides
take turns; the ratios of each round are taken, and of the ratios the medians.

With a real model: python -m tests.benchmarks.bench_stream --model FOLDER
"""

import argparse
import csv
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch
from transformers import AutoConfig

from pipelines.alongside import Alongside
from pipelines.corpora import _language_models as models
from pipelines.manifest import load_manifest, part_of, record_uri
from pipelines.request import Request
from pipelines.stream_request import Streamed
from pipelines.train import train
from tests.benchmarks import bench_activations as activations

ROUNDS, SECONDS = 4, 30.0
"""Each side works about so long in a round."""
BATCH = 512


def run(quick: bool = False, model: str | None = None, recipe: str = "plain_vq") -> None:
    """Print tokens/s of both sides and the ratio. Without a folder the model is of MiniLM's size and random."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{home / 'bench.db'}"
        folder = model or str(activations._random_model(home / "model", small=quick))
        bare = activations._Bare(folder)
        texts = activations._texts(20_000)
        rate, tokens = activations._tokens_a_second(bare, texts[:100])
        texts = texts[: max(1000, int(100 * rate * (5.0 if quick else SECONDS) / tokens))]
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        rounds = 2 if quick else ROUNDS
        turns = [
            (
                _stream(folder, texts, home / f"stream-{turn}", recipe),
                activations._tokens_a_second(bare, texts)[0],
                activations._tokens_a_second(_in_chunks, bare, texts)[0],
            )
            for turn in range(rounds)
        ]
        rows = load_manifest(str(home / "stream-0" / "shards")).rows()
        ray.shutdown()
    torch.set_num_threads(before)
    ours = statistics.median(turn[0] for turn in turns)
    print(f"stream ({recipe}): {ours:.0f} tokens/s in {rounds} rounds of {rows} tokens; the bar is 0.9")
    for side, name in ((1, "all texts together"), (2, "in chunks")):
        ratios = [turn[0] / turn[side] for turn in turns]
        print(
            f"  bare forward, {name}: {statistics.median(turn[side] for turn in turns):.0f} tokens/s, ratio"
            f" {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})"
        )


def _in_chunks(bare: activations._Bare, texts: list[str]) -> int:
    tokens, start = 0, 0
    sizes = [len(ids) for ids in bare.tokenizer(texts)["input_ids"]]
    while start < len(texts):
        stop, size = start, 0
        while stop < len(texts) and size < 16 * models.BATCH_TOKENS:
            size, stop = size + sizes[stop], stop + 1
        tokens += bare(texts[start:stop])
        start = stop
    return tokens


def _stream(folder: str, texts: list[str], home: Path, recipe: str) -> float:
    """Tokens a second of one streamed run over about one pass."""
    home.mkdir()
    with open(home / "texts.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    deepest = AutoConfig.from_pretrained(folder).num_hidden_layers
    layers = [deepest // 2, deepest]
    # A row a token; eight of ten documents are for training, and a few less than their steps are asked for.
    words = sum(len(text.split()) for text in texts)
    settings = {"column": f"layer_{deepest}"} if recipe == "plain_vq" else {}
    trains: list[float] = []

    def hear(event: dict[str, Any]) -> None:
        if event["kind"] == "progress":
            trains.append(time.time())

    request = Request(
        recipe,
        str(home / "shards"),
        str(home / "run"),
        preset="small",
        overrides={"num_codes": 256, "steps": int(0.75 * words / BATCH), "batch_size": BATCH, **settings},
        stream=Streamed(
            (str(home / "texts.csv"),), "activations", {"model": folder, "layers": layers, "special": "all"}
        ),
    )
    with mock.patch.object(Alongside, "hear", lambda self, event: hear(event)):
        train(request)
    shards = load_manifest(str(home / "shards")).shards
    ended = {
        shard.name: Path(record_uri(str(home / "shards"), part_of(shard.name))).stat().st_mtime for shard in shards
    }
    first = min(end for end in ended.values() if end > trains[0])
    rows = sum(shard.rows for shard in shards if ended[shard.name] > first)
    seconds = (home / "run" / "bundle" / "card.json").stat().st_mtime - first
    return rows / seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a language model (default: a random one)")
    parser.add_argument("--recipe", default="plain_vq", help="what is trained meanwhile (plain_vq)")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    run(quick=given.quick, model=given.model, recipe=given.recipe)
