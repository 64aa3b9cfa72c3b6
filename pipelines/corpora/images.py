"""Images: folders of JPEG, PNG and WebP (class = folder), WebDataset tars, IDX, Parquet, and the Oxford-102 layout."""

import hashlib
import io
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps
from pydantic import Field, model_validator
from torch import Tensor

from pipelines import storage
from pipelines.corpora import Bad, Corpus, CorpusSettings, Row, Slice, Survey
from pipelines.corpora import _image_folders as folders
from pipelines.corpora import _image_tables as tables
from pipelines.corpora import _image_tars as tars
from pipelines.corpora import _image_units as units
from pipelines.corpora._sources import is_hidden, prefixes
from pipelines.corpora._tars import is_tar
from pipelines.errors import Failed, Refused

FORMATS = ("JPEG", "PNG", "WEBP")
"""What Pillow may try to decode. Its other decoders are seldom needed, and each is a way in for a crafted file."""

# What Pillow's decoders raise on damaged files, seen over the formats above.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)


# Above this many pixels Pillow refuses to open an image at all, so max_pixels cannot promise more.
PILLOW_LIMIT = 178_956_970

READERS = {
    "file": folders.read_file,
    "tar": tars.read_tar,
    "idx": tables.read_idx,
    "parquet": tables.read_parquet,
    "unreadable": units.read_unreadable,
}

# EXIF orientation -> what turns the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageSettings(CorpusSettings):
    size: int | None = Field(64, ge=1, le=8192, description="side in pixels; `none` keeps each image's own size")
    crop: Literal["center", "none"] = Field("center", description="center crops to a square first; none squashes")
    colour: Literal["rgb", "grey"] = "rgb"
    resample: Literal["bicubic", "bilinear", "lanczos", "box", "nearest"] = "bicubic"
    max_pixels: int = Field(
        50_000_000, ge=1, le=PILLOW_LIMIT, description="images with more are quarantined before they are decoded"
    )
    encoding: Literal["decoded", "original"] = Field("decoded", description="original keeps the file's own bytes")

    @model_validator(mode="after")
    def _one_size_or_own_bytes(self) -> "ImageSettings":
        if self.size is None and self.encoding == "decoded":
            raise ValueError("decoded rows need one size: set size=64 (or another), or encoding=original")
        return self

    @property
    def channels(self) -> int:
        return 3 if self.colour == "rgb" else 1


class UnreadableImage(ValueError):
    """Why one image cannot become a row."""


def survey(sources: list[str], settings: ImageSettings) -> Survey:
    """What images there are under the sources. Labels number the sorted class names of all sources together.

    Raises:
        Refused: a source that does not exist, or in which there is no image.
    """
    slices: list[Slice] = []
    ignored: Counter[str] = Counter()
    for source, prefix in zip(sources, prefixes(sources), strict=True):
        found, left = _survey_one(source, prefix)
        if not found:
            held = ", ".join(f"{count:,} x {reason}" for reason, count in left.most_common(3)) or "nothing"
            raise Refused(
                f"there is no image in {source!r}; it holds {held}. Allowed are folders of "
                f"{', '.join(units.EXTENSIONS)}, .tar, .tar.gz, *-idx3-ubyte.gz and .parquet files, and the Oxford-102 "
                "layout (jpg/, imagelabels.mat, setid.mat)."
            )
        slices += found
        ignored.update(left)
    classes = sorted({piece.meta["class"] for piece in slices if piece.meta.get("class") is not None})
    number = {name: place for place, name in enumerate(classes)}
    return Survey([_numbered(piece, number) for piece in slices], {"classes": classes}, dict(ignored))


def _numbered(piece: Slice, number: Mapping[str, int]) -> Slice:
    if "class" not in piece.meta:
        return piece
    meta = {**piece.meta, "label": number.get(piece.meta["class"])}
    del meta["class"]
    return replace(piece, meta=meta)


def _survey_one(source: str, prefix: str) -> tuple[list[Slice], Counter[str]]:
    entries = storage.list_files(source)
    if folders.is_oxford(entries):
        return folders.of_oxford(entries, source, prefix)
    ignored: Counter[str] = Counter()
    files, slices = [], []
    for entry in entries:
        if is_hidden(entry.name):
            ignored[units.why_ignored(entry.name)] += 1
        elif units.is_image(entry.name):
            files.append(entry)
        elif is_tar(entry.name):
            found, left = tars.of_tar(entry, prefix)
            slices += found
            ignored.update(left)
        elif tables.is_idx(entry.name):
            slices += tables.of_idx(entry, entries, prefix)
        elif tables.is_parquet(entry.name):
            found = tables.of_parquet(entry, prefix)
            slices += found
            ignored.update({} if found else {"Parquet file without images": 1})
        elif not tables.is_idx_labels(entry.name):
            ignored[units.why_ignored(entry.name)] += 1
    return folders.of_files(files, prefix) + slices, ignored


def read(
    piece: Slice, context: Mapping[str, Any], settings: ImageSettings, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Row | Bad, bytes]]:
    """Every wanted image of a slice as a row, or the reason why it is none, with the digest of its bytes."""
    for unit, found in READERS[piece.meta["layout"]](piece, wanted):
        if isinstance(found, Bad):
            yield unit, found, found.reason.encode()
            continue
        digest = hashlib.sha256(found.data).digest()
        try:
            yield unit, _row(found, settings), digest
        except UnreadableImage as trouble:
            yield unit, Bad(found.name, str(trouble)), digest


def _row(found: units.Found, settings: ImageSettings) -> Row:
    label = -1 if found.label is None else found.label
    if not -1 <= label < 2**31:
        raise UnreadableImage(f"its label {label} does not lie in [0, 2^31), nor is it -1 (none)")
    # Decoded in either case: an image that no step of training could read is found here.
    pixels = prepare(found.data, settings, found.shape)
    kept: Any = pixels
    if settings.encoding == "original":
        kept = found.data if found.shape is None else _as_png(pixels)
    values = {"image": kept, "label": label, "name": found.name}
    return Row(values, group=found.group or found.name, split=found.split)


def prepare(data: bytes, settings: ImageSettings, shape: tuple[int, int] | None = None) -> UInt8[np.ndarray, "C H W"]:
    """An image's bytes (or raw grey pixels of `shape`) upright, coloured, cropped and scaled as set.

    Raises:
        UnreadableImage: with a short reason.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    with warnings.catch_warnings():
        # Size is checked here, by a setting; Pillow's notes on odd metadata are no reason to stop.
        warnings.simplefilter("ignore")
        try:
            image = Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape)) if shape else _opened(data, settings)
            pixels = np.asarray(_sized(_coloured(_upright(image), settings), settings))
        except UnreadableImage:
            raise
        except Image.UnidentifiedImageError:
            raise UnreadableImage(f"not an image in {', '.join(FORMATS)} format") from None
        except Image.DecompressionBombError:
            raise UnreadableImage(f"more than {PILLOW_LIMIT:,} pixels") from None
        except DAMAGE as damage:
            raise UnreadableImage(f"cut off or damaged: {_plain(damage)}") from None
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _opened(data: bytes, settings: ImageSettings) -> Image.Image:
    """Only the header is read here, so the number of pixels is known before any is decoded."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > settings.max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels are more than max_pixels={settings.max_pixels:,}")
    if settings.size is not None and image.format == "JPEG":
        # JPEG can be decoded at 1/2, 1/4 or 1/8; never below twice the size that is wanted.
        image.draft(None, (2 * settings.size, 2 * settings.size))
    return image


def _upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says. EXIF that cannot be parsed says nothing: the pixels are still good.

    ImageOps.exif_transpose also writes the EXIF back, which fails on tags it cannot encode.
    """
    image.load()
    try:
        method = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*DAMAGE, TypeError, KeyError):
        method = None
    return image if method is None else image.transpose(method)


def _coloured(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """To RGB or grey. 16-bit grey keeps its upper 8 bits; what is transparent is laid on white."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    # CMYK has no direct way to grey that keeps its brightness.
    image = image.convert("RGB") if image.mode == "CMYK" else image
    return image.convert("RGB" if settings.colour == "rgb" else "L")


def _sized(image: Image.Image, settings: ImageSettings) -> Image.Image:
    if settings.size is None:
        return image
    side = (settings.size, settings.size)
    how = Image.Resampling[settings.resample.upper()]
    if settings.crop == "center":
        return ImageOps.fit(image, side, method=how)
    return image.resize(side, how)


def _plain(damage: Exception) -> str:
    return str(damage).strip().splitlines()[0][:120] if str(damage).strip() else type(damage).__name__


def _as_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, format="PNG")
    return file.getvalue()


def schema(settings: ImageSettings) -> pa.Schema:
    pixels = pa.binary()
    if settings.encoding == "decoded" and settings.size is not None:
        pixels = pa.fixed_shape_tensor(pa.uint8(), (settings.channels, settings.size, settings.size))
    return pa.schema([("image", pixels), ("label", pa.int32()), ("name", pa.string())])


def shapes(settings: ImageSettings) -> dict[str, list[int] | None]:
    return {"image": None if settings.size is None else [settings.channels, settings.size, settings.size]}


def tensors(stored: dict[str, Any], settings: ImageSettings) -> dict[str, Tensor]:
    """uint8 images [B, C, H, W] and their labels; images kept in their own encoding are decoded here.

    Raises:
        Failed: images kept at their own sizes differ in size, so they make no batch.
    """
    images = stored["image"]
    if settings.encoding == "original":
        decoded = [prepare(data, settings) for data in images]
        if len(sizes := {pixels.shape[1:] for pixels in decoded}) > 1:
            (h1, w1), (h2, w2) = sorted(sizes)[:2]
            raise Failed(f"images of {h1} x {w1} and {h2} x {w2} pixels make no batch: ingest with --set size=64.")
        images = np.stack(decoded) if decoded else np.zeros((0, settings.channels, 0, 0), np.uint8)
    return {"image": torch.from_numpy(images), "label": torch.from_numpy(stored["label"])}


def write_files(columns: dict[str, Tensor], stems: list[str], directory: str, settings: ImageSettings) -> None:
    """One PNG an image."""
    for stem, pixels in zip(stems, columns["image"].cpu().numpy(), strict=True):
        storage.write_atomic(storage.join(directory, f"{stem}.png"), _as_png(pixels))


corpus = Corpus(
    Settings=ImageSettings,
    survey=survey,
    read=read,
    schema=schema,
    shapes=shapes,
    tensors=tensors,
    write_files=write_files,
)
