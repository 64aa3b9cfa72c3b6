"""The report on bundles: its numbers against what can be worked out, and that nothing is learned from test rows."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines.errors import Refused
from pipelines.recipe import ReportJob
from pipelines.recipes import _bundle_probes as probes
from pipelines.recipes import _bundle_report as reports
from pipelines.recipes import _bundle_scores as scores
from pipelines.recipes import streamline_dvqvae as dvqvae
from pipelines.recipes._bundle_model import Chunk
from pipelines.recipes.streamline_dvqvae import BundleAutoencoder, StreamlineSettings
from pipelines.shards import ShardReader
from tests.pipelines.bundle_shards import BUNDLES, CHUNK, POINTS, make_bundle_shards
from tests.pipelines.loops import TINY
from vqcore import polylines

NAME = "streamline_dvqvae"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_bundle_shards(tmp_path_factory.mktemp("shards"))


def model_of(**changes) -> BundleAutoencoder:
    torch.manual_seed(0)
    settings = StreamlineSettings(**{**TINY[NAME], **changes})
    model = BundleAutoencoder(dvqvae.resolve(settings, {"points": [CHUNK, POINTS, 3], "real": [CHUNK]})).eval()
    model.extent.copy_(torch.tensor([-60.0, 100.0]))
    return model


def job_of(shards: str, out: Path, split: str = "test", **settings) -> ReportJob:
    opened = SimpleNamespace(digest="d" * 64, recipe=SimpleNamespace(name=NAME))
    given = reports.BundleReportSettings(**settings)
    return ReportJob(opened, out, ShardReader(shards), split, given, str(out))


@pytest.mark.parametrize(("bottleneck", "network"), [("gumbel", "grid"), ("gumbel", "set"), ("ae", "grid")])
def test_every_question_is_answered_on_the_split_asked_for(shards, tmp_path, bottleneck, network):
    job, model = job_of(shards, tmp_path), model_of(bottleneck=bottleneck, network=network)
    numbers = reports.write(job, dvqvae.bundle_model(model))
    told = json.loads((tmp_path / "bundles.json").read_text())
    *each, whole = told["bundles"]
    assert [row["streamlines"] for row in each] == list(BUNDLES)
    assert whole["streamlines"] == sum(BUNDLES)
    assert whole["chunks"] == sum(-(-count // 4) for count in BUNDLES)
    found = scores.summarise(_measured(model, shards))
    for name in ("buan", "mdf_mm", "rmse_mm"):
        assert numbers[name] == pytest.approx(found[name], rel=1e-5)
    assert ("buan_of_codes" in numbers) == (bottleneck == "gumbel")
    assert [row["draws"] for row in told["rate"]] == ([1, 4, 16, 64, 256] if bottleneck == "gumbel" else [])
    assert told["shift"][4]["moved"] < 1e-6
    assert told["shift"][0]["moved"] > 0
    page = (tmp_path / "bundles.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "img-src data:" in page
    assert (tmp_path / "bundles.png").read_bytes()[:4] == b"\x89PNG"


def _measured(model: BundleAutoencoder, shards: str) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    from pipelines.encode import seen_batches

    for shard in range(2):
        for batch, _, _ in seen_batches(ShardReader(shards), shard, "test"):
            with torch.inference_mode():
                for name, value in dvqvae.measure(model, batch).sums.items():
                    sums[name] = sums.get(name, torch.zeros(())) + value
    return sums


def chunk(label: int, code: int, offset: float = 0.0) -> Chunk:
    """Streamlines along x at a height of the label, all of one code."""
    points = torch.zeros(4, POINTS, 3)
    points[..., 0] = torch.linspace(0, 1, POINTS)
    points[..., 2] = label + 0.01 * torch.arange(4).unsqueeze(1) + offset
    codes = torch.full((1, 4), code)
    return Chunk(
        label, points, torch.ones(4, dtype=torch.bool), torch.full((1, 4, 2), float(code)), points,
        torch.ones(1, 4, dtype=torch.bool), codes, points,
    )  # fmt: skip


def test_bundles_are_recognised_by_what_train_chunks_say_and_by_nothing_else():
    train = [chunk(label, label) for label in (1, 2, 3)] * 2
    found = probes.recognition(train, [chunk(label, label) for label in (3, 1, 2)], 8)
    assert found["accuracy"]["codes_1nn"] == found["accuracy"]["codes_linear"] == found["accuracy"]["points_1nn"] == 1
    # The codes of the train chunks say another bundle than the points do.
    swapped = [chunk(label, label % 3 + 1) for label in (1, 2, 3)]
    found = probes.recognition(train, swapped, 8)["accuracy"]
    assert found["codes_1nn"] == found["codes_linear"] == 0
    assert found["points_1nn"] == 1
    assert found["chance"] == pytest.approx(1 / 3)
    unknown = probes.recognition(train, [chunk(7, 7), chunk(1, 1)], 8)
    assert (unknown["chunks"], unknown["of_bundles_without_train_chunks"]) == (1, 1)


def test_new_chunks_are_judged_by_the_nearest_train_chunk_of_their_bundle():
    train = [chunk(1, 0), chunk(1, 1, 0.5), chunk(2, 2)]
    test = [chunk(1, 1, 0.5), chunk(1, 0), chunk(2, 2)]
    decoder = SimpleNamespace(
        apart=False, num_codes=3, look_up=lambda codes: codes.unsqueeze(-1).double(), render=_render, coded_lines=EVERY
    )
    found = probes.synthesis(train, test, decoder, 2, seed=0)
    assert found["real"] == {"chunks": 3, "buan": 1, "length_off": pytest.approx(0), "bending_off": pytest.approx(0)}
    assert found["interpolated"]["chunks"] == 3
    # Halfway between two heights there is no streamline; halfway between two chunks that are one there are all.
    assert found["interpolated"]["buan"] == pytest.approx(1 / 3)
    assert found["drawn"]["chunks"] == 4
    assert 0 < found["drawn"]["buan"] <= 1


def EVERY(codes: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(codes), 4, dtype=torch.bool)


def _render(latents: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The chunk whose code the mean of the latents is: heights are 1, 1.5 and 2."""
    code = latents.mean().item()
    return chunk(1, 0, 0.5 * code).points.unsqueeze(0)


def test_drawn_codes_stand_where_train_chunks_have_them_and_follow_from_the_seed():
    some = [chunk(1, code) for code in range(5)]
    drawn = [probes._drawn(some, seed) for seed in range(20)]
    assert torch.equal(drawn[3], probes._drawn(some, 3))
    assert set(torch.stack(drawn).unique().tolist()) == set(range(5))
    assert any(len(one.unique()) > 1 for one in drawn), "each position for itself"


def test_no_code_is_drawn_where_no_chunk_has_one():
    some = [chunk(1, code) for code in (3, 4, 5)]
    for one in some[:2]:
        one.codes[0, 2] = -1
    for one in some:
        one.codes[0, 3] = -1
    for seed in range(20):
        assert probes._drawn(some, seed)[0, 2:].tolist() == [5, -1]


def test_streamlines_with_latents_of_their_own_are_drawn_whole_and_met_halfway_by_the_nearest():
    some = [replace(chunk(1, code), codes=torch.full((4, 3), code)) for code in range(5)]
    drawn = [probes._drawn(some, seed, apart=True) for seed in range(9)]
    assert all((lines == lines[:, :1]).all() for lines in drawn)
    assert any(len(lines.unique()) > 1 for lines in drawn)
    one = replace(chunk(1, 0), latents=torch.arange(4.0).view(4, 1, 1))
    other = replace(one, points=one.points.flip(0), latents=10 * one.latents.flip(0), real=torch.arange(4) > 0)
    latents, real = probes._halfway(one, other, apart=True)
    assert latents.flatten().tolist() == [0, 5.5, 11, (3 + 20) / 2], "the last one's own is not real"
    assert torch.equal(real, one.real)


def test_a_mixture_told_by_one_code_is_its_nearest_and_by_many_it_is_itself(shards):
    model = model_of(temperature=3.0, num_codes=8, chunk=CHUNK)
    told = dvqvae.bundle_model(model)
    found = list(reports.chunks_of(ShardReader(shards), "test", told))
    rows = scores.rate(found, told.apportioned, told, 80.0)
    coded = scores.of_pairs([(one.lines, one.of_codes[one.real]) for one in found], 80.0)
    assert rows[0] == {"draws": 1, "bits": rows[0]["bits"], **{k: pytest.approx(v, rel=1e-5) for k, v in coded.items()}}
    one = found[0]
    with torch.inference_mode():
        many, few = (told.apportioned(one.points[None], one.real[None], draws)[0][one.places] for draws in (1 << 14, 4))
    mixed = one.latents[one.places]
    assert (many - mixed).abs().max() < 1e-3 < (few - mixed).abs().max()
    assert any(int(one.places.sum()) < one.places.numel() for one in found)
    positions = sum(one.places.numel() for one in found) / sum(len(one.lines) for one in found)
    assert rows[0]["bits"] == pytest.approx(positions * 3)
    # Four codes of eight without an order: C(11, 4) = 330 ways.
    assert rows[1]["bits"] == pytest.approx(positions * math.log2(330))


def test_a_shift_of_what_does_not_listen_moves_nothing():
    model = SimpleNamespace(render=lambda latents, real: chunk(1, 0).points.unsqueeze(0))
    rows = reports.shifted([chunk(1, 0)], model)
    assert [row["alpha"] for row in rows] == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]
    assert {row["moved"] for row in rows} == {0}
    assert rows[0]["bending"] == pytest.approx(float(polylines.bending(chunk(1, 0).points).mean()))


@pytest.mark.parametrize("split", ["train", "all"])
def test_rows_that_probes_learned_from_are_refused(split, shards, tmp_path):
    with pytest.raises(Refused, match=f"split={split} was given"):
        reports.refuse(job_of(shards, tmp_path, split=split))
    reports.refuse(job_of(shards, tmp_path))
