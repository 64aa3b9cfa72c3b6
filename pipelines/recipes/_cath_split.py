"""Train, valid and test by CATH, so that a test asks for folds or superfamilies that training never saw.

StructTokenBench's rule (Yuan et al. 2025, its code's `splitting_dataset`):

1. of every fold (C.A.T) 40 % of its superfamilies (C.A.T.H) are held out whole: the `fold` test. A fold with so few
   superfamilies that 40 % of them is less than one goes wholly to train;
2. of every superfamily that is left, 20 % of its proteins: the `superfamily` test;
3. 20 % of each test set becomes the valid set that belongs to it.

These are `SHARES`; ProteinGLUE's epitopes take 50 %, 20 % and 40 % instead.

The authors split by bare T and H numbers, which merges all folds that share a number; here codes are C.A.T.H in full.
A protein is a file: chains of one file and superfamily stay together.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipelines import storage
from pipelines.corpora._protein_annotations import stem_of
from pipelines.errors import Refused

CODE = re.compile(r"\d+\.\d+\.\d+\.\d+")
COLUMNS = ("file", "chain", "code")

SHARES = (0.4, 0.2, 0.2)
"""Of superfamilies for the fold test, of proteins for the superfamily test, of each test for its valid set."""

T = TypeVar("T")

Place = tuple[str, str]
"""(file, chain)"""


@dataclass(frozen=True)
class Division:
    """Indices of chains. What is in neither part was left out."""

    train: list[int]
    tests: dict[str, tuple[list[int], list[int]]]
    """Name of a test -> (its valid chains, its test chains)."""


def read_cath(uri: str) -> dict[Place, str]:
    """(file, chain) -> C.A.T.H. A chain of several different superfamilies belongs to none and is left out.

    Raises:
        Refused: no such file, another form of table, a code that is not C.A.T.H in full.
    """
    uri = storage.normalise(uri)
    if not storage.exists(uri):
        raise Refused(f"cath={uri} does not exist; give a CSV with the columns {', '.join(COLUMNS)}.")
    try:
        reader = csv.DictReader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig")))
        rows = [{str(key).strip(): value for key, value in row.items()} for row in reader]
    except (UnicodeDecodeError, csv.Error) as trouble:
        raise Refused(f"cath={uri} is no CSV file: {trouble}.") from None
    if not rows or (absent := [name for name in COLUMNS if name not in rows[0]]):
        held = ", ".join(rows[0]) if rows else "no rows"
        raise Refused(f"cath={uri} has {held}; it needs {', '.join(absent if rows else COLUMNS)}.")
    found: dict[Place, set[str]] = defaultdict(set)
    for number, row in enumerate(rows, 2):
        file, chain, code = ((row[name] or "").strip() for name in COLUMNS)
        if not CODE.fullmatch(code):
            raise Refused(
                f"line {number} of cath={uri} has the code {code!r}; give all of C.A.T.H, as 3.40.50.720: the last"
                " number alone does not tell superfamilies apart."
            )
        found[file, chain].add(code)
    return {place: next(iter(codes)) for place, codes in found.items() if len(codes) == 1}


def codes_for(places: Sequence[Place], cath: Mapping[Place, str]) -> list[str | None]:
    """The code of every chain. Its file may stand in the table by name, without its ending, or without folders too."""
    found = []
    for name, chain in places:
        stem = stem_of(name)
        forms = (name, stem, stem.rpartition("/")[2])
        found.append(next((cath[form, chain] for form in forms if (form, chain) in cath), None))
    return found


def divide(
    places: Sequence[Place], codes: Sequence[str | None], seed: int, shares: tuple[float, float, float] = SHARES
) -> Division:
    """Split chains by the rule above; chains without a code are in no part. The same for any order of chains."""
    proteins: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, ((name, _), code) in enumerate(zip(places, codes, strict=True)):
        if code is not None:
            proteins[code][name].append(index)
    folds: dict[str, list[str]] = defaultdict(list)
    for code in sorted(proteins):
        folds[code.rpartition(".")[0]].append(code)
    drawn = np.random.default_rng(seed)
    train: list[list[int]] = []
    tests: dict[str, list[list[int]]] = {"fold": [], "superfamily": []}
    kept: list[str] = []
    for _, members in sorted(folds.items()):
        held, rest = _cut(members, shares[0], drawn)
        kept += sorted(rest)
        tests["fold"] += [chains for code in sorted(held) for _, chains in sorted(proteins[code].items())]
    for code in kept:
        held, rest = _cut(sorted(proteins[code]), shares[1], drawn)
        tests["superfamily"] += [proteins[code][name] for name in sorted(held)]
        train += [proteins[code][name] for name in sorted(rest)]
    parts = {}
    for name, units in tests.items():
        valid, test = _cut(range(len(units)), shares[2], drawn)
        parts[name] = (_flat([units[n] for n in valid]), _flat([units[n] for n in test]))
    return Division(_flat(train), parts)


def _cut(items: Sequence[T], share: float, drawn: np.random.Generator) -> tuple[list[T], list[T]]:
    """(a random share of the items, rounded down; the rest)"""
    order = [items[int(n)] for n in drawn.permutation(len(items))]
    # Rounding keeps 0.2 x 5 at 1 although the product is a hair less for other shares.
    count = int(np.floor(round(share * len(items), 9)))
    return order[:count], order[count:]


def _flat(units: Sequence[Sequence[int]]) -> list[int]:
    return sorted(index for unit in units for index in unit)
