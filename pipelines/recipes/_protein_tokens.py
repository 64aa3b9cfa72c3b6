"""Tokens of protein structures, one code a residue: of a trained bundle, or made elsewhere and read from files.

Tokens made elsewhere are a table of codes (.parquet, .arrow, .feather, .jsonl) with the columns `name` and `chain` as
the shards have them, `codes` (integers, one a residue of that row, -1 for a residue without one) and, where they are
needed to tell rows apart, `model` (default 1, the first) and `copy` (default 0); and what the codes stand for, [K, D]
as .npy or .safetensors with one tensor.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipelines import storage
from pipelines.errors import Refused
from pipelines.recipe import Batch
from pipelines.shards import ShardReader
from pipelines.trained import Trained
from vqcore.quantizers.contract import quantizers_in

Key = tuple[str, str, int, int]
"""(name, chain, copy, model) of a row of protein shards."""
KEY_COLUMNS = ("name", "chain", "copy", "model")
TABLES = (".parquet", ".arrow", ".feather", ".jsonl")


@dataclass(frozen=True)
class ProteinTokens:
    """A source of structure tokens, as the evaluation sees it."""

    vectors: Float[Tensor, "K D"]
    """What a code stands for: look_up of every code."""
    codes: Callable[[Batch], Int64[Tensor, "B L"]]
    """-1 where there is no residue or no code for it."""
    what: str
    """In a few words, for people."""
    latents: Callable[[Batch], Float[Tensor, "B L D"]] | None = None
    """Before the quantizer: what no code can beat."""
    rebuilt: Callable[[Float[Tensor, "B L D"], Bool[Tensor, "B L"]], Float[Tensor, "B L 3 3"]] | None = None
    """(vectors, residues there are) -> backbone N, CA, C in Angstrom."""
    missing: int = 0
    """Rows of the shards that have no tokens."""
    elsewhere: Callable[[ShardReader], "ProteinTokens"] | None = None
    """The same tokens for other shards; None where `codes` takes any batch."""

    def on(self, reader: ShardReader) -> "ProteinTokens":
        return self if self.elsewhere is None else self.elsewhere(reader)


def tokens_of(trained: Trained) -> ProteinTokens:
    """Codes and vectors of any recipe that gives one code a residue. Latents and decoding are the recipe's to add.

    Raises:
        Refused: the bundle has several codebooks.
    """
    found = [quantizer for _, quantizer in quantizers_in(trained.model)]
    books = trained.recipe.codebooks(trained.settings)
    if len(found) != 1 or len(books) != 1:
        raise Refused(
            f"the bundle of {trained.recipe.name!r} has {len(books)} codebooks in {len(found)} quantizers; structure"
            " tokens are one code a residue, of one codebook. Train with a single level."
        )
    quantizer: Any = found[0]
    size = books[0][0]

    def codes(batch: Batch) -> Tensor:
        with torch.inference_mode():
            given = trained.recipe.encode(trained.model, batch)
        real = batch.columns["residue_mask"]
        if given.shape != real.shape:
            raise Refused(
                f"recipe {trained.recipe.name!r} encodes {tuple(real.shape)} residues to codes of shape"
                f" {tuple(given.shape)}; the evaluation of structure tokens takes one code a residue."
            )
        return given.cpu().long().masked_fill(~real, -1)

    with torch.inference_mode():
        device = next(iter(trained.model.state_dict().values())).device
        vectors = quantizer.look_up(torch.arange(size, device=device)).float().cpu()
    return ProteinTokens(
        vectors.clone(), codes, f"{trained.recipe.name}, {size} codes of {vectors.shape[1]} dimensions"
    )


# Tokens made elsewhere


def read_tokens(codes: str, vectors: str) -> ProteinTokens:
    """Tokens from files; `on(reader)` matches them to the rows of shards.

    Raises:
        Refused: a file that is missing or of another form, two rows of one chain, codes outside [0, K). From `on`: rows
            whose number of codes is not that of their residues, or no row with tokens at all.
    """
    book = _vectors(storage.normalise(vectors))
    table = dict(_checked(storage.normalise(codes), len(book)))

    def unmatched(batch: Batch) -> Tensor:
        raise ValueError("tokens from a file belong to rows: call on(reader) first")

    what = f"tokens of {codes.rstrip('/').rpartition('/')[2]}, {len(book)} codes of {book.shape[1]} dimensions"
    tokens = ProteinTokens(book, unmatched, what)
    return replace(tokens, elsewhere=lambda reader: _matched(tokens, table, reader))


def keys_of(reader: ShardReader, split: str = "all") -> list[Key]:
    """Of every row of a split."""
    taken = reader.take(split, np.arange(reader.rows(split)), KEY_COLUMNS)
    return list(zip(*(taken.column(name).to_pylist() for name in KEY_COLUMNS), strict=True))


def _matched(tokens: ProteinTokens, table: Mapping[Key, npt.NDArray[np.int64]], reader: ShardReader) -> ProteinTokens:
    rows = reader.take("all", np.arange(reader.rows()), ("row_id", "length"))
    found: dict[int, npt.NDArray[np.int64]] = {}
    keys = keys_of(reader)
    for key, row, length in zip(keys, rows["row_id"].to_pylist(), rows["length"].to_pylist(), strict=True):
        if key not in table:
            continue
        if len(table[key]) != length:
            raise Refused(
                f"the tokens of {_shown(key)} are {len(table[key])} codes, and that row of {reader.uri} has {length}"
                " residues: give one code for every residue of the shards (-1 for one without a code)."
            )
        found[row] = table[key]
    if not found:
        raise Refused(
            f"none of the {len(table):,} token rows is a row of {reader.uri}: the first is of"
            f" {_shown(next(iter(table)))}, and the first row there is {_shown(keys[0])}. Names must be alike."
        )

    def codes(batch: Batch) -> Tensor:
        given = np.full(batch.columns["residue_mask"].shape, -1, np.int64)
        for place, row in enumerate(batch.keys.tolist()):
            own = found.get(row)
            if own is not None:
                given[place, : len(own)] = own
        return torch.from_numpy(given)

    return replace(tokens, codes=codes, missing=len(keys) - len(found))


def _checked(uri: str, size: int) -> Iterator[tuple[Key, npt.NDArray[np.int64]]]:
    seen: set[Key] = set()
    for row in _rows(uri):
        copy, model = row.get("copy") or 0, row.get("model") or 1
        if not isinstance(copy, int) or not isinstance(model, int):
            raise Refused(f"{uri}: copy={copy!r} and model={model!r} of {row['name']} must be whole numbers.")
        key = (str(row["name"]), str(row["chain"]), copy, model)
        codes = np.asarray(row["codes"])
        if codes.ndim != 1 or (codes.size and codes.dtype.kind not in "iu"):
            raise Refused(f"the codes of {_shown(key)} in {uri} are no list of integers; give one integer a residue.")
        codes = codes.astype(np.int64)
        if codes.size and (codes.min() < -1 or codes.max() >= size):
            wrong = codes[(codes < -1) | (codes >= size)][0]
            raise Refused(
                f"{_shown(key)} in {uri} has the code {wrong}, and there are {size} vectors: codes are 0 to {size - 1},"
                " or -1 for a residue without one. Are these the vectors that belong to them?"
            )
        if key in seen:
            raise Refused(f"{uri} has two rows of {_shown(key)}; keep one, or tell them apart by `model` or `copy`.")
        seen.add(key)
        yield key, codes
    if not seen:
        raise Refused(f"{uri} holds no tokens; give one row a chain.")


def _rows(uri: str) -> Iterator[Mapping[str, Any]]:
    kind = next((ending for ending in TABLES if uri.endswith(ending)), None)
    if kind is None:
        raise Refused(f"tokens={uri} was given; allowed are {', '.join(TABLES)} files.")
    data = _bytes(uri)
    try:
        if kind == ".jsonl":
            table = pa.Table.from_pylist([json.loads(line) for line in data.decode().splitlines() if line.strip()])
        elif kind == ".parquet":
            table = pq.read_table(io.BytesIO(data))
        else:
            table = pa.ipc.open_file(io.BytesIO(data)).read_all()
    except (pa.ArrowException, ValueError, TypeError, AttributeError) as trouble:
        raise Refused(f"tokens={uri} cannot be read as {kind}: {trouble}") from None
    if absent := {"name", "chain", "codes"} - set(table.column_names):
        raise Refused(
            f"tokens={uri} has no column {', '.join(sorted(absent))}; it has {', '.join(table.column_names)}, and"
            " needs name, chain and codes."
        )
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _vectors(uri: str) -> Float[Tensor, "K D"]:
    data = _bytes(uri)
    try:
        if uri.endswith(".npy"):
            found = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32))
        elif uri.endswith(".safetensors"):
            from safetensors.torch import load

            held = load(data)
            if len(held) != 1:
                raise Refused(f"vectors={uri} holds {len(held)} tensors ({', '.join(held)}); give a file with one.")
            found = next(iter(held.values())).float()
        else:
            raise Refused(f"vectors={uri} was given; allowed are .npy and .safetensors files.")
    except Refused:
        raise
    except Exception as trouble:
        raise Refused(f"vectors={uri} cannot be read: {trouble}") from None
    if found.dim() != 2 or not found.numel() or not bool(found.isfinite().all()):
        raise Refused(f"vectors={uri} has shape {tuple(found.shape)}; it must be finite [K, D], one vector a code.")
    return found


def _bytes(uri: str) -> bytes:
    if not storage.exists(uri):
        raise Refused(f"{uri} does not exist; give the file's place.")
    return storage.read_bytes(uri)


def _shown(key: Key) -> str:
    name, chain, copy, model = key
    return f"{name} chain {chain}" + (f" copy {copy}" if copy else "") + (f" model {model}" if model != 1 else "")
