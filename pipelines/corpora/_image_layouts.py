"""Where images are found: folders, tars, IDX files, Parquet and the Oxford layout, each as slices of units.

A unit is one image (or what should have been one). Only names, sizes and headers are read to survey; pixels never.
"""

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io

from pipelines import storage
from pipelines.corpora import NOT_TEST, Bad, Slice
from pipelines.errors import Refused
from pipelines.storage import Entry

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
SLICE_BYTES = 64 << 20
MOST_MEMBER_BYTES = 512 << 20

Wanted = Callable[[int], bool]


@dataclass(frozen=True)
class Found:
    """One image before it is decoded."""

    name: str
    data: bytes
    """The file's bytes, or of raw pixels (`shape` given) the bytes of the uint8 array."""
    label: int | None
    split: str | None = None
    shape: tuple[int, int] | None = None


def is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def is_idx(name: str) -> bool:
    return name.lower().endswith(("-idx3-ubyte.gz", "-idx3-ubyte"))


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


# Folders


def of_files(entries: list[Entry], prefix: str) -> tuple[list[Slice], list[str]]:
    """(slices, class names) of image files. The class is the folder; train/, valid/, test/ on top are the splits."""
    tops = {PurePosixPath(entry.name).parts[0].lower() for entry in entries}
    official = bool(tops) and tops <= SPLIT_FOLDERS.keys() and any(t in tops for t in ("train", "test"))
    placed = []
    for entry in entries:
        parts = PurePosixPath(entry.name).parts
        split = SPLIT_FOLDERS[parts[0].lower()] if official else None
        folder = "/".join(parts[1:-1] if official else parts[:-1])
        placed.append((entry, folder, split))
    classes = sorted({folder for _, folder, _ in placed if folder})
    number = {folder: place for place, folder in enumerate(classes)}
    slices = [
        Slice(
            entry.uri, prefix + entry.name, 0, 1, entry.bytes,
            {"layout": "file", "label": number.get(folder), "split": split},
        )
        for entry, folder, split in placed
    ]  # fmt: skip
    return slices, classes


def _read_file(piece: Slice, wanted: Wanted) -> Iterator[tuple[int, Found | Bad]]:
    if not wanted(0):
        return
    try:
        data = storage.read_bytes(piece.uri)
    except OSError as trouble:
        yield 0, Bad(piece.name, f"could not be read: {trouble.strerror or type(trouble).__name__}")
        return
    yield 0, Found(piece.name, data, piece.meta["label"], piece.meta["split"])


# Oxford-102: jpg/, imagelabels.mat, setid.mat


def is_oxford(entries: list[Entry]) -> bool:
    names = {entry.name for entry in entries}
    return {"imagelabels.mat", "setid.mat"} <= names and any(name.startswith("jpg/") for name in names)


def of_oxford(entries: list[Entry], root: str, prefix: str) -> tuple[list[Slice], list[str]]:
    """Labels 1..102 become 0..101; trnid, valid and tstid are the official splits."""
    try:
        labels = _matlab(root, "imagelabels.mat")["labels"].ravel().astype(int)
        sets = _matlab(root, "setid.mat")
        split_of = {
            int(image): split
            for key, split in (("trnid", "train"), ("valid", "valid"), ("tstid", "test"))
            for image in sets[key].ravel()
        }
    except (ValueError, KeyError, TypeError) as trouble:
        raise Refused(f"imagelabels.mat or setid.mat in {root} is not as Oxford-102 has them: {trouble}") from None
    slices = []
    for entry in entries:
        if not (entry.name.startswith("jpg/") and is_image(entry.name)):
            continue
        number = int("".join(filter(str.isdigit, PurePosixPath(entry.name).stem)) or 0)
        if not 1 <= number <= len(labels):
            raise Refused(f"{entry.name} has no label: imagelabels.mat holds {len(labels)}.")
        meta = {"layout": "file", "label": int(labels[number - 1]) - 1, "split": split_of.get(number)}
        slices.append(Slice(entry.uri, prefix + entry.name, 0, 1, entry.bytes, meta))
    return slices, [f"{label:03d}" for label in range(1, int(labels.max()) + 1)]


def _matlab(root: str, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = scipy.io.loadmat(storage.open_read(storage.join(root, name)))
    return loaded


# WebDataset tars: members with one stem belong together


def of_tar(entry: Entry, prefix: str) -> list[Slice]:
    """The images of a tar, each with its place in it. A compressed tar is one slice: it can only be read in order."""
    name = prefix + entry.name
    compressed = not entry.name.lower().endswith(".tar")
    members: list[list[Any]] = []
    labels: dict[str, int] = {}
    trouble = None
    try:
        with (
            storage.open_read(entry.uri) as file,
            tarfile.open(fileobj=file, mode="r:gz" if compressed else "r:") as tar,
        ):
            for member in tar:
                if member.isdir():
                    continue
                if refusal := _unsafe(member):
                    members.append([member.name, -1, 0, refusal])
                elif is_image(member.name):
                    members.append([member.name, member.offset_data, member.size, None])
                elif member.name.endswith((".cls", ".json")) and member.size <= 1 << 20:
                    labels.update(_label_of(member, tar))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as cut:
        trouble = f"the archive is cut off or damaged after {len(members)} images: {cut}"
    rows = [[m, offset, size, refusal, labels.get(_stem(m))] for m, offset, size, refusal in members]
    if trouble:
        rows.append(["", -1, 0, trouble, None])
    slices, first = [], 0
    while first < len(rows):
        stop, size = first, 0
        while stop < len(rows) and (compressed or size < SLICE_BYTES):
            size += rows[stop][2]
            stop += 1
        meta = {"layout": "tar", "members": rows[first:stop], "compressed": compressed}
        slices.append(Slice(entry.uri, name, 0, stop - first, size, meta))
        first = stop
    return slices


def _unsafe(member: tarfile.TarInfo) -> str | None:
    """Nothing is ever extracted, but a member that tries to leave its folder is not taken for an image either."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "its path climbs out of the archive"
    if not member.isfile():
        return "it is a link or a device, not a file"
    if member.size > MOST_MEMBER_BYTES:
        return f"it has {member.size:,} bytes; at most {MOST_MEMBER_BYTES:,} are read"
    return None


def _stem(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _label_of(member: tarfile.TarInfo, tar: tarfile.TarFile) -> dict[str, int]:
    file = tar.extractfile(member)
    text = file.read().decode("utf-8", "replace").strip() if file else ""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    value = value.get("label", value.get("cls")) if isinstance(value, dict) else value
    return {_stem(member.name): value} if isinstance(value, int) and not isinstance(value, bool) else {}


def _read_tar(piece: Slice, wanted: Wanted) -> Iterator[tuple[int, Found | Bad]]:
    members = piece.meta["members"]
    with storage.open_read(piece.uri) as raw:
        # In a compressed tar, offsets count uncompressed bytes; members come in order, so seeking only goes forward.
        file = gzip.GzipFile(fileobj=raw) if piece.meta["compressed"] else raw
        for unit, (name, offset, size, refusal, label) in enumerate(members):
            if not wanted(unit):
                continue
            full = f"{piece.name}/{name}" if name else piece.name
            if refusal:
                yield unit, Bad(full, refusal)
                continue
            try:
                file.seek(offset)
                data = file.read(size)
            except (OSError, EOFError, zlib.error) as trouble:
                yield unit, Bad(full, f"could not be read from the archive: {trouble}")
                continue
            yield unit, Found(full, data, label) if len(data) == size else Bad(full, "the archive is cut off inside it")


# IDX (MNIST's format): magic, count, height, width, then bytes


def of_idx(entry: Entry, entries: list[Entry], prefix: str) -> list[Slice]:
    """Slices of 10,000 images. With both a train and a t10k file, t10k is the official test split."""
    stem = entry.name.rpartition("/")[2]
    count, height, width = _idx_header(entry)
    pair = _idx_labels(entry, entries)
    stems = [e.name.rpartition("/")[2] for e in entries if is_idx(e.name)]
    official = any(s.startswith("t10k") for s in stems) and any(s.startswith("train") for s in stems)
    split = ("test" if stem.startswith("t10k") else NOT_TEST) if official else None
    step = 10_000
    meta = {"layout": "idx", "shape": [height, width], "labels": pair, "split": split}
    name = prefix + entry.name
    return [
        Slice(entry.uri, name, low, min(low + step, count), min(step, count - low) * height * width, meta)
        for low in range(0, count, step)
    ]


def _opened(file: Any, name: str) -> Any:
    return gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file


def _idx_header(entry: Entry) -> tuple[int, int, int]:
    try:
        with storage.open_read(entry.uri) as file:
            magic, count, height, width = struct.unpack(">IIII", _opened(file, entry.name).read(16))
    except (struct.error, OSError, EOFError, zlib.error) as trouble:
        raise Refused(f"{entry.uri} is not an IDX file of images: {trouble}") from None
    if magic != 0x803:
        raise Refused(f"{entry.uri} is not an IDX file of images: it begins with {magic:#x}, not 0x803.")
    return count, height, width


def _idx_labels(entry: Entry, entries: list[Entry]) -> str | None:
    wanted = entry.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
    return next((e.uri for e in entries if e.name == wanted and e.name != entry.name), None)


def _read_idx(piece: Slice, wanted: Wanted) -> Iterator[tuple[int, Found | Bad]]:
    height, width = piece.meta["shape"]
    labels = _idx_label_bytes(piece)
    with storage.open_read(piece.uri) as raw:
        file = _opened(raw, piece.uri)
        file.seek(16 + piece.start * height * width)
        for unit in range(piece.stop - piece.start):
            number = piece.start + unit
            name = f"{piece.name}/{number}"
            try:
                data = file.read(height * width)
            except (OSError, EOFError, zlib.error):
                data = b""
            if not wanted(unit):
                continue
            if len(data) != height * width:
                yield unit, Bad(name, "the file is cut off before this image")
                continue
            label = labels[unit] if unit < len(labels) else None
            yield unit, Found(name, data, label, piece.meta["split"], (height, width))


def _idx_label_bytes(piece: Slice) -> bytes:
    uri = piece.meta["labels"]
    if uri is None:
        return b""
    try:
        with storage.open_read(uri) as raw:
            file = _opened(raw, uri)
            file.seek(8 + piece.start)
            data: bytes = file.read(piece.stop - piece.start)
            return data
    except (OSError, EOFError, zlib.error) as trouble:
        raise Refused(f"the labels {uri} cannot be read: {trouble}") from None


# Parquet with an image column


def of_parquet(entry: Entry, prefix: str) -> list[Slice]:
    """One slice per row group."""
    try:
        with storage.open_read(entry.uri) as file:
            parquet = pq.ParquetFile(file)
            image, label = _parquet_columns(parquet.schema_arrow, entry.uri)
            groups = [parquet.metadata.row_group(n) for n in range(parquet.num_row_groups)]
    except pa.ArrowInvalid as trouble:
        raise Refused(f"{entry.uri} is not a Parquet file that can be read: {trouble}") from None
    meta = {"layout": "parquet", "image": image, "label": label}
    slices, first = [], 0
    for number, group in enumerate(groups):
        stop = first + group.num_rows
        slices.append(
            Slice(entry.uri, prefix + entry.name, first, stop, group.total_byte_size, {**meta, "group": number})
        )
        first = stop
    return slices


def _parquet_columns(schema: pa.Schema, uri: str) -> tuple[str, str | None]:
    """The image column (bytes, or a struct with `bytes` as data-set hubs write it) and the label column."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    able = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in able if name in ("image", "img", "jpg", "png")] or able
    if len(named) != 1:
        what = f"several ({', '.join(named)}): name one of them `image`" if named else "none"
        raise Refused(f"{uri} needs one column with images' bytes; of {', '.join(schema.names)} there is {what}.")
    label = "label" if "label" in schema.names and pa.types.is_integer(schema.field("label").type) else None
    return named[0], label


def _read_parquet(piece: Slice, wanted: Wanted) -> Iterator[tuple[int, Found | Bad]]:
    columns = [piece.meta["image"], *([piece.meta["label"]] if piece.meta["label"] else [])]
    with storage.open_read(piece.uri) as file:
        table = pq.ParquetFile(file).read_row_group(piece.meta["group"], columns=columns)
    images = table.column(piece.meta["image"])
    labels = table.column(piece.meta["label"]) if piece.meta["label"] else None
    for unit in range(len(images)):
        if not wanted(unit):
            continue
        value = images[unit].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        name = f"{piece.name}/{piece.start + unit}"
        if data is None:
            yield unit, Bad(name, "the image column is empty here")
            continue
        yield unit, Found(name, data, None if labels is None else labels[unit].as_py())


READERS = {"file": _read_file, "tar": _read_tar, "idx": _read_idx, "parquet": _read_parquet}


def units(piece: Slice, wanted: Wanted) -> Iterator[tuple[int, Found | Bad]]:
    """(unit, image or reason) of the wanted units of a slice, in order."""
    return READERS[piece.meta["layout"]](piece, wanted)
