"""A corpus for tests: lines `group value` of *.txt files, or `group value,value,...` for units of many rows.

Importable by name, so that Ray's workers find it too.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.corpora import Bad, Corpus, CorpusSettings, Filtered, Row, Slice, Survey


class TinySettings(CorpusSettings):
    scale: float = 1.0
    most: int = 1_000_000
    """Larger values are filtered."""
    diary: str = ""
    """A directory where every read slice leaves a mark."""
    pause: float = 0.0


def survey(sources: list[str], settings: TinySettings) -> Survey:
    files = [entry for source in sources for entry in storage.list_files(source)]
    texts = [entry for entry in files if entry.name.endswith(".txt")]
    slices = [
        Slice(entry.uri, entry.name, 0, len(storage.read_bytes(entry.uri).splitlines()), entry.bytes) for entry in texts
    ]
    return Survey(slices, {"letters": ["a", "b"]}, {"other files": len(files) - len(texts)} if files != texts else {})


def read(
    piece: Slice, context: Mapping[str, Any], settings: TinySettings, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Row | list[Row] | Bad | Filtered, bytes]]:
    if settings.diary:
        open(os.path.join(settings.diary, f"{piece.name.replace('/', '_')}.{time.time_ns()}"), "w").close()
        time.sleep(settings.pause)
    for unit, line in enumerate(storage.read_bytes(piece.uri).splitlines()):
        if not wanted(unit):
            continue
        words = line.decode().split()
        if words == ["vanish"]:
            continue
        if words == ["crash"]:
            raise ZeroDivisionError("a bug in the corpus")
        if len(words) != 2:
            yield unit, Bad(piece.name, f"{len(words)} words instead of 2"), line
        elif "," in words[1]:
            yield unit, [_row(words[0], value, settings) for value in words[1].split(",") if value], line
        elif int(words[1]) > settings.most:
            yield unit, Filtered("most"), line
        else:
            yield unit, _row(words[0], words[1], settings), line


def _row(group: str, value: str, settings: TinySettings) -> Row:
    return Row({"vector": np.full((2, 2), int(value) * settings.scale, np.float64), "text": group}, group)


def schema(settings: TinySettings) -> pa.Schema:
    return pa.schema({"vector": pa.fixed_shape_tensor(pa.float32(), (2, 2)), "text": pa.string()})


def never(*_: object) -> Any:
    raise NotImplementedError


corpus = Corpus(TinySettings, survey, read, schema, never, never, never)
