"""Words and the tokens they are made of, and which of their occurrences a frequency filter keeps."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

WORDS: dict[str, re.Pattern[str]] = {
    # Near to what the Moses tokenizer cuts: punctuation marks apart (runs of one mark together), hyphens inside.
    "punctuation": re.compile(r"\w+(?:['’-]\w+)*|([^\w\s])\1*"),
    "space": re.compile(r"\S+"),
}
SplitAt = Literal["punctuation", "space"]


@dataclass(frozen=True)
class Encoded:
    """A document as a model's tokenizer cuts it."""

    before: list[int]
    """Ids of the special tokens before the text ([CLS], <s>); `after` those behind it."""
    after: list[int]
    ids: list[int]
    """Of the text's own tokens."""
    shown: list[str]
    """All tokens as the tokenizer spells them, special ones included."""
    words: list[str]
    """Of the text, in order."""
    word_of: list[int]
    """Token -> its word; -1 for a token of white space."""


class Window(NamedTuple):
    """Tokens [start, stop) of the text that go through the model as one sequence."""

    start: int
    stop: int


def encoded(tokenizer: Any, texts: Sequence[str], split_at: SplitAt) -> list[Encoded]:
    """Texts -> tokens and words. A token belongs to the word that its last character lies in."""
    if not texts:
        return []
    made = tokenizer(
        list(texts),
        add_special_tokens=True,
        truncation=False,
        padding=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        # It would warn of documents longer than the window, which are seen to here.
        verbose=False,
    )
    columns = zip(texts, made["input_ids"], made["offset_mapping"], made["special_tokens_mask"], strict=True)
    return [_encoded(*column, made.tokens(place), WORDS[split_at]) for place, column in enumerate(columns)]


def _encoded(
    text: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    special: list[int],
    shown: list[str],
    pattern: re.Pattern[str],
) -> Encoded:
    first = next((place for place, mark in enumerate(special) if not mark), len(ids))
    last = next((place for place in range(len(ids), first, -1) if not special[place - 1]), first)
    spans = [match.span() for match in pattern.finditer(text)]
    word_of, word = [], 0
    for start, stop in offsets[first:last]:
        while word < len(spans) and spans[word][1] < stop:
            word += 1
        # A token that begins in the word before and ends in the white space behind it, as some tokenizers cut.
        place = word
        if word == len(spans) or spans[word][0] >= stop:
            place = word - 1
        inside = 0 <= place < len(spans) and spans[place][1] > start and spans[place][0] < stop
        word_of.append(place if inside else -1)
    return Encoded(ids[:first], ids[last:], ids[first:last], shown, [text[slice(*span)] for span in spans], word_of)


def windows(document: Encoded, most: int) -> Iterator[Window]:
    """Runs of tokens that fit into a window of `most` with their special tokens, cut between words where one fits."""
    room = most - len(document.before) - len(document.after)
    start, count = 0, len(document.ids)
    while count - start > room:
        stop = start + room
        while stop > start and document.word_of[stop] == document.word_of[stop - 1] >= 0:
            stop -= 1
        # One word alone is longer than the window: it is cut inside.
        stop = stop if stop > start else start + room
        yield Window(start, stop)
        start = stop
    yield Window(start, count)


class Frequencies:
    """How often words occur in train documents, and which occurrences are kept, slice by slice.

    The filter of CLVQ-VAE: words of at least `least` occurrences, and of each the first `most` (in the order of the
    sources). Words of other documents are all kept.
    """

    def __init__(self, least: int, most: int | None) -> None:
        self.least, self.most = least, most
        self.total: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def count(self, words: Iterable[str]) -> None:
        """First pass: all train documents."""
        self.total.update(words)

    def allowance(self, words: Iterable[str]) -> dict[str, Any]:
        """Second pass, one slice after the other: of each word, how many occurrences it may keep.

        JSON: {"kept": {word: n}} where all other words keep none, or {"limits": {word: n}} where they keep all,
        whichever is shorter.
        """
        here = Counter(words)
        kept = {word: self._kept(word, count) for word, count in here.items()}
        self.seen.update(here)
        limits = {word: number for word, number in sorted(kept.items()) if number < here[word]}
        some = {word: number for word, number in sorted(kept.items()) if number}
        return {"limits": limits} if len(limits) <= len(some) else {"kept": some}

    def _kept(self, word: str, count: int) -> int:
        if self.total[word] < self.least:
            return 0
        return count if self.most is None else max(0, min(count, self.most - self.seen[word]))


class Allowance:
    """What `Frequencies.allowance` gave one slice, spent document by document."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.left: dict[str, int] = dict(given.get("kept", given.get("limits", {})))
        self.others = 0 if "kept" in given else None

    def spend(self, words: Sequence[str]) -> list[bool]:
        """For each word of the next document whether its occurrence is kept."""
        return [self._spend(word) for word in words]

    def _spend(self, word: str) -> bool:
        left = self.left.get(word, self.others)
        if left is None:
            return True
        if left:
            self.left[word] = left - 1
        return left > 0
