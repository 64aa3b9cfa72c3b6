"""A corpus for tests: lines `group value` of *.txt files, or `group value,value,...` for units of many rows.

Importable by name, so that Ray's workers find it too.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.corpora import Bad, Corpus, CorpusSettings, Filtered, Joined, Row, SideTable, Slice, Survey


class TinySettings(CorpusSettings):
    scale: float = 1.0
    most: int = 1_000_000
    """Larger values are filtered."""
    diary: str = ""
    """A directory where every read slice leaves a mark."""
    pause: float = 0.0
    log: str = ""
    """A file of lines `user time`: the corpus's side table."""


def survey(sources: list[str], settings: TinySettings) -> Survey:
    files = [entry for source in sources for entry in storage.list_files(source)]
    texts = [entry for entry in files if entry.name.endswith(".txt")]
    slices = [
        Slice(entry.uri, entry.name, 0, len(storage.read_bytes(entry.uri).splitlines()), entry.bytes) for entry in texts
    ]
    return Survey(slices, {"letters": ["a", "b"]}, {"other files": len(files) - len(texts)} if files != texts else {})


def read(
    piece: Slice, context: Mapping[str, Any], settings: TinySettings, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Row | list[Row] | Bad | Filtered | Joined, bytes]]:
    if settings.diary:
        mark = f"read.{os.getpid()}.{time.time_ns()}.{piece.name.replace('/', '_')}"
        open(os.path.join(settings.diary, mark), "w").close()
        time.sleep(settings.pause)
    for unit, line in enumerate(storage.read_bytes(piece.uri).splitlines()):
        if not wanted(unit):
            continue
        words = line.decode().split()
        if words == ["vanish"]:
            continue
        if words == ["crash"]:
            raise ZeroDivisionError("a bug in the corpus")
        if words == ["joined"]:
            yield unit, Joined(), line
        elif len(words) != 2:
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


def tables(sources: list[str], settings: TinySettings) -> Iterator[SideTable]:
    lines = [line.split() for line in storage.read_bytes(settings.log).decode().splitlines()]
    bad = [(n, Bad("log", "no time")) for n, words in enumerate(lines) if len(words) != 2]
    good = [(user, int(time)) for user, time in (words for words in lines if len(words) == 2) if user != "test"]
    users, times = zip(*sorted(good, key=lambda row: row[1]), strict=True)
    table = pa.table({"user": pa.array(users), "time": pa.array(times)})
    yield SideTable("log", table, bad, {"test user": len(lines) - len(bad) - len(good)})


def load_scale(settings: TinySettings) -> dict[str, Any]:
    """A model, of a kind: what reading multiplies by. Each load leaves a mark."""
    import torch

    if settings.diary:
        open(os.path.join(settings.diary, f"load.{os.getpid()}.{time.time_ns()}"), "w").close()
    return {"scale": settings.scale, "threads": torch.get_num_threads(), "process": os.getpid()}


def read_with_model(
    piece: Slice,
    context: Mapping[str, Any],
    settings: TinySettings,
    wanted: Callable[[int], bool],
    model: dict[str, Any],
) -> Iterator[tuple[int, Row | Bad | Filtered | Joined, bytes]]:
    """As `read`, scaled by the model; a line `kill` ends the worker that reads it first."""
    mark = os.path.join(settings.diary, "killed")
    if b"kill\n" in storage.read_bytes(piece.uri) and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    plain = settings.model_copy(update={"scale": 1.0})
    for unit, found, fingerprint in read(piece, context, plain, wanted):
        if isinstance(found, Row):
            text = f"{found.values['text']} {model['threads']}"
            found = Row({"vector": found.values["vector"] * model["scale"], "text": text}, found.group)
        yield unit, found, fingerprint


corpus = Corpus(TinySettings, survey, read, schema, never, never, never)
modelled = replace(corpus, read=read_with_model, setup=load_scale)
logged = replace(corpus, tables=tables)
