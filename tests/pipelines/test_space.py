"""Search expressions: what they list, what they draw, and what they refuse in words a person can act on."""

import random

import pytest
from pydantic import BaseModel, Field

from pipelines import recipe
from pipelines.errors import Refused
from pipelines.space import Choice, Interval, parse_space


class Sized(BaseModel):
    num_codes: int = Field(8, ge=2)
    code_dim: int = Field(4, ge=1)
    rate: float = Field(0.1, gt=0)
    decay: float | None = Field(0.9, gt=0, lt=1)
    sizes: tuple[int, ...] = (1,)
    kind: str = "a"
    on: bool = False


OWN = {"num_codes": "choice:4,8", "rate": "1e-3..1e-1:log"}


def parsed(*words: str):
    return parse_space(words, Sized, OWN, "recipe 'x'")


@pytest.mark.parametrize(
    ("word", "domain"),
    [
        ("num_codes=choice:256,512,1024", Choice((256, 512, 1024))),
        ("code_dim=32..512:log2", Choice((32, 64, 128, 256, 512))),
        ("code_dim=3..20:log2", Choice((3, 6, 12))),
        ("code_dim=5..5:log2", Choice((5,))),
        ("code_dim=3..6", Interval(3, 6, whole=True, log=False)),
        ("code_dim=3..600:log", Interval(3, 600, whole=True, log=True)),
        ("rate=1e-4..2e-3:log", Interval(1e-4, 2e-3, whole=False, log=True)),
        ("rate=0.1..0.9", Interval(0.1, 0.9, whole=False, log=False)),
        ("rate=0.1..0.8:log2", Choice((0.1, 0.2, 0.4, 0.8))),
        ("decay=choice:none,0.9", Choice((None, 0.9))),
        ("decay=0.5..0.9", Interval(0.5, 0.9, whole=False, log=False)),
        ("sizes=choice:1|1,2|1,2,4", Choice(([1], [1, 2], [1, 2, 4]))),
        ("kind=choice:a,b", Choice(("a", "b"))),
        ("on=choice:true,false", Choice((True, False))),
    ],
)
def test_expressions_are_typed_by_their_setting(word, domain):
    assert parsed(word).domains == {word.partition("=")[0]: domain}


def test_words_with_an_expression_replace_the_recipes_space_and_plain_words_fix_settings():
    assert parsed().given == OWN
    fixed = parsed("num_codes=16", "kind=b")
    assert (set(fixed.domains), fixed.fixed, fixed.chosen) == ({"rate"}, {"num_codes": "16", "kind": "b"}, frozenset())
    said = parsed("code_dim=2..8:log2", "rate=0.5")
    assert (set(said.domains), said.fixed, said.chosen) == ({"code_dim"}, {"rate": "0.5"}, frozenset({"code_dim"}))


def test_a_grid_is_every_combination_once():
    space = parsed("num_codes=choice:4,8", "code_dim=2..4", "on=choice:true,false")
    points = list(space.grid())
    assert space.size() == len(points) == 12
    assert len({tuple(point.items()) for point in points}) == 12
    assert {point["code_dim"] for point in points} == {2, 3, 4}


@pytest.mark.parametrize("word", ["rate=1e-3..1e-1:log", "code_dim=3..600:log", "rate=0.1..0.9"])
def test_what_cannot_be_listed_has_no_grid(word):
    assert parsed(word).size() is None
    with pytest.raises(Refused, match=r"--sampler random or adaptive"):
        list(parsed(word).grid())


def test_draws_stay_inside_and_follow_the_scale():
    drawn = random.Random(0)
    log = [parsed("rate=1e-4..1e-2:log").draw(drawn)["rate"] for _ in range(2000)]
    assert all(1e-4 <= value <= 1e-2 for value in log)
    assert 0.45 < sum(value < 1e-3 for value in log) / 2000 < 0.55
    plain = [parsed("rate=0.5..1.0").draw(drawn)["rate"] for _ in range(2000)]
    assert 0.45 < sum(value < 0.75 for value in plain) / 2000 < 0.55
    whole = {parsed("code_dim=3..5").draw(drawn)["code_dim"] for _ in range(200)}
    assert whole == {3, 4, 5}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["num_code=choice:1,2"], r"no setting 'num_code'; did you mean 'num_codes'"),
        (["num_cods=4"], r"no setting 'num_cods'; did you mean 'num_codes'"),
        (["num_codes=choice:1,2"], r"num_codes=1 cannot be: .*greater than or equal to 2"),
        (["num_codes=choice:4,4"], r"has 4 twice"),
        (["num_codes=choice:"], r"an empty choice"),
        (["num_codes=choice:4,,8"], r"an empty choice"),
        (["num_codes=2.5..9"], r"num_codes=2.5 cannot be: .*integer"),
        (["num_codes=64..16"], r"64 is above 16.*swap them"),
        (["num_codes=4..16:lin"], r"no scale 'lin'; allowed: choice:a,b,c \| a\.\.b:log2"),
        (["kind=a..b"], r"kind is not a number, so it has no range; write kind=choice:"),
        (["on=0..1"], r"on is not a number"),
        (["num_codes=choice:4,8", "num_codes=choice:16"], r"gives 'num_codes' twice"),
        (["num_codes=choice:4,8", "num_codes=16"], r"gives 'num_codes' twice"),
        (["num_codes=4", "rate=0.1"], r"nothing is searched: every setting has one value"),
        (["num_codes"], r"takes key=value words"),
    ],
)
def test_what_is_wrong_is_refused_with_what_would_be_right(words, said):
    with pytest.raises(Refused, match=said):
        parsed(*words)


def test_a_log_scale_begins_above_zero():
    class Zero(BaseModel):
        below: float = 0.0

    with pytest.raises(Refused, match=r"begins above 0, not at 0\.0"):
        parse_space(["below=0..1:log"], Zero, {}, "x")


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipes_own_space_can_be_read(name):
    found = recipe.load(name)
    space = parse_space([], found.Settings, found.space, name)
    assert space.domains.keys() == found.space.keys()
