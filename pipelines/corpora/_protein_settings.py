"""How structure files become rows: the settings of the kind, and the columns they give."""

import re
from typing import Literal

import pyarrow as pa
from pydantic import Field, model_validator

from pipelines.corpora import CorpusSettings

NUMBERS = {"residues": pa.int8(), "numbers": pa.int32(), "insertions": pa.uint8(), "b_factors": pa.float32()}
"""Ragged columns of one number a residue."""
TAKEN = frozenset(
    ("name", "chain", "copy", "model", "length", "notes", "unmatched", "row_id", "split", "backbone", "atoms", *NUMBERS)
)


class ProteinSettings(CorpusSettings):
    models: Literal["first", "all"] = Field("first", description="of an NMR ensemble: its first model, or each a row")
    missing: Literal["drop", "keep"] = Field(
        "drop",
        description="residues without N, CA or C (9999 is no place): dropped, or kept with zeros and atom_mask False",
    )
    min_length: int = Field(20, ge=1, description="chains of fewer residues are filtered")
    max_length: int | None = Field(None, ge=1, description="chains of more residues are filtered")
    group: Literal["file", "folder"] = Field(
        "file", description="what stays in one split: a file, or all files of a folder (a complex, bound and unbound)"
    )
    contacts: str | None = Field(
        None, description="file name in each folder, lines `residue chain atom residue chain atom ...`: label `contact`"
    )
    strings: str | None = Field(
        None, description="suffix of files beside structures, as .dssp, one line of letters a chain: label `secondary`"
    )
    table: str | None = Field(
        None, description="name of a CSV or TSV above them: file or complex, chain, residue (as 52A), value columns"
    )
    values: tuple[str, ...] = Field((), description="the value columns of `table`, each a label")

    @model_validator(mode="after")
    def _labels_have_names_of_their_own(self) -> "ProteinSettings":
        if (self.table is None) != (not self.values):
            raise ValueError("table and values go together: the table's file name, and which of its columns to take")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length={self.max_length} is less than min_length={self.min_length}")
        for name in self.values:
            if not re.fullmatch(r"[a-z]\w*", name, re.ASCII):
                raise ValueError(f"values={name}: a column's name is a lower-case word; rename it in the table")
        added = [name for label in self.labels for name in (label, f"{label}_known")]
        names = [*TAKEN, "atom_mask", "residue_mask", *added]
        if twice := sorted({name for name in added if names.count(name) > 1}):
            raise ValueError(f"there would be two columns {', '.join(twice)}; rename that column of the table")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the label columns."""
        beside = (("contact", self.contacts), ("secondary", self.strings))
        return (*(name for name, given in beside if given is not None), *self.values)
