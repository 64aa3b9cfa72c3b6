"""Images as files: class folders, official split folders, and the Oxford-102 flowers."""

import io
import re
import zlib
from collections import Counter
from typing import Any

import scipy.io
from scipy.io.matlab import MatReadError

from pipelines import storage
from pipelines.corpora import NOT_TEST, Bad, Slice
from pipelines.corpora._image_units import MOST_IMAGE_BYTES, Found, Units, Wanted, is_image, why_ignored
from pipelines.errors import Failed, Refused
from pipelines.storage import Entry

SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}


def of_files(entries: list[Entry], prefix: str) -> list[Slice]:
    """Image files, each with its class: its folder, below train/, valid/ or test/ where nothing else is on top.

    Where there is no valid folder, train is cut by the hash: into train and valid, and test too if that is missing.
    """
    tops = {entry.name.partition("/")[0].lower() for entry in entries}
    official = tops <= SPLIT_FOLDERS.keys()
    splits = {SPLIT_FOLDERS[top] for top in tops} if official else set()
    slices = []
    for entry in entries:
        parts = entry.name.split("/")
        split = SPLIT_FOLDERS[parts[0].lower()] if official else None
        if split == "train" and "valid" not in splits:
            split = NOT_TEST if "test" in splits else None
        folder = "/".join(parts[1:-1] if official else parts[:-1])
        meta = {"layout": "file", "class": folder or None, "split": split}
        slices.append(Slice(entry.uri, prefix + entry.name, 0, 1, entry.bytes, meta))
    return slices


def read_file(piece: Slice, wanted: Wanted) -> Units:
    if not wanted(0):
        return
    if piece.bytes > MOST_IMAGE_BYTES:
        yield 0, Bad(piece.name, f"it has {piece.bytes:,} bytes; at most {MOST_IMAGE_BYTES:,} are read")
        return
    try:
        data = storage.read_bytes(piece.uri)
    except (OSError, Refused, Failed) as trouble:
        # One file that is gone or unreadable is dirt; the message without the path, which the source names already.
        reason = trouble.strerror if isinstance(trouble, OSError) else None
        yield 0, Bad(piece.name, f"could not be read: {reason or type(trouble).__name__}")
        return
    yield 0, Found(piece.name, data, piece.meta["label"], piece.meta["split"])


def is_oxford(entries: list[Entry]) -> bool:
    names = {entry.name for entry in entries}
    return {"imagelabels.mat", "setid.mat"} <= names and any(name.startswith("jpg/") for name in names)


def of_oxford(entries: list[Entry], root: str, prefix: str) -> tuple[list[Slice], Counter[str]]:
    """Oxford-102: `jpg/image_00001.jpg` has the first label; trnid, valid and tstid are the official splits.

    Labels 1..102 become classes "001".."102".
    """
    labels, split_of = _oxford_tables(root)
    slices = []
    ignored: Counter[str] = Counter()
    for entry in entries:
        if entry.name in ("imagelabels.mat", "setid.mat"):
            continue
        number = re.fullmatch(r"jpg/\D*(\d+)\.\w+", entry.name)
        if number is None or not is_image(entry.name):
            ignored[why_ignored(entry.name) if number is None else "no number in its name"] += 1
            continue
        place = int(number[1])
        if not 1 <= place <= len(labels):
            raise Refused(
                f"{entry.name} in {root} has no label: imagelabels.mat holds {len(labels)}. "
                "Remove the file, or get the imagelabels.mat that belongs to these images."
            )
        meta = {"layout": "file", "class": f"{labels[place - 1]:03d}", "split": split_of.get(place)}
        slices.append(Slice(entry.uri, prefix + entry.name, 0, 1, entry.bytes, meta))
    return slices, ignored


def _oxford_tables(root: str) -> tuple[list[int], dict[int, str]]:
    """(label of each image, image number -> split)."""
    try:
        labels = [int(label) for label in _matlab(root, "imagelabels.mat")["labels"].ravel()]
        sets = _matlab(root, "setid.mat")
        names = {"trnid": "train", "valid": "valid", "tstid": "test"}
        split_of = {int(image): split for key, split in names.items() for image in sets[key].ravel()}
    except (MatReadError, NotImplementedError, ValueError, KeyError, TypeError, IndexError, OSError, zlib.error) as odd:
        raise Refused(
            f"imagelabels.mat or setid.mat in {root} is not as Oxford-102 has them ({type(odd).__name__}: {odd}). "
            "Download them again."
        ) from None
    return labels, split_of


def _matlab(root: str, name: str) -> dict[str, Any]:
    data = io.BytesIO(storage.read_bytes(storage.join(root, name)))
    loaded: dict[str, Any] = scipy.io.loadmat(data)  # type: ignore[arg-type]  # its stubs know paths only
    return loaded
