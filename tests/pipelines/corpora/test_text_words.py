"""Words of texts and the tokens they are made of, with tokenizers that cut white space in different ways."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipelines.corpora import _text_words as words

SPACE = "\u2581"
PIECES = [
    "<s>",
    "<unk>",
    SPACE,
    f"{SPACE}ab",
    f"{SPACE}a",
    "a",
    "b",
    "c",
    ".",
    "!",
    "\u0120",
    "\u0120ab",
    "\u0120a",
]


def tokenizer(kind: str) -> Any:
    """Of single letters and some pieces; offsets of `metaspace` and `untrimmed` take in the space before."""
    ids = {piece: place for place, piece in enumerate(PIECES)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    if kind == "letters":
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    elif kind == "metaspace":
        made = Tokenizer(models.Unigram([(piece, -1.0 - (len(piece) == 1)) for piece in PIECES], unk_id=1))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
    else:
        merges = [("\u0120", "a"), ("\u0120a", "b")]
        made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
        made.post_processor = processors.ByteLevel(trim_offsets=kind == "trimmed")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


KINDS = ["letters", "metaspace", "trimmed", "untrimmed"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_belongs_to_the_word_its_letters_lie_in(kind: str) -> None:
    (found,) = words.encoded(tokenizer(kind), ["ab a.  cab"], "punctuation")
    assert found.words == ["ab", "a", ".", "cab"]
    made = ["".join(found.shown[t] for t, w in enumerate(found.word_of) if w == word) for word in range(4)]
    assert [text.strip(f"{SPACE}\u0120 ") for text in made] == ["ab", "a", ".", "cab"]
    assert found.word_of[0] == 0


def test_tokens_of_white_space_belong_to_no_word() -> None:
    (found,) = words.encoded(tokenizer("letters"), ["  a b "], "space")
    assert (found.words, found.word_of) == (["a", "b"], [-1, -1, 0, -1, 1, -1])
    assert words.encoded(tokenizer("letters"), [], "space") == []
    (empty,) = words.encoded(tokenizer("letters"), [""], "space")
    assert (empty.ids, empty.words, empty.word_of) == ([], [], [])


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=st.text("abc. !\n", max_size=30))
def test_laws_of_words(kind: str, text: str) -> None:
    (found,) = words.encoded(tokenizer(kind), [text], "space")
    assert found.words == text.split()
    assert len(found.word_of) == len(found.ids) == len(found.shown)
    real = [word for word in found.word_of if word >= 0]
    assert real == sorted(real)
    # Every word has a token of its own: none of these tokenizers joins words.
    assert set(real) == set(range(len(found.words)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), max_size=20), st.integers(1, 7))
def test_windows_hold_every_token_once_and_cut_words_only_where_they_must(lengths: list[int], room: int) -> None:
    word_of = [word for word, length in enumerate(lengths) for _ in range(length)]
    document = words.Encoded([0], [1], list(range(len(word_of))), [], [""] * len(lengths), word_of)
    found = list(words.windows(document, room + 2))
    assert [token for start, stop in found for token in range(start, stop)] == list(range(len(word_of)))
    assert all(stop - start <= room for start, stop in found)
    for (start, stop), _ in pairwise(found):
        if word_of[stop - 1] == word_of[stop]:
            assert word_of[start] == word_of[stop]
        else:
            # The next word would not have fitted.
            assert stop - start + lengths[word_of[stop]] > room


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=8), max_size=12), st.integers(1, 4), st.integers(1, 4))
def test_slices_spend_what_the_whole_corpus_would(documents: list[list[str]], least: int, most: int) -> None:
    counted = words.Frequencies(least, most)
    for document in documents:
        counted.count(document)
    total = [word for document in documents for word in document]
    seen: list[str] = []
    for place in range(0, len(documents), 3):
        piece = documents[place : place + 3]
        allowance = words.Allowance(counted.allowance(word for document in piece for word in document))
        for document in piece:
            kept = allowance.spend(document)
            for word, found in zip(document, kept, strict=True):
                assert found == (total.count(word) >= least and seen.count(word) < most)
                seen.append(word)
