"""Reading activations against a bare forward loop over the same texts: tokens a second, both with one thread.

The bare loop tokenizes all texts, sorts them by length, pads batches of the same size and keeps the last hidden state
of every token as float16. The kind reads the same texts from a CSV file and gives rows. Both sides take turns; the
ratio of each pair is taken, and of the ratios the median. A row costs the kind about 8 us beside the model.

With a real model: python -m tests.benchmarks.bench_activations --model FOLDER
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig

from pipelines.corpora import _language_models as models
from pipelines.corpora import activations
from pipelines.corpora.activations import ActivationSettings
from tests.pipelines.corpora import tiny_language_models as tiny

ROUNDS, SECONDS = 7, 4.0
"""Each side works for more than 20 s in all."""


def run(quick: bool = False, model: str | None = None) -> None:
    """Print tokens/s of both sides and the ratio. Without a folder the model is of MiniLM's size and random."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model or str(_random_model(Path(scratch) / "model", small=quick))
        rounds = 3 if quick else ROUNDS
        bare = _Bare(folder)
        texts = _texts(2000)
        rate = _tokens_a_second(bare, texts[:50])
        texts = texts[: max(20, int(len(texts[:50]) * rate[0] * (0.5 if quick else SECONDS) / rate[1]))]
        kind = _Kind(folder, texts, Path(scratch))
        assert kind() == bare(texts), "both sides must see the same tokens"
        ratios, ours, theirs = [], [], []
        for _ in range(rounds):
            pair = [_tokens_a_second(kind)[0], _tokens_a_second(bare, texts)[0]]
            ours.append(pair[0])
            theirs.append(pair[1])
            ratios.append(pair[0] / pair[1])
    torch.set_num_threads(before)
    print(
        f"activations: {statistics.median(ours):.0f} tokens/s, bare forward: {statistics.median(theirs):.0f} tokens/s,"
        f" ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f} in {rounds} rounds;"
        " the bar is 0.9)"
    )


def _tokens_a_second(side: Any, *arguments: Any) -> tuple[float, int]:
    began = time.perf_counter()
    tokens = side(*arguments)
    return tokens / (time.perf_counter() - began), tokens


class _Kind:
    """The kind's own reading, as a worker does it."""

    def __init__(self, folder: str, texts: list[str], scratch: Path) -> None:
        path = scratch / "texts.csv"
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
        settings = ActivationSettings(model=folder, special="all")
        self.survey = activations.survey([str(path)], settings)
        self.settings = settings.model_copy(update=self.survey.settings)
        self.model = activations.setup(self.settings)

    def __call__(self) -> int:
        rows = 0
        for piece in self.survey.slices:
            for _, found, _ in activations.read(piece, self.survey.context, self.settings, lambda _: True, self.model):
                assert isinstance(found, list)
                rows += len(found)
        return rows


class _Bare:
    """As anybody would write it who batches by length."""

    def __init__(self, folder: str) -> None:
        self.model, self.tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def __call__(self, texts: list[str]) -> int:
        sequences = self.tokenizer(texts)["input_ids"]
        order = sorted(range(len(texts)), key=lambda place: len(sequences[place]))
        kept: dict[int, np.ndarray] = {}
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and len(sequences[order[stop]]) * (stop + 1 - start) <= models.BATCH_TOKENS:
                stop += 1
            batch = self.tokenizer.pad(
                {"input_ids": [sequences[place] for place in order[start:stop]]}, return_tensors="pt"
            )
            with torch.inference_mode():
                states = self.model(**batch).last_hidden_state.half().numpy()
            for row, place in enumerate(order[start:stop]):
                kept[place] = states[row, : len(sequences[place])]
            start = stop
        return sum(len(vectors) for vectors in kept.values())


def _texts(count: int) -> list[str]:
    """Documents of some 40 words, a few of them long, as news and reviews are."""
    random = np.random.default_rng(0)
    words = [word for word in tiny.WORDS if word.isalpha()]
    lengths = np.exp(random.normal(3.7, 0.5, count)).astype(int).clip(3, 300)
    return [" ".join(random.choice(words, length)) for length in lengths]


def _random_model(folder: Path, small: bool) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    size["num_hidden_layers"] = 2 if small else 6
    AutoModel.from_config(BertConfig(vocab_size=len(tiny.VOCABULARY), **size)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a language model (default: a random one)")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    run(quick=given.quick, model=given.model)
