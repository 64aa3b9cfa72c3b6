"""Shards to codes and codes back to rows, with the bundle that belongs to them. One shard out per shard in."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from torch import Tensor

from pipelines import corpora, registry, storage, trained
from pipelines.errors import Failed, Refused
from pipelines.feed import read_columns, to_batch
from pipelines.manifest import FILE, Manifest, ShardRecord, Units, load_manifest
from pipelines.options import differences
from pipelines.parts import Part, Record, forget_records, run_parts
from pipelines.recipe import Batch
from pipelines.shards import ShardReader, export_parquet, with_platform_columns, write_shards
from pipelines.trained import Trained

CODES = "codes"
"""The kind of a manifest whose rows are codes."""
ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Made:
    out: str
    digest: str
    rows: int
    skipped: bool


def smallest_integer(num_codes: int) -> pa.DataType:
    """The smallest signed Arrow integer that holds every code in [0, num_codes) and the -1 of what is masked."""
    for kind in (pa.int8(), pa.int16(), pa.int32()):
        if num_codes - 1 <= np.iinfo(kind.to_pandas_dtype()).max:
            return kind
    return pa.int64()


def encode(bundle: str, shards: str, out: str, *, split: str = "all", parquet: bool = False) -> Made:
    """Encode one split (or `all`) of a manifest. Rows keep their ids and splits; the schema names the bundle's digest.

    Raises:
        Refused: shards prepared otherwise than the bundle's training data, an empty split, or an `out` that holds
            something else.
        Failed: a row with a value that is not finite, since it has no codes.
    """
    out, directory = storage.normalise(out), registry.local_bundle(bundle)
    model, reader = opened_for(directory, shards, split)
    request = {"bundle": model.digest, "shards": reader.manifest.digest, "split": split}
    if done := claim(out, request, "codes"):
        return Made(out, done.digest, done.rows, skipped=True)
    config = {"bundle": str(directory), "shards": reader.uri, "split": split, "out": out}
    parts = shard_parts(reader, split)
    records = run_parts(parts, _encode_shard, config, label="encode", unit="rows", out=out)
    context = {"corpus": {"kind": reader.manifest.kind, "settings": reader.manifest.settings}}
    settings = {"split": split, "recipe": model.recipe.name}
    parents = {"bundle": model.digest, "shards": reader.manifest.digest}
    return _finish(out, CODES, settings, context, parents, records, parquet)


def decode(bundle: str, codes: str, out: str, *, files: bool = False) -> Made:
    """Decode a directory of codes to shards of the corpus's own kind, or to files people open, named by row id.

    Raises:
        Refused: codes that another bundle made, or an `out` that holds something else.
    """
    out, directory = storage.normalise(out), registry.local_bundle(bundle)
    model = trained.open_trained(directory)
    reader = ShardReader(codes)
    manifest = reader.manifest
    if manifest.kind != CODES:
        raise Refused(f"{reader.uri} holds {manifest.kind}, not codes; `vqray encode` makes them.")
    if manifest.parents["bundle"] != model.digest:
        raise Refused(
            f"{reader.uri} was encoded with bundle {manifest.parents['bundle'][:16]}..., and {bundle} is"
            f" {model.digest[:16]}...: its codebook means something else. Decode with the bundle that encoded."
        )
    request = {"bundle": model.digest, "codes": manifest.digest, "files": files}
    if done := claim(out, request, "decoded rows"):
        return Made(out, done.digest, done.rows, skipped=True)
    config = {"bundle": str(directory), "shards": reader.uri, "split": "all", "out": out, "files": files}
    config["corpus"] = manifest.context["corpus"]
    records = run_parts(shard_parts(reader, "all"), _decode_shard, config, label="decode", unit="rows", out=out)
    corpus = manifest.context["corpus"]
    parents = {"bundle": model.digest, "codes": manifest.digest}
    kind = f"{corpus['kind']} files" if files else corpus["kind"]
    return _finish(out, kind, corpus["settings"], {}, parents, records, parquet=False)


def opened_for(directory: Path, shards: str, split: str) -> tuple[Trained, ShardReader]:
    """A bundle and the shards it is to work on, or Refused where they do not belong together."""
    model = trained.open_trained(directory)
    reader = ShardReader(shards)
    trained.check_fits(model.card, reader.manifest.kind, reader.manifest.settings, reader.uri)
    if reader.rows(split) == 0:
        raise Refused(f"{reader.uri} has no rows in split {split!r}: name another with --split.")
    return model, reader


def shard_parts(reader: ShardReader, split: str) -> dict[int, Part]:
    """One part for every shard that holds rows of the split."""
    spans = {number: reader.span(number, split) for number in range(len(reader.manifest.shards))}
    return {number: Part(stop - first) for number, (first, stop) in spans.items() if stop > first}


def claim(out: str, request: dict[str, Any], what: str) -> Manifest | None:
    """Make `out` this request's; its manifest where it is finished already, Refused where it is another's."""
    home = storage.join(out, "request.json")
    if not storage.exists(home):
        if storage.exists(out) and storage.list_files(out):
            raise Refused(f"{out} holds other files; give an --out that is empty or does not exist.")
        storage.write_json_atomic(home, request)
        return None
    if different := differences(storage.read_json(home), request):
        raise Refused(f"{out} holds other {what} ({'; '.join(different)}). Choose another --out.")
    return load_manifest(out) if storage.exists(storage.join(out, FILE)) else None


_OPENED: dict[str, Trained] = {}


def opened(directory: str) -> Trained:
    """The bundle, loaded once per worker process: a bundle directory never changes."""
    if directory not in _OPENED:
        _OPENED.clear()
        _OPENED[directory] = trained.open_trained(Path(directory))
    return _OPENED[directory]


def rows_of_shard(reader: ShardReader, shard: int, split: str) -> list[np.ndarray]:
    """Ordinals of one shard's rows of a split, in runs of at most `ROWS_AT_ONCE`: a fixed batch, so one result."""
    first, stop = reader.span(shard, split)
    return [np.arange(low, min(low + ROWS_AT_ONCE, stop), dtype=np.int64) for low in range(first, stop, ROWS_AT_ONCE)]


def whole_batch(reader: ShardReader, split: str, ordinals: np.ndarray) -> tuple[Batch, int]:
    """The rows as a batch, and how many of them held a value that is not finite."""
    columns, row_ids = read_columns(reader, split, ordinals)
    return to_batch(columns, row_ids, np.ones(len(ordinals), dtype=bool))


def _encode_shard(shard: int, payload: None, config: dict[str, Any]) -> Record:
    model = opened(config["bundle"])
    reader = ShardReader(config["shards"])
    batches = []
    for ordinals in rows_of_shard(reader, shard, config["split"]):
        batch, lost = whole_batch(reader, config["split"], ordinals)
        if lost:
            name = reader.manifest.shards[shard].name
            raise Failed(f"{lost} rows of {name} hold values that are not finite, so they have no codes.")
        with torch.inference_mode():
            codes = model.recipe.encode(model.model, batch)
        stored = reader.take(config["split"], ordinals)
        batches.append(_codes_batch(model, codes, stored["row_id"], stored["split"]))
    schema = batches[0].schema
    return {"shards": [asdict(s) for s in write_shards(config["out"], shard, schema, batches)]}


def _codes_batch(
    model: Trained, codes: Int64[Tensor, "B ..."], row_ids: np.ndarray, splits: np.ndarray
) -> pa.RecordBatch:
    kind = smallest_integer(max(size for size, _ in model.recipe.codebooks(model.settings)))
    field = pa.field("codes", pa.fixed_shape_tensor(kind, list(codes.shape[1:])))
    schema = with_platform_columns(pa.schema([field])).with_metadata({"bundle_digest": model.digest})
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(
        np.ascontiguousarray(codes.cpu().numpy().astype(kind.to_pandas_dtype()))
    )
    return pa.record_batch([pa.array(row_ids), pa.array(splits), array], schema=schema)


def _decode_shard(shard: int, payload: None, config: dict[str, Any]) -> Record:
    model = opened(config["bundle"])
    reader = ShardReader(config["shards"])
    corpus = corpora.load(config["corpus"]["kind"])
    settings = corpus.Settings.model_validate(config["corpus"]["settings"])
    batches = []
    for ordinals in rows_of_shard(reader, shard, "all"):
        stored = reader.take("all", ordinals)
        with torch.inference_mode():
            columns = model.recipe.decode(model.model, torch.from_numpy(stored["codes"].astype(np.int64)))
        if config["files"]:
            corpus.write_files(columns, [str(row) for row in stored["row_id"]], config["out"], settings)
        else:
            batches.append(_decoded_batch(columns, stored["row_id"], stored["split"]))
    if config["files"]:
        return {"shards": [], "files": reader.manifest.shards[shard].rows}
    return {"shards": [asdict(s) for s in write_shards(config["out"], shard, batches[0].schema, batches)]}


def _decoded_batch(columns: dict[str, Tensor], row_ids: np.ndarray, splits: np.ndarray) -> pa.RecordBatch:
    arrays = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(c.cpu().numpy()) for name, c in columns.items()}
    schema = with_platform_columns(pa.schema([(name, array.type) for name, array in arrays.items()]))
    return pa.record_batch([pa.array(row_ids), pa.array(splits), *arrays.values()], schema=schema)


def _finish(
    out: str,
    kind: str,
    settings: dict[str, Any],
    context: dict[str, Any],
    parents: dict[str, str],
    records: list[Record],
    parquet: bool,
) -> Made:
    shards = tuple(ShardRecord(**shard) for record in records for shard in record["shards"])
    rows = sum(shard.rows for shard in shards) + sum(record.get("files", 0) for record in records)
    columns = _schema_of(out, shards[0]) if shards else {}
    manifest = Manifest(kind, settings, columns, shards, Units(rows, rows, 0, {}), {}, context, parents)
    manifest.save(out)
    forget_records(out)
    if parquet:
        export_parquet(out)
    return Made(out, manifest.digest, rows, skipped=False)


def _schema_of(out: str, shard: ShardRecord) -> dict[str, str]:
    with storage.open_read(storage.join(out, shard.name)) as file:
        return {field.name: str(field.type) for field in pa.ipc.open_file(file).schema}
