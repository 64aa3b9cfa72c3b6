"""Which points can be trained: fixed capacity, fixed rate, K against the vectors there are, recounted by hand."""

import math

import numpy as np
import pytest

from pipelines import recipe
from pipelines.errors import Refused
from pipelines.feasibility import Feasibility
from pipelines.sampling import Adaptive, Random, grid_points
from pipelines.shards import ShardReader
from pipelines.space import parse_space
from tests.pipelines.loops import SIDE, TINY, make_shards
from tests.pipelines.protein_shards import make_protein_shards, protein

ROWS = 45


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> ShardReader:
    return ShardReader(make_shards(tmp_path_factory.mktemp("shards"), ROWS))


def feasible(reader: ShardReader, name: str, *words: str, **limits) -> Feasibility:
    found = recipe.load(name)
    space = parse_space(words, found.Settings, found.space, name)
    tiny = {key: value for key, value in TINY[name].items() if key not in ("num_codes", "code_dim", *space.fixed)}
    return Feasibility(found, space, {**tiny, **space.fixed}, reader, **limits)


def test_at_fixed_capacity_the_size_follows_from_the_dimension(reader):
    points, left_out = grid_points(feasible(reader, "rotation_trick", "code_dim=2..64:log2", capacity=512))
    assert points == [{"code_dim": d, "num_codes": 512 // d} for d in (2, 4, 8, 16, 32, 64)]
    assert left_out == []


def test_the_dimension_follows_where_only_the_size_was_given(reader):
    points, _ = grid_points(feasible(reader, "rotation_trick", "num_codes=choice:16,64", capacity=512))
    assert {(point["num_codes"], point["code_dim"]) for point in points} == {(16, 32), (64, 8)}


def test_where_both_were_given_only_their_pairs_stay(reader):
    words = ("num_codes=choice:16,64,100", "code_dim=8..64:log2")
    points, left_out = grid_points(feasible(reader, "rotation_trick", *words, capacity=512))
    assert [(point["num_codes"], point["code_dim"]) for point in points] == [(64, 8), (16, 32)]
    assert [point["code_dim"] for point, _ in left_out] == [16, 64]
    assert "num_codes=32 would follow from --capacity 512" in left_out[0][1]


def test_capacity_counts_what_a_recipe_calls_its_dimension(reader):
    """plain_vq has no code_dim: D is patch x patch of the grey images."""
    points, _ = grid_points(feasible(reader, "plain_vq", "patch=choice:1,2,4", capacity=64))
    assert points == [{"patch": p, "num_codes": 64 // p**2} for p in (1, 2, 4)]


def test_structure_tokens_of_one_capacity_are_the_papers_five_pairs(tmp_path):
    """AminoAseed's study of size against dimension: K x D = 2^19 throughout, from 256 x 2048 to 4096 x 128."""
    drawn = np.random.default_rng(0)
    rows = [("train", protein(str(n), drawn, 64)) for n in range(64)]
    proteins = ShardReader(make_protein_shards(tmp_path, rows))
    points, left_out = grid_points(feasible(proteins, "aminoaseed", "crop=64", capacity=2**19))
    pairs = [(2**size, 2 ** (19 - size)) for size in range(8, 13)]
    for quantizer in ("reparameterized", "plain"):
        found = [(p["num_codes"], p["code_dim"]) for p in points if p["quantizer"] == quantizer]
        assert sorted(found) == pairs
    assert (len(points), left_out) == (10, [])


def test_at_a_fixed_rate_codes_times_their_bits_are_that_rate(reader):
    bits = 64.0
    points, left_out = grid_points(feasible(reader, "plain_vq", "patch=choice:1,2,4,8", bits=bits))
    for point in points:
        codes = (SIDE // point["patch"]) ** 2
        assert codes * math.log2(point["num_codes"]) == pytest.approx(bits, rel=0.01)
    assert [point["patch"] for point in points] == [1, 2]
    assert "65536 is more than" in left_out[0][1]
    assert "are 64 bits a code" in left_out[1][1]


@pytest.mark.parametrize("key", ["num_codes", "code_dim"])
def test_a_limit_and_what_follows_from_it_are_not_both_fixed(reader, key):
    words = ("estimator=choice:rotate,straight_through", "num_codes=4", "code_dim=8")
    with pytest.raises(Refused, match=r"num_codes follows from --capacity 64; leave num_codes"):
        feasible(reader, "rotation_trick", *words, capacity=64)


def test_more_codes_than_vectors_are_refused_with_both_numbers(reader):
    rows, vectors = reader.rows("train"), (SIDE // 2) ** 2
    with pytest.raises(Refused, match=rf"num_codes=4096 is more than the {rows * vectors} vectors .*{rows} rows x 16"):
        grid_points(feasible(reader, "plain_vq", "num_codes=choice:4096,8192", "patch=2"))
    points, left_out = grid_points(feasible(reader, "plain_vq", "num_codes=choice:8,4096", "patch=2"))
    assert (points, left_out[0][0]) == ([{"num_codes": 8}], {"num_codes": 4096})


def test_an_impossible_space_says_why(reader):
    with pytest.raises(Refused, match=r"no point of the search space can be trained: patches of 3 x 3 do not tile"):
        grid_points(feasible(reader, "plain_vq", "patch=choice:3,5", "num_codes=4"))
    with pytest.raises(Refused, match=r"batch of 4 rows cannot be shared by 8 workers"):
        grid_points(feasible(reader, "plain_vq", "num_codes=choice:4,8", "batch_size=4", workers=8))
    with pytest.raises(Refused, match=r"7 numbers cannot be shared by code_dim 2; choose a divisor"):
        grid_points(feasible(reader, "rotation_trick", "code_dim=2..4", capacity=7))


@pytest.mark.parametrize("make", [lambda f: Random(f, 3), lambda f: Adaptive(f, 3, ["min", "min"])])
def test_samplers_find_every_feasible_point_once_and_then_end(reader, make):
    space = feasible(reader, "plain_vq", "patch=choice:1,2,3,4", "num_codes=choice:4,8,4096")
    possible, _ = grid_points(space)
    sampler = make(space)
    found = [sampler.propose(index) for index in range(len(possible))]
    assert sorted(map(str, found)) == sorted(map(str, possible))
    assert sampler.propose(len(possible)) is None


@pytest.mark.parametrize("make", [lambda f: Random(f, 3), lambda f: Adaptive(f, 3, ["min"])])
def test_a_sampler_that_is_made_again_goes_on_as_if_it_had_not_been(reader, make):
    space = feasible(reader, "rotation_trick", "num_codes=4..64", "learning_rate=1e-4..1e-2:log")

    def score(point):
        return [(point["num_codes"] - 20) ** 2 + abs(math.log10(point["learning_rate"]) + 3)]

    whole, points = make(space), []
    for index in range(14):
        points.append(whole.propose(index))
        whole.tell(index, score(points[-1]))
    for cut in (1, 12):
        again = make(space)
        for index in range(cut):
            again.restore(index, points[index])
        for index in range(cut):
            again.tell(index, score(points[index]))
        assert again.propose(cut) == points[cut]


def test_the_adaptive_sampler_learns(reader):
    """Of 40 points, those after the first 10 come nearer to the optimum than chance does."""
    space = feasible(reader, "rotation_trick", "num_codes=4..200", "learning_rate=1e-4..1e-2:log")

    def loss(point):
        return abs(point["num_codes"] - 150) / 200 + abs(math.log10(point["learning_rate"]) + 3.5)

    def mean_of(sampler):
        seen = []
        for index in range(40):
            seen.append(loss(sampler.propose(index)))
            sampler.tell(index, [seen[-1]])
        return sum(seen[20:]) / 20

    assert mean_of(Adaptive(space, 0, ["min"])) < 0.7 * mean_of(Random(space, 0))
