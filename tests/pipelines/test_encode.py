"""Encode, decode and evaluate a trained bundle: codes that decode to the evaluation's own output, and refusals."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines import loop, tracking, trained
from pipelines.columns import values_of
from pipelines.encode import decode, encode, smallest_integer
from pipelines.errors import Failed, Refused
from pipelines.evaluate import evaluate
from pipelines.feed import Feed, as_seen, to_batch
from pipelines.shards import ShardReader
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
