"""What the layouts of image corpora share: names that are images, sizes of slices, an image before it is decoded."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.corpora import Bad, Slice, _sources
from pipelines.storage import Entry

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
SLICE_BYTES = 64 << 20
"""Where large files are cut: well under the 256 MiB of a part, so that parts come out even."""
MOST_IMAGE_BYTES = 512 << 20
"""A larger file or member is refused unread: no image has it, and it would not fit beside the rest of a worker."""

Wanted = Callable[[int], bool]


@dataclass(frozen=True)
class Found:
    """One image before it is decoded."""

    name: str
    data: bytes
    """The file's bytes, or of raw grey pixels (`shape` given) the bytes of the uint8 array."""
    label: int | None
    split: str | None = None
    shape: tuple[int, int] | None = None
    """(height, width) of raw pixels."""
    group: str | None = None
    """What the split hashes where that is not the name."""


Units = Iterator[tuple[int, Found | Bad]]


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def why_ignored(name: str) -> str:
    """Why a file is no unit of this kind."""
    return _sources.why_ignored(name, "an image file")


def unreadable(entry: Entry, prefix: str, reason: str) -> list[Slice]:
    """A whole file as one unit that goes to the quarantine."""
    return [Slice(entry.uri, prefix + entry.name, 0, 1, 0, {"layout": "unreadable", "reason": reason})]


def read_unreadable(piece: Slice, wanted: Wanted) -> Units:
    if wanted(0):
        yield 0, Bad(piece.name, piece.meta["reason"])
