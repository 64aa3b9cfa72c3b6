"""Plain VQ over rows that are vectors: what it computes, what follows from shards, one run that serves all depths."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import corpora, loop, recipe, search_report
from pipelines.columns import batch_from, batch_of, stored_as
from pipelines.errors import Refused
from pipelines.feed import Feed, columns_of
from pipelines.loop import RunSpec
from pipelines.manifest import Manifest, Units, describe, save_manifest
from pipelines.recipe import Batch
from pipelines.search_plan import Plan, Search
from pipelines.search_session import Session
from pipelines.shards import ShardReader, ShardWriter
from tests.pipelines.test_search_session import run_all
from vqcore.bundle import read_bundle

NAME, DIM, ROWS = "plain_vq", 6, 240


def vectors_in(home: Path, dtype: str = "float16") -> str:
    corpus = corpora.load("vectors")
    settings = corpus.Settings(dtype=dtype, dim=DIM)
    schema = corpus.schema(settings)
    drawn = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float16)
    with ShardWriter(str(home), 0, schema) as writer:
        rows = [{"vector": vector, "label": row % 3} for row, vector in enumerate(drawn)]
        splits = np.array([0] * (ROWS - 60) + [1] * 30 + [2] * 30, dtype=np.int8)
        writer.write(batch_of(rows, schema), splits)
    units = Units(ROWS, ROWS, 0, {})
    kept = settings.model_dump(mode="json")
    selection = {"limit": None, "holdout": 0.1}
    save_manifest(
        Manifest("vectors", kept, selection, describe(schema), tuple(writer.records), units, ""), str(home)
    )  # fmt: skip
    return str(home)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return vectors_in(tmp_path_factory.mktemp("vectors"))


def run_of(shards: str, out: Path, **settings) -> RunSpec:
    found = recipe.load(NAME)
    asked = found.Settings(**{"num_codes": 8, "batch_size": 8, "steps": 12, "decay": 0.9, **settings})
    resolved = found.resolve(asked, columns_of(ShardReader(shards).manifest))
    return RunSpec(NAME, resolved.model_dump(mode="json"), shards, 0, 8, str(out), checkpoint_every=6)


def model_of(spec: RunSpec) -> torch.nn.Module:
    return loop.train(spec, Feed(ShardReader(spec.shards)), torch.device("cpu"), lambda _: None)[0].eval()


def batch_of_test(shards: str) -> Batch:
    reader = ShardReader(shards)
    rows = torch.from_numpy(reader.values("test", np.arange(30))["vector"])
    mask = torch.ones(30, dtype=torch.bool)
    mask[4] = False
    return Batch({"vector": rows}, mask, torch.arange(30))


@pytest.mark.parametrize("levels", [1, 3])
def test_metrics_are_those_of_numpy_over_the_decoded_rows(shards, tmp_path, levels):
    found = recipe.load(NAME)
    model = model_of(run_of(shards, tmp_path, levels=levels))
    batch = batch_of_test(shards)
    with torch.inference_mode():
        measured = found.measure(model, batch)
        decoded = found.decode(model, found.encode(model, batch))["vector"]
    assert decoded.shape == (30, DIM)
    assert measured.codes.shape == ((30, 1) if levels == 1 else (30, 1, levels))
    assert (measured.codes[4] == -1).all()
    kept = np.delete(np.arange(30), 4)
    x = batch.columns["vector"].double().numpy()[kept]
    error = ((x - decoded.double().numpy()[kept]) ** 2).mean()
    made = found.summarise({**measured.sums, "rows": torch.tensor(29.0)})
    assert made["mse"] == pytest.approx(error, rel=1e-6)
    assert made["explained"] == pytest.approx(1 - error / x.var(0).mean(), rel=1e-6)


def test_every_depth_of_a_search_is_the_run_that_it_would_have_been(shards, tmp_path):
    words = ("num_codes=choice:4,8", "levels=choice:1,2,3", "batch_size=8", "steps=12", "decay=0.9")
    search = Search(NAME, shards, str(tmp_path / "s"), preset="small", words=words, checkpoint_every=6, repeats=2)
    plan = Plan(search)
    plan.check()
    ended = run_all(Session(plan))
    assert [ended[n].state for n in sorted(ended)] == ["finished"] * 12
    for trial in ended.values():
        deepest = trial.settings["levels"] == 3
        assert (trial.steps, trial.prefix_of is None) == ((12, True) if deepest else (0, False))
        if trial.repeat == 0:
            spec = replace(run_of(shards, tmp_path / f"own-{trial.number}", **trial.settings), seed=trial.seed)
            made, alone = read_bundle(Path(trial.out) / "bundle"), model_of(spec).state_dict()
            assert made.tensors.keys() == alone.keys()
            assert all(made.tensors[name].equal(tensor) for name, tensor in alone.items()), trial.settings
            assert made.card["settings"] == spec.settings
        if not deepest:
            parent = ended[trial.prefix_of]
            assert (parent.settings["num_codes"], parent.repeat) == (trial.settings["num_codes"], trial.repeat)
            assert read_bundle(Path(trial.out) / "bundle").card["parents"]["prefix_of"] == parent.bundle_digest
    (said,) = search_report._said_of_prefixes(list(ended.values()))
    assert said.startswith("8 trials are the first levels of 4 deeper ones")
    assert "48 steps made instead of 144, 67% saved" in said


def test_trials_whose_own_seconds_or_steps_count_are_all_trained(shards, tmp_path):
    words = ("levels=choice:1,2", "num_codes=4", "batch_size=8", "steps=2")
    for changes in ({"objectives": ("min:distortion", "min:seconds")}, {"pick": "min:distortion@steps<=4"}):
        plan = Plan(Search(NAME, shards, str(tmp_path), preset="small", words=words, **changes))
        assert len(plan.points) == 2
        assert plan.deeper == {}
    assert Plan(Search(NAME, shards, str(tmp_path), preset="small", words=words)).deeper == {0: 1}


def test_what_shards_leave_no_choice_of_is_no_part_of_the_recipes_own_space(shards, tmp_path):
    plan = Plan(Search(NAME, shards, str(tmp_path), preset="small"))
    assert "patch" in plan.found.space
    assert plan.space.domains.keys() == plan.found.space.keys() - {"patch"}


def test_which_column_is_quantized():
    found = recipe.load(NAME)
    layers = {"layer_3": [4], "layer_6": [4]}
    with pytest.raises(Refused, match="--set column=layer_3 or column=layer_6"):
        found.resolve(found.Settings(), layers)
    with pytest.raises(Refused, match="no column 'layer_9'; allowed: column=layer_3 or layer_6"):
        found.resolve(found.Settings(column="layer_9"), layers)
    settings = found.resolve(found.Settings(column="layer_6", levels=2, num_codes=16), layers)
    assert found.codebooks(settings) == [(16, 4), (16, 4)]
    with pytest.raises(Refused, match="use metric=euclidean, or levels=1"):
        found.resolve(found.Settings(column="layer_6", levels=2, metric="cosine"), layers)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_decoded_vectors_have_the_type_that_their_corpus_stores(dtype):
    corpus = corpora.load("vectors")
    item = corpus.schema(corpus.Settings(dtype=dtype, dim=3)).field("vector")
    values = torch.tensor([[-1.0, 1 / 3, 300.7]])
    kept = stored_as(values, item)
    assert kept.dtype == getattr(torch, dtype)
    assert kept.equal(values.to(kept.dtype))
    stored = batch_from({"vector": kept}, {}).schema.field("vector")
    assert (stored.type, stored.metadata) == (item.type, item.metadata)


def test_decoded_masks_have_the_type_that_their_corpus_stores():
    corpus = corpora.load("streamlines")
    item = corpus.schema(corpus.Settings(rows="chunks", chunk=4)).field("real")
    kept = stored_as(torch.tensor([[True, True, False, False]]), item)
    assert batch_from({"real": kept}, {}).schema.field("real").type == item.type
