"""Fronts against brute force, knees and picks against their definitions, and what a spread lets be said."""

import random
from itertools import product

import pytest

from pipelines import front
from pipelines.errors import Failed, Refused
from pipelines.trials import Trial

BOTH = [("distortion", "min"), ("bits_per_row", "min")]
KNOWN = {"distortion", "bits_per_row", "usage", "seconds"}


def trial(number: int, metrics: dict[str, float], state="finished", repeat=0, **settings) -> Trial:
    settings = settings or {"k": number}
    return Trial(
        number, settings, repeat, repeat, state, metrics, metrics.get("bits_per_row"), 10, 1.0, 5, "", "d", None
    )


def points(*pairs: tuple[float, float]) -> list[front.Point]:
    """One point for each (distortion, bits)."""
    return front.points_of(
        [trial(n, {"distortion": d, "bits_per_row": b, "usage": 1 - d}) for n, (d, b) in enumerate(pairs)]
    )


def repeated(number: int, distortions: list[float], bits: float = 8.0) -> list[Trial]:
    return [
        trial(number + r, {"distortion": d, "bits_per_row": bits}, repeat=r, k=number)
        for r, d in enumerate(distortions)
    ]


@pytest.mark.parametrize("directions", list(product(["min", "max"], repeat=3)))
def test_the_front_is_that_of_brute_force(directions):
    """From the definition: a point is off the front exactly where another one is no worse anywhere and better once."""
    drawn = random.Random(str(directions))
    names = ["a", "b", "c"]
    many = [trial(n, {name: float(drawn.randint(0, 6)) for name in names}) for n in range(60)]
    objectives = list(zip(names, directions, strict=True))
    expected = set()
    for mine in many:
        beaten = False
        for other in many:
            gains = [
                (mine.metrics[name] - other.metrics[name]) * (1 if direction == "min" else -1)
                for name, direction in objectives
            ]
            beaten |= min(gains) >= 0 and max(gains) > 0
        if not beaten:
            expected.add(mine.number)
    found = front.pareto(front.points_of(many), objectives)
    assert {point.number for point in found} == expected
    assert 0 < len(expected) < 60
    last = [point.values["c"] * (1 if directions[2] == "min" else -1) for point in found]
    assert last == sorted(last), "the cheapest is first"


def test_a_point_is_the_mean_of_its_finished_repeats_and_no_others():
    trials = [
        *repeated(0, [1.0, 2.0, 6.0]),
        trial(3, {}, "failed", k=3),
        trial(4, {"distortion": 0.1, "bits_per_row": 1.0}, "pruned", k=4),
        trial(5, {"distortion": 4.0, "bits_per_row": 8.0}, repeat=1, k=5),
    ]
    first, second = front.points_of(trials)
    assert (first.number, first.values["distortion"], first.values["parameters"]) == (0, 3.0, 10.0)
    assert first.spreads["distortion"] == pytest.approx(7**0.5)
    assert (second.number, second.spreads["distortion"]) == (5, None)


def test_the_knee_is_farthest_below_the_chord():
    """Distances from the line through the ends, by the cross product."""
    pairs = [(9.0, 2.0), (5.0, 3.0), (3.2, 4.0), (2.5, 7.0), (2.0, 12.0)]
    front_of = front.pareto(points(*pairs), BOTH)
    scaled = [((d - 2) / 7, (b - 2) / 10) for d, b in pairs]
    (x0, y0), (x1, y1) = scaled[0], scaled[-1]
    away = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x, y in scaled]
    farthest = max(range(5), key=lambda n: abs(away[n]))
    chosen, why = front.knee(front_of, BOTH)
    assert chosen.number == farthest == 2
    assert "in distortion and bits_per_row from 0 to 1" in why


def test_the_knee_looks_at_wide_values_on_a_log_scale_and_does_not_depend_on_units():
    pairs = [(1000.0, 2.0), (100.0, 3.0), (30.0, 4.0), (10.0, 8.0)]
    chosen, why = front.knee(points(*pairs), BOTH)
    scaled, _ = front.knee(points(*[(d * 7, b / 4) for d, b in pairs]), BOTH)
    assert chosen.number == scaled.number == 2
    assert "log distortion and bits_per_row" in why
    linear = min(pairs, key=lambda p: (p[0] - 10) / 990 + (p[1] - 2) / 6)
    assert pairs.index(linear) == 1, "else this test could not tell the scales apart"


def test_a_front_without_a_knee_gives_its_best_end_and_says_so():
    chosen, why = front.knee(front.pareto(points((4.0, 2.0), (3.5, 3.0), (1.0, 4.0)), BOTH), BOTH)
    assert chosen.number == 2
    assert "no point lies below the chord" in why
    alone, why = front.knee(front.pareto(points((4.0, 2.0), (3.0, 9.0)), BOTH[:1]), BOTH[:1])
    assert (alone.number, why) == (1, "the best distortion")


def test_picks_keep_within_limits_or_name_the_closest():
    found = points((9.0, 2.0), (5.0, 6.0), (3.0, 12.0), (2.0, 20.0))

    def picked(text):
        return front.pick(front.parse_rule(text, KNOWN), found, BOTH)

    assert picked("min:distortion@bits<=12")[0].number == 2
    assert picked("min:distortion@bits<=12@usage>=-4.5")[0].number == 2
    assert picked("min:bits_per_row@distortion<=4.9")[0].number == 2
    assert picked("max:distortion")[0].number == 0
    chosen, why = picked("min:distortion@bits_per_row<=6")
    assert (chosen.number, why) == (1, "the least distortion of the 2 points within bits_per_row<=6")
    with pytest.raises(Failed, match=r"within bits_per_row<=1: the closest is trial 0 \(k=0\) with bits_per_row 2\."):
        picked("min:distortion@bits<=1")
    with pytest.raises(Failed, match=r"no metric 'psmr'.*distortion"):
        front.pick(front.parse_rule("max:psmr", None), found, BOTH)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("elbow", r"--pick elbow is no rule; allowed: knee"),
        ("min:distorsion", r"no metric 'distorsion'; did you mean 'distortion'"),
        ("min:distortion@bit_per_row<=3", r"no metric 'bit_per_row'; did you mean 'bits_per_row'"),
        ("min:distortion@bits<=few", r"'few' is not a number"),
        ("min:distortion@bits<=nan", r"nothing is below or above nan"),
        ("min:distortion@bits<3", r"is no rule; allowed"),
        ("distortion", r"is no rule; allowed"),
    ],
)
def test_rules_are_refused_with_what_is_allowed(text, said):
    with pytest.raises(Refused, match=said):
        front.parse_rule(text, KNOWN)


def test_rules_read_back_as_they_were_given():
    for text in ("knee", "min:distortion", "max:usage@bits_per_row<=12@seconds>=0.5"):
        assert str(front.parse_rule(text, KNOWN)) == text


def test_a_difference_is_real_only_beyond_the_spread_and_unknown_with_one_run():
    a, near, far, once = front.points_of(
        [
            *repeated(0, [1.0, 2.0, 3.0]),
            *repeated(10, [2.5, 3.5, 4.5]),
            *repeated(20, [5.0, 6.0, 7.0]),
            *repeated(30, [100.0]),
        ]
    )
    assert front.differs(a, near, "distortion") is False
    assert front.differs(a, far, "distortion") is True
    assert front.differs(far, a, "distortion") is True
    assert front.differs(a, once, "distortion") is None
    assert front.differs(a, near, "bits_per_row") is False


def test_how_often_equal_points_seem_to_differ():
    """The numbers in the docstring of `differs`."""
    drawn = random.Random(0)

    def share(repeats: int) -> float:
        seen = 0
        for _ in range(2000):
            a, b = front.points_of(
                [*repeated(0, [drawn.gauss(0, 1) for _ in range(repeats)]),
                 *repeated(10, [drawn.gauss(0, 1) for _ in range(repeats)])]
            )  # fmt: skip
            seen += bool(front.differs(a, b, "distortion"))
        return seen / 2000

    assert share(3) == pytest.approx(1 / 13, abs=0.015)
    assert share(2) == pytest.approx(1 / 5, abs=0.03)


def test_points_beaten_by_less_than_the_spread_are_told_apart_from_those_beaten_clearly():
    trials = [*repeated(0, [1.0, 1.2, 1.4]), *repeated(10, [1.1, 1.3, 1.5]), *repeated(20, [2.0, 2.2, 2.4])]
    found = front.points_of(trials)
    best = front.pareto(found, BOTH)
    assert [point.number for point in best] == [0]
    assert [point.number for point in front.within_spread(found, best, BOTH)] == [10]
