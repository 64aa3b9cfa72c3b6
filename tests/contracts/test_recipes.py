"""What every recipe owes the platform, found by name: a new one is tested here without a line being added."""

import pytest
import torch

from pipelines import corpora, recipe
from pipelines.errors import Refused
from pipelines.options import validated
from pipelines.recipe import Share
from tests.contracts import kinds
from vqcore.derived import DerivedCodebook
from vqcore.quantizers.contract import VectorBatch, quantizers_in

ROWS = 8


def small(name: str):
    found = recipe.load(name)
    (kind, *_) = found.corpus
    fewer = {key: value for key, value in kinds.SMALL[kind].items() if key in found.Settings.model_fields}
    settings = validated(found.Settings, {**found.presets["small"], **fewer, "batch_size": 4}, name)
    return found, found.resolve(settings, kinds.SHAPES[kind])


def seeded_model(name: str):
    found, settings = small(name)
    (stage, *_) = found.stages(settings)
    torch.manual_seed(0)
    model = stage.build(settings, None)
    for _, quantizer in quantizers_in(model):
        book = quantizer.codebook
        if isinstance(book, DerivedCodebook):
            if not quantizer.seeded:
                rows = torch.randn(2 * book.num_codes, book.code_dim, generator=torch.Generator().manual_seed(1))
                quantizer.seed([VectorBatch(rows, None, torch.arange(len(rows)))])
            continue
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
def test_evaluation_measures_the_codes_that_encode_gives_and_what_they_decode_to(name):
    found, _, _, model = seeded_model(name)
    (kind, *_) = found.corpus
    batch = kinds.batch(kind, ROWS)
    model.eval()
    with torch.inference_mode():
        codes = found.encode(model, batch)
        measured = found.measure(model, batch)
        decoded = found.decode(model, codes)
    assert torch.equal(measured.codes, codes)
    assert (codes >= 0).all()
    for column, values in decoded.items():
        assert values.shape == batch.columns[column].shape, column
        assert values.dtype == batch.columns[column].dtype, column
    if kind == "images":
        error = (decoded["image"] / 255.0 - batch.columns["image"] / 255.0).double().square().sum() / 256
        assert measured.sums["pixel"].item() == pytest.approx(error.item(), rel=1e-5)


def assert_same(name: str, one, other):
    """Two batches are the same to evaluation and to training."""
    found, _, stage, model = seeded_model(name)
    model.eval()
    with torch.inference_mode():
        measured = [found.measure(model, batch) for batch in (one, other)]
        shares = [Share(1, stage.counts(model, batch)) for batch in (one, other)]
        pair = [stage.losses(model, b, s).groups["model"].item() for b, s in zip((one, other), shares, strict=True)]
    for key, value in measured[1].sums.items():
        torch.testing.assert_close(measured[0].sums[key].double(), value.double(), rtol=1e-5, atol=1e-6, msg=key)
    assert shares[0].totals == shares[1].totals
    assert pair[0] == pytest.approx(pair[1], rel=1e-4, abs=1e-6)
    return measured


@pytest.mark.parametrize("name", recipe.names())
def test_what_a_masked_row_holds_does_not_matter(name):
    found = recipe.load(name)
    plain, garbage = (kinds.batch(found.corpus[0], ROWS, masked=ROWS - 1, garbage=g) for g in (False, True))
    measured, _ = assert_same(name, plain, garbage)
    assert (measured.codes[ROWS - 1] == -1).all()
    assert (measured.codes[: ROWS - 1] >= 0).all()


@pytest.mark.parametrize("name", recipe.names())
def test_masked_rows_are_as_if_they_were_not_there(name):
    found, _, stage, _ = seeded_model(name)
    together = stage.grouping.size if stage.grouping else 1
    with_masked = kinds.batch(found.corpus[0], ROWS)
    with_masked.mask[-together:] = False
    rows = ROWS - together
    without = recipe.Batch(
        {column: values[:rows] for column, values in with_masked.columns.items()},
        with_masked.mask[:rows],
        with_masked.keys[:rows],
    )
    assert_same(name, with_masked, without)


@pytest.mark.parametrize("name", [name for name in recipe.names() if "images" in recipe.load(name).corpus])
def test_an_image_of_no_fixed_size_is_refused_with_what_to_do(name):
    found = recipe.load(name)
    with pytest.raises(Refused, match="size=64"):
        found.resolve(found.Settings(), {"image": None})


@pytest.mark.parametrize(
    "name", [name for name in recipe.names() if "layer_out" in recipe.load(name).Settings.model_fields]
)
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(name):
    found = recipe.load(name)
    settings = found.Settings(layer_out=7)
    with pytest.raises(Refused, match=r"layer_out=7 .* hold layers 1, 2"):
        found.resolve(settings, kinds.SHAPES["activations"])
    with pytest.raises(Refused, match="layer 2 alone"):
        found.resolve(found.Settings(), {"layer_2": [8]})


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(Refused, match="did you mean 'rotation_trick'"):
        recipe.load("rotation_trik")
    with pytest.raises(Refused, match="did you mean 'images'"):
        corpora.load("image")
