"""A streamed run as it was asked for: the ingest that goes on beside it, and what is not possible."""

from dataclasses import dataclass, field, replace
from typing import Any

from pipelines import corpora, storage
from pipelines.errors import Refused
from pipelines.ingest_request import REQUEST, Asked, ask
from pipelines.manifest import is_finished, load_manifest
from pipelines.options import validated
from pipelines.recipe import Recipe, Stage
from pipelines.used import check_owner, state_of


@dataclass(frozen=True)
class Streamed:
    """What the user asked for beside the run itself; the fields of an ingest mean what they mean there."""

    sources: tuple[str, ...] = ()
    """Empty: the shards are finished already, and the run goes through them as through a stream."""
    corpus: str | None = None
    """None: the first kind that the recipe trains on."""
    preparation: dict[str, Any] = field(default_factory=dict)
    """Settings of the corpus."""
    limit: int | None = None
    holdout: float = 0.1
    max_bad_fraction: float = 0.05
    delete_used: bool = False
    """Parts are deleted when no checkpoint goes on in them; there is one epoch. It does not change the result."""


@dataclass(frozen=True)
class Stream:
    """The rows of a streamed run."""

    asked: Asked | None
    """None: there is nothing left to ingest."""
    kind: str
    settings: dict[str, Any]
    """The corpus's, as the manifest will have them."""
    digest: str
    """Of the ingest's request, which the manifest follows from: what is known of it from the beginning."""
    once: bool


def stream_of(streamed: Streamed, found: Recipe, shards: str) -> Stream:
    """Check the ingest of a streamed run and survey its sources.

    Raises:
        Refused: a mistake in it, or nothing to read.
    """
    shards = storage.normalise(shards)
    if not streamed.sources:
        return _finished(streamed, shards)
    kind = streamed.corpus or found.corpus[0]
    settings = validated(corpora.load(kind).Settings, streamed.preparation, f"corpus {kind!r}")
    asked = ask(kind, streamed.sources, shards, settings, streamed.limit, streamed.max_bad_fraction, streamed.holdout)
    request = asked.request
    return Stream(asked, kind, request["settings"], _digest(request), streamed.delete_used)


def check_stream(stream: Stream, stages: tuple[Stage, ...], shards: str, out: str) -> None:
    """Raises Refused where parts are deleted that are needed later, or by another run."""
    if stream.once and len(stages) > 1:
        raise Refused(
            f"--delete-used was given, and this recipe has the stages {', '.join(stage.name for stage in stages)}: each"
            " goes through the stream from its beginning. Leave --delete-used out."
        )
    check_owner(storage.normalise(shards), out, stream.once)


def _finished(streamed: Streamed, shards: str) -> Stream:
    if replace(streamed, delete_used=False) != Streamed():
        raise Refused("it was said how a source is read, and there is none: give --source too, or say nothing of it.")
    if not is_finished(shards):
        begun = storage.exists(storage.join(shards, REQUEST))
        what = "holds an ingest that is not finished: repeat" if begun else "holds no shards: give"
        raise Refused(f"--stream without --source goes through finished shards, and {shards} {what} its --source.")
    manifest = load_manifest(shards)
    home = storage.join(shards, REQUEST)
    digest = _digest(storage.read_json(home)) if storage.exists(home) else manifest.digest
    # The run that deleted parts may go on, through the others.
    once = streamed.delete_used or state_of(shards)["deleted"] > 0
    return Stream(None, manifest.kind, manifest.settings, digest, once)


def _digest(request: dict[str, Any]) -> str:
    return storage.sha256_of_bytes(storage.canonical_json(request))
