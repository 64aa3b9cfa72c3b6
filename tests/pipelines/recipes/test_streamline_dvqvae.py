"""The streamline DVQ-VAE: its five bottlenecks, chunks drawn anew, millimetres, and the order its paper reports."""

from pathlib import Path

import pytest
import torch

from pipelines import loop
from pipelines.errors import Failed, Refused
from pipelines.evaluate import measure
from pipelines.feed import Feed
from pipelines.recipe import Batch, Share
from pipelines.recipes import _bundle_scores as scores
from pipelines.recipes import streamline_dvqvae as dvqvae
from pipelines.recipes.streamline_dvqvae import BundleAutoencoder, StreamlineSettings
from pipelines.shards import ShardReader
from pipelines.trained import Trained
from tests.pipelines.bundle_shards import CHUNK, POINTS, make_bundle_shards
from tests.pipelines.loops import TINY, run_workers, spec_of, state_of
from vqcore import polylines

NAME = "streamline_dvqvae"
BOTTLENECKS = ("ae", "vae", "vq", "vq_ema", "gumbel")
CPU = torch.device("cpu")
RUN = {"steps": 6, "double": True, "checkpoint_every": 6}
FORMS: dict[str, dict] = {
    **{one: {"bottleneck": one, **({"chunk": CHUNK} if one in ("vae", "gumbel") else {})} for one in BOTTLENECKS},
    # Train rows of 5 and 4 streamlines are filled up.
    "vq with repeats": {"bottleneck": "vq", "chunk": 8},
    "set": {"network": "set", "chunk": CHUNK},
    "set of hard codes": {"network": "set", "bottleneck": "vq", "revive_below": 0.1, "chunk": 8},
}
COLUMNS = {"points": [CHUNK, POINTS, 3], "real": [CHUNK]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_bundle_shards(tmp_path_factory.mktemp("shards"))


def model_of(**changes) -> BundleAutoencoder:
    given = {**TINY[NAME], **changes}
    torch.manual_seed(0)
    return BundleAutoencoder(dvqvae.resolve(StreamlineSettings(**given), COLUMNS))


def batch(rows: int = 3, held: int = CHUNK, row: int = 0) -> Batch:
    """Rows with `held` real streamlines each, the rest repeats."""
    drawn = torch.Generator().manual_seed(row)
    points = torch.randn(rows, held, POINTS, 3, generator=drawn).cumsum(2)
    filled = points[:, torch.arange(CHUNK) % held]
    real = (torch.arange(CHUNK) < held).expand(rows, -1)
    return Batch({"points": filled, "real": real}, torch.ones(rows, dtype=torch.bool), torch.arange(row, row + rows))


@pytest.mark.parametrize(("bottleneck", "parameters"), [("ae", 662_083), ("vq", 694_851), ("gumbel", 694_851)])
def test_parameters_are_the_papers(bottleneck, parameters):
    settings = dvqvae.resolve(StreamlineSettings(bottleneck=bottleneck), {"points": [64, 64, 3], "real": [64]})
    model = BundleAutoencoder(settings)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.grid == (16, 16)


@pytest.mark.parametrize(("bottleneck", "spread"), [("gumbel", 3.0), ("vq_ema", 1.0), ("vq", 1 / 16 / 3**0.5)])
def test_first_codes_are_the_sources_and_follow_the_runs_seed(bottleneck, spread):
    def codes(seed):
        torch.manual_seed(seed)
        given = {**TINY[NAME], "bottleneck": bottleneck, "init_std": 3.0, "num_codes": 16, "code_dim": 64}
        return BundleAutoencoder(
            dvqvae.resolve(StreamlineSettings(**given), COLUMNS)
        ).quantizer.codebook.vectors.detach()

    assert codes(0).std().item() == pytest.approx(spread, rel=0.1)
    assert torch.equal(codes(0), codes(0))
    assert not torch.equal(codes(0), codes(1))


def test_the_loss_is_the_squared_error_of_real_streamlines_and_with_gumbel_nothing_else():
    model = model_of(chunk=CHUNK).train()
    some = batch(held=5)
    share = Share(1, dvqvae.counts(model, some))
    assert share.totals == {"rows": 3, "streamlines": 15, "vectors": 3 * 2 * POINTS // 4}
    found = dvqvae.train_losses(model, some, share)
    with torch.no_grad():
        # The quantizer's noise follows from the step, which its forward has counted: counted back to draw it again.
        model.quantizer.codebook.step -= 1
        points, real = model.drawn(some, share)
        z = model.latents(points, real)
        mixed = model.filled(z, model.quantizer(z, model.places(real), model.keys(some.keys)).vectors, real)
        error = (model.render(mixed, real) - points)[real].square().mean()
    torch.testing.assert_close(found.groups["model"].detach().float(), error)
    found.groups["model"].backward()
    codes = model.quantizer.codebook.vectors.grad
    assert (codes.abs().sum(1) > 0).all(), "no code is without a gradient"


def test_repeats_are_in_no_metric_and_no_count():
    model = model_of(chunk=CHUNK).eval()
    some = batch(held=4)
    with torch.no_grad():
        found = dvqvae.measure(model, some).sums
    assert found["streamlines"] == 12
    points = model.scaled(some.columns["points"])
    codes = dvqvae.measure(model, some).codes
    assert codes.shape == (3, 1, CHUNK // 4, POINTS // 4)
    assert (codes[:, :, 0] >= 0).all()
    assert (codes[:, :, 1:] == -1).all(), "a position with repeats alone is not counted"
    assert (dvqvae.encode(model, some) >= 0).all(), "but it is stored: the decoder needs it"
    with torch.no_grad():
        # Without a mask repeats are quantized as all else is.
        made = model.render(model.quantizer(model.latents(points, some.columns["real"])).vectors, some.columns["real"])
    expected = [polylines.bundle_adjacency(points[n, :4], made[n, :4], 0.05) for n in range(3)]
    assert found["buan"].item() == pytest.approx(sum(expected))
    assert found["mdf"].item() == pytest.approx(polylines.mdf(made[:, :4], points[:, :4]).sum().item(), rel=1e-5)


def test_a_row_that_is_one_chunk_is_put_in_another_order_each_step():
    model, some = model_of(chunk=CHUNK), batch(rows=1)
    own = model.scaled(some.columns["points"][0])
    drawn = [model.drawn(some, Share(1, {}, step=step))[0][0] for step in range(3)]
    orders = [[(own == line).flatten(1).all(1).nonzero().item() for line in points] for points in drawn]
    assert all(sorted(order) == list(range(CHUNK)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("held", [1, 3, 4, CHUNK])
def test_chunks_are_drawn_anew_each_step_from_the_rows_own_streamlines(held):
    model = model_of(chunk=4)
    some = batch(held=held)
    seen = []
    for step in range(8):
        points, real = model.drawn(some, Share(1, {}, step=step))
        assert real.sum(1).tolist() == [min(4, held)] * 3
        names = []
        for row in range(3):
            own = model.scaled(some.columns["points"][row, :held])
            places = [(own == line).flatten(1).all(1).nonzero().item() for line in points[row]]
            assert len(set(places[: min(4, held)])) == min(4, held), "no real streamline twice"
            names.append(tuple(places))
        seen.append(tuple(names))
        again, _ = model.drawn(batch(held=held), Share(1, {}, step=step))
        assert torch.equal(again, points)
    assert len(set(seen)) >= (6 if held > 1 else 1)
    other, _ = model.drawn(some, Share(1, {}, step=0, seed=1))
    assert held == 1 or not torch.equal(other, model.drawn(some, Share(1, {}, step=0))[0])


def test_training_tells_the_recipe_its_step_and_seed(shards, tmp_path, monkeypatch):
    seen = []
    plain = BundleAutoencoder.drawn
    monkeypatch.setattr(
        BundleAutoencoder,
        "drawn",
        lambda self, batch, share: seen.append((share.step, share.seed)) or plain(self, batch, share),
    )
    loop.train(spec_of(NAME, shards, tmp_path, steps=3, seed=5), Feed(ShardReader(shards)), CPU, lambda _: None)
    assert seen == [(0, 5), (1, 5), (2, 5)]


def test_a_row_draws_alike_wherever_it_lies():
    model = model_of(chunk=4)
    some = batch(rows=4)
    points, _ = model.drawn(some, Share(1, {}, step=3))
    last = Batch({name: column[2:] for name, column in some.columns.items()}, some.mask[2:], some.keys[2:])
    assert torch.equal(model.drawn(last, Share(2, {}, step=3))[0], points[2:])


def test_the_scale_is_one_for_all_axes_fitted_on_real_train_streamlines_and_inverted_by_decoding(shards, tmp_path):
    spec = spec_of(NAME, shards, tmp_path, steps=2)
    model, _ = loop.train(spec, Feed(ShardReader(shards)), CPU, lambda _: None)
    reader = ShardReader(shards)
    values = reader.values("train", range(reader.rows("train")), ["points", "real"])
    real = values["points"][values["real"].astype(bool)]
    assert model.extent.tolist() == [pytest.approx(real.min()), pytest.approx(real.max())]
    scaled = model.scaled(torch.from_numpy(real))
    assert (float(scaled.min()), float(scaled.max())) == (-1, 1)
    torch.testing.assert_close(model.millimetres(scaled), torch.from_numpy(real), rtol=0, atol=1e-4)
    assert dvqvae.fitted(model) == {"lowest_mm": float(real.min()), "highest_mm": float(real.max())}
    some = batch()
    with torch.no_grad():
        decoded = dvqvae.decode(model.eval(), dvqvae.encode(model.eval(), some))
    assert decoded["points"].shape == some.columns["points"].shape
    assert float(decoded["points"].abs().mean()) > 1, "millimetres, not [-1, 1]"


def test_a_chunk_without_a_streamline_has_no_codes_and_decodes_to_none():
    model = model_of(chunk=4).eval()
    codes = dvqvae.encode(model, batch(held=3))
    assert (codes[:, 0] >= 0).all()
    assert (codes[:, 1:] == -1).all()
    assert dvqvae.decode(model, codes)["real"].tolist() == [[True] * 4 + [False] * (CHUNK - 4)] * 3


def test_no_rows_decode_to_none():
    model = model_of().eval()
    none = dvqvae.decode(model, torch.full((0, model.chunks, *model.grid), -1))
    assert none["points"].shape == (0, CHUNK, POINTS, 3)
    assert none["real"].shape == (0, CHUNK)


def test_rows_without_extent_are_an_error():
    model = model_of()
    with pytest.raises(Failed, match="no train row holds a finite streamline"):
        dvqvae.seed(model, [])
    still = Batch(
        {"points": torch.ones(2, CHUNK, POINTS, 3), "real": torch.ones(2, CHUNK, dtype=torch.bool)},
        torch.ones(2, dtype=torch.bool), torch.arange(2),
    )  # fmt: skip
    with pytest.raises(Failed, match="are 1 mm"):
        dvqvae.seed(model, [still])


def test_noise_in_evaluation_is_a_setting():
    some = batch()
    plain, noisy = (model_of(chunk=CHUNK, noise_in_eval=yes).eval() for yes in (False, True))
    sums = [dvqvae.measure(model, some).sums["error"] for model in (plain, plain, noisy)]
    assert sums[0] == sums[1] != sums[2]


def test_the_network_sees_order_and_direction():
    """A silent sort or canonical direction would be something else than the paper's."""
    model = model_of(chunk=CHUNK).eval()
    some = batch(rows=1)
    points = some.columns["points"]
    order = torch.randperm(CHUNK, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, shuffled, turned = (
            model.latents(model.scaled(p), some.columns["real"]) for p in (points, points[:, order], points.flip(2))
        )
    assert not torch.allclose(plain, shuffled)
    assert not torch.allclose(plain, turned)


def test_to_the_set_network_streamlines_have_no_order_and_repeats_are_nothing():
    model = model_of(network="set", chunk=CHUNK).eval()
    some = batch(rows=2, held=5)
    points, real = some.columns["points"].clone(), some.columns["real"]
    order = torch.randperm(CHUNK, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        codes = dvqvae.encode(model, some)
        other = Batch({"points": points[:, order], "real": real[:, order]}, some.mask, some.keys)
        assert torch.equal(dvqvae.encode(model, other), codes[:, :, order])
        points[:, 5:] = 1e3
        assert torch.equal(dvqvae.encode(model, Batch({"points": points, "real": real}, some.mask, some.keys)), codes)
        decoded, shuffled = dvqvae.decode(model, codes), dvqvae.decode(model, codes[:, :, order])
    assert (codes[:, 0, :5] >= 0).all()
    assert (codes[:, 0, 5:] == -1).all()
    assert torch.equal(decoded["real"], real)
    assert torch.equal(shuffled["real"], real[:, order])
    torch.testing.assert_close(shuffled["points"], decoded["points"][:, order])
    alone = Batch({name: column[:1] for name, column in some.columns.items()}, some.mask[:1], some.keys[:1])
    assert torch.equal(dvqvae.encode(model, alone), codes[:1])


@pytest.mark.parametrize("network", ["grid", "set"])
def test_metrics_are_those_of_what_decoding_gives(network):
    """Hard codes: evaluation is encode, decode, compare; and each of 12 streamlines costs what its positions do."""
    model = model_of(bottleneck="vq", network=network, num_codes=8).eval()
    some = batch(held=4)
    with torch.no_grad():
        found = scores.summarise(dvqvae.measure(model, some).sums)
        decoded = dvqvae.decode(model, dvqvae.encode(model, some))
    real = some.columns["real"]
    apart = (decoded["points"] - some.columns["points"])[real]
    assert found["rmse_mm"] == pytest.approx(float(apart.square().mean().sqrt()), rel=1e-4)
    assert found["rmse_mm_of_codes"] == pytest.approx(found["rmse_mm"])
    # Four positions (of 4 points) for four streamlines, or one (of 16 points) for each.
    assert found["bits"] == found["bits_of_codes"] == 3


@pytest.mark.parametrize(("bottleneck", "bits"), [("ae", 32 * 4 * 4), ("gumbel", 32 * 4 * 4), ("vae", 32 * 20 / 4)])
def test_bits_are_of_what_the_decoder_is_given(bottleneck, bits):
    """16 positions of four numbers for four streamlines, or 20 numbers."""
    model = model_of(bottleneck=bottleneck, chunk=CHUNK, code_dim=4).eval()
    with torch.no_grad():
        assert scores.summarise(dvqvae.measure(model, batch(held=4)).sums)["bits"] == bits


@pytest.mark.parametrize(("network", "bits"), [("grid", 16 * 3 / 5), ("set", 3)])
def test_bits_of_codes_are_those_of_all_that_are_stored(network, bits):
    model = model_of(network=network, chunk=CHUNK, num_codes=8).eval()
    some = batch(held=5)
    with torch.no_grad():
        found = scores.summarise(dvqvae.measure(model, some).sums)["bits_of_codes"]
    assert found == pytest.approx(bits)
    assert found == pytest.approx(int((dvqvae.encode(model, some) >= 0).sum()) * 3 / 15)


@pytest.mark.parametrize("bottleneck", ["vq", "vq_ema", "gumbel", "ae"])
def test_the_encoder_learns_of_repeats_too(bottleneck):
    """They are seen beside real streamlines, so the error of these says something of them."""
    model = model_of(bottleneck=bottleneck, chunk=CHUNK)
    some = batch(held=5)
    points, real = model.all_chunks(some)
    z = model.latents(points, real).detach().requires_grad_()
    made = model.render(dvqvae._through(model, z, real, some.keys), real)
    (made - points)[real].square().sum().backward()
    repeats = ~model.places(real)
    assert (z.grad[repeats].abs().sum(-1) > 0).any()


@pytest.fixture(scope="module")
def two(shards, tmp_path_factory) -> Path:
    """Each form trained by two workers."""
    home = tmp_path_factory.mktemp("two")
    run_workers(2, home, {one: spec_of(NAME, shards, home / one, **RUN, **FORMS[one]) for one in FORMS})
    return home


@pytest.mark.parametrize("form", FORMS)
def test_two_workers_reach_the_model_of_one(two, shards, tmp_path, form):
    spec = spec_of(NAME, shards, tmp_path, **RUN, **FORMS[form])
    model, _ = loop.train(spec, Feed(ShardReader(shards)), CPU, lambda _: None)
    first, second = (state_of(two, form, rank, 2) for rank in range(2))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-9, msg=name)
        assert torch.equal(first[name], second[name]), name


def test_bare_codes_lose_what_the_mixture_keeps_and_hard_codes_lose_nothing(shards, tmp_path):
    """Also learns: half of the error of a model that says the mean."""
    reader, found = ShardReader(shards), {}
    for one in ("ae", "gumbel", "vq_ema"):
        changes = {"bottleneck": one, "chunk": CHUNK, "num_codes": 32, "width": 16, "steps": 80, "learning_rate": 5e-3}
        spec = spec_of(NAME, shards, tmp_path / one, **changes, checkpoint_every=80)
        model, _ = loop.train(spec, Feed(reader), CPU, lambda _: None)
        settings = StreamlineSettings.model_validate(spec.settings)
        found[one] = measure(Trained(dvqvae.recipe, settings, model.eval(), {}, ""), reader, "test")
    values = reader.values("test", range(reader.rows("test")), ["points", "real"])
    points = model.scaled(torch.from_numpy(values["points"][values["real"].astype(bool)]))
    spread = float((points - points.flatten(0, 1).mean(0)).square().mean())
    assert all(one["mse"] < spread / 2 for one in found.values())
    assert found["gumbel"]["mse_of_codes"] > 1.2 * found["gumbel"]["mse"]
    assert found["vq_ema"]["mse_of_codes"] == pytest.approx(found["vq_ema"]["mse"], rel=1e-5)
    assert found["ae"].keys() == {"rows", "mse", "rmse_mm", "mdf_mm", "buan", "bits"}
    to_mm = float(model.extent[1] - model.extent[0]) / 2
    assert found["vq_ema"]["rmse_mm"] == pytest.approx(found["vq_ema"]["mse"] ** 0.5 * to_mm, rel=1e-5)


@pytest.mark.parametrize("bottleneck", ["ae", "vae"])
def test_what_has_no_codebook_encodes_nothing(bottleneck):
    model = model_of(**FORMS[bottleneck])
    assert dvqvae.codebooks(model.settings) == []
    with pytest.raises(Failed, match=f"bottleneck={bottleneck} has no codes"):
        dvqvae.encode(model, batch())


@pytest.mark.parametrize(
    ("settings", "columns", "said"),
    [
        ({}, {"points": [64, 3]}, "ingest with --set rows=chunks"),
        ({"chunk": 64}, {"points": [96, 64, 3]}, "chunk=64 does not divide the 96 streamlines"),
        ({}, {"points": [64, 50, 3]}, "num_points=50 is no multiple of 4, .* num_points=48 or 52"),
        ({"network": "set"}, {"points": [64, 40, 3]}, "num_points=40 is no multiple of 16, .* num_points=32 or 48"),
        ({"network": "set", "bottleneck": "vae"}, {"points": [64, 64, 3]}, "keeps no order .* give network=grid"),
        (
            {"bottleneck": "vae", "chunk": 8},
            {"points": [64, 64, 3]},
            "chunk=8 is no multiple of 16, .* train with --set chunk=16",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_those_that_do(settings, columns, said):
    with pytest.raises(Refused, match=said):
        dvqvae.resolve(StreamlineSettings(**settings), columns)
