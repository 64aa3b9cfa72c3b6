"""WebDataset tars: members with one key (the name up to its first dot) are one example."""

import json
import tarfile
from collections import Counter

from pipelines.corpora import Bad, Slice
from pipelines.corpora._image_units import MOST_IMAGE_BYTES, Found, Units, Wanted, is_image, why_ignored
from pipelines.corpora._sources import is_hidden
from pipelines.corpora._tars import list_members, read_members, slices_of
from pipelines.storage import Entry

LABEL_SUFFIXES = (".cls", ".json")
MOST_LABEL_BYTES = 1 << 20


def of_tar(entry: Entry, prefix: str) -> tuple[list[Slice], Counter[str]]:
    """The images of a tar, each with its place in it, and what else it holds. Only headers and labels are read."""
    labels: dict[str, int] = {}

    def choose(info: tarfile.TarInfo, tar: tarfile.TarFile) -> str | None:
        if is_image(info.name) and not is_hidden(info.name):
            return None
        if info.name.endswith(LABEL_SUFFIXES) and info.size <= MOST_LABEL_BYTES:
            labels.update(_label(info, tar))
            return ""
        return why_ignored(info.name)

    members, ignored = list_members(entry, choose, MOST_IMAGE_BYTES)
    labelled = [member._replace(label=labels.get(_key(member.name))) for member in members]
    return slices_of(entry, prefix, labelled, {"layout": "tar"}), ignored


def read_tar(piece: Slice, wanted: Wanted) -> Units:
    for unit, member, data in read_members(piece, wanted):
        if isinstance(data, Bad):
            yield unit, data
        else:
            name = f"{piece.name}/{member.name}"
            yield unit, Found(name, data, member.label, group=f"{piece.name}/{_key(member.name)}")


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _label(info: tarfile.TarInfo, tar: tarfile.TarFile) -> dict[str, int]:
    """A whole number, alone or as `label` or `cls` of a JSON object. Anything else is other metadata."""
    file = tar.extractfile(info)
    try:
        value = json.loads(file.read() if file else b"")
    except (ValueError, RecursionError):
        return {}
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    return {_key(info.name): value} if isinstance(value, int) and not isinstance(value, bool) else {}
