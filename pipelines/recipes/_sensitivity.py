"""Do tokens tell conformations apart? The structural similarity consistency of StructTokenBench (Yuan et al. 2025).

For each pair of conformations of one protein, s is the score of the optimal global alignment of their tokens: 100 x the
cosine of two vectors, as a whole number, for a match, and -10 for each residue in a gap, at the ends too. t is the mean
of the two length-normalised TM-scores of CA. Told are Pearson's and Spearman's correlation of s and t over pairs. A
longer chain has a larger s, which the authors leave so; beside it stands s over the mean of both chains' score with
themselves. Pairs are conformations in two files (`pair_suffixes`), a table of them (`pairs`), or models of one chain.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines import storage
from pipelines.corpora._protein_annotations import stem_of
from pipelines.errors import Refused
from pipelines.recipes._protein_tokens import Key
from pipelines.recipes._structure_chains import Floats
from pipelines.recipes._tm_align import SHORTEST, TmAligner

GAP = -10
COLUMNS = ("a", "chain_a", "b", "chain_b")
FEWEST = 3
"""Pairs that a correlation is told of."""


class Pair(NamedTuple):
    """Indices of two chains."""

    one: int
    other: int
    name: str


def pairs_by_suffix(keys: Sequence[Key], suffixes: tuple[str, str]) -> list[Pair]:
    """Chains of one name in files whose names differ by the suffix only, endings aside."""
    found: dict[tuple[str, str, int, int], dict[str, int]] = defaultdict(dict)
    for index, (name, chain, copy, model) in enumerate(keys):
        stem = stem_of(name)
        # The longer one first: _l_u ends with _u too.
        for suffix in sorted(suffixes, key=len, reverse=True):
            if stem.endswith(suffix):
                found[stem.removesuffix(suffix), chain, copy, model].setdefault(suffix, index)
                break
    first, second = suffixes
    return [
        Pair(held[first], held[second], f"{stem} {chain}")
        for (stem, chain, _, _), held in sorted(found.items())
        if len(held) == 2
    ]


def pairs_of_models(keys: Sequence[Key]) -> list[Pair]:
    """All pairs of models of one chain."""
    found: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for index, (name, chain, copy, _) in enumerate(keys):
        found[name, chain, copy].append(index)
    return [
        Pair(one, other, f"{name} {chain} models {keys[one][3]}, {keys[other][3]}")
        for (name, chain, _), members in sorted(found.items())
        for one, other in combinations(sorted(members, key=lambda n: keys[n][3]), 2)
    ]


def pairs_of_table(uri: str, keys: Sequence[Key]) -> tuple[list[Pair], int]:
    """(pairs listed in a CSV, how many of it have a chain that is not there). Files by name, or without ending.

    Raises:
        Refused: no such file, or other columns.
    """
    if not storage.exists(uri):
        raise Refused(f"pairs={uri} does not exist; give a CSV with the columns {', '.join(COLUMNS)}.")
    try:
        rows = list(csv.DictReader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as trouble:
        raise Refused(f"pairs={uri} is no CSV file: {trouble}.") from None
    if not rows or (absent := [name for name in COLUMNS if name not in rows[0]]):
        raise Refused(
            f"pairs={uri} has {f'no column {absent[0]}' if rows else 'no rows'}; needed: {', '.join(COLUMNS)}."
        )
    known: dict[tuple[str, str], int] = {}
    for index, (name, chain, copy, model) in enumerate(keys):
        if copy == 0 and model == 1:
            for form in (stem_of(name).rpartition("/")[2], stem_of(name), name):
                known.setdefault((form, chain), index)
    found = []
    for row in rows:
        # A short line has None at its end.
        one, other = (known.get(((row[name] or "").strip(), (row[f"chain_{name}"] or "").strip())) for name in "ab")
        if one is not None and other is not None:
            found.append(Pair(one, other, f"{row['a']} {row['chain_a']}, {row['b']} {row['chain_b']}"))
    return found, len(rows) - len(found)


def spread(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many of them, evenly along the list."""
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[int(place)] for place in np.linspace(0, len(pairs) - 1, most)]


def alignment_score(one: Floats, other: Floats) -> int:
    """Score of the optimal global alignment of two sequences of vectors [L, D] and [M, D].

    Every residue is a symbol of its own: so codes and continuous latents are aligned by one rule, and the matrix is
    L x M whatever K is. The cosine with a vector of length 0 is 0.
    """
    from biotite.sequence import Alphabet, GeneralSequence
    from biotite.sequence.align import SubstitutionMatrix, align_optimal

    if not len(one) or not len(other):
        return GAP * (len(one) + len(other))
    # Rounded, not cut: a cosine of 0.9999999 is that of a vector with itself.
    scores = np.rint(100 * _unit(one) @ _unit(other).T).astype(np.int32)
    rows, columns = (Alphabet(range(size)) for size in scores.shape)
    sequences = (GeneralSequence(alphabet, list(alphabet.get_symbols())) for alphabet in (rows, columns))
    matrix = SubstitutionMatrix(rows, columns, scores)
    return int(align_optimal(*sequences, matrix, gap_penalty=GAP, terminal_penalty=True, max_number=1)[0].score)


def self_score(vectors: Floats) -> int:
    """`alignment_score` with itself: no match is above 100, and on the diagonal all are but those of zeros."""
    return 100 * int((vectors != 0).any(1).sum())


def _unit(vectors: Floats) -> npt.NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(lengths > 0, lengths, 1.0)


def similarities(
    pairs: Sequence[Pair], vectors: Mapping[str, Mapping[int, Floats]], alphas: Mapping[int, Floats], seconds: float
) -> dict[str, Any]:
    """What is told of pairs: every s and t, and their correlations for each kind of vectors.

    Args:
        vectors: name -> chain -> [L, D], its residues with a code only.
        alphas: chain -> [L, 3] of the same residues.
        seconds: for one run of TM-align at most; pairs that take longer, or end it, are left out and counted.
    """
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    with TmAligner(seconds) as aligner:
        for pair in pairs:
            short = min(len(alphas[pair.one]), len(alphas[pair.other])) < SHORTEST
            target = None if short else aligner.mean_score(alphas[pair.one], alphas[pair.other])
            if target is None:
                left.append(pair.name)
                continue
            row: dict[str, Any] = {"pair": pair.name, "tm": target}
            for name, of in vectors.items():
                raw = alignment_score(of[pair.one], of[pair.other])
                own = self_score(of[pair.one]) + self_score(of[pair.other])
                row[name] = {"raw": raw, "normalised": 2 * raw / max(1, own)}
            rows.append(row)
    told = {name: _correlations(rows, name) for name in vectors}
    return {"pairs": len(rows), "left_out": left, "correlations": told, "each": rows}


def _correlations(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | None]:
    """Pearson and Spearman of both forms of s with t; None where there are too few pairs, or one side is constant."""
    from scipy.stats import pearsonr, spearmanr

    found: dict[str, float | None] = {}
    t = np.array([row["tm"] for row in rows])
    for form in ("raw", "normalised"):
        s = np.array([row[name][form] for row in rows], np.float64)
        defined = len(rows) >= FEWEST and np.ptp(s) > 0 and np.ptp(t) > 0
        found[f"pearson_{form}"] = float(pearsonr(s, t).statistic) if defined else None
        found[f"spearman_{form}"] = float(spearmanr(s, t).statistic) if defined else None
    return found
