"""Citation graphs (.npz): each document with all that lies within some steps of it, as one graph.

The node is the unit, not the graph: labels and splits belong to nodes, and a network sees of a node no more than the
neighbourhood its layers reach. So a row is that neighbourhood, and what trains on molecules trains on it.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import storage
from pipelines.corpora import NOT_TEST, Bad, Slice
from pipelines.corpora import _text_tables as tables
from pipelines.errors import Failed, Refused
from pipelines.storage import Entry

ARRAYS = ("x_indptr", "x_indices", "num_features", "y", "edge_index")
MASKS = {"train_mask": "train", "val_mask": "valid", "test_mask": "test"}
MOST_BYTES = 2 << 30
"""Of all arrays unpacked: a graph is held in memory."""
SLICE_NODES = 1000
DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, NotImplementedError, Refused, Failed)

Numbers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Citations:
    """One file, checked: every index lies where it may."""

    word_starts: Numbers
    """[N + 1]: the words of node n are words[word_starts[n]:word_starts[n + 1]]."""
    words: Numbers
    num_words: int
    labels: Numbers
    """[N]; -1 where there is none."""
    sources: Numbers
    """[M] from, sorted by where the edge leads to."""
    edge_starts: Numbers
    """[N + 1]: the edges into node n come from sources[edge_starts[n]:edge_starts[n + 1]]."""
    splits: list[str | None]


@dataclass(frozen=True)
class Neighbourhood:
    """One node and what lies around it."""

    name: str
    nodes: Numbers
    """[A] numbers in the file; the first is the node the row is about."""
    words: Numbers
    """Of all nodes, one behind the other."""
    word_counts: Numbers
    """[A]"""
    edges: Numbers
    """[E, 2]: from, to; every edge of the file between these nodes."""
    label: int
    split: str | None


def is_npz(name: str) -> bool:
    return name.lower().endswith(".npz")


def of_npz(entry: Entry, prefix: str) -> list[Slice]:
    """The nodes of a graph in slices."""
    try:
        graph = opened(entry.uri)
    except DAMAGE as trouble:
        return tables.unreadable(entry, prefix, f"not a citation graph: {tables.first_line(trouble)}")
    count = len(graph.labels)
    return [
        Slice(entry.uri, prefix + entry.name, low, min(low + SLICE_NODES, count), entry.bytes, {"layout": "npz"})
        for low in range(0, count, SLICE_NODES)
    ]


def read_npz(piece: Slice, hops: int, wanted: tables.Wanted) -> Iterator[tuple[int, Neighbourhood | Bad, bytes]]:
    """Every wanted node of a slice with its neighbourhood."""
    units = [unit for unit in range(piece.stop - piece.start) if wanted(unit)]
    try:
        graph = opened(piece.uri)
    except DAMAGE as trouble:
        reason = f"not a citation graph: {tables.first_line(trouble)}"
        yield from ((unit, Bad(tables.unit_name(piece, unit), reason), reason.encode()) for unit in units)
        return
    for unit in units:
        node, name = piece.start + unit, tables.unit_name(piece, unit)
        if node >= len(graph.labels):
            yield unit, Bad(name, "the file ends before this record"), b""
            continue
        found = neighbourhood(graph, node, hops, name)
        arrays = (found.nodes, found.words, found.word_counts, found.edges)
        data = b"".join(np.ascontiguousarray(array, "<i8").tobytes() for array in arrays)
        yield unit, found, hashlib.sha256(data + b"%d" % found.label).digest()


def neighbourhood(graph: Citations, node: int, hops: int, name: str) -> Neighbourhood:
    """`node` first, then what reaches it over one edge in order of number, then over two, and so on."""
    nodes, ring = [np.array([node])], np.array([node])
    seen = {node}
    for _ in range(hops):
        into = [graph.sources[graph.edge_starts[n] : graph.edge_starts[n + 1]] for n in ring]
        ring = np.array([n for n in np.unique(np.concatenate(into)).tolist() if n not in seen], np.int64)
        if not len(ring):
            break
        seen.update(ring.tolist())
        nodes.append(ring)
    inside = np.concatenate(nodes)
    place = {number: index for index, number in enumerate(inside.tolist())}
    edges = [
        (place[source], place[target])
        for target in inside.tolist()
        for source in graph.sources[graph.edge_starts[target] : graph.edge_starts[target + 1]].tolist()
        if source in place
    ]
    words = [graph.words[graph.word_starts[n] : graph.word_starts[n + 1]] for n in inside]
    return Neighbourhood(
        name,
        inside,
        np.concatenate(words),
        np.array([len(some) for some in words]),
        np.array(edges, np.int64).reshape(-1, 2),
        int(graph.labels[node]),
        graph.splits[node],
    )


def opened(uri: str) -> Citations:
    """A whole graph.

    Raises:
        ValueError: an array is missing, is too large or holds an index that points nowhere; and what zip files raise.
    """
    with storage.open_read(uri) as file:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MOST_BYTES:
            raise ValueError(f"its arrays unpack to more than {MOST_BYTES:,} bytes")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            if missing := [name for name in ARRAYS if name not in arrays.files]:
                raise ValueError(f"it has no array {missing[0]!r}; needed are {', '.join(ARRAYS)}")
            starts, words, size, labels, edges = (arrays[name] for name in ARRAYS)
            masks = {split: arrays[name].astype(bool) for name, split in MASKS.items() if name in arrays.files}
    _check(
        all(np.issubdtype(some.dtype, np.integer) for some in (starts, words, labels, edges)), "an array", "integers"
    )
    _check(labels.ndim == 1 and size.ndim == 0, "y", "[N], or num_features one number")
    count = len(labels)
    _check(starts.shape == (count + 1,) and starts[0] == 0 and starts[-1] == len(words), "x_indptr", "x_indices and y")
    _check(bool((np.diff(starts) >= 0).all()), "x_indptr", "itself: it falls")
    _check(not len(words) or (words.min() >= 0 and words.max() < int(size)), "x_indices", "num_features")
    _check(edges.ndim == 2 and len(edges) == 2, "edge_index", "edges: it is not [2, M]")
    _check(not edges.size or (edges.min() >= 0 and edges.max() < count), "edge_index", "y")
    _check(all(mask.shape == (count,) for mask in masks.values()), "a mask", "y")
    order = np.lexsort((edges[0], edges[1]))
    into = np.concatenate([[0], np.cumsum(np.bincount(edges[1], minlength=count))])
    splits = _splits(masks, count)
    if masks:
        # Nodes outside the masks are there to learn from, but the official split does not give their labels.
        outside = ~np.logical_or.reduce(list(masks.values()))
        labels = np.where(outside, -1, labels)
    return Citations(starts, words, int(size), labels, edges[0][order], into, splits)


def _splits(masks: dict[str, npt.NDArray[np.bool_]], count: int) -> list[str | None]:
    """Official splits where there are masks."""
    if not masks.keys() & {"valid", "test"}:
        return [None] * count
    train = "train" if masks.keys() >= {"valid", "test"} else NOT_TEST if "test" in masks else None
    splits: list[str | None] = [train] * count
    for split in ("valid", "test"):
        for node in np.flatnonzero(masks.get(split, [])).tolist():
            splits[node] = split
    return splits


def _check(fits: bool | np.bool_, name: str, other: str) -> None:
    if not fits:
        raise ValueError(f"{name} does not fit {other}")
