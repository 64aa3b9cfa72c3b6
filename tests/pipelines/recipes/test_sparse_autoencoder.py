"""The sparse autoencoder: its loss from the definition, what stays active, and that it learns."""

import pytest
import torch

from pipelines import loop
from pipelines.feed import Feed
from pipelines.recipe import Share
from pipelines.recipes import sparse_autoencoder
from pipelines.recipes.sparse_autoencoder import Sparse, SparseSettings
from pipelines.shards import ShardReader
from tests.contracts import kinds
from tests.pipelines.activation_shards import make_activation_shards
from tests.pipelines.loops import spec_of

ROWS = 6


def model_of(**changes) -> Sparse:
    settings = SparseSettings(**{"num_codes": 20, "sparsity_weight": 0.3, **changes})
    torch.manual_seed(0)
    return Sparse(sparse_autoencoder.resolve(settings, kinds.SHAPES["activations"]))


def test_the_loss_is_squared_error_and_the_sum_of_activities():
    model, batch = model_of(), kinds.batch("activations", ROWS, masked=2)
    x, y = (batch.columns[name].float()[batch.mask] for name in ("layer_1", "layer_2"))
    z = torch.relu(x @ model.encoder.weight.T + model.encoder.bias)
    error = (z @ model.decoder.weight.T + model.decoder.bias - y).square().mean()
    found = sparse_autoencoder.train_losses(model, batch, Share(1, {"rows": ROWS - 1}))
    expected = error + 0.3 * z.sum() / (ROWS - 1)
    torch.testing.assert_close(found.groups["model"].detach(), expected.detach(), check_dtype=False)
    assert found.logs["active"] == pytest.approx(float((z > 0).sum()) / (ROWS - 1))


def test_top_k_keeps_the_largest_and_has_no_penalty():
    model, batch = model_of(activation="top_k", active=3), kinds.batch("activations", ROWS)
    a = model.encoder(batch.columns["layer_1"].float()).detach()
    z = model.sparse(a)
    assert (z > 0).sum(-1).tolist() == [3] * ROWS
    for row in range(ROWS):
        torch.testing.assert_close(z[row].max(), a[row].max())
        assert float(z[row][z[row] > 0].min()) >= float(a[row][z[row] == 0].max())
    heavier = model_of(activation="top_k", active=3, sparsity_weight=9.0)
    losses = [
        sparse_autoencoder.train_losses(m, batch, Share(1, {"rows": ROWS})).groups["model"] for m in (model, heavier)
    ]
    assert losses[0].item() == losses[1].item()


def test_a_code_is_the_most_active_neuron_also_where_none_is_above_nought():
    model, batch = model_of(), kinds.batch("activations", ROWS, masked=4)
    torch.nn.init.constant_(model.encoder.bias, -100.0)
    codes = sparse_autoencoder.encode(model, batch)
    assert codes[4] == -1
    expected = (batch.columns["layer_1"].float() @ model.encoder.weight.T).argmax(-1)
    assert torch.equal(codes[batch.mask], expected[batch.mask])


def test_what_does_not_fit_into_float16_is_decoded_to_its_end():
    model = model_of()
    torch.nn.init.constant_(model.decoder.bias, 1e6)
    decoded = sparse_autoencoder.decode(model, torch.tensor([0, -1]))["layer_2"]
    assert decoded.tolist() == [[65504.0] * decoded.shape[1]] * 2


@pytest.mark.parametrize("activation", ["relu", "top_k"])
def test_it_learns(activation, tmp_path):
    shards = make_activation_shards(tmp_path / "shards")
    changes = {"steps": 80, "log_every": 20, "activation": activation, "active": 4, "sparsity_weight": 1e-3}
    said: list[loop.Event] = []
    spec = spec_of("sparse_autoencoder", shards, tmp_path / "run", **changes, checkpoint_every=80)
    loop.train(spec, Feed(ShardReader(shards)), torch.device("cpu"), said.append)
    first, *_, last = (event["metrics"]["train/reconstruction"] for event in said if event["kind"] == "metrics")
    assert last < 0.4 * first
