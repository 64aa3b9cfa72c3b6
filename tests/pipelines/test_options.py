"""--set words: typed, checked, refused with the nearest right name."""

import pytest
from pydantic import Field

from pipelines.errors import Refused
from pipelines.options import describe, differences, parse_pairs, validated
from pipelines.recipe import Settings


class Example(Settings):
    num_codes: int = Field(8, ge=2, description="K")
    decay: float | None = 0.9
    widths: tuple[int, ...] = (1, 2)


def test_words_become_typed_settings():
    pairs = parse_pairs(["num_codes=16", "decay=none", "widths=1,2,4"])
    assert validated(Example, pairs, "example") == Example(num_codes=16, decay=None, widths=(1, 2, 4))


def test_one_value_for_a_sequence_is_a_sequence_of_one():
    assert validated(Example, parse_pairs(["widths=3"]), "example").widths == (3,)


def test_misspelt_key_names_the_nearest():
    with pytest.raises(Refused, match=r"no setting 'num_code'; did you mean 'num_codes'\?"):
        validated(Example, {"num_code": "4"}, "example")


@pytest.mark.parametrize(("word", "said"), [("num_codes=1", "greater than or equal to 2"), ("num_codes=x", "integer")])
def test_bad_value_says_what_is_allowed(word, said):
    with pytest.raises(Refused, match=said):
        validated(Example, parse_pairs([word]), "example")


@pytest.mark.parametrize("words", [["num_codes"], ["=3"], ["a=1", "a=2"]])
def test_words_that_are_not_pairs_are_refused(words):
    with pytest.raises(Refused, match="--set"):
        parse_pairs(words)


def test_differences_name_each_key_once_with_both_values():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}) == [
        "b.c: 2 -> 4",
        "e: None -> 5",
    ]
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []


def test_describe_lists_every_field_with_default_and_meaning():
    assert ("num_codes", "8", "K") in describe(Example)
