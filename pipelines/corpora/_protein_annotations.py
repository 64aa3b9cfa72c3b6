"""Annotations of residues: lists of contacts, strings of secondary structure, and tables; joined to chains by number.

Every label is one float a residue, NaN where there is no annotation.
"""

import csv
import gzip
import hashlib
import io
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from pipelines import storage
from pipelines.corpora._protein_chains import Chain
from pipelines.errors import Failed, Refused

SECONDARY = "-HEBGITSP"
"""Letters of DSSP in the order of their numbers; ` `, `C` and `L` count as `-`."""
STRUCTURE = re.compile(r"\.(?:pdb\d*|ent|cif|mmcif|pdbx|bcif)(?:\.gz)?$", re.IGNORECASE)
RESIDUE = re.compile(r"\s*(-?\d+)\s*([A-Za-z]?)\s*")
MOST_VALUE = float(np.finfo(np.float32).max)
MOST_BYTES = 256 << 20
"""Of one file of annotations, unpacked."""

Key = tuple[int, str]
"""(residue number, insertion code)"""


class UnreadableLabels(ValueError):
    """Why the annotations beside a structure cannot be joined to it."""


def stem_of(name: str) -> str:
    """`1A2K/1A2K_r_u.pdb.gz` -> `1A2K/1A2K_r_u`."""
    return STRUCTURE.sub("", name)


# Lists of contacts: residue chain atom residue chain atom distance


def contacts_of(uri: str) -> Mapping[str, frozenset[Key]]:
    """Chain -> residues that are in contact with another chain."""
    found: dict[str, set[Key]] = {}
    for number, line in enumerate(text_of(uri).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        residues = [_residue(words[place]) for place in (0, 3)] if len(words) >= 6 else [None]
        if None in residues:
            name = uri.rpartition("/")[2]
            raise UnreadableLabels(
                f"{name} beside it is no list of `residue chain atom residue chain atom`: line {number}"
            )
        for residue, chain in zip(residues, (words[1], words[4]), strict=True):
            if residue is not None:
                found.setdefault(chain, set()).add(residue)
    return {chain: frozenset(residues) for chain, residues in found.items()}


def join_contacts(contacts: Mapping[str, frozenset[Key]], chain: Chain) -> tuple[npt.NDArray[np.float32], int]:
    """1 for residues in contact, 0 for the others; and how many of the list are not in the chain."""
    listed, keys = contacts.get(chain.name, frozenset()), keys_of(chain)
    return np.array([key in listed for key in keys], np.float32), len(listed - set(keys))


# Strings: one letter a residue, one line a chain


def strings_of(uri: str) -> Sequence[str]:
    """The first word of every line."""
    return [line.split(maxsplit=1)[0] for line in text_of(uri).splitlines() if line.strip()]


def join_string(text: str, chain: Chain) -> tuple[npt.NDArray[np.float32], int]:
    """Numbers of its letters where it has one a residue (of all, or of those with N, CA and C); else nothing fits."""
    letters = text.upper().replace("C", "-").replace("L", "-")
    codes = np.array([SECONDARY.find(letter) for letter in letters], np.float32)
    codes[codes < 0] = np.nan
    label = np.full(len(chain), np.nan, np.float32)
    for there in (np.ones(len(chain), bool), chain.whole):
        if int(there.sum()) == len(codes):
            label[there] = codes
            return label, 0
    return label, len(codes)


# Tables: a column `file` or `complex`, `chain`, `residue`, and values


@dataclass(frozen=True)
class Table:
    places: Mapping[str, tuple[int, int]]
    """File or complex -> its rows [start, stop) below."""
    rows: npt.NDArray[np.int64]
    chains: Sequence[str]
    residues: Sequence[Key]
    values: npt.NDArray[np.float32]
    """[rows, columns], NaN where empty."""
    lost: int
    """Rows whose residue or value is no number."""


@lru_cache(maxsize=4)
def table_of(uri: str, digest: str, values: tuple[str, ...]) -> Table:
    """
    Args:
        digest: of its text, so that a process that outlives a change of the file does not remember the old one.

    Raises:
        Refused: a column is missing; the message names those there are.
        UnreadableLabels: it is no table of text.
    """
    text = text_of(uri)
    if digest != digest_of(text):
        raise UnreadableLabels(f"{uri.rpartition('/')[2]} changed while it was read")
    rows = _rows(csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(uri)), uri)
    key_at, chain_at, residue_at, values_at = _columns(next(rows, []), values, uri)
    names: dict[str, int] = {}
    of, numbers, lost = array("q"), array("f"), 0
    chains: list[str] = []
    residues: list[Key] = []
    for row in rows:
        try:
            key = _residue(row[residue_at])
            found = [_value(row[at]) for at in values_at]
            name, chain = row[key_at].strip(), row[chain_at].strip()
        except (IndexError, ValueError):
            key = None
        if key is None:
            lost += 1
            continue
        of.append(names.setdefault(name, len(names)))
        chains.append(chain)
        residues.append(key)
        numbers.extend(found)
    order = np.argsort(np.frombuffer(of, np.int64), kind="stable") if of else np.empty(0, np.int64)
    ends = np.cumsum(np.bincount(np.frombuffer(of, np.int64))) if of else np.empty(0, np.int64)
    starts = [0, *ends[:-1].tolist()]
    places = {name: (starts[number], int(ends[number])) for name, number in names.items()}
    taken = np.frombuffer(numbers, np.float32).reshape(-1, len(values)) if of else np.empty((0, len(values)))
    return Table(places, order, chains, residues, taken.astype(np.float32), lost)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def names_of_file(name: str) -> list[str]:
    """What a column `file` may call a structure: its path or file name, with its suffix or without."""
    stem = stem_of(name)
    return list(dict.fromkeys([name, PurePosixPath(name).name, stem, PurePosixPath(stem).name]))


def names_of_complex(name: str) -> list[str]:
    """What a column `complex` may call it besides: its folder, or the last word of that."""
    folder = PurePosixPath(name).parent
    return list(dict.fromkeys([str(folder), folder.name])) if folder.name else []


def join_table(table: Table, name: str, chain: Chain) -> tuple[npt.NDArray[np.float32], int]:
    """Values [columns, L] of a chain; of several for one residue the last. And how many rows fit no residue of it."""
    at = {key: place for place, key in enumerate(keys_of(chain))}
    label = np.full((table.values.shape[1], len(chain)), np.nan, np.float32)
    unmatched = 0
    for known in dict.fromkeys([*names_of_file(name), *names_of_complex(name)]):
        start, stop = table.places.get(known, (0, 0))
        for row in table.rows[start:stop].tolist():
            if table.chains[row] != chain.name:
                continue
            place = at.get(table.residues[row])
            if place is None:
                unmatched += 1
            else:
                label[:, place] = table.values[row]
    return label, unmatched


def of_missing_chains(table: Table, name: str, chains: Collection[str]) -> int:
    """Rows that name this file and a chain that it has not. (Of a complex, another file may have it.)"""
    ranges = [table.places.get(known, (0, 0)) for known in names_of_file(name)]
    return sum(table.chains[row] not in chains for start, stop in ranges for row in table.rows[start:stop].tolist())


def keys_of(chain: Chain) -> list[Key]:
    insertions = [chr(code) if code else "" for code in chain.insertions.tolist()]
    return list(zip(chain.numbers.tolist(), insertions, strict=True))


def _columns(header: Sequence[str], values: Sequence[str], uri: str) -> tuple[int, int, int, list[int]]:
    names = [name.strip().lower() for name in header]
    key = next((name for name in ("file", "complex") if name in names), None)
    missing = [name for name in ("chain", "residue") if name not in names]
    missing += [name for name in values if name.lower() not in names]
    if key is None or missing:
        wanted = [*([] if key else ["file or complex"]), *missing]
        raise Refused(
            f"the table {uri} has no column {', '.join(wanted)}; it has {', '.join(map(repr, header)) or 'none'}. "
            "Needed are `file` (or `complex`), `chain`, `residue` (number and insertion code, as 52A) and the values."
        )
    return names.index(key), names.index("chain"), names.index("residue"), [names.index(v.lower()) for v in values]


@lru_cache(maxsize=1 << 16)
def _residue(text: str) -> Key | None:
    match = RESIDUE.fullmatch(text)
    return (int(match[1]), match[2]) if match else None


def _value(text: str) -> float:
    value = float(text) if text.strip() else np.nan
    if abs(value) > MOST_VALUE:
        raise ValueError(text)
    return value


def _rows(rows: Iterator[list[str]], uri: str) -> Iterator[list[str]]:
    try:
        yield from filter(None, rows)
    except csv.Error as trouble:
        raise UnreadableLabels(f"{uri} is no table of text: {trouble}") from None


def _delimiter(uri: str) -> str:
    return "\t" if uri.lower().removesuffix(".gz").endswith((".tsv", ".tab")) else ","


def text_of(uri: str) -> str:
    """A file of text, plain or .gz; bytes that are no UTF-8 are written out.

    Raises:
        UnreadableLabels: with a short reason.
    """
    name = uri.rpartition("/")[2]
    try:
        data = storage.read_bytes(uri, 0, MOST_BYTES + 1)
        if data[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error, Refused, Failed):
        raise UnreadableLabels(f"{name} beside it cannot be read") from None
    if len(data) > MOST_BYTES:
        raise UnreadableLabels(f"{name} has more than {MOST_BYTES:,} bytes")
    return data.decode("utf-8-sig", "backslashreplace")


def unknown_in(table: Table, names: Sequence[str]) -> Counter[str]:
    """Why rows of a table belong to no structure of the corpus."""
    here = {known for name in names for known in (*names_of_file(name), *names_of_complex(name))}
    strays = sum(stop - start for name, (start, stop) in table.places.items() if name not in here)
    return Counter({"annotation of no structure here": strays, "annotation that is no number": table.lost})
