"""Images: folders of JPEG, PNG and WebP (class = folder), WebDataset tars, IDX, Parquet, and the Oxford-102 layout."""

import hashlib
import io
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps
from pydantic import Field, model_validator
from torch import Tensor

from pipelines import storage
from pipelines.corpora import Bad, Corpus, CorpusSettings, Row, Slice, Survey
from pipelines.corpora import _image_layouts as layouts
from pipelines.errors import Refused
from pipelines.storage import Entry

FORMATS = ("JPEG", "PNG", "WEBP")
"""What Pillow may try to decode. Its other decoders are seldom needed, and each is a way in for a crafted file."""

# What Pillow's decoders raise on damaged files, seen over the formats above.
DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageSettings(CorpusSettings):
    size: int | None = Field(64, ge=1, description="side in pixels; `none` keeps each image's own size")
    crop: Literal["center", "none"] = Field("center", description="center crops to a square first; none squashes")
    colour: Literal["rgb", "grey"] = "rgb"
    resample: Literal["bicubic", "bilinear", "lanczos", "box", "nearest"] = "bicubic"
    max_pixels: int = Field(50_000_000, ge=1, description="images with more are quarantined before they are decoded")
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
    """What images there are under the sources.

    Raises:
        Refused: a source that does not exist, or in which there is no image.
    """
    slices: list[Slice] = []
    classes: list[str] = []
    ignored: Counter[str] = Counter()
    prefixes = _prefixes(sources)
    for source, prefix in zip(sources, prefixes, strict=True):
        found, names, left = _survey_one(source, prefix)
        if not found:
            held = f"{sum(left.values())} other files" if left else "nothing"
            raise Refused(
                f"no image in {source!r}: it holds {held}. Allowed are folders of {', '.join(layouts.EXTENSIONS)},"
                " .tar, *-idx3-ubyte.gz and .parquet files, and the Oxford-102 layout."
            )
        if classes and names and names != classes:
            raise Refused(f"{source!r} has classes {names[:5]}..., but the sources before it {classes[:5]}...")
        classes = classes or names
        slices += found
        ignored.update(left)
    return Survey(slices, {"classes": classes}, dict(ignored))


def _prefixes(sources: list[str]) -> list[str]:
    """Of several sources, each name begins with its source's last word, numbered where two are the same."""
    if len(sources) == 1:
        return [""]
    words = [PurePosixPath(source).name for source in sources]
    return [f"{word}/" if words.count(word) == 1 else f"{n}-{word}/" for n, word in enumerate(words)]


def _survey_one(source: str, prefix: str) -> tuple[list[Slice], list[str], Counter[str]]:
    entries = storage.list_files(source)
    if layouts.is_oxford(entries):
        slices, classes = layouts.of_oxford(entries, source, prefix)
        return slices, classes, Counter()
    slices, classes = layouts.of_files([entry for entry in entries if layouts.is_image(entry.name)], prefix)
    ignored: Counter[str] = Counter()
    for entry in entries:
        if layouts.is_tar(entry.name):
            slices += layouts.of_tar(entry, prefix)
        elif layouts.is_idx(entry.name):
            slices += layouts.of_idx(entry, entries, prefix)
        elif layouts.is_parquet(entry.name):
            slices += layouts.of_parquet(entry, prefix)
        elif not layouts.is_image(entry.name) and not _is_label_file(entry, entries):
            ignored[f"not an image file ({PurePosixPath(entry.name).suffix or 'no suffix'})"] += 1
    return slices, classes, ignored


def _is_label_file(entry: Entry, entries: list[Entry]) -> bool:
    return "labels-idx1" in entry.name and any(layouts.is_idx(other.name) for other in entries)


def read(
    piece: Slice, context: Mapping[str, Any], settings: ImageSettings, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Row | Bad, bytes]]:
    """Every wanted image of a slice as a row, or the reason why it is none, with the digest of its bytes."""
    for unit, found in layouts.units(piece, wanted):
        if isinstance(found, Bad):
            yield unit, found, found.reason.encode()
            continue
        digest = hashlib.sha256(found.data).digest()
        try:
            pixels = prepare(found.data, settings, found.shape)
        except UnreadableImage as trouble:
            yield unit, Bad(found.name, str(trouble)), digest
            continue
        kept = found.data if settings.encoding == "original" and found.shape is None else pixels
        if settings.encoding == "original" and found.shape is not None:
            kept = _as_png(pixels)
        values = {"image": kept, "label": -1 if found.label is None else found.label, "name": found.name}
        yield unit, Row(values, group=found.name, split=found.split), digest


def prepare(data: bytes, settings: ImageSettings, shape: tuple[int, int] | None = None) -> np.ndarray:
    """An image's bytes (or raw grey pixels of `shape`) as uint8 [C, H, W], cropped, scaled and coloured as set.

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
            coloured = _coloured(ImageOps.exif_transpose(image), settings)
            pixels = np.asarray(_sized(coloured, settings))
        except Image.UnidentifiedImageError:
            raise UnreadableImage(f"not an image in {', '.join(FORMATS)} format") from None
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


def _coloured(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """To RGB or grey. 16-bit grey is scaled to 8 bits; what is transparent is laid on white."""
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
    """uint8 images [B, C, H, W] and their labels; images kept in their own encoding are decoded here."""
    images = stored["image"]
    if settings.encoding == "original":
        images = np.stack([prepare(data, settings) for data in images])
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
