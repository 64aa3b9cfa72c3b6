"""Encode, decode and evaluate a trained bundle: codes that decode to the evaluation's own output, and refusals."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines import corpora, loop, tracking, trained
from pipelines.columns import batch_of, bfloat16_of, padded, ragged_field, values_of
from pipelines.encode import _decode_shard, _encode_shard, decode, encode, smallest_integer
from pipelines.errors import Failed, Refused
from pipelines.evaluate import evaluate
from pipelines.feed import Feed, as_seen, to_batch
from pipelines.manifest import Manifest, ShardRecord, Units, describe, save_manifest
from pipelines.recipe import Batch
from pipelines.shards import ShardReader, ShardWriter
from tests.pipelines.bundle_shards import make_bundle_shards
from tests.pipelines.loops import make_shards, spec_of
from vqcore import metrics

pytestmark = pytest.mark.usefixtures("ray_instance")


def make_bundle(shards: str, out: Path, **changes) -> str:
    spec = spec_of("rotation_trick", shards, out, steps=8, **changes)
    reader = ShardReader(shards)
    model, totals = loop.train(spec, Feed(reader), torch.device("cpu"), lambda _: None)
    about = {
        "recipe": spec.recipe,
        "settings": spec.settings,
        "corpus": {"kind": "images", "settings": reader.manifest.settings},
        "codebooks": [{"num_codes": 12, "code_dim": 4}],
        "metrics": totals.latest,
        "parents": {"shards": reader.manifest.digest},
    }
    trained.write_trained(spec.out, model, about)
    return spec.out


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def bundle(shards, tmp_path_factory) -> str:
    return make_bundle(shards, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def codes(shards, bundle, tmp_path_factory) -> str:
    return encode(bundle, shards, str(tmp_path_factory.mktemp("codes"))).out


def model_of(bundle: str) -> trained.Trained:
    return trained.open_trained(Path(bundle) / "bundle")


def all_rows(shards: str) -> pa.RecordBatch:
    reader = ShardReader(shards)
    return reader.take("all", np.arange(reader.rows("all")))


@pytest.mark.parametrize(("num_codes", "kind"), [(128, "int8"), (129, "int16"), (32768, "int16"), (32769, "int32")])
def test_codes_take_the_smallest_signed_type(num_codes, kind):
    assert str(smallest_integer(num_codes)) == kind


def test_codes_are_those_of_the_model_with_the_rows_own_ids(shards, bundle, codes):
    rows, made = values_of(all_rows(shards)), values_of(all_rows(codes))
    assert np.array_equal(rows["row_id"], made["row_id"])
    assert np.array_equal(rows["split"], made["split"])
    assert made["codes"].dtype == np.int8
    model = model_of(bundle)
    columns, ids = as_seen(ShardReader(shards).manifest, all_rows(shards))
    batch, _ = to_batch(columns, ids, np.ones(len(ids), dtype=bool))
    with torch.inference_mode():
        expected = model.recipe.encode(model.model, batch)
    assert np.array_equal(made["codes"], expected.numpy())


def test_decode_gives_the_evaluation_output_bit_for_bit(shards, bundle, codes, tmp_path):
    restored = decode(bundle, codes, str(tmp_path / "restored"))
    made = values_of(all_rows(restored.out))
    model = model_of(bundle)
    columns, ids = as_seen(ShardReader(shards).manifest, all_rows(shards))
    batch, _ = to_batch(columns, ids, np.ones(len(ids), dtype=bool))
    with torch.inference_mode():
        image = model.model.render(model.model.quantizer(*model.model.latents(batch)[:2]).vectors)
    expected = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    difference = made["image"].astype(int) - expected.numpy().astype(int)
    # Convolutions of another batch size may round a pixel the other way; codes and vectors are the same bits.
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3


def test_decode_writes_one_picture_a_row(bundle, codes, tmp_path):
    out = decode(bundle, codes, str(tmp_path / "pictures"), files=True)
    ids = values_of(all_rows(codes))["row_id"]
    assert {int(path.stem) for path in Path(out.out).glob("*.png")} == set(ids.tolist())
    assert decode(bundle, codes, str(tmp_path / "pictures"), files=True).skipped


def test_encoding_again_is_a_no_op_and_other_requests_are_refused(shards, bundle, codes):
    again = encode(bundle, shards, codes)
    assert again.skipped
    assert again.digest == ShardReader(codes).manifest.digest
    with pytest.raises(Refused, match="split: 'all' -> 'test'"):
        encode(bundle, shards, codes, split="test")


def test_metrics_are_those_of_the_whole_split_at_once(shards, bundle, codes, tmp_path):
    found = evaluate(bundle, shards, str(tmp_path / "evaluation"), "test")
    reader = ShardReader(codes)
    counts = metrics.counts_of(
        torch.from_numpy(values_of(reader.take("test", np.arange(reader.rows("test"))))["codes"].astype(np.int64)), 12
    )
    assert found.rows == reader.rows("test")
    assert found.metrics["usage"] == pytest.approx(float(metrics.usage(counts)))
    assert found.metrics["perplexity"] == pytest.approx(float(metrics.perplexity(counts)))
    assert found.metrics["bits_per_row"] == pytest.approx(16 * np.log2(12))
    experiment = tracking.client().get_experiment_by_name("rotation_trick")
    digest = found.digest
    (run,) = tracking.client().search_runs([experiment.experiment_id], f"tags.bundle_digest = '{digest}'")
    assert run.data.metrics["test/usage"] == found.metrics["usage"]
    for picture in found.pictures:
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert evaluate(bundle, shards, str(tmp_path / "evaluation"), "test").skipped


def test_another_bundles_codes_are_refused(shards, bundle, codes, tmp_path):
    other = make_bundle(shards, tmp_path / "other", seed=1)
    with pytest.raises(Refused, match="Decode with the bundle that encoded"):
        decode(other, codes, str(tmp_path / "restored"))


def test_shards_prepared_otherwise_are_refused_naming_the_setting(bundle, tmp_path):
    other = make_shards(tmp_path / "other", side=16)
    with pytest.raises(Refused, match=r"size: 8 -> 16.*ingest --bundle"):
        encode(bundle, other, str(tmp_path / "codes"))


def test_a_flipped_byte_in_a_shard_is_named(shards, bundle, tmp_path):
    damaged = Path(make_shards(tmp_path / "damaged"))
    victim = sorted(damaged.glob("shard-*.arrow"))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(Failed, match=victim.name):
        encode(bundle, str(damaged), str(tmp_path / "codes"))


def test_weights_that_do_not_match_their_card_are_refused(shards, tmp_path):
    home = Path(make_bundle(shards, tmp_path / "run")) / "bundle" / "model.safetensors"
    data = bytearray(home.read_bytes())
    data[-1] ^= 1
    home.write_bytes(bytes(data))
    with pytest.raises(Refused, match=r"model\.safetensors.* does not match its card"):
        evaluate(str(tmp_path / "run"), shards, str(tmp_path / "evaluation"))


def test_a_planted_pickle_is_refused_by_name(shards, tmp_path):
    home = Path(make_bundle(shards, tmp_path / "run")) / "bundle"
    (home / "weights.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(Refused, match=r"weights\.pkl"):
        encode(str(tmp_path / "run"), shards, str(tmp_path / "codes"))


class Signs(torch.nn.Module):
    """Codes of chains of points: 1 where x > 0, 0 elsewhere, and -1 in what is filled up; a point (x, x, x) back."""


def encode_signs(model: Signs, batch: Batch) -> torch.Tensor:
    assert batch.columns["point"].shape == (*batch.columns["point_mask"].shape, 3)
    return torch.where(batch.columns["point_mask"], (batch.columns["point"][..., 0] > 0).long(), -1)


def decode_signs(model: Signs, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    points = (2.0 * codes - 1)[..., None].expand(*codes.shape, 3)
    return {"point": points.to(torch.bfloat16), "point_mask": codes != -1, "size": codes.clamp(min=0).sum(1).float()}


def chains_to_tensors(stored: dict, settings: corpora.CorpusSettings) -> dict[str, torch.Tensor]:
    point, mask = padded(stored["point"], (3,))
    return {"point": point, "point_mask": mask}


def test_rows_of_several_lengths_become_codes_of_their_lengths_and_back(tmp_path, monkeypatch):
    schema = pa.schema([ragged_field("point", pa.float32(), (3,))])
    kind = SimpleNamespace(
        Settings=corpora.CorpusSettings,
        schema=lambda _: schema,
        shapes=lambda _: {"point": None, "size": []},
        tensors=chains_to_tensors,
    )
    monkeypatch.setattr(corpora, "load", lambda name: kind)
    recipe = SimpleNamespace(encode=encode_signs, decode=decode_signs, codebooks=lambda _: [(2, 1)])
    model = SimpleNamespace(recipe=recipe, settings=None, model=Signs(), digest="ab" * 32)
    drawn = np.random.default_rng(0)
    chains = [drawn.normal(size=(n % 7, 3)).astype(np.float32) for n in range(200)]
    home, codes, back = (str(tmp_path / name) for name in ("chains", "codes", "back"))
    with ShardWriter(home, 0, schema) as writer:
        writer.write(batch_of([{"point": chain} for chain in chains], schema), np.zeros(200, np.int8))
    save(home, "chains", schema, writer.records)
    made = _encode_shard(home, "all", codes, 0, None, model)
    save(codes, "codes", ragged_schema(codes), [ShardRecord(**shard) for shard in made["shards"]])
    stored = values_of(all_rows(codes))["codes"]
    assert [row.tolist() for row in stored] == [(chain[:, 0] > 0).astype(int).tolist() for chain in chains]
    assert ragged_schema(codes).field("codes").type == pa.list_(pa.int8())
    made = _decode_shard(codes, {"kind": "chains", "settings": {}}, back, False, 0, None, model)
    save(back, "chains", ragged_schema(back), [ShardRecord(**shard) for shard in made["shards"]])
    rows = all_rows(back)
    assert describe(rows.schema)["size"].shape == ()
    point = rows.schema.field("point")
    assert point.metadata == {b"shape": b"[L, 3]", b"dtype": b"bfloat16"}
    for bits, chain in zip(values_of(rows)["point"], chains, strict=True):
        assert torch.equal(bfloat16_of(bits).view(-1, 3), torch.tensor(np.sign(chain[:, :1])).expand(-1, 3).bfloat16())


def ragged_schema(home: str) -> pa.Schema:
    with pa.ipc.open_file(f"{home}/shard-00000-000.arrow") as file:
        return pa.schema([item for item in file.schema if item.name not in ("row_id", "split")])


def save(home: str, kind: str, schema: pa.Schema, records: list[ShardRecord]) -> None:
    units = Units(200, 200, 0, {})
    save_manifest(Manifest(kind, {}, {}, describe(schema), tuple(records), units, ""), home)


def test_a_model_without_a_codebook_is_measured_and_encodes_nothing(tmp_path):
    """And what was fitted beside the network stands in its card."""
    shards = make_bundle_shards(tmp_path / "shards")
    spec = spec_of("streamline_dvqvae", shards, tmp_path / "run", steps=2, bottleneck="ae")
    reader = ShardReader(shards)
    model, _ = loop.train(spec, Feed(reader), torch.device("cpu"), lambda _: None)
    corpus = {"kind": "streamlines", "settings": reader.manifest.settings}
    about = {"recipe": spec.recipe, "settings": spec.settings, "corpus": corpus, "codebooks": [], "metrics": {}}
    trained.write_trained(spec.out, model, about)
    low, high = model.extent.tolist()
    assert model_of(spec.out).card["fitted"] == {"lowest_mm": low, "highest_mm": high}
    found = evaluate(spec.out, shards, str(tmp_path / "measured"))
    assert found.metrics["mse"] > 0
    assert not {"usage", "perplexity", "num_codes", "bits_per_row"} & found.metrics.keys()
    assert [Path(picture).name for picture in found.pictures] == ["bundles.png"]
    with pytest.raises(Refused, match="has no codebook, so there are no codes"):
        encode(spec.out, shards, str(tmp_path / "codes"))
    assert not (tmp_path / "codes").exists()
