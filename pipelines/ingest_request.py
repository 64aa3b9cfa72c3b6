"""An ingest as it was asked for, checked and surveyed before anything is written or started."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import corpora, storage
from pipelines.corpora import Corpus, CorpusSettings, Survey
from pipelines.errors import Refused
from pipelines.reading import Selection
from pipelines.shards import check_holdout

REQUEST = "ingest.json"


@dataclass(frozen=True)
class Asked:
    """What there is to read, and how it is read."""

    kind: str
    corpus: Corpus
    settings: CorpusSettings
    """Completed by the survey."""
    sources: list[str]
    out: str
    survey: Survey
    selection: Selection
    max_bad_fraction: float

    @property
    def request(self) -> dict[str, Any]:
        """What the manifest follows from, and with it its digest: what reruns must repeat."""
        return {
            "kind": self.kind,
            "settings": self.settings.model_dump(mode="json"),
            "limit": self.selection.limit,
            "holdout": self.selection.holdout,
            "sources": _described(self.survey, self.selection.units),
        }


def ask(
    kind: str,
    sources: Sequence[str],
    out: str,
    settings: CorpusSettings,
    limit: int | None,
    max_bad_fraction: float,
    holdout: float,
) -> Asked:
    """Check an ingest and survey its sources; the arguments are those of `pipelines.ingest.ingest`.

    Raises:
        Refused: nothing to read, or a number out of range.
    """
    out, found = storage.normalise(out), [storage.normalise(source) for source in sources]
    _check(found, out, limit, max_bad_fraction, holdout)
    corpus = corpora.load(kind)
    survey = corpus.survey(found, settings)
    settings = settings.model_copy(update=survey.settings)
    units = sum(piece.stop - piece.start for piece in survey.slices)
    if not units:
        raise Refused(
            f"there is nothing of the kind {kind!r} in {', '.join(found)}; found {survey.ignored or 'no files'}."
        )
    return Asked(kind, corpus, settings, found, out, survey, Selection(units, limit, holdout), max_bad_fraction)


def _check(sources: list[str], out: str, limit: int | None, max_bad_fraction: float, holdout: float) -> None:
    check_holdout(holdout)
    if limit is not None and limit < 1:
        raise Refused(f"limit={limit} was given; it is the number of units to take: at least 1.")
    if not 0 <= max_bad_fraction <= 1:
        raise Refused(f"max_bad_fraction={max_bad_fraction} was given; it is a share: from 0 to 1.")
    if not sources:
        raise Refused("no source was given; name at least one file, directory or s3:// prefix.")
    for source in sources:
        if f"{out}/".startswith(f"{source}/"):
            raise Refused(f"out={out} lies inside the source {source}; put it elsewhere, or it would be read as data.")


def _described(survey: Survey, units: int) -> dict[str, Any]:
    """What the sources are, independent of where they lie; a file of another size, name or label changes it."""
    listing = [[piece.name, piece.start, piece.stop, piece.bytes, piece.meta] for piece in survey.slices]
    return {
        "digest": storage.sha256_of_bytes(storage.canonical_json([listing, survey.context, survey.ignored])),
        "names": len({piece.name for piece in survey.slices}),
        "units": units,
        "bytes": sum(piece.bytes for piece in survey.slices),
    }
