"""Concept pages: counts against counting by hand, and a page that stays inert whatever the corpus says."""

import math
from collections import Counter
from html.parser import HTMLParser

import pytest
import torch

from pipelines.recipes import _concept_page as pages
from pipelines.recipes import _concepts as concepts

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"
TEXT = ["the", "cat", "sat", "on", "the", "mat"]


def rows_of(words: list[str], label: str | None = "pets", first: int = 0) -> dict[str, list]:
    count = len(words)
    return {
        "row_id": list(range(first, first + count)),
        "word": words,
        "token": ["[CLS]"] * count,
        "position": list(range(count)),
        "document": [f"d{first}"] * count,
        "label": [label] * count,
    }


def both() -> list[dict[int, dict]]:
    """Two shards with the codes of their rows; -1 is a masked row."""
    return [
        concepts.tally([0, 1, 2, 0, 0, -1], rows_of(TEXT)),
        concepts.tally([0, 1, 1], rows_of(["the", "dog", "cat"], None, first=50)),
    ]


def test_words_and_labels_are_counted():
    found = concepts.merged({str(code): one for code, one in part.items()} for part in both())
    assert {code: one["rows"] for code, one in found.items()} == {0: 4, 1: 3, 2: 1}
    assert found[0]["words"] == Counter({"the": 3, "on": 1})
    assert found[1]["labels"] == Counter({concepts.NO_LABEL: 2, "pets": 1})


def test_contexts_do_not_depend_on_how_rows_lie_in_shards():
    words = [f"w{n}" for n in range(40)]
    whole = concepts.merged([{"0": concepts.tally([0] * 40, rows_of(words))[0]}])
    halves = []
    for low, high in ((0, 20), (20, 40)):
        rows = {name: values[low:high] for name, values in rows_of(words).items()}
        halves.append({"0": concepts.tally([0] * 20, rows)[0]})
    places = [[c["word"] for _, c in one[0]["contexts"]] for one in (whole, concepts.merged(reversed(halves)))]
    assert places[0] == places[1]
    assert len(places[0]) == concepts.CONTEXTS
    assert places[0] != words[: concepts.CONTEXTS], "the first rows are no sample"


def test_a_context_shows_neighbours_of_its_own_document_and_marks_gaps():
    rows = rows_of(TEXT)
    rows["position"] = [0, 1, 2, 5, 6, 7]
    rows["document"] = ["a"] * 5 + ["b"]
    found = concepts._context(2, TEXT, rows)
    assert (found["left"], found["word"], found["right"]) == ("the cat", "sat", "… on the")


def test_concepts_are_described_by_what_they_hold_more_of():
    found = concepts.described(concepts.merged({str(c): one for c, one in p.items()} for p in both()), torch.eye(4))
    first = found[0]
    assert (first["code"], first["rows"], first["share"]) == (0, 4, 4 / 8)
    score = {word: n * math.log(n * 8 / (4 * of)) for word, n, of in (("the", 3, 3), ("on", 1, 1))}
    assert first["named"] == sorted(score, key=score.get, reverse=True)
    assert [entry["word"] for entry in found[1]["words"]] == ["cat", "dog"]
    assert sum(entry["share"] for entry in found[1]["labels"]) == pytest.approx(1)
    assert [near["code"] for near in first["nearest"]] == [1, 2]
    assert first["nearest"][0]["distance"] == pytest.approx(math.sqrt(2))
    assert concepts.label_mix(found) == ["pets", concepts.NO_LABEL]


class Seen(HTMLParser):
    """Every tag with its attributes, and the text between."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def seen(page: str) -> Seen:
    parser = Seen()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def page_of(word: str, label: str) -> str:
    rows = rows_of([word, "cat", "sat"], label)
    rows["document"] = [EVIL] * 3
    found = concepts.described(concepts.merged([{"0": concepts.tally([0, 0, 0], rows)[0]}]), torch.eye(2))
    table = pages.table(word, [label], [[word]])
    return pages.page(word, label, {word: label}, found, [table])


def test_nothing_a_corpus_says_becomes_markup():
    plain, evil = seen(page_of("dog", "pets")), seen(page_of(EVIL, EVIL))
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert not [name for _, attributes in evil.tags for name in attributes if name.startswith("on")]
    assert any(EVIL in text for text in evil.text), "it is shown as it is"
    assert any(attributes.get("title", "").startswith(EVIL) for _, attributes in evil.tags)


def test_the_page_needs_nothing_from_elsewhere():
    found = seen(page_of("dog", "pets"))
    assert not [a for _, attributes in found.tags for a in attributes if a in ("src", "srcset", "action")]
    assert all(attributes["href"].startswith("#") for _, attributes in found.tags if "href" in attributes)
    assert "link" not in {tag for tag, _ in found.tags}
    policy = next(a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "url(" not in pages.STYLE
    assert "fetch" not in pages.SCRIPT


def test_a_page_of_very_many_shows_the_largest_and_says_so(monkeypatch):
    monkeypatch.setattr(pages, "MOST", 2)
    found = concepts.described(concepts.merged({str(c): one for c, one in p.items()} for p in both()), torch.eye(4))
    page = seen(pages.page("t", "a", {}, found))
    assert [a["id"] for tag, a in page.tags if tag == "article"] == ["code-0", "code-1"]
    assert {a["href"] for _, a in page.tags if "href" in a} == {"#code-0", "#code-1"}
    assert any("all 3 are in the JSON" in text for text in page.text)


def test_links_lead_to_cards():
    found = concepts.described(concepts.merged({str(c): one for c, one in p.items()} for p in both()), torch.eye(4))
    tags = seen(pages.page("t", "a", {}, found)).tags
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    links = {attributes["href"][1:] for _, attributes in tags if "href" in attributes}
    assert links
    assert links <= ids
