"""CLVQ-VAE: its dossier's checks of the recipe (those of the quantizer and of seeding lie with them), and its data."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines import evaluate, loop, recipe, trained
from pipelines.errors import Refused
from pipelines.feed import Feed, grouped_batches
from pipelines.recipe import Batch, Grouping, Share
from pipelines.recipes import clvq_vae
from pipelines.recipes.clvq_vae import AdaptiveResidual, ConceptSettings, CrossLayer
from pipelines.shards import ShardReader
from tests.contracts import kinds
from tests.pipelines.activation_shards import make_activation_shards
from tests.pipelines.loops import run_workers, spec_of, state_of

CPU = torch.device("cpu")
NAME = "clvq_vae"
WIDTH, T = kinds.WIDTH, 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_activation_shards(tmp_path_factory.mktemp("activations"))


def model_of(**changes) -> CrossLayer:
    settings = ConceptSettings(
        **{"num_codes": 10, "sequence": T, "decoder_layers": 1, "heads": 2, "feedforward": 16, **changes}
    )
    torch.manual_seed(0)
    model = CrossLayer(clvq_vae.resolve(settings, kinds.SHAPES["activations"]))
    model.quantizer.codebook.set_vectors(torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def test_the_encoder_starts_as_the_stated_mixture():
    encoder = AdaptiveResidual(WIDTH, None, "identity")
    x = torch.randn(5, WIDTH)
    mix = 0.5 / (1 + math.exp(-0.2))
    assert mix == pytest.approx(0.275, abs=1e-3)
    expected = (1 - mix) * x + mix * nn.functional.layer_norm(x, (WIDTH,))
    torch.testing.assert_close(encoder(x), expected)


@pytest.mark.parametrize("alpha", [-30.0, 0.0, 30.0])
def test_the_mixture_stays_between_nothing_and_a_half(alpha):
    encoder = AdaptiveResidual(WIDTH, None, "identity")
    nn.init.constant_(encoder.alpha, alpha)
    assert 0 <= float(encoder.mix.detach()) <= 0.5


def test_a_fixed_mixture_has_no_parameter():
    encoder = AdaptiveResidual(WIDTH, 0.6, "default")
    assert encoder.mix == pytest.approx(0.3)
    assert "alpha" not in dict(encoder.named_parameters())


def same_codes(model: CrossLayer) -> tuple[Batch, Batch]:
    """Two batches that differ, with the same code at every row."""
    batch = kinds.batch("activations", 2 * T)
    nudged = {name: column.clone() for name, column in batch.columns.items()}
    nudged["layer_1"] = nudged["layer_1"] + 0.002
    other = Batch(nudged, batch.mask, batch.keys)
    assert torch.equal(clvq_vae.encode(model, batch), clvq_vae.encode(model, other))
    return batch, other


@pytest.mark.parametrize(("memory", "slips_past"), [("source", True), ("strict", False)])
def test_in_the_strict_form_nothing_slips_past_the_codebook(memory, slips_past):
    """Equal codes decode to equal bits, whatever z_e was; in the source form they do not."""
    model = model_of(memory=memory)
    outs = []
    with torch.inference_mode():
        for batch in same_codes(model):
            z, mask, _ = model.latents(batch)
            outs.append(model.render(model.quantizer(z, mask).vectors, z, mask))
    assert torch.equal(*outs) is not slips_past


@pytest.mark.parametrize("memory", ["source", "strict"])
def test_rows_of_a_group_have_no_order(memory):
    model = model_of(memory=memory)
    batch = kinds.batch("activations", 2 * T)
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    with torch.inference_mode():
        z, mask, _ = model.latents(batch)
        out = model.render(model.quantizer(z, mask).vectors, z, mask)
        z = z[order]
        turned = model.render(model.quantizer(z, mask).vectors, z, mask)
    torch.testing.assert_close(turned, out[order])


def test_a_group_does_not_see_the_other():
    model = model_of()
    batch = kinds.batch("activations", 2 * T)
    with torch.inference_mode():
        z, mask, _ = model.latents(batch)
        both = model.render(model.quantizer(z, mask).vectors, z, mask)
        alone = model.render(model.quantizer(z[:T], mask[:T]).vectors, z[:T], mask[:T])
    torch.testing.assert_close(both[:T], alone)


def test_a_batch_without_a_valid_row_trains_nothing_and_is_no_nan():
    model = model_of().train()
    batch = kinds.batch("activations", T)
    batch.mask[:] = False
    before = model.quantizer.codebook.vectors.clone()
    found = clvq_vae.train_losses(model, batch, Share(1, {"rows": 0}))
    assert found.groups["model"].item() == 0
    gradients = torch.autograd.grad(found.groups["model"], list(model.parameters()), allow_unused=True)
    assert all(g is None or bool((g == 0).all()) for g in gradients)
    assert torch.equal(model.quantizer.codebook.vectors, before)


def test_the_loss_is_the_sources_over_valid_elements():
    """With argmin and the codebook at rest, from its definition: errors of both terms over rows x width."""
    model = model_of(top_k=1, dropout=0.0, decay=0.0, ema="standard").train()
    batch = kinds.batch("activations", 2 * T, masked=5)
    z, mask, _ = model.latents(batch)
    codes = model.quantizer.assign(z, mask)
    chosen = torch.where(mask[:, None], model.quantizer.codebook.vectors[codes], 0.0)
    with torch.inference_mode():
        out = model.render(chosen, z, mask)
    target = batch.columns["layer_2"].float()
    found = clvq_vae.train_losses(model, batch, Share(1, {"rows": 7}))
    reconstruction = (out - target)[mask].square().mean()
    commitment = (z - chosen)[mask].square().mean()
    expected = reconstruction + 0.1 * commitment.detach()
    torch.testing.assert_close(found.groups["model"].detach(), expected, check_dtype=False)
    torch.testing.assert_close(found.logs["reconstruction"], reconstruction, check_dtype=False)
    assert found.logs["nearest"] == pytest.approx(1)


def test_what_is_decayed_are_matrices_and_never_the_codebook():
    model = model_of()
    settings = model.settings.model_copy(update={"weight_decay": 0.5})
    made = clvq_vae.optimiser(settings, "model", recipe.all_parameters(model)["model"])
    decayed, rest = made.param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.5, 0.0)
    book = {id(p) for p in model.quantizer.parameters()}
    assert not book & {id(p) for group in made.param_groups for p in group["params"]}


def test_the_rate_rises_for_a_tenth_and_ends_at_nothing():
    settings = ConceptSettings(steps=100)
    factors = [clvq_vae.schedule(settings, step) for step in range(101)]
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[100] == pytest.approx(0, abs=1e-12)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_codes_start_as_directions_of_the_lower_layer_itself():
    """Of x, not of z_e: each as long as its cluster's rows are on average."""
    model = model_of(seeding="spherical", sequence=16)
    rows = kinds.columns("activations", 64)["layer_1"].float()
    batches = [Batch({"layer_1": rows, "layer_2": rows}, torch.ones(64, dtype=torch.bool), torch.arange(64))]
    said = clvq_vae.seed(model, batches)
    assert "64" in said
    codes = model.quantizer.codebook.vectors
    lengths = rows.norm(dim=1)
    assert float(codes.norm(dim=1).min()) >= float(lengths.min())
    assert float(codes.norm(dim=1).max()) <= float(lengths.max())
    unit = nn.functional.normalize(codes, dim=1)
    nearest = (nn.functional.normalize(rows, dim=1) @ unit.T).argmax(1)
    # Each direction is that of the mean of its own unit rows, up to what Lloyd has not yet moved.
    means = torch.stack([nn.functional.normalize(rows[nearest == k], dim=1).mean(0) for k in range(10)])
    assert float(nn.functional.cosine_similarity(means, unit).min()) > 0.97
    assert "codes by spherical" in said


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do():
    with pytest.raises(Refused, match=r"heads=3 .* width 8 .*: 1, 2, 4, 8"):
        clvq_vae.resolve(ConceptSettings(heads=3), kinds.SHAPES["activations"])


def test_a_single_layer_may_be_asked_for():
    found = clvq_vae.resolve(ConceptSettings(layer_in=1, layer_out=1), kinds.SHAPES["activations"])
    assert (found.layer_in, found.layer_out) == (1, 1)


def test_the_later_layer_first_is_refused():
    with pytest.raises(Refused, match="layer_in=2 lies above layer_out=1"):
        clvq_vae.resolve(ConceptSettings(layer_in=2, layer_out=1), kinds.SHAPES["activations"])


def test_fewer_rows_than_codes_is_an_error_that_names_both(shards, tmp_path):
    rows = ShardReader(shards).rows("train")
    spec = spec_of(NAME, shards, tmp_path / "run", steps=2, num_codes=rows + 1)
    with pytest.raises(ValueError, match=f"{rows} .*{rows + 1}"):
        loop.train(spec, Feed(ShardReader(shards)), CPU, lambda _: None)


FORMS = ("source", "strict")


@pytest.fixture(scope="module")
def two(shards, tmp_path_factory) -> Path:
    """Each form trained by two workers."""
    home = tmp_path_factory.mktemp("two")
    run_workers(2, home, {memory: spec_of(NAME, shards, home / memory, **RUN, memory=memory) for memory in FORMS})
    return home


RUN = {"steps": 20, "double": True, "checkpoint_every": 20}


@pytest.mark.parametrize("memory", FORMS)
def test_two_workers_reach_the_model_of_one(two, shards, tmp_path, memory):
    spec = spec_of(NAME, shards, tmp_path, **RUN, memory=memory)
    model, _ = loop.train(spec, Feed(ShardReader(shards)), CPU, lambda _: None)
    first, second = (state_of(two, memory, rank, 2) for rank in range(2))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-9, msg=name)
        assert torch.equal(first[name], second[name]), name


def test_training_learns_the_later_layer(shards, tmp_path):
    said: list[loop.Event] = []
    changes = {"steps": 150, "learning_rate": 1e-2, "log_every": 30, "checkpoint_every": 150}
    spec = spec_of(NAME, shards, tmp_path / "run", **changes)
    model, _ = loop.train(spec, Feed(ShardReader(shards)), CPU, said.append)
    first, *_, last = (event["metrics"]["train/reconstruction"] for event in said if event["kind"] == "metrics")
    assert last < 0.6 * first
    found = recipe.load(NAME)
    settings = found.Settings(**spec.settings)
    metrics = evaluate.measure(trained.Trained(found, settings, model.eval(), {}, ""), ShardReader(shards), "test")
    assert metrics["rows"] == ShardReader(shards).rows("test")
    assert metrics["explained"] > 0.3
    assert metrics["active_codes"] == round(metrics["usage"] * 12)
    assert -1 < metrics["code_cosine"] < 1


def test_a_row_that_is_not_finite_is_left_out_and_counted(tmp_path):
    shards = make_activation_shards(tmp_path / "shards", documents=20, broken=3)
    _, totals = loop.train(
        spec_of(NAME, shards, tmp_path / "run", steps=12, num_codes=4), Feed(ShardReader(shards)), CPU, lambda _: None
    )
    assert totals.non_finite_rows > 0
    assert totals.skipped_steps == 0
    assert totals.latest["train/reconstruction"] is not None


@pytest.mark.parametrize("rows", [3, 16, 1000])
def test_evaluation_sees_every_row_once_in_groups_of_one_document(shards, rows):
    reader = ShardReader(shards)
    seen: list[int] = []
    for shard in range(2):
        documents = {
            int(row): name
            for batch in reader.batches(shard, 64, "valid")
            for row, name in zip(batch.column("row_id").to_pylist(), batch.column("document").to_pylist(), strict=True)
        }
        for batch in grouped_batches(reader, shard, "valid", Grouping("document", T), rows):
            keys = batch.keys.tolist()
            seen += [key for key, valid in zip(keys, batch.mask.tolist(), strict=True) if valid]
            for first in range(0, len(keys), T):
                group = [
                    documents[key]
                    for key, valid in zip(keys[first : first + T], batch.mask[first : first + T], strict=True)
                    if valid
                ]
                assert len(set(group)) <= 1
    expected = [i for b in range(2) for rows_ in reader.batches(b, 64, "valid") for i in rows_.column(0).to_pylist()]
    assert sorted(seen) == sorted(expected)
