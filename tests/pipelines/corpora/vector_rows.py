"""What tests of vectors share: all under a source, read as an ingest would, with the laws that always hold."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.columns import batch_of
from pipelines.corpora import Bad, Row, Slice, Survey, vectors
from pipelines.corpora.vectors import VectorSettings


class Read(NamedTuple):
    """All of a source."""

    survey: Survey
    settings: VectorSettings
    """Completed by the survey."""
    units: list[Row | Bad]
    fingerprints: list[bytes]

    @property
    def rows(self) -> list[Row]:
        return [unit for unit in self.units if isinstance(unit, Row)]

    @property
    def values(self) -> np.ndarray:
        """[rows, D] (or [rows, L, D]) as stored."""
        return np.stack([row.values["vector"] for row in self.rows])

    @property
    def labels(self) -> list[int]:
        return [row.values["label"] for row in self.rows]

    @property
    def splits(self) -> list[str | None]:
        return [row.split for row in self.rows]

    @property
    def reasons(self) -> list[str]:
        return [unit.reason for unit in self.units if isinstance(unit, Bad)]


def read(*sources: Path | str, wanted: Callable[[int], bool] = lambda unit: True, **chosen: Any) -> Read:
    """Slices go through JSON, as parts do; every wanted unit comes once and in order; rows fit the schema."""
    settings = VectorSettings(**chosen)
    survey = vectors.survey([str(source) for source in sources], settings)
    settings = settings.model_copy(update=survey.settings)
    units, fingerprints = [], []
    for piece in survey.slices:
        again = Slice(**json.loads(json.dumps(asdict(piece))))
        came = list(vectors.read(again, survey.context, settings, wanted, vectors.setup(settings)))
        assert [unit for unit, _, _ in came] == [unit for unit in range(piece.stop - piece.start) if wanted(unit)]
        units += [found for _, found, _ in came]
        fingerprints += [mark for _, _, mark in came]
    read = Read(survey, settings, units, fingerprints)
    batch = batch_of([row.values for row in read.rows], vectors.schema(settings))
    assert batch.num_rows == len(read.rows)
    return read
