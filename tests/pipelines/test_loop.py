"""The training loop: any number of workers is one worker, and stopping changes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines import loop, recipe
from pipelines.checkpoint import Checkpoints
from pipelines.errors import Refused
from pipelines.feed import Feed
from pipelines.recipe import Batch, Losses, Share
from pipelines.shards import ShardReader
from tests.pipelines.loops import about, make_shards, rows_seen, run_workers, spec_of, state_of
from vqcore.quantizers import TemperedQuantizer
from vqcore.seeding import random_rows

CPU = torch.device("cpu")
WORLDS = (1, 2, 4)
LONG = 400


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """Every case trained by 1, 2 and 4 workers."""
    home = tmp_path_factory.mktemp("loops")
    for world in WORLDS:
        out = home / str(world)
        cases = {
            "float32": spec_of("rotation_trick", shards, out / "float32", steps=20),
            "float64": spec_of("rotation_trick", shards, out / "float64", steps=30, double=True),
            "gradient": spec_of("rotation_trick", shards, out / "gradient", steps=12, double=True, decay=None),
            "cosine": spec_of("rotation_trick", shards, out / "cosine", steps=12, double=True, metric="cosine"),
            "plain": spec_of("plain_vq", shards, out / "plain", steps=12, double=True),
        }
        if world <= 2:
            changes = {"steps": LONG, "double": True, "checkpoint_every": LONG}
            cases["long"] = spec_of("rotation_trick", shards, out / "long", **changes)
        run_workers(world, home, cases)
    return home


def test_two_workers_are_one_after_400_steps(trained):
    one, two = state_of(trained, "long", 0, 1), state_of(trained, "long", 0, 2)
    for name in one:
        assert torch.allclose(one[name].double(), two[name].double(), rtol=0, atol=1e-9), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("case", "tolerance"), [("float32", 1e-5), ("float64", 1e-9), ("gradient", 1e-9), ("cosine", 1e-9), ("plain", 1e-9)]
)
def test_any_number_of_workers_reaches_the_model_of_one(trained, case, tolerance, world):
    one, many = state_of(trained, case, 0, 1), state_of(trained, case, 0, world)
    for name in one:
        assert torch.allclose(one[name].double(), many[name].double(), rtol=0, atol=tolerance), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", ["float32", "float64", "gradient", "cosine", "plain"])
def test_all_workers_hold_the_same_bits(trained, case, world):
    first = state_of(trained, case, 0, world)
    for rank in range(1, world):
        other = state_of(trained, case, rank, world)
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_training_moves_what_it_should(trained):
    """Else the laws above would hold of a loop that does nothing."""
    losses = [
        e["metrics"]["train/loss/model"] for e in about(trained, "long", 0, 2)["events"] if e["kind"] == "metrics"
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_three_sums_over_workers_a_step_and_few_besides(trained):
    """Counts, gradients, codebook; one more for a revival, one at each log, and what seeding and starting take."""
    found = about(trained, "plain", 0, 2)
    logs = sum(event["kind"] == "metrics" for event in found["events"])
    with_seeding = found["calls"] - logs - 1
    # plain_vq has no gradients: two a step.
    assert 2 * 12 <= with_seeding <= 2 * 12 + 8


def test_workers_read_the_same_global_batches_and_each_row_once_an_epoch(shards, tmp_path):
    spec = spec_of("plain_vq", shards, tmp_path / "run")
    steps = 10
    one = rows_seen(spec, 1, steps)
    assert rows_seen(spec, 2, steps) == one
    assert rows_seen(spec, 4, steps) == one
    rows = ShardReader(shards).rows("train")
    epoch = [row for step in one[: -(-rows // 8)] for row in step]
    assert sorted(epoch) == list(range(rows))


class Stopped(Exception):
    """Stands for a process that ends without a word."""


@pytest.mark.parametrize("name", ["rotation_trick", "plain_vq"])
@pytest.mark.parametrize("at", [3, 5, 8, 11])
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(shards, tmp_path, name, at):
    whole, _ = loop.train(spec_of(name, shards, tmp_path / "whole", steps=12), _feed(shards), CPU, lambda _: None)

    def stop(event: loop.Event) -> None:
        if event["kind"] == "progress" and event["step"] == at:
            raise Stopped

    spec = spec_of(name, shards, tmp_path / "stopped", steps=12)
    with pytest.raises(Stopped):
        loop.train(spec, _feed(shards), CPU, stop)
    said: list[loop.Event] = []
    resumed, totals = loop.train(spec, _feed(shards), CPU, said.append)
    first = next(event["step"] for event in said if event["kind"] == "progress")
    assert first == (at - 1) // 4 * 4 + 1
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in resumed.state_dict().items())
    assert totals.latest


def test_a_checkpoint_cut_off_while_it_was_written_is_never_loaded(shards, tmp_path):
    spec = spec_of("plain_vq", shards, tmp_path / "run", steps=12)
    whole, _ = loop.train(spec, _feed(shards), CPU, lambda _: None)
    home = Path(Checkpoints(spec.out).uri)
    newest = sorted(home.iterdir())[-1]
    damaged = newest / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    said: list[loop.Event] = []
    again, _ = loop.train(spec, _feed(shards), CPU, said.append)
    assert any("damaged" in event.get("text", "") for event in said)
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in again.state_dict().items())
    (newest / "state.json").unlink()
    assert Checkpoints(spec.out).complete()[-1] != (0, 12)


def test_micro_batches_add_up_to_the_whole_batch(shards, tmp_path):
    whole, _ = loop.train(
        spec_of("rotation_trick", shards, tmp_path / "whole", steps=6, double=True), _feed(shards), CPU, lambda _: None
    )
    cut, _ = loop.train(
        spec_of("rotation_trick", shards, tmp_path / "cut", steps=6, double=True, micro_batches=3),
        _feed(shards), CPU, lambda _: None,
    )  # fmt: skip
    for name, value in whole.state_dict().items():
        assert torch.allclose(value.double(), cut.state_dict()[name].double(), rtol=0, atol=1e-10), name


def test_fewer_workers_than_planned_make_more_forwards_of_the_same_size_and_one_update(shards, tmp_path, monkeypatch):
    sizes = []
    found = recipe.load("plain_vq")
    spec = spec_of("plain_vq", shards, tmp_path / "few", steps=6, double=True, most_workers=4, micro_batches=2)
    (stage,) = found.stages(found.Settings(**spec.settings))

    def losses(model: torch.nn.Module, batch: Batch, share: Share) -> Losses:
        sizes.append(len(batch.mask))
        return stage.losses(model, batch, share)

    monkeypatch.setattr(recipe, "load", lambda _: _with(found, stages=lambda s: (_with(stage, losses=losses),)))
    few, _ = loop.train(spec, _feed(shards), CPU, lambda _: None)
    # A batch of 8 over 4 workers and 2 micro-batches each.
    assert set(sizes) == {1}
    assert len(sizes) == 6 * 8
    assert few.quantizer.codebook.step == 6
    whole, _ = loop.train(
        spec_of("plain_vq", shards, tmp_path / "whole", steps=6, double=True), _feed(shards), CPU, lambda _: None
    )
    for name, value in whole.state_dict().items():
        assert torch.allclose(value.double(), few.state_dict()[name].double(), rtol=0, atol=1e-10), name


def test_bf16_computes_networks_in_bfloat16_and_codebooks_in_float32(shards, tmp_path, monkeypatch):
    found = recipe.load("rotation_trick")
    spec = spec_of("rotation_trick", shards, tmp_path / "half", steps=12, precision="bf16")
    (stage,) = found.stages(found.Settings(**spec.settings))
    seen = []

    def losses(model: torch.nn.Module, batch: Batch, share: Share) -> Losses:
        latents = model.latents(batch)
        seen.append(latents.x.dtype)
        model.eval()
        codes = model.quantizer.assign(latents.x, latents.mask)
        model.train()
        x = latents.x.float().flatten(0, -2)
        exact = torch.cdist(x.double(), model.quantizer.codebook.vectors.double()).argmin(1)
        valid = codes.flatten() >= 0
        assert torch.equal(codes.flatten()[valid], exact[valid])
        return stage.losses(model, batch, share)

    monkeypatch.setattr(recipe, "load", lambda _: _with(found, stages=lambda s: (_with(stage, losses=losses),)))
    half, totals = loop.train(spec, _feed(shards), CPU, lambda _: None)
    assert set(seen) == {torch.bfloat16}
    book = half.quantizer.codebook
    assert {book.vectors.dtype, *(parameter.dtype for parameter in half.parameters())} == {torch.float32}
    assert {book.counts.dtype, book.sums.dtype} == {torch.float64}
    assert totals.skipped_steps == 0
    # It is another result, and as good a one as three digits allow.
    monkeypatch.undo()
    whole, exact = loop.train(
        spec_of("rotation_trick", shards, tmp_path / "whole", steps=12), _feed(shards), CPU, lambda _: None
    )
    assert not torch.equal(whole.quantizer.codebook.vectors, book.vectors)
    assert totals.latest["train/loss/model"] == pytest.approx(exact.latest["train/loss/model"], rel=0.1)


def test_a_quantizer_that_updates_at_every_forward_takes_one_a_step(shards, tmp_path, monkeypatch):
    found = recipe.load("plain_vq")
    spec = spec_of("plain_vq", shards, tmp_path / "run", steps=4)
    (stage,) = found.stages(found.Settings(**spec.settings))

    def build(settings, previous):
        model = stage.build(settings, previous)
        model.quantizer = TemperedQuantizer(12, model.quantizer.code_dim, seeding=random_rows)
        return model

    monkeypatch.setattr(recipe, "load", lambda _: _with(found, stages=lambda s: (_with(stage, build=build),)))
    with pytest.raises(Refused, match=r"2 micro-batches.*'quantizer' updates at every forward; use one"):
        loop.train(replace(spec, micro_batches=2), _feed(shards), CPU, lambda _: None)
    assert not Path(spec.out).exists()
    model, totals = loop.train(spec, _feed(shards), CPU, lambda _: None)
    assert model.quantizer.codebook.step == 4
    assert 0 < totals.latest["train/usage"] <= 1


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(shards, tmp_path, monkeypatch):
    found = recipe.load("rotation_trick")
    spec = spec_of("rotation_trick", shards, tmp_path / "run", steps=4)
    (stage,) = found.stages(found.Settings(**spec.settings))
    calls = 0

    def spoilt(model: torch.nn.Module, batch: Batch, share: Share) -> Losses:
        nonlocal calls
        calls += 1
        losses = stage.losses(model, batch, share)
        return Losses({"model": losses.groups["model"] * float("nan")}) if calls == 2 else losses

    monkeypatch.setattr(recipe, "load", lambda _: _with(found, stages=lambda s: (_with(stage, losses=spoilt),)))
    model, totals = loop.train(spec, _feed(shards), CPU, lambda _: None)
    assert totals.skipped_steps == 1
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_latents_that_are_not_finite_change_nothing_in_the_codebook(shards, tmp_path):
    """A network that has gone wrong is told by counts; its codebook stays as it was."""
    spec = spec_of("rotation_trick", shards, tmp_path / "run", steps=4)
    model, _ = loop.train(spec, _feed(shards), CPU, lambda _: None)
    before = model.quantizer.codebook.vectors.clone()
    model.train()
    with torch.no_grad():
        model.narrow.bias.fill_(float("nan"))
    found = recipe.load("rotation_trick")
    settings = found.Settings(**spec.settings)
    source = _feed(shards).open(spec, settings, found.stages(settings)[0], CPU)
    batch, _ = source.at(0)
    losses = found.stages(settings)[0].losses(model, batch, Share(1, {"rows": 8, "vectors": 128}))
    assert torch.equal(model.quantizer.codebook.vectors, before)
    assert losses.groups["model"].isfinite()


def _feed(shards: str) -> Feed:
    return Feed(ShardReader(shards))


def _with(value, **changes):
    return type(value)(**{**value.__dict__, **changes})
