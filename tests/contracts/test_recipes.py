"""What every recipe owes the platform, found by name: a new one is tested here without a line being added."""

import pytest
import torch

from pipelines import corpora, recipe
from pipelines.errors import Refused
from pipelines.options import validated
from pipelines.recipe import Batch, Share
from vqcore.quantizers.contract import quantizers_in

IMAGE = [1, 16, 16]


def small(name: str):
    found = recipe.load(name)
    settings = validated(found.Settings, {**found.presets["small"], "batch_size": 4}, name)
    return found, found.resolve(settings, {"image": IMAGE})


def images(rows: int = 4, masked: int | None = None) -> Batch:
    pixels = torch.randint(0, 256, (rows, *IMAGE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = torch.ones(rows, dtype=torch.bool)
    if masked is not None:
        mask[masked] = False
    return Batch({"image": pixels, "label": torch.zeros(rows, dtype=torch.int32)}, mask, torch.arange(rows))


def seeded_model(name: str):
    found, settings = small(name)
    (stage, *_) = found.stages(settings)
    torch.manual_seed(0)
    model = stage.build(settings, None)
    for _, quantizer in quantizers_in(model):
        book = quantizer.codebook
        book.set_vectors(torch.randn(book.num_codes, book.code_dim, generator=torch.Generator().manual_seed(1)))
    return found, settings, stage, model


@pytest.mark.parametrize("name", recipe.names())
def test_recipe_says_what_it_is_and_names_what_exists(name):
    found = recipe.load(name)
    assert found.summary.endswith((".", "code."))
    assert {"paper", "small"} <= found.presets.keys()
    for preset in found.presets.values():
        validated(found.Settings, preset, name)
    assert set(found.corpus) <= set(corpora.names())
    assert found.space.keys() <= found.Settings.model_fields.keys()


@pytest.mark.parametrize("name", recipe.names())
def test_every_settings_field_that_a_user_sets_is_explained_or_plain(name):
    found, settings = small(name)
    assert found.Settings.model_validate(settings.model_dump(mode="json")) == settings
    assert all(k > 1 and d > 0 for k, d in found.codebooks(settings))


@pytest.mark.parametrize("name", recipe.names())
def test_decoding_codes_gives_what_evaluation_gives(name):
    found, _, _, model = seeded_model(name)
    model.eval()
    with torch.inference_mode():
        codes = found.encode(model, images())
        measured = found.measure(model, images())
        decoded = found.decode(model, codes)
    assert torch.equal(measured.codes, codes)
    assert decoded["image"].shape == (4, *IMAGE)
    assert decoded["image"].dtype == torch.uint8
    error = (decoded["image"] / 255.0 - images().columns["image"] / 255.0).double().square().sum() / 256
    assert measured.sums["pixel"].item() == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("name", recipe.names())
def test_a_masked_row_is_as_if_it_were_not_there(name):
    found, _, stage, model = seeded_model(name)
    model.eval()
    with torch.inference_mode():
        with_mask, without = found.measure(model, images(4, masked=3)), found.measure(model, images(3))
        shares = [Share(1, stage.counts(model, batch)) for batch in (images(4, masked=3), images(3))]
        pair = [
            stage.losses(model, b, s).groups["model"]
            for b, s in zip((images(4, masked=3), images(3)), shares, strict=True)
        ]
    assert (with_mask.codes[3] == -1).all()
    for key, value in without.sums.items():
        assert with_mask.sums[key].double().item() == pytest.approx(value.double().item(), rel=1e-5), key
    assert shares[0].totals == shares[1].totals
    assert pair[0].item() == pytest.approx(pair[1].item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", recipe.names())
def test_an_image_of_no_fixed_size_is_refused_with_what_to_do(name):
    found = recipe.load(name)
    with pytest.raises(Refused, match="size=64"):
        found.resolve(found.Settings(), {"image": None})


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(Refused, match="did you mean 'rotation_trick'"):
        recipe.load("rotation_trik")
    with pytest.raises(Refused, match="did you mean 'images'"):
        corpora.load("image")
