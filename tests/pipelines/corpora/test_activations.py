"""Activations against a bare forward with output_hidden_states: one document at a time, no batch, no padding."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from pipelines import ingest
from pipelines.columns import batch_of, values_of
from pipelines.corpora import Bad, Filtered, Row, Slice, Survey, activations
from pipelines.corpora.activations import ActivationSettings
from pipelines.errors import Refused
from pipelines.manifest import load_manifest
from pipelines.options import validated
from pipelines.shards import ShardReader, split_of
from tests.pipelines.corpora import tiny_language_models as tiny

TEXTS = [
    "The cat sat on the mat.",
    "good",
    "Bad, bad films and dogs and cats",
    "a dog",
    "the film the film the film",
    "mats on cats, cats on mats.",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(home / kind, kind) for kind in tiny.CONFIGS}


@pytest.fixture
def model(models: dict[str, Path]) -> str:
    return str(models["bert"])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "texts.csv"
    lines = [f'{n},"{text}",{"pos" if n % 2 else "neg"}' for n, text in enumerate(TEXTS)]
    path.write_text("\n".join(["id,text,label", *lines]))
    return path


class Read(NamedTuple):
    settings: ActivationSettings
    survey: Survey
    units: list[list[Row] | Bad | Filtered]

    @property
    def documents(self) -> list[list[Row]]:
        return [unit for unit in self.units if isinstance(unit, list)]

    def column(self, name: str, document: int | None = None) -> list[Any]:
        chosen = self.documents if document is None else [self.documents[document]]
        return [row.values[name] for rows in chosen for row in rows]


def read(source: Path, wanted: Callable[[int], bool] = lambda unit: True, holdout: float = 0.0, **chosen: Any) -> Read:
    """As an ingest does: slices go through JSON, every wanted unit comes once and in order, rows fit the schema."""
    settings = validated(ActivationSettings, chosen, "corpus 'activations'")
    survey = activations.survey([str(source)], settings)
    settings = settings.model_copy(update=survey.settings)
    survey = activations.prepare(survey, settings, wanted, lambda group, split: split or split_of(group, holdout))
    model = activations.setup(settings)
    units, first = [], 0
    for piece in survey.slices:
        again = Slice(**json.loads(json.dumps(asdict(piece))))
        count = piece.stop - piece.start
        here = [unit for unit in range(count) if wanted(first + unit)]
        came = list(
            activations.read(again, survey.context, settings, lambda unit, first=first: wanted(first + unit), model)
        )
        assert [unit for unit, _, _ in came] == here
        units += [found for _, found, _ in came]
        first += count
    found = Read(settings, survey, units)
    assert all(isinstance(unit, Bad | Filtered) or unit for unit in units)
    batch_of([row.values for rows in found.documents for row in rows], activations.schema(settings))
    return found


class Bare(NamedTuple):
    """A document alone through transformers."""

    tokens: list[str]
    states: list[np.ndarray]
    words: list[int | None]


def bare(folder: str, text: str, **options: Any) -> Bare:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    encoding = tokenizer(text.split(" ") if options.get("is_split_into_words") else text, **options)
    with torch.no_grad():
        states = model(torch.tensor([encoding["input_ids"]]), output_hidden_states=True).hidden_states
    return Bare(encoding.tokens(), [state[0].numpy() for state in states], encoding.word_ids())


def close(found: list[np.ndarray], expected: np.ndarray) -> None:
    assert len(found) == len(expected)
    np.testing.assert_allclose(np.stack(found).astype(np.float32), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_every_token_has_its_vector_at_every_layer(kind: str, models: dict[str, Path], table: Path) -> None:
    folder = str(models[kind])
    found = read(table, model=folder, layers=(1, 0), label="label", special="all", batch_tokens=20)
    assert len(found.documents) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        expected = bare(folder, text)
        assert found.column("token", number) == expected.tokens
        assert found.column("position", number) == list(range(len(expected.tokens)))
        close(found.column("layer_1", number), expected.states[1])
        close(found.column("layer_0", number), expected.states[0])
        assert set(found.column("document", number)) == {f"texts.csv/{number}"}
        assert set(found.column("label", number)) == {"pos" if number % 2 else "neg"}
        assert {row.group for row in found.documents[number]} == {f"texts.csv/{number}"}


@pytest.mark.parametrize("how", ["mean", "first", "last"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_words_are_made_of_their_tokens(how: str, kind: str, models: dict[str, Path], table: Path) -> None:
    """The reference cuts words by the tokenizer's own is_split_into_words; the vectors are its tokens'."""
    folder = str(models[kind])
    found = read(table, model=folder, layers=2 if kind == "bert" else 1, words=how, split_words="space")
    column = found.survey.settings["layers"][0]
    for number, text in enumerate(TEXTS):
        expected = bare(folder, text, is_split_into_words=True)
        first = 1 if kind == "bert" else 0
        assert found.column("word", number)[first:] == text.split(" ")
        groups = [[t for t, w in enumerate(expected.words) if w == word] for word in range(len(text.split(" ")))]
        pick = {"mean": slice(None), "first": slice(0, 1), "last": slice(-1, None)}[how]
        vectors = np.stack([expected.states[column][group][pick].mean(0) for group in groups])
        close(found.column(f"layer_{column}", number)[first:], vectors)
        assert found.column("token", number)[first:] == ["".join(expected.tokens[t] for t in g) for g in groups]
        assert found.column("position", number) == list(range(len(groups) + first))


def test_words_and_punctuation_marks_are_apart(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Don't stop... it's a well-known  film, (1999)!?\n")
    found = read(tmp_path / "a.txt", model=model, words="last", special="none")
    expected = ["Don't", "stop", "...", "it's", "a", "well-known", "film", ",", "(", "1999", ")", "!", "?"]
    assert found.column("word") == expected


@pytest.mark.parametrize(
    ("special", "words", "kept"),
    [
        ("first", "off", ["[CLS]", "good", "film", "##s"]),
        ("all", "off", ["[CLS]", "good", "film", "##s", "[SEP]"]),
        ("none", "off", ["good", "film", "##s"]),
        ("first", "mean", ["[CLS]", "good", "film##s"]),
        ("all", "mean", ["[CLS]", "good", "film##s", "[SEP]"]),
    ],
)
def test_special_tokens_are_kept_as_asked(
    special: str, words: str, kept: list[str], model: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Good films")
    found = read(tmp_path / "a.txt", model=model, special=special, words=words)
    assert found.column("token") == kept
    assert found.column("position") == [n for n in range(len(kept) + 1) if special != "none" or n][: len(kept)]
    assert found.column("word")[-1] == ("[SEP]" if special == "all" else "films")


def test_two_readings_and_any_limit_give_the_same_bits(model: str, table: Path) -> None:
    def bits(found: Read) -> list[bytes]:
        return [vector.tobytes() for vector in found.column("layer_2")]

    every = read(table, model=model, batch_tokens=16)
    assert bits(read(table, model=model, batch_tokens=16)) == bits(every)
    odd = read(table, lambda unit: unit % 2 == 1, model=model, batch_tokens=16)
    assert bits(odd) == bits(read(table, lambda unit: unit % 2 == 1, model=model, batch_tokens=16))
    assert odd.column("document") == [name for name in every.column("document") if int(name[-1]) % 2]


def test_chunks_of_documents_change_no_row(model: str, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors may differ in their last bits, as their batches do; which document has which may not."""
    whole = read(table, model=model)
    held: list[int] = []
    compute = activations.rows.activations

    def computed(plans: Any, *rest: Any) -> Any:
        held.append(len(plans))
        return compute(plans, *rest)

    monkeypatch.setattr(activations.rows, "activations", computed)
    monkeypatch.setattr(activations, "CHUNK_BYTES", 1)
    parts = read(table, model=model, batch_tokens=5)
    # Memory holds the documents of one chunk: it is done once it has the tokens of a batch.
    assert held == [1, 2, 2, 1, 0]
    assert parts.column("token") == whole.column("token")
    assert parts.column("document") == whole.column("document")
    close(parts.column("layer_2"), np.stack(whole.column("layer_2")))


# Documents longer than the window

LONG = "the cat sat on the mat and the dogs sat on the mats . good films and bad films ."


def test_a_long_document_goes_in_pieces_and_loses_nothing(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    found = read(tmp_path / "a.txt", model=model, max_tokens=8, layers=(0, 2))
    tokens = AutoTokenizer.from_pretrained(model).tokenize(LONG)
    assert found.column("token") == ["[CLS]", *tokens]
    assert found.column("position") == list(range(len(tokens) + 1))
    # Six tokens beside [CLS] and [SEP]; words of two tokens would be cut at some ends.
    pieces = regrouped(tokens, 6)
    assert any(len(piece) < 6 for piece in pieces[:-1])
    expected = [bare(model, " ".join(piece).replace(" ##", "")).states[2][1:-1] for piece in pieces]
    close(found.column("layer_2")[1:], np.concatenate(expected))


def regrouped(tokens: list[str], room: int) -> list[list[str]]:
    """Greedy: as many whole words as fit."""
    words: list[list[str]] = []
    for token in tokens:
        words[-1:] = [[*words[-1], token]] if token.startswith("##") else [*words[-1:], [token]]
    pieces: list[list[str]] = [[]]
    for word in words:
        pieces[-1:] = [pieces[-1] + word] if len(pieces[-1] + word) <= room else [pieces[-1], word]
    return pieces


def test_a_word_longer_than_the_window_is_cut_inside(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a " + "q" * 9 + " cat")
    off = read(tmp_path / "a.txt", model=model, max_tokens=6, special="none")
    assert off.column("token") == ["a", "q", *["##q"] * 8, "cat"]
    assert off.column("word") == ["a", *["q" * 9] * 9, "cat"]
    word = read(tmp_path / "a.txt", model=model, max_tokens=6, special="none", words="last")
    assert word.column("word") == ["a", "q" * 9, "cat"]
    assert word.column("token")[1] == "q##q##q##q"


def test_truncation_is_that_of_transformers(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    found = read(tmp_path / "a.txt", model=model, max_tokens=8, longer="truncate", special="all")
    expected = bare(model, LONG, truncation=True, max_length=8)
    assert found.column("token")[:-1] == expected.tokens[:-1]
    close(found.column("layer_2"), expected.states[2])


@pytest.mark.parametrize(
    ("longer", "given"),
    [("quarantine", Bad("a.txt/0", "more than max_tokens=8 tokens")), ("drop", Filtered("max_tokens"))],
)
def test_a_long_document_may_be_left_out(longer: str, given: Bad | Filtered, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{LONG}\nthe cat sat on the mat\n")
    found = read(tmp_path / "a.txt", model=model, max_tokens=8, longer=longer)
    assert found.units[0] == given
    assert found.column("word") == ["[CLS]", "the", "cat", "sat", "on", "the", "mat"]


def test_the_default_is_the_window_of_the_model(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cat " * 40)
    found = read(tmp_path / "a.txt", model=model)
    assert found.survey.settings["max_tokens"] == tiny.WINDOW
    assert len(found.column("token")) == 41
    with pytest.raises(Refused, match=f"max_tokens=25 was given; the window of this model is {tiny.WINDOW}"):
        read(tmp_path / "a.txt", model=model, max_tokens=25)


# The frequency filter


def brute_force(documents: list[tuple[str, list[str]]], holdout: float, least: int, most: int) -> list[list[str]]:
    """The dossier's words: count over train; keep the first `most` of words with at least `least`; others whole."""
    train = [split_of(name, holdout) == "train" for name, _ in documents]
    total = Counter(word for yes, (_, words) in zip(train, documents, strict=True) if yes for word in words)
    seen: Counter[str] = Counter()
    kept = []
    for yes, (_, words) in zip(train, documents, strict=True):
        here = []
        for word in words:
            seen[word] += yes
            if not yes or (total[word] >= least and seen[word] <= most):
                here.append(word)
        kept.append(here)
    return kept


@pytest.mark.parametrize("words", ["last", "off"])
@pytest.mark.parametrize(("least", "most"), [(3, 4), (1, 2), (5, 10**6), (2, 1)])
def test_the_frequency_filter_counts_train_documents_in_order(
    words: str, least: int, most: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "LEAST_SLICE_BYTES", 6000)
    generator = np.random.default_rng(5)
    vocabulary = ["the", "cat", "on", "mat", "good", "bad", "film", "and", "dog", "."]
    odds = np.arange(1, 11) ** 2 / 385
    texts = [generator.choice(vocabulary, generator.integers(1, 9), p=odds).tolist() for _ in range(60)]
    (tmp_path / "t.txt").write_text("\n".join(map(" ".join, texts)))
    found = read(
        tmp_path / "t.txt", holdout=0.15, model=model, words=words, min_word_count=least, max_word_occurrences=most
    )
    assert len(found.survey.slices) > 3
    names = [f"t.txt/{n}" for n in range(60)]
    expected = brute_force(list(zip(names, texts, strict=True)), 0.15, least, most)
    assert {split_of(name, 0.15) for name in names} == {"train", "valid", "test"}
    # The tag of the sentence is always kept.
    assert [[row.values["word"] for row in rows] for rows in found.documents] == [["[CLS]", *kept] for kept in expected]


def test_a_filter_counts_only_the_units_that_are_taken(model: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("cat cat\ncat\ncat dog\ncat dog\n")
    odd = read(tmp_path / "t.txt", lambda unit: unit % 2 == 1, model=model, words="last", min_word_count=2)
    assert odd.column("word") == ["[CLS]", "cat", "[CLS]", "cat"]


def test_a_document_all_of_whose_words_are_filtered_is_counted_by_the_setting(model: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("cat cat\ndog\ncat\n")
    rare = read(tmp_path / "t.txt", model=model, words="last", special="none", min_word_count=2)
    assert (rare.units[1], rare.column("word")) == (Filtered("min_word_count"), ["cat"] * 3)
    late = read(tmp_path / "t.txt", model=model, words="last", special="none", max_word_occurrences=2)
    assert (late.units[2], late.column("word")) == (Filtered("max_word_occurrences"), ["cat", "cat", "dog"])


def test_words_beyond_a_truncation_are_not_counted(model: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("cat dog\ncat mat dog\n")
    found = read(
        tmp_path / "t.txt", model=model, words="last", min_word_count=2, max_tokens=4, longer="truncate", special="none"
    )
    assert found.column("word") == ["cat", "cat"]


# Sources


def test_a_folder_of_texts_takes_labels_and_splits_from_its_folders(model: str, tmp_path: Path) -> None:
    for name, text in {"train/pos/a.txt": "good", "train/neg/b.txt": "bad", "test/pos/c.txt": "good film"}.items():
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_text(text)
    (tmp_path / "s/train/pos/notes.pdf").write_bytes(b"%PDF")
    found = read(tmp_path / "s", model=model, special="none")
    assert len(found.survey.slices) == 1
    assert found.survey.ignored == {"not a file of text (.pdf)": 1}
    assert found.column("document") == ["test/pos/c.txt"] * 2 + ["train/neg/b.txt", "train/pos/a.txt"]
    assert found.column("label") == ["pos", "pos", "neg", "pos"]
    # No valid folder: train is cut by the hash.
    assert [rows[0].split for rows in found.documents] == ["test", "not test", "not test"]


def test_files_with_odd_names_and_gzip_are_documents_too(model: str, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/b.txt.gz").write_bytes(gzip.compress(b"good film"))
    with open(os.fsencode(tmp_path / "s") + b"/\xff.txt", "wb") as file:
        file.write(b"bad dog")
    (tmp_path / "s/c.txt").write_text("cat")
    os.symlink(tmp_path / "s", tmp_path / "s/loop")
    found = read(tmp_path / "s", model=model, special="none")
    assert found.column("word") == ["bad", "dog", "good", "film", "cat"]
    assert sorted(set(found.column("document"))) == ["\\xff.txt", "b.txt.gz", "c.txt"]


@pytest.mark.parametrize(("txt", "documents"), [("auto", 2), ("lines", 2), ("documents", 1)])
def test_a_text_file_is_lines_or_one_document(txt: str, documents: int, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good film\nbad dog\n")
    found = read(tmp_path / "a.txt", model=model, txt=txt, special="none")
    assert len(found.documents) == documents
    assert found.column("word") == ["good", "film", "bad", "dog"]


def test_columns_of_parquet_with_official_splits(model: str, tmp_path: Path) -> None:
    columns = {
        "title": ["Cat", None, "dog", "mat"], "body": ["sat", "film", None, None],
        "stars": [1, 2, 3, None], "part": ["train", "dev", "TEST", "extra"],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = read(
        tmp_path / "t.parquet", model=model, text=["title", "body"], label="stars", split="part", special="none"
    )
    assert found.column("word") == ["Cat", "sat", "film", "dog"]
    assert [rows[0].split for rows in found.documents] == ["train", "valid", "test"]
    assert found.column("label") == ["1", "1", "2", "3"]
    assert found.units[3] == Bad("t.parquet/3", "its official split is none of train, valid and test")
    with pytest.raises(Refused, match="split=stars names no official splits: it holds '1', '2', '3', 'none'"):
        read(tmp_path / "t.parquet", model=model, text="title", split="stars")


def test_tables_without_a_header(model: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('"3","cat","sat"\n"4","dog","on"\n')
    found = read(tmp_path / "t.csv", model=model, header=False, text=["column_2", "column_3"], label="column_1")
    assert found.column("word") == ["[CLS]", "cat", "sat", "[CLS]", "dog", "on"]
    assert found.column("label") == ["3"] * 3 + ["4"] * 3


# Dirt


def test_dirty_texts_are_quarantined_one_by_one(model: str, tmp_path: Path) -> None:
    lines = ["text,label", "cat,a", "b\xffd,b", '"",c', '"  ",d', "\x00\x01,e", "dog,f"]
    (tmp_path / "t.csv").write_bytes("\n".join(lines).encode("latin-1"))
    found = read(tmp_path / "t.csv", model=model, special="none")
    assert found.column("word")[0] == "cat"
    assert found.column("word")[-1] == "dog"
    reasons = {unit.source: unit.reason for unit in found.units if isinstance(unit, Bad)}
    assert reasons["t.csv/1"] == "not UTF-8 text"
    assert reasons["t.csv/2"] == reasons["t.csv/3"] == "the document is empty"


def test_a_cut_off_gzip_costs_what_lies_behind_it(model: str, tmp_path: Path) -> None:
    text = "\n".join(f"cat {n}" for n in range(3000)).encode()
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(text)[:2000])
    found = read(tmp_path / "t.txt.gz", lambda unit: unit > 200, model=model, max_tokens=8)
    assert [isinstance(unit, Bad) for unit in found.units[-2:]] == [False, True]


@pytest.fixture
def broken(model: str, tmp_path: Path) -> Callable[[float], str]:
    """The model with one number of the vector of `cat` replaced."""

    def make(value: float) -> str:
        folder = tmp_path / "broken"
        folder.mkdir()
        for path in Path(model).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        weights = load_file(folder / "model.safetensors")
        weights["embeddings.word_embeddings.weight"][tiny.VOCABULARY.index("cat"), 3] = value
        # The layer norm of an encoder would make any finite number small again.
        weights["embeddings.LayerNorm.weight"][3] = 1.0 if value != value else value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return make


def test_activations_that_are_not_finite_cost_their_document(broken: Callable[[float], str], table: Path) -> None:
    found = read(table, model=broken(float("nan")), layers=2)
    reasons = {unit.source: unit.reason for unit in found.units if isinstance(unit, Bad)}
    having = [n for n, text in enumerate(TEXTS) if "cat" in text.lower()]
    assert reasons == {f"texts.csv/{n}": "an activation is NaN or infinite" for n in having}
    for number, rows in zip([n for n in range(len(TEXTS)) if n not in having], found.documents, strict=True):
        assert rows[0].values["document"] == f"texts.csv/{number}"


def test_what_float16_cannot_hold_bfloat16_can(broken: Callable[[float], str], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the dog\ncat\n")
    folder = broken(1e6)
    found = read(tmp_path / "t.txt", model=folder, layers=0)
    assert Bad("t.txt/1", "an activation is too large for float16") in found.units
    wide = read(tmp_path / "t.txt", model=folder, layers=0, dtype="bfloat16")
    assert not any(isinstance(unit, Bad) for unit in wide.units)
    batch = batch_of([row.values for rows in wide.documents for row in rows], activations.schema(wide.settings))
    stored = activations.tensors(values_of(batch), wide.settings)["layer_0"]
    expected = np.concatenate([bare(folder, text).states[0][:-1] for text in ("the dog", "cat")])
    torch.testing.assert_close(stored, torch.from_numpy(expected).bfloat16(), rtol=2**-7, atol=1e-6)
    assert expected.max() > 1e5


# Refused before work


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layers": (0, 3)}, r"layers=3 was given; this model has 0 \(embeddings\) to 2"),
        ({"layers": -1}, "layers=-1 was given"),
        ({"layers": (1, 1)}, "layers=1,1 names none or one twice"),
        ({"text": "body"}, r"has no column 'body'; allowed: id, label, text"),
        ({"label": "topic"}, "has no column 'topic'"),
        ({"model": "/nowhere"}, "/nowhere does not exist"),
        ({"model": None}, "no model was named"),
        ({"model_digest": "0" * 64}, "is another model than these settings were made with"),
        ({"width": 17}, "width=17 was given; this model has 16"),
        ({"words": "sum"}, "words='sum'"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"gpus": 2}, "gpus=2"),
    ],
)
def test_impossible_requests_are_refused(wrong: dict[str, Any], words: str, model: str, table: Path) -> None:
    with pytest.raises(Refused, match=words):
        read(table, **{"model": model, **wrong})


def test_workers_find_a_model_given_by_a_relative_path(
    model: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model).parent)
    settings = ActivationSettings(model="bert")
    monkeypatch.chdir(tmp_path)
    assert activations.setup(settings).shape.width == tiny.WIDTH


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(model: str, table: Path) -> None:
    settings = ActivationSettings(model=model, gpus=0.5)
    assert activations.gpus(settings) == 0.5
    with pytest.raises(Refused, match=r"gpus=0\.5 was given, but this process sees no CUDA device"):
        activations.setup(settings)


def test_sources_without_text_are_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.png").write_bytes(b"\x89PNG")
    with pytest.raises(Refused, match=r"there is no text in .*; it holds 1 x not a file of text \(\.png\)"):
        read(tmp_path / "s", model=model)
    with pytest.raises(Refused, match="does not exist"):
        read(tmp_path / "missing", model=model)


# What others see


def test_what_a_recipe_and_a_person_see(model: str, table: Path, tmp_path: Path) -> None:
    found = read(table, model=model, layers=(0, 2))
    assert activations.shapes(found.settings) == {"layer_0": [tiny.WIDTH], "layer_2": [tiny.WIDTH]}
    batch = batch_of([row.values for row in found.documents[0]], activations.schema(found.settings))
    seen = activations.tensors(values_of(batch), found.settings)
    assert {name: column.dtype for name, column in seen.items()} == {
        "layer_0": torch.float16, "layer_2": torch.float16, "position": torch.int32,
    }  # fmt: skip
    assert np.array_equal(seen["layer_2"].numpy(), np.stack(found.column("layer_2", 0)))
    activations.write_files({"layer_2": seen["layer_2"][:2]}, ["a", "b"], str(tmp_path), found.settings)
    assert np.array_equal(np.load(tmp_path / "b-layer_2.npy"), seen["layer_2"][1].float().numpy())
    with pytest.raises(ValueError, match="the width of the model is not known"):
        activations.schema(ActivationSettings(model=model))


def test_a_bundle_asks_where_the_model_lies(model: str, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = read(table, model=model).settings.model_dump(mode="json")
    assert not {"model", "gguf_file", "revision"} & kept.keys()
    card = {"corpus": {"kind": "activations", "settings": kept}}
    monkeypatch.setattr(ingest, "read_card", lambda directory: card)
    monkeypatch.setattr(ingest.registry, "local_bundle", lambda bundle: bundle)

    def prepared(**overrides: Any) -> Any:
        return ingest.prepared_by(corpus=None, recipe_name=None, bundle="b", overrides=overrides)[1]

    assert read(table, **dict(prepared(model=model))).settings == read(table, model=model).settings
    with pytest.raises(Refused, match="no model was named"):
        activations.survey([str(table)], prepared())
    with pytest.raises(Refused, match=r"but for where things lie \(gguf_file, model, revision\); leave --set dtype"):
        prepared(model=model, dtype="bfloat16")


@pytest.mark.usefixtures("ray_instance")
def test_an_ingest_counts_documents_and_does_not_care_where_the_model_lies(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "LEAST_PART_BYTES", 1)
    monkeypatch.setattr(activations, "LEAST_SLICE_BYTES", 4000)
    (tmp_path / "t.csv").write_text("text\n" + "\n".join(f'"{text}"' for text in [*TEXTS * 5, " "]))
    settings = ActivationSettings(model=str(models["bert"]), layers=(1, 2), words="last", min_word_count=2)
    done = ingest.ingest("activations", [str(tmp_path / "t.csv")], str(tmp_path / "out"), settings=settings)
    manifest = load_manifest(str(tmp_path / "out"))
    assert (manifest.units.read, manifest.units.kept, manifest.units.quarantined) == (31, 30, 1)
    expected = read(
        tmp_path / "t.csv", holdout=0.1, model=str(models["bert"]), layers=(1, 2), words="last", min_word_count=2
    )
    taken = values_of(ShardReader(str(tmp_path / "out")).take("all", np.arange(done.rows)))
    assert taken["word"] == expected.column("word")
    assert taken["layer_2"].tobytes() == np.stack(expected.column("layer_2")).tobytes()
    assert [shard.name for shard in manifest.shards][-1] != "shard-00000-000.arrow"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in models["bert"].iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    again = settings.model_copy(update={"model": str(moved)})
    same = ingest.ingest("activations", [str(tmp_path / "t.csv")], str(tmp_path / "out"), settings=again)
    assert (same.skipped, same.digest) == (True, done.digest)
