"""Molecules from SMILES tables and SDF as graphs with Hu et al.'s features; citation graphs as neighbourhoods."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipelines import storage
from pipelines.columns import padded, ragged_field
from pipelines.corpora import Bad, Corpus, CorpusSettings, Filtered, Row, Slice, Survey, _sources
from pipelines.corpora import _molecule_citations as citations
from pipelines.corpora import _molecule_features as features
from pipelines.corpora import _molecule_files as files
from pipelines.corpora import _molecule_labels as meanings
from pipelines.corpora import _molecule_sdf as sdf
from pipelines.corpora import _text_tables as tables
from pipelines.errors import Failed, Refused

READ = ".csv, .tsv and .parquet with a column of SMILES (.csv and .tsv also as .gz), .smi, .sdf, .sdf.gz, .sd and .mol"


class MoleculeSettings(CorpusSettings):
    graphs: Literal["molecules", "citations"] = Field("molecules", description="citations reads .npz citation graphs")
    # What columns are called differs between files of one preparation; the context says which labels were taken.
    smiles: str | None = Field(None, exclude=True, description="column of SMILES; none finds it by its usual names")
    labels: tuple[str, ...] | None = Field(
        (), exclude=True, description="label columns; default every column of numbers that is no index; `none`: none"
    )
    split: str | None = Field(
        None, exclude=True, description="column of official splits; default `split` where it holds splits"
    )
    split_by: Literal["scaffold", "molecule"] = Field(
        "scaffold", description="what stays together where no split is official (out of domain, in domain)"
    )
    chirality: bool = Field(True, description="scaffolds that differ in chirality differ")
    fragments: Literal["all", "largest"] = Field("all", description="of a salt or mixture keep all, or the largest")
    # RDKit's scaffolds take time with the cube of it: 3 s for 1,000 atoms, a minute for 2,000.
    max_atoms: int = Field(1000, ge=1, description="molecules with more atoms (hydrogens not counted) are left out")
    hops: int = Field(2, ge=0, le=10, description="citations: how far a node's neighbourhood reaches")

    @field_validator("labels", mode="before")
    @classmethod
    def _one_label(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def survey(sources: list[str], settings: MoleculeSettings) -> Survey:
    """What molecules (or nodes of citation graphs) there are, what their labels are called, what split is official.

    Tables are read once to count their records, and once more where a split or a label of classes has to be known.
    Labels of several files are put side by side: a file has none of another's.

    Raises:
        Refused: a source in which there is nothing of this kind, a column that no file has.
    """
    ignored: Counter[str] = Counter()
    if settings.graphs == "citations":
        return Survey(_citation_slices(sources, ignored), {}, dict(ignored))
    features.chemistry()
    found = []
    for source, prefix in zip(sources, _sources.prefixes(sources), strict=True):
        here, seen = _opened(source, prefix, settings, ignored)
        if not here:
            raise Refused(_nothing_in(source, seen, ignored))
        found += here
    split, official = meanings.split_of(found, settings.split)
    labels, classes = meanings.labels_of(found, settings.labels, split)
    slices = [piece for source in found for piece in files.with_columns(source, labels, split)]
    return Survey(slices, {"labels": labels, "classes": classes, "official": official}, dict(ignored))


def _citation_slices(sources: list[str], ignored: Counter[str]) -> list[Slice]:
    slices = []
    for source, prefix in zip(sources, _sources.prefixes(sources), strict=True):
        entries = storage.list_files(source)
        graphs = [entry for entry in entries if citations.is_npz(entry.name) and not _sources.is_hidden(entry.name)]
        if not graphs:
            raise Refused(f"there is no citation graph in {source!r}: graphs=citations reads .npz files.")
        ignored.update(_sources.why_ignored(entry.name, "an .npz file") for entry in entries if entry not in graphs)
        slices += [piece for entry in graphs for piece in citations.of_npz(entry, prefix)]
    return slices


def _opened(
    source: str, prefix: str, settings: MoleculeSettings, ignored: Counter[str]
) -> tuple[list[files.Source], dict[str, list[str]]]:
    """The files of molecules under a source, and the columns of tables that are none of them."""
    found: list[files.Source] = []
    others: dict[str, list[str]] = {}
    for entry in storage.list_files(source):
        table = tables.layout_of(entry.name) in ("csv", "tsv", "parquet") or files.is_smi(entry.name)
        if _sources.is_hidden(entry.name) or not (table or sdf.is_sdf(entry.name)):
            ignored[_sources.why_ignored(entry.name, "a file of molecules")] += 1
            continue
        opened = files.open_table(entry, prefix, settings.smiles) if table else files.open_sdf(entry, prefix)
        if opened is None:
            ignored["a table without a column of SMILES"] += 1
            layout = tables.layout_of(entry.name)
            others[entry.name] = files.columns_of(entry, layout) if layout else []
        elif not opened.slices:
            ignored["a file without records"] += 1
        else:
            found.append(opened)
    return found, others


def _nothing_in(source: str, others: dict[str, list[str]], ignored: Counter[str]) -> str:
    if others:
        name, columns = next(iter(others.items()))
        return (
            f"no column of {name} in {source!r} is called {', '.join(files.SMILES_NAMES)}. "
            f"It has: {', '.join(columns)}. Name the column of SMILES with --set smiles=..."
        )
    held = ", ".join(f"{count:,} x {reason}" for reason, count in ignored.most_common(3)) or "nothing"
    return (
        f"there is no molecule in {source!r}; it holds {held}. Allowed are {READ}; "
        "for citation graphs (.npz) give --set graphs=citations."
    )


def read(
    piece: Slice, context: Mapping[str, Any], settings: MoleculeSettings, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Row | Bad | Filtered, bytes]]:
    """Every wanted molecule (or node) of a slice as a row, or why it is none, with the digest of its record."""
    if settings.graphs == "citations":
        for unit, node, digest in citations.read_npz(piece, settings.hops, wanted):
            yield unit, node if isinstance(node, Bad) else _node_row(node), digest
        return
    with features.quietly():
        for unit, found, digest in files.read(piece, wanted):
            yield unit, found if isinstance(found, Bad) else _molecule(found, piece, context, settings), digest


def _molecule(
    found: files.Found, piece: Slice, context: Mapping[str, Any], settings: MoleculeSettings
) -> Row | Bad | Filtered:
    try:
        parse = features.from_sdf if piece.meta["layout"] == "sdf" else features.from_smiles
        molecule = parse(found.text)
        if settings.fragments == "largest":
            molecule = features.largest_fragment(molecule)
        if molecule.GetNumAtoms() > settings.max_atoms:
            return Filtered("max_atoms")
        graph = features.graph(molecule)
        scaffold = features.scaffold(molecule, settings.chirality)
        smiles = features.canonical(molecule)
        labels = meanings.label_values(found.values, context)
        split = meanings.official_split(found.values, piece.meta["split"], context["official"])
    except features.UnreadableMolecule as trouble:
        return Bad(found.name, str(trouble))
    values = {
        "nodes": graph.nodes,
        "num_nodes": len(graph.nodes),
        "edges": graph.edges,
        "edge_features": graph.edge_features,
        "num_edges": len(graph.edges),
        "labels": labels,
        "smiles": smiles,
        "scaffold": scaffold,
        "name": found.name,
    }
    return Row(values, group=scaffold if settings.split_by == "scaffold" else smiles, split=split)


def _node_row(node: citations.Neighbourhood) -> Row:
    values = {
        "words": node.words,
        "word_counts": node.word_counts,
        "node_ids": node.nodes,
        "num_nodes": len(node.nodes),
        "edges": node.edges,
        "num_edges": len(node.edges),
        "label": node.label,
        "name": node.name,
    }
    return Row(values, group=node.name, split=node.split)


def schema(settings: MoleculeSettings) -> pa.Schema:
    number, text = pa.int32(), pa.string()
    if settings.graphs == "citations":
        return pa.schema(
            [
                ragged_field("words", number),
                ragged_field("word_counts", number),
                ragged_field("node_ids", number),
                ("num_nodes", number),
                ragged_field("edges", number, (2,)),
                ("num_edges", number),
                ("label", number),
                ("name", text),
            ]
        )
    return pa.schema(
        [
            ragged_field("nodes", pa.int16(), (2,)),
            ("num_nodes", number),
            ragged_field("edges", number, (2,)),
            ragged_field("edge_features", pa.int8(), (2,)),
            ("num_edges", number),
            ragged_field("labels", pa.float32()),
            ("smiles", text),
            ("scaffold", text),
            ("name", text),
        ]
    )


def shapes(settings: MoleculeSettings) -> dict[str, list[int] | None]:
    if settings.graphs == "citations":
        return {"words": None, "words_mask": None, "nodes_mask": None, "edges": None, "edges_mask": None, "label": []}
    return dict.fromkeys(("nodes", "nodes_mask", "edges", "edges_mask", "edge_features", "labels", "labels_mask"), None)


def tensors(stored: dict[str, Any], settings: MoleculeSettings) -> dict[str, Tensor]:
    """Graphs padded with zeros to the largest of the batch; masks are True where something real is.

    Molecules: nodes [B, A, 2], edges [B, E, 2] and edge_features [B, E, 2] int64, labels [B, T] float32 with 0 where
    labels_mask is False: a NaN would cost the row. Citations: words [B, A, W] int64, label [B] int64.
    """
    edges, edges_mask = padded(stored["edges"], (2,))
    if settings.graphs == "citations":
        words, words_mask = _words(stored["words"], stored["word_counts"])
        return {
            "words": words,
            "words_mask": words_mask,
            "nodes_mask": padded(stored["node_ids"])[1],
            "edges": edges.long(),
            "edges_mask": edges_mask,
            "label": torch.from_numpy(stored["label"]).long(),
        }
    nodes, nodes_mask = padded(stored["nodes"], (2,))
    labels = padded(stored["labels"])[0]
    return {
        "nodes": nodes.long(),
        "nodes_mask": nodes_mask,
        "edges": edges.long(),
        "edges_mask": edges_mask,
        "edge_features": padded(stored["edge_features"], (2,))[0].long(),
        "labels": labels.nan_to_num(nan=0.0),
        "labels_mask": ~labels.isnan(),
    }


def _words(words: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(words [B, A, W], mask) of B graphs: all words of a graph one behind the other, and how many each node has."""
    sizes = [np.asarray(row) for row in counts]
    nodes = [node for row, many in zip(words, sizes, strict=True) for node in np.split(row, np.cumsum(many)[:-1])]
    flat, flat_mask = padded(nodes)
    _, real = padded(counts)
    values = torch.zeros((*real.shape, flat.shape[1]), dtype=torch.int64)
    mask = torch.zeros(values.shape, dtype=torch.bool)
    values[real], mask[real] = flat.long(), flat_mask
    return values, mask


def write_files(columns: dict[str, Tensor], stems: list[str], directory: str, settings: MoleculeSettings) -> None:
    """One SDF a molecule, its atoms laid out in the plane.

    Raises:
        Failed: the columns are no molecules.
    """
    needed = ("nodes", "nodes_mask", "edges", "edges_mask", "edge_features")
    if settings.graphs == "citations" or not all(name in columns for name in needed):
        raise Failed(
            f"the decoded columns are {', '.join(sorted(columns))}; an SDF needs {', '.join(needed)}. "
            "Decode with --format shards: features of nodes are no molecules."
        )
    arrays = {name: columns[name].cpu().numpy() for name in needed}
    for place, stem in enumerate(stems):
        real, kept = arrays["nodes_mask"][place], arrays["edges_mask"][place]
        graph = features.Graph(
            arrays["nodes"][place][real], arrays["edges"][place][kept], arrays["edge_features"][place][kept]
        )
        storage.write_atomic(storage.join(directory, f"{stem}.sdf"), features.to_sdf(graph).encode())


corpus = Corpus(
    Settings=MoleculeSettings,
    survey=survey,
    read=read,
    schema=schema,
    shapes=shapes,
    tensors=tensors,
    write_files=write_files,
)
