"""Concept ablation: projections, probes and integrated gradients against what can be computed by hand."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.corpora import _language_models as models
from pipelines.corpora.activations import ActivationSettings
from pipelines.errors import Refused
from pipelines.recipes import _faithfulness as faithfulness
from pipelines.recipes import _saliency as saliency
from pipelines.shards import ShardReader
from tests.pipelines.activation_shards import make_activation_shards
from tests.pipelines.corpora import tiny_language_models as tiny

SENTENCE = [2, 5, 9, 12, 4, 3]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_left_is_orthogonal_and_taking_it_out_again_changes_nothing(count):
    h, directions = drawn(20, 8), drawn(20, count, 8, seed=1)
    left = faithfulness.without(h, directions)
    assert float((left.unsqueeze(1) * directions).sum(-1).abs().max()) < 1e-5
    torch.testing.assert_close(faithfulness.without(left, directions), left)


def test_one_direction_is_the_papers_formula_at_any_length():
    h, v = drawn(20, 8), drawn(20, 1, 8, seed=1)
    expected = h - (h * v[:, 0]).sum(-1, keepdim=True) / v[:, 0].square().sum(-1, keepdim=True) * v[:, 0]
    torch.testing.assert_close(faithfulness.without(h, v), expected)
    torch.testing.assert_close(faithfulness.without(h, -7 * v), expected)


def test_no_direction_and_one_twice_take_out_what_they_span():
    h, v = drawn(5, 8), drawn(5, 1, 8, seed=1)
    assert torch.equal(faithfulness.without(h, torch.zeros(5, 1, 8)), h)
    torch.testing.assert_close(faithfulness.without(h, v.repeat(1, 2, 1)), faithfulness.without(h, v))


def toy(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two classes on the first axis of eight."""
    targets = np.arange(count) % 2
    vectors = drawn(count, 8, seed=seed).numpy()
    vectors[:, 0] = 4.0 * (2 * targets - 1) + 0.3 * vectors[:, 0]
    return vectors, targets


def test_without_the_axis_of_the_classes_the_probe_guesses_and_without_another_it_does_not():
    (train, train_targets), (h, targets) = toy(400, 0), toy(60, 1)
    axis = torch.zeros(60, 1, 8)
    axis[..., 0] = 1
    forms = faithfulness.ablations(h, {"concept": axis}, np.zeros(8, np.float32), seed=0)
    found = faithfulness.ask(train, train_targets, forms, targets, ["a", "b"], seed=0)
    assert found["whole"].accuracy > 0.93
    assert found["random"].accuracy > 0.9
    assert found["concept"].accuracy < 0.75
    assert found["concept"].drop(found["whole"]) > 0.2
    assert set(found["whole"].per_class) == {"a", "b"}
    assert np.mean(list(found["whole"].per_class.values())) == pytest.approx(found["whole"].accuracy, abs=1e-9)


def test_each_control_takes_out_what_it_is_named_after():
    """Directions differ between documents, so that no control is another's."""
    h, mean, own = drawn(6, 8), drawn(8, seed=3), drawn(6, 1, 8, seed=2)
    forms = faithfulness.ablations(h.numpy(), {"c": own}, mean.numpy(), seed=0)
    others = torch.stack([own[(n - 3) % 6] for n in range(6)])
    expected = {
        "c": faithfulness.without(h, own),
        "other c": faithfulness.without(h, others),
        "mean activation": faithfulness.without(h, mean.expand(6, 1, 8)),
    }
    for name, form in expected.items():
        np.testing.assert_allclose(forms[name], form.numpy(), atol=1e-5, err_msg=name)
    apart = [np.abs(forms[a] - forms[b]).max() for a in forms for b in forms if a < b]
    assert min(apart) > 1e-2


def test_about_the_mean_what_all_codes_share_stays():
    h, mean = drawn(6, 8).numpy() + 20, np.full(8, 20, np.float32)
    codes = (torch.from_numpy(mean) + drawn(6, 1, 8, seed=2)).float()
    forms = faithfulness.ablations(h, {"c": codes}, mean, seed=0)
    assert np.linalg.norm(forms["c"]) < 0.2 * np.linalg.norm(h)
    assert np.linalg.norm(forms["c about the mean"] - h) < 0.1 * np.linalg.norm(h)
    left = torch.from_numpy(forms["c about the mean"] - mean)
    along = (left * (codes[:, 0] - torch.from_numpy(mean))).sum(-1)
    assert float(along.abs().max()) < 1e-3


def test_one_class_and_no_labels_are_refused_with_what_to_do():
    with pytest.raises(Refused, match=r"only the label 'a'.*label=COLUMN"):
        faithfulness.classes_of(["a", None, "a"])
    with pytest.raises(Refused, match="no labels"):
        faithfulness.classes_of([None])


def test_a_class_of_one_document_is_refused_by_name():
    vectors, targets = toy(9, 0)
    targets = np.where(np.arange(9) == 3, 2, targets)
    with pytest.raises(Refused, match="'c' has fewer than two"):
        faithfulness.ask(vectors, targets, {"whole": vectors}, targets, ["a", "b", "c"], seed=0)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_readout_predicts_what_logistic_regression_does(classes):
    vectors, targets = toy(60, 0)
    targets = np.where(vectors[:, 1] > 0, targets, classes - 1)
    found = faithfulness.readout(vectors, targets)
    assert found.weights.shape == (classes, 8)
    assert float((found.classes(vectors) == targets).mean()) > 0.8


@pytest.mark.parametrize("first", [True, False])
def test_sentence_vectors_are_the_first_rows_or_the_means(first, tmp_path):
    reader = ShardReader(make_activation_shards(tmp_path))
    found = faithfulness.sentences(reader, "test", {1, 2}, first=first)
    batch = reader.take("test", np.arange(reader.rows("test")))
    names = batch.column("document").to_pylist()
    rows = batch.column("layer_2").to_numpy_ndarray().astype(np.float32)
    assert found.names == list(dict.fromkeys(names))
    for number, name in enumerate(found.names):
        mine = rows[[n == name for n in names]]
        np.testing.assert_allclose(found.vectors[2][number], mine[0] if first else mine.mean(0), atol=1e-3)
    np.testing.assert_allclose(found.mean[2], rows.mean(0), atol=1e-3)
    assert {label.split()[0] for label in found.labels} == {"topic"}
    places = faithfulness.places_of(reader, "test", found.names[1:2])
    assert [names[ordinal] for ordinal in places[found.names[1]].values()] == [found.names[1]] * len(
        places[found.names[1]]
    )
    assert not faithfulness.first_is_special(reader, "test")


@pytest.mark.parametrize("first", [True, False])
def test_rows_that_are_not_finite_count_nowhere(first, tmp_path):
    """Where they stand first, a document has no first token any more, and is left out of `first`."""
    whole = ShardReader(make_activation_shards(tmp_path / "whole"))
    broken = ShardReader(make_activation_shards(tmp_path / "broken", broken=60))
    found = faithfulness.sentences(broken, "test", {1, 2}, first=first)
    batch = whole.take("test", np.arange(whole.rows("test")))
    names, later = batch.column("document").to_pylist(), batch.column("position").to_numpy() > 0
    rows = batch.column("layer_2").to_numpy_ndarray().astype(np.float32)
    kept = [] if first else sorted({name for name, usable in zip(names, later, strict=True) if usable})
    assert sorted(found.names) == kept
    np.testing.assert_allclose(found.mean[2], rows[later].mean(0), atol=1e-3)
    for number, name in enumerate(found.names):
        mine = rows[later & (np.array(names) == name)]
        np.testing.assert_allclose(found.vectors[2][number], mine.mean(0), atol=1e-3)
    places = faithfulness.places_of(broken, "test", set(names))
    assert all(0 not in found for found in places.values())
    assert sum(map(len, places.values())) == int(later.sum())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(home / kind, kind) for kind in tiny.CONFIGS}


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("layer", [0, 1])
def test_streams_carried_on_are_those_of_the_model(folders, kind, layer):
    model = models.open_model(str(folders[kind]))
    low, high = model.hidden_states([SENTENCE], (layer, 2))
    states, carry = model.onward(SENTENCE, layer, 2)
    torch.testing.assert_close(states, low.clone())
    torch.testing.assert_close(carry(states), high.clone())
    several = carry(states.repeat(3, 1, 1))
    torch.testing.assert_close(several, high.clone().repeat(3, 1, 1))
    moved = states.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(carry(moved)[:, 0, 3].sum(), moved)
    assert float(gradient[:, 0].abs().max()) > 0


def head_of(seed: int = 0) -> saliency.Readout:
    made = np.random.default_rng(seed)
    return saliency.Readout(made.normal(size=(2, tiny.WIDTH)), made.normal(size=2))


def test_attributions_add_up_to_the_change_of_the_logit(folders):
    """Completeness, the axiom that integrated gradients are named for; and it tells the rule of the sum from others."""
    model = models.open_model(str(folders["bert"]))
    text = saliency.Text("d", SENTENCE, list(range(5)), [[0], [1], [2, 3], [4], [5]])
    gaps = []
    for steps in (2, 64):
        found = saliency.explain(model, text, head_of(), 1, {"layer": 1, "upto": 2, "first": True, "steps": steps})
        assert sum(found.attributions) == pytest.approx(found.change, abs=found.gap + 1e-4)
        gaps.append(found.gap)
    assert gaps[1] < 1e-3 * max(1.0, abs(found.change))
    assert gaps[1] < gaps[0]


def test_where_nothing_lies_between_the_attribution_is_the_linear_one(folders):
    """With the mean over tokens of a block that passes its input on, each token adds w . (h - b) / T."""
    model = models.open_model(str(folders["bert"]))
    states, _ = model.onward(SENTENCE, 1, 2)
    baseline, _ = model.onward([0] * len(SENTENCE), 1, 2)
    head = head_of(1)

    class Through(torch.nn.Module):
        def forward(self, hidden_states, *_, **__):
            return hidden_states

    blocks = [model.blocks[0], Through()]
    original = model.blocks[1]
    stack = next(m for m in model.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    stack[1] = blocks[1]
    try:
        passing = models.LanguageModel(model.shape, model.tokenizer, model.model, blocks, model.folder, model.device)
        text = saliency.Text("d", SENTENCE, list(range(6)), [[n] for n in range(6)])
        found = saliency.explain(passing, text, head, 0, {"layer": 1, "upto": 2, "first": False, "steps": 4})
    finally:
        stack[1] = original
    expected = ((states - baseline)[0].double() @ torch.from_numpy(head.weights[0])) / len(SENTENCE)
    np.testing.assert_allclose(found.attributions, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("special", ["first", "all"])
def test_texts_are_cut_as_the_ingest_cut_them_without_what_stands_behind(folders, tmp_path, special):
    table = tmp_path / "texts.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([["text"], ["The cats sat."], ["dog"]])
    settings = ActivationSettings(
        model=str(folders["bert"]), layers=(1, 2), words="mean", max_tokens=16, min_word_count=9, special=special
    )
    texts = saliency.texts_of([str(table)], settings, ["texts.csv/0", "texts.csv/1"])
    text = texts["texts.csv/0"]
    assert text.places == [[0], [1], [2, 3], [4], [5]]
    assert text.positions == [0, 1, 2, 3, 4]
    assert len(text.ids) == 7
    with pytest.raises(Refused, match=re.escape("'elsewhere.txt'")):
        saliency.check_texts([str(table)], settings, {"elsewhere.txt"})
    saliency.check_texts([str(table)], settings, {"elsewhere.txt", "texts.csv/1"})


@pytest.mark.parametrize(("first", "expected"), [(True, [1, 0, 0, 0]), (False, [0, 1 / 2, 1 / 4, 1 / 4])])
def test_a_sentence_vector_is_the_mean_over_rows_of_means_over_their_tokens(first, expected):
    text = saliency.Text("d", [7, 8, 9, 6], [1, 2], [[1], [2, 3]])
    assert saliency._shares(text, first).tolist() == pytest.approx(expected)


def test_probes_and_readout_do_not_mind_a_small_scale_on_a_large_mean():
    """As of [CLS] in MiniLM's middle: vectors of length 10 that differ by thousandths."""
    (train, train_targets), (h, targets) = toy(400, 0), toy(60, 1)
    shrunk = [(5 + 1e-3 * vectors).astype(np.float32) for vectors in (train, h)]
    found = faithfulness.ask(shrunk[0], train_targets, {"whole": shrunk[1]}, targets, ["a", "b"], seed=0)
    assert found["whole"].accuracy > 0.93
    assert float((faithfulness.readout(shrunk[0], train_targets).classes(shrunk[1]) == targets).mean()) > 0.97
