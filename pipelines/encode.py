"""Shards to codes and codes back to rows, with the bundle that belongs to them. One shard out per shard in."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines import corpora, registry, storage, trained
from pipelines.claims import claim
from pipelines.columns import batch_from, padded, stored_as, tail_of, values_of
from pipelines.errors import Failed, Refused
from pipelines.export import export_parquet
from pipelines.feed import as_seen, columns_of, to_batch
from pipelines.manifest import Manifest, ShardRecord, Units, describe, is_finished, load_manifest, save_manifest
from pipelines.parts import Part, Record, run_parts
from pipelines.recipe import Batch
from pipelines.shards import ShardReader, ShardWriter
from pipelines.trained import Trained

CODES = "codes"
"""The kind of a manifest whose rows are codes."""
ROWS_AT_ONCE = 128
REQUEST = "request.json"
PLATFORM_NAMES = ("row_id", "split")


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
        Refused: shards prepared otherwise than the bundle's training data, an empty split, an `out` that holds
            something else, or a model without a codebook.
        Failed: a row with a value that is not finite, since it has no codes.
    """
    out, directory = storage.normalise(out), registry.local_bundle(bundle)
    model, reader = opened_for(directory, shards, split)
    if not model.recipe.codebooks(model.settings):
        raise Refused(f"{bundle} has no codebook, so there are no codes to encode to; `vqray evaluate` measures it.")
    request = {"bundle": model.digest, "shards": reader.manifest.digest, "split": split}
    if done := finished(out, request, "codes"):
        return Made(out, done.digest, done.rows(), skipped=True)
    work = partial(_encode_shard, reader.uri, split, out)
    setup = partial(trained.open_trained, directory)
    records = run_parts(shard_parts(reader, split), work, out, label="encode", unit="rows", setup=setup)
    context = {"corpus": {"kind": reader.manifest.kind, "settings": reader.manifest.settings}}
    parents = {"bundle": model.digest, "shards": reader.manifest.digest}
    made = _finish(
        out, CODES, {"recipe": model.recipe.name}, {"split": split}, context, parents, reader.manifest, records
    )
    if parquet:
        export_parquet(out)
    return made


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
    if done := finished(out, request, "decoded rows"):
        return Made(out, done.digest, done.rows(), skipped=True)
    corpus = manifest.context["corpus"]
    work = partial(_decode_shard, reader.uri, corpus, out, files)
    setup = partial(trained.open_trained, directory)
    records = run_parts(shard_parts(reader, "all"), work, out, label="decode", unit="rows", setup=setup)
    parents = {"bundle": model.digest, "codes": manifest.digest}
    kind = f"{corpus['kind']} files" if files else corpus["kind"]
    return _finish(out, kind, corpus["settings"], manifest.selection, {}, parents, manifest, records)


def opened_for(directory: Path, shards: str, split: str) -> tuple[Trained, ShardReader]:
    """A bundle and the shards it is to work on, or Refused where they do not belong together."""
    model = trained.open_trained(directory)
    reader = ShardReader(shards)
    trained.check_fits(model.card, reader.manifest.kind, reader.manifest.settings, reader.uri)
    if reader.rows(split) == 0:
        raise Refused(f"{reader.uri} has no rows in split {split!r}: name another with --split.")
    return model, reader


def shard_parts(reader: ShardReader, split: str) -> list[Part]:
    """One part for every shard, also where it holds no row of the split."""
    return [Part(shard.rows if split == "all" else shard.splits[split]) for shard in reader.manifest.shards]


def finished(out: str, request: dict[str, Any], what: str) -> Manifest | None:
    """Claim `out`; its manifest where it is finished already."""
    claim(out, REQUEST, request, what)
    return load_manifest(out) if is_finished(out) else None


def seen_batches(reader: ShardReader, shard: int, split: str) -> Iterator[tuple[Batch, int, dict[str, Any]]]:
    """One shard's rows of a split in order: (batch, its rows that were not finite, the rows as stored).

    Batches have a fixed size, so that a result does not depend on who computes it.
    """
    for rows in reader.batches(shard, ROWS_AT_ONCE, split):
        columns, row_ids = as_seen(reader.manifest, rows)
        batch, lost = to_batch(columns, row_ids, np.ones(rows.num_rows, dtype=bool))
        yield batch, lost, values_of(rows)


def _encode_shard(shards: str, split: str, out: str, shard: int, payload: None, model: Trained) -> Record:
    reader = ShardReader(shards)
    kind = smallest_integer(max(size for size, _ in model.recipe.codebooks(model.settings)))
    ragged = bool(_ragged(reader.manifest)) and any(pa.types.is_list(item.type) for item in reader.schema)
    writer: ShardWriter | None = None
    for batch, lost, stored in seen_batches(reader, shard, split):
        if lost:
            name = reader.manifest.shards[shard].name
            raise Failed(f"{lost} rows of {name} hold values that are not finite, so they have no codes.")
        with torch.inference_mode():
            codes = model.recipe.encode(model.model, batch)
        small = torch.from_numpy(codes.cpu().numpy().astype(kind.to_pandas_dtype()))
        made = batch_from({"codes": small}, {"codes": _lengths(batch.columns, codes)} if ragged else {})
        made = made.replace_schema_metadata({"bundle_digest": model.digest})
        writer = writer or ShardWriter(out, shard, made.schema)
        writer.write(made, stored["split"], stored["row_id"])
    return {"shards": [asdict(record) for record in writer.close()] if writer else []}


def _decode_shard(
    codes: str, made_from: dict[str, Any], out: str, files: bool, shard: int, payload: None, model: Trained
) -> Record:
    reader = ShardReader(codes)
    corpus = corpora.load(made_from["kind"])
    settings = corpus.Settings.model_validate(made_from["settings"])
    schema = corpus.schema(settings)
    ragged = [name for name, shape in corpus.shapes(settings).items() if shape is None]
    tail = tail_of(reader.schema.field("codes"))
    writer: ShardWriter | None = None
    for rows in reader.batches(shard, ROWS_AT_ONCE):
        stored = values_of(rows)
        found = torch.from_numpy(stored["codes"]) if tail is None else padded(stored["codes"], tail, fill=-1)[0]
        found = found.to(torch.int64)
        with torch.inference_mode():
            columns = model.recipe.decode(model.model, found)
        columns = {
            name: stored_as(column, schema.field(name)) if name in schema.names else column
            for name, column in columns.items()
        }
        if files:
            corpus.write_files(columns, [str(row) for row in stored["row_id"]], out, settings)
            continue
        made = _trimmed(columns, ragged, found)
        writer = writer or ShardWriter(out, shard, made.schema)
        writer.write(made, stored["split"], stored["row_id"])
    return {"shards": [asdict(record) for record in writer.close()] if writer else []}


def _trimmed(columns: dict[str, Tensor], ragged: Collection[str], codes: Tensor) -> pa.RecordBatch:
    """Decoded columns as they are stored: ragged ones without what they were filled up with, and without masks."""
    lengths = {name: _lengths(columns, codes, columns[name].shape[1]) for name in ragged if name in columns}
    return batch_from({name: column for name, column in columns.items() if column.dtype != torch.bool}, lengths)


def _lengths(columns: Mapping[str, Tensor], codes: Tensor, most: int | None = None) -> Tensor:
    """How many of `most` (default: of the codes' L) places of each row are real, [B].

    A mask [B, L] among the columns says so; without one what has codes is real, or all where codes have another L.
    """
    most = codes.shape[1] if most is None else most
    real = codes != -1 if codes.dim() == 2 else (codes != -1).flatten(2).any(2)
    if real.shape[1] != most:
        real = torch.ones(len(codes), most, dtype=torch.bool)
    for name, column in columns.items():
        if name.endswith("_mask") and column.dtype == torch.bool and column.shape == real.shape:
            real = column
    # The last real place: what is masked before it is a gap, such as a residue without coordinates.
    places = real * torch.arange(1, most + 1, device=real.device)
    return torch.nn.functional.pad(places, (1, 0)).amax(1)


def _ragged(manifest: Manifest) -> list[str]:
    """Columns a recipe sees whose rows differ in shape."""
    return [name for name, shape in columns_of(manifest).items() if shape is None]


def _finish(
    out: str,
    kind: str,
    settings: dict[str, Any],
    selection: dict[str, Any],
    context: dict[str, Any],
    parents: dict[str, str],
    made_from: Manifest,
    records: list[Record],
) -> Made:
    shards = tuple(ShardRecord(**shard) for record in records for shard in record["shards"])
    # Files have no shards to count; every row of the codes became one.
    rows = sum(shard.rows for shard in shards) or made_from.rows()
    columns = {}
    if shards:
        with storage.open_read(storage.join(out, shards[0].name)) as file:
            columns = describe(pa.schema([f for f in pa.ipc.open_file(file).schema if f.name not in PLATFORM_NAMES]))
    manifest = Manifest(kind, settings, selection, columns, shards, Units(rows, rows, 0, {}), "", parents, context)
    save_manifest(manifest, out)
    return Made(out, manifest.digest, rows, skipped=False)
