"""Which annotations belong to which structure, and their values as labels of a chain."""

import posixpath
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.corpora import Slice
from pipelines.corpora import _protein_annotations as annotations
from pipelines.corpora._protein_annotations import Table, UnreadableLabels, stem_of
from pipelines.corpora._protein_chains import Chain
from pipelines.corpora._protein_settings import ProteinSettings
from pipelines.errors import Refused


def folder_of(name: str) -> str:
    """`1A2K/1A2K_r_u.pdb` -> `1A2K/`; "" where it lies on top."""
    return name[: name.rfind("/") + 1]


def is_annotation(name: str, settings: ProteinSettings) -> bool:
    base = name.rpartition("/")[2]
    return base in (settings.contacts, settings.table) or bool(settings.strings and base.endswith(settings.strings))


def annotations_of(name: str, sizes: Mapping[str, int], settings: ProteinSettings) -> dict[str, Any]:
    """Setting -> [path as seen from the structure's folder, bytes] of the files that annotate it.

    A table is that of its folder or the nearest above. Relative, so that nothing depends on where a corpus lies.
    """
    folder = folder_of(name)
    wanted: dict[str, list[str]] = {}
    if settings.contacts is not None:
        wanted["contacts"] = [settings.contacts]
    if settings.strings is not None:
        wanted["strings"] = [
            (stem + settings.strings).removeprefix(folder) for stem in (name.removesuffix(".gz"), stem_of(name))
        ]
    if settings.table is not None:
        wanted["table"] = ["../" * up + settings.table for up in range(folder.count("/") + 1)]
    found: dict[str, Any] = {}
    for kind, paths in wanted.items():
        for path in paths:
            size = sizes.get(posixpath.normpath(folder + path))
            if size is not None:
                found.setdefault(kind, [path, size])
    return found


def checked(slices: list[Slice], settings: ProteinSettings) -> tuple[list[Slice], Counter[str]]:
    """The slices with the digests of their tables, and the rows of those that belong to no structure here, with why.

    Raises:
        Refused: annotations that no structure has, a table that cannot be read, a column that it does not have.
    """
    for kind in ("contacts", "strings", "table"):
        name = getattr(settings, kind)
        if name is not None and not any(kind in piece.meta for piece in slices):
            where = "in the folder of a structure or above it" if kind == "table" else "beside any structure"
            raise Refused(f"{kind}={name} was given, and there is no such file {where}; leave it out or mend the name.")
    names: dict[str, list[str]] = {}
    for piece in slices:
        if "table" in piece.meta:
            names.setdefault(_place(piece, "table"), []).extend(names_in(piece))
    digests: dict[str, str] = {}
    strays: Counter[str] = Counter()
    for uri, here in names.items():
        try:
            digests[uri] = annotations.digest_of(annotations.text_of(uri))
            strays += annotations.unknown_in(annotations.table_of(uri, digests[uri], settings.values), here)
        except UnreadableLabels as trouble:
            raise Refused(f"table={settings.table} was given, but it cannot be read: {trouble}.") from None
    return [_with_digest(piece, digests) for piece in slices], strays


def _with_digest(piece: Slice, digests: Mapping[str, str]) -> Slice:
    if "table" not in piece.meta:
        return piece
    path, _ = piece.meta["table"]
    return replace(piece, meta={**piece.meta, "table": [path, digests[_place(piece, "table")]]})


def names_in(piece: Slice) -> list[str]:
    """Of the structures of a slice."""
    if "members" not in piece.meta:
        return [piece.name]
    return [f"{piece.name}/{fields[0]}" for fields in piece.meta["members"]]


def labels_of(
    piece: Slice, name: str, place: int, chain: Chain, settings: ProteinSettings
) -> tuple[dict[str, npt.NDArray[np.float32]], int]:
    """Label -> [L], NaN where there is none; and how many annotations name this chain and no residue of it.

    Args:
        name: of the structure.
        place: of the chain in its model.
    """
    labels = {label: np.full(len(chain), np.nan, np.float32) for label in settings.labels}
    unmatched = 0
    if "contacts" in piece.meta:
        labels["contact"], lost = annotations.join_contacts(annotations.contacts_of(_place(piece, "contacts")), chain)
        unmatched += lost
    if "strings" in piece.meta:
        strings = annotations.strings_of(_place(piece, "strings"))
        if place < len(strings):
            labels["secondary"], lost = annotations.join_string(strings[place], chain)
            unmatched += lost
    if table := _table(piece, settings):
        values, lost = annotations.join_table(table, name, chain)
        labels.update(zip(settings.values, values, strict=True))
        unmatched += lost
    return labels, unmatched


def of_missing_chains(piece: Slice, name: str, chains: Collection[str], settings: ProteinSettings) -> int:
    """Annotations of this very file that name a chain which it has not."""
    table = _table(piece, settings)
    return annotations.of_missing_chains(table, name, chains) if table else 0


def _table(piece: Slice, settings: ProteinSettings) -> Table | None:
    if "table" not in piece.meta:
        return None
    return annotations.table_of(_place(piece, "table"), piece.meta["table"][1], settings.values)


def _place(piece: Slice, kind: str) -> str:
    """URI of the file that annotates a slice."""
    path, _ = piece.meta[kind]
    scheme, mark, place = piece.uri.rpartition("://")
    return scheme + mark + posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
