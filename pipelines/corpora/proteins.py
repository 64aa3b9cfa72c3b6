"""Proteins: PDB, mmCIF and BinaryCIF, plain, .gz or in tars; rows are models x chains with their backbones."""

import hashlib
import importlib.util
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from pipelines import storage
from pipelines.columns import padded, ragged_field
from pipelines.corpora import Bad, Corpus, Filtered, Row, Slice, Survey
from pipelines.corpora._protein_annotations import STRUCTURE, UnreadableLabels, stem_of
from pipelines.corpora._protein_atoms import BACKBONE, UnreadableStructure
from pipelines.corpora._protein_chains import Chain, chains_of
from pipelines.corpora._protein_files import MOST_FILE_BYTES, models_of
from pipelines.corpora._protein_labels import (
    annotations_of,
    checked,
    folder_of,
    is_annotation,
    labels_of,
    names_in,
    of_missing_chains,
)
from pipelines.corpora._protein_residues import RESIDUES, UNKNOWN
from pipelines.corpora._protein_settings import NUMBERS, ProteinSettings
from pipelines.corpora._sources import is_hidden, official_folders, prefixes, top_folder, why_ignored
from pipelines.corpora._tars import is_tar, list_members, read_members, slices_of
from pipelines.errors import Failed, Refused

ALLOWED = ".pdb, .ent, .cif, .mmcif, .pdbx and .bcif files, plain or .gz, and .tar, .tar.gz or .tgz of them"


def survey(sources: list[str], settings: ProteinSettings) -> Survey:
    """What structures there are under the sources, and the annotations beside them.

    Raises:
        Refused: a source that does not exist or holds no structure, annotations that are nowhere, biotite missing.
    """
    if importlib.util.find_spec("biotite") is None:
        raise Refused("structures are read by biotite, which is not installed: pip install 'vqray[proteins]'")
    slices: list[Slice] = []
    ignored: Counter[str] = Counter()
    for source, prefix in zip(sources, prefixes(sources), strict=True):
        found, left = _survey_one(source, prefix, settings)
        if not found:
            held = ", ".join(f"{count:,} x {reason}" for reason, count in left.most_common(3)) or "nothing"
            raise Refused(f"there is no structure in {source!r}; it holds {held}. Allowed are {ALLOWED}.")
        slices += found
        ignored.update(left)
    folders = {folder_of(name) for piece in slices for name in names_in(piece)}
    if settings.group == "folder" and len(folders) == 1 and sum(piece.stop for piece in slices) > 1:
        raise Refused(
            f"group=folder puts all of {', '.join(sources)} into one split, as it is one folder; use group=file."
        )
    slices, strays = checked(slices, settings)
    ignored.update(strays)
    official = official_folders(name for piece in slices for name in names_in(piece))
    context = {"residues": list(RESIDUES), "official": official}
    return Survey(slices, context, {reason: count for reason, count in ignored.items() if count})


def _survey_one(source: str, prefix: str, settings: ProteinSettings) -> tuple[list[Slice], Counter[str]]:
    entries = storage.list_files(source)
    sizes = {entry.name: entry.bytes for entry in entries}
    slices: list[Slice] = []
    ignored: Counter[str] = Counter()
    for entry in entries:
        if is_hidden(entry.name):
            ignored["hidden file"] += 1
        elif STRUCTURE.search(entry.name):
            beside = annotations_of(entry.name, sizes, settings)
            slices.append(Slice(entry.uri, prefix + entry.name, 0, 1, entry.bytes, beside))
        elif is_tar(entry.name):
            members, left = list_members(entry, _choose, MOST_FILE_BYTES)
            beside = annotations_of(entry.name, sizes, settings)
            # Strings and contacts belong to one structure, tables to any.
            slices += slices_of(entry, prefix, members, {"table": beside["table"]} if "table" in beside else {})
            ignored.update(left)
        elif not is_annotation(entry.name, settings):
            ignored[why_ignored(entry.name, "a structure file")] += 1
    return slices, ignored


def _choose(info: Any, tar: Any) -> str | None:
    is_structure = STRUCTURE.search(info.name) and not is_hidden(info.name)
    return None if is_structure else why_ignored(info.name, "a structure file")


def read(
    piece: Slice, context: Mapping[str, Any], settings: ProteinSettings, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, list[Row] | Bad | Filtered, bytes]]:
    """The chains of every wanted file of a slice as rows, or the reason why there are none."""
    for unit, name, data in _files(piece, wanted):
        if isinstance(data, Bad):
            yield unit, data, data.reason.encode()
            continue
        digest = hashlib.sha256(data)
        try:
            found = _rows(name, data, piece, settings, context["official"])
        except (UnreadableStructure, UnreadableLabels) as trouble:
            yield unit, Bad(name, str(trouble)), digest.digest()
            continue
        for row in [] if isinstance(found, Filtered) else found:
            # Annotations are no units, but another label is another corpus.
            for label in settings.labels:
                digest.update(row.values[label].tobytes())
        yield unit, found, digest.digest()


def _files(piece: Slice, wanted: Callable[[int], bool]) -> Iterator[tuple[int, str, bytes | Bad]]:
    if "members" in piece.meta:
        for unit, member, found in read_members(piece, wanted):
            yield unit, f"{piece.name}/{member.name}", found
    elif wanted(0):
        yield 0, piece.name, _file(piece)


def _file(piece: Slice) -> bytes | Bad:
    if piece.bytes > MOST_FILE_BYTES:
        return Bad(piece.name, f"it has {piece.bytes:,} bytes; at most {MOST_FILE_BYTES:,} are read")
    try:
        return storage.read_bytes(piece.uri)
    except (OSError, Refused, Failed) as trouble:
        reason = trouble.strerror if isinstance(trouble, OSError) else None
        return Bad(piece.name, f"could not be read: {reason or type(trouble).__name__}")


def _rows(
    name: str, data: bytes, piece: Slice, settings: ProteinSettings, official: Mapping[str, str]
) -> list[Row] | Filtered:
    """The rows of a file, or one Filtered where it has none: no protein, or no chain that the settings let through.

    A file without protein is sound (nucleic acids, a ligand): it is no damage and does not count as such.
    """
    mended: Counter[str] = Counter()
    left: Counter[str] = Counter()
    rows: list[Row] = []
    names: set[str] = set()
    for model, atoms in enumerate(models_of(data, settings.models == "all", mended), 1):
        for place, chain in enumerate(chains_of(atoms)):
            names.add(chain.name)
            if setting := _why_left(chain, settings):
                left[setting] += 1
            else:
                rows.append(_row(piece, name, model, place, chain, settings, official))
    if not rows:
        return Filtered(left.most_common(1)[0][0] if left else "no protein")
    rows[0].values["unmatched"] += of_missing_chains(piece, name, names, settings)
    told = [f"{what} ({count})" for what, count in sorted(mended.items())]
    told += [f"{count} chains left out by {setting}" for setting, count in sorted(left.items())]
    for row in rows:
        row.values["notes"] = "; ".join(filter(None, [*told, row.values["notes"]]))
    return rows


def _why_left(chain: Chain, settings: ProteinSettings) -> str | None:
    """The setting that leaves a chain out."""
    length = len(chain) if settings.missing == "keep" else int(chain.whole.sum())
    if length < settings.min_length:
        return "missing" if len(chain) >= settings.min_length else "min_length"
    return "max_length" if settings.max_length is not None and length > settings.max_length else None


def _row(
    piece: Slice,
    name: str,
    model: int,
    place: int,
    chain: Chain,
    settings: ProteinSettings,
    official: Mapping[str, str],
) -> Row:
    labels, unmatched = labels_of(piece, name, place, chain, settings)
    keep = chain.whole if settings.missing == "drop" else np.ones(len(chain), bool)
    notes = [f"{np.count_nonzero(~keep)} residues without N, CA or C dropped"] if not keep.all() else []
    notes += [f"{chain.nowhere} atoms without a place (9999, no number)"] if chain.nowhere else []
    notes += [f"{chain.repeats} atoms given twice"] if chain.repeats else []
    kept = chain[keep]
    values: dict[str, Any] = {
        "name": name,
        "chain": chain.name,
        "copy": chain.copy,
        "model": model,
        "length": len(kept),
        "backbone": kept.backbone,
        "atoms": kept.atoms,
        **{column: getattr(kept, column) for column in NUMBERS},
        **{label: value[keep] for label, value in labels.items()},
        "unmatched": unmatched,
        "notes": "; ".join(notes),
    }
    group = folder_of(name).rstrip("/") if settings.group == "folder" else stem_of(name)
    return Row(values, group=group or name, split=official.get(top_folder(name)))


def schema(settings: ProteinSettings) -> pa.Schema:
    """Which file, chain and model; L residues; labels, NaN where there is none.

    `atoms` is 1 where an atom is there; `numbers` and `insertions` (ASCII, 0 = none) are the author's; `copy` counts
    earlier chains of the same name; `unmatched` annotations name the chain and no residue of it; `notes` say what was
    mended or left out.
    """
    return pa.schema(
        [
            pa.field("name", pa.string()),
            pa.field("chain", pa.string()),
            pa.field("copy", pa.int32()),
            pa.field("model", pa.int32()),
            pa.field("length", pa.int32()),
            ragged_field("backbone", pa.float32(), (len(BACKBONE), 3)),
            ragged_field("atoms", pa.uint8(), (len(BACKBONE),)),
            *(ragged_field(name, kind) for name, kind in NUMBERS.items()),
            *(ragged_field(name, pa.float32()) for name in settings.labels),
            pa.field("unmatched", pa.int32()),
            pa.field("notes", pa.string()),
        ]
    )


def shapes(settings: ProteinSettings) -> dict[str, list[int] | None]:
    names = ["backbone", "atom_mask", "residue_mask", *NUMBERS]
    return dict.fromkeys([*names, *(name for label in settings.labels for name in (label, f"{label}_known"))])


def tensors(stored: dict[str, Any], settings: ProteinSettings) -> dict[str, Tensor]:
    """Rows filled up with zeros to the longest of the batch, L residues.

    backbone [B, L, 4, 3] in Angstrom; atom_mask [B, L, 4], False where an atom is missing; residue_mask [B, L];
    residues (int64), numbers, insertions, b_factors [B, L]; each label [B, L], zero where its <label>_known is False.
    """
    backbone, real = padded(stored["backbone"], (len(BACKBONE), 3))
    atoms, _ = padded(stored["atoms"], (len(BACKBONE),))
    columns = {"backbone": backbone, "atom_mask": atoms.bool(), "residue_mask": real}
    columns |= {name: padded(stored[name])[0] for name in NUMBERS}
    columns["residues"] = columns["residues"].long()
    for label in settings.labels:
        value = padded(stored[label])[0]
        # Not `_mask`: where codes are cut to the lengths of rows, a mask [B, L] is what tells them.
        columns[f"{label}_known"] = real & ~value.isnan()
        columns[label] = value.nan_to_num(0.0)
    return columns


def write_files(columns: dict[str, Tensor], stems: list[str], directory: str, settings: ProteinSettings) -> None:
    """One .pdb file a row.

    Args:
        columns: backbone [B, L, 3 or 4, 3] in Angstrom. Where there are any: residue_mask [B, L] and atom_mask
            [B, L, 3 or 4] (else all are real), residues [B, L] (else UNK), numbers and insertions [B, L] (else 1 to
            L), b_factors [B, L].

    Raises:
        Failed: a coordinate that is not finite, or does not fit the columns of the format.
    """
    host = {name: column.detach().cpu() for name, column in columns.items()}
    for row, stem in enumerate(stems):
        text = _pdb({name: column[row] for name, column in host.items()}, stem)
        storage.write_atomic(storage.join(directory, f"{stem}.pdb"), text.encode())


def _pdb(columns: Mapping[str, Tensor], stem: str) -> str:
    from biotite.structure import AtomArray
    from biotite.structure.error import BadStructureError
    from biotite.structure.io.pdb import PDBFile

    xyz = columns["backbone"].float().numpy()
    length, width = xyz.shape[:2]
    there = np.ones((length, width), bool)
    there &= columns["residue_mask"].bool().numpy()[:, None] if "residue_mask" in columns else True
    there &= columns["atom_mask"].bool().numpy() if "atom_mask" in columns else True
    residue, atom = np.nonzero(there)
    if not np.isfinite(xyz[there]).all():
        raise Failed(f"row {stem} has coordinates that are not finite, which no .pdb file can hold.")

    def of(name: str, default: Any) -> Any:
        return columns[name].numpy()[residue] if name in columns else np.asarray(default)[residue]

    array = AtomArray(len(residue))
    array.coord = xyz[residue, atom]
    array.chain_id[:] = "A"
    array.res_id = of("numbers", np.arange(1, length + 1)).astype(int)
    array.ins_code = np.array(
        [chr(code) if code else "" for code in of("insertions", np.zeros(length, int)).tolist()], "U1"
    )
    array.res_name = np.array(RESIDUES)[of("residues", np.full(length, UNKNOWN))]
    array.atom_name = np.array(BACKBONE)[atom]
    array.element = np.array([name[0] for name in BACKBONE])[atom]
    array.set_annotation("b_factor", of("b_factors", np.zeros(length)).astype(float))
    file, text = PDBFile(), io.StringIO()
    try:
        # Hybrid-36 numbers only where plain ones do not fit: fewer programs read them.
        file.set_structure(array, hybrid36=bool(len(residue) > 99_999 or (len(residue) and array.res_id.max() > 9_999)))
    except BadStructureError as trouble:
        raise Failed(f"row {stem} does not fit the columns of a .pdb file: {trouble}") from None
    file.write(text)
    return text.getvalue().rstrip("\n") + "\nTER\nEND\n"


corpus = Corpus(
    Settings=ProteinSettings,
    survey=survey,
    read=read,
    schema=schema,
    shapes=shapes,
    tensors=tensors,
    write_files=write_files,
)
