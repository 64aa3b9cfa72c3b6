"""Images to pixels: every mode scaled rightly, every damaged file given a reason, nothing decoded that is too large."""

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, PngImagePlugin

from pipelines.corpora import Bad, Row, images
from pipelines.corpora.images import ImageSettings, UnreadableImage, prepare
from pipelines.errors import Failed, Refused

KEEP = ImageSettings(size=None, encoding="original")
"""No resizing, so pixels can be compared one by one."""


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(height: int = 6, width: int = 8) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 20, columns * 20, rows + columns], -1).astype(np.uint8)


def read_all(source: Path, settings: ImageSettings) -> list[Row | Bad]:
    survey = images.survey([str(source)], settings)
    return [
        found for piece in survey.slices for _, found, _ in images.read(piece, survey.context, settings, lambda _: True)
    ]


def test_rgb_png_keeps_its_pixels() -> None:
    assert np.array_equal(prepare(encoded(Image.fromarray(ramp())), KEEP), ramp().transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    """TIFF 6.0: where row 0 and column 0 of the stored picture lie in the upright one."""
    upright = np.zeros((32, 48), np.uint8)
    upright[:16, :24] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = prepare(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options), KEEP)
    assert pixels.shape == (3, 32, 48)
    assert np.abs(pixels[0].astype(int) - upright).mean() < 3


def test_broken_exif_does_not_cost_the_picture() -> None:
    image = Image.fromarray(ramp())
    data = encoded(image, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x01" * 20)
    assert np.array_equal(prepare(data, KEEP), ramp().transpose(2, 0, 1))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    pixels = prepare(encoded(Image.fromarray(values)), ImageSettings(size=None, encoding="original", colour="grey"))
    assert pixels.tolist() == [[[0, 0, 1], [128, 255, 255]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_laid_on_white(mode: str) -> None:
    layer = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    layer.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        layer = Image.new("P", (2, 1), 0)
        layer.putpalette([0, 0, 0, 10, 20, 30])
        layer.putpixel((1, 0), 1)
        data = encoded(layer, transparency=1)
    else:
        data = encoded(layer.convert(mode))
    assert prepare(data, KEEP).tolist() == [[[0, 255]]] * 3


def test_half_transparent_is_half_white() -> None:
    assert prepare(encoded(Image.new("RGBA", (1, 1), (200, 0, 100, 128))), KEEP).ravel().tolist() == [227, 127, 177]


@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_cmyk_is_converted(colour: str) -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = prepare(encoded(red, "JPEG", quality=100), ImageSettings(size=None, encoding="original", colour=colour))
    expected = [255, 0, 0] if colour == "rgb" else [76]
    assert np.abs(pixels.mean((1, 2)) - expected).max() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_every_mode_becomes_the_colour_that_is_set(mode: str, colour: str) -> None:
    data = encoded(Image.new("L", (4, 4), 255).convert(mode))
    pixels = prepare(data, ImageSettings(size=2, colour=colour))
    assert pixels.shape == ((3 if colour == "rgb" else 1), 2, 2)
    assert (pixels == 255).all()


def test_centre_crop_takes_the_middle_and_none_squashes() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    data = encoded(Image.fromarray(wide))
    assert (prepare(data, ImageSettings(size=10, resample="nearest")) == 255).all()
    squashed = prepare(data, ImageSettings(size=9, crop="none", resample="nearest"))
    assert squashed[0, 0].tolist() == [0] * 3 + [255] * 3 + [0] * 3


def test_a_jpeg_decoded_at_a_fraction_looks_like_the_whole_one() -> None:
    """Large JPEGs are decoded at 1/2 to 1/8: faster, and no other picture."""
    y, x = np.mgrid[:512, :512] / 512
    smooth = (np.stack([x, y, (np.sin(9 * x) + 1) / 2], -1) * 255).astype(np.uint8)
    jpeg, png = encoded(Image.fromarray(smooth), "JPEG", quality=95), encoded(Image.fromarray(smooth))
    settings = ImageSettings(size=32)
    assert np.abs(prepare(jpeg, settings).astype(int) - prepare(png, settings)).mean() < 2


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(("side", "limit"), [(14_143, 50_000_000), (100, 9_999), (60_000, 178_956_970)])
def test_too_many_pixels_are_refused_from_the_header(side: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(UnreadableImage, match=r"pixels"):
        prepare(bomb, ImageSettings(max_pixels=limit))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_cut_off_files_are_reported(kind: str) -> None:
    data = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    for length in (len(data) // 2, len(data) - len(data) // 4, 20):
        with pytest.raises(UnreadableImage, match=r"cut off|not an image"):
            prepare(data[:length], ImageSettings(size=8))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_not_opened_whatever_their_name(kind: str) -> None:
    with pytest.raises(UnreadableImage, match="not an image in JPEG, PNG, WEBP format"):
        prepare(encoded(Image.fromarray(ramp()).convert("P"), kind), ImageSettings())


def test_random_damage_never_escapes_as_another_error() -> None:
    """Pillow's decoders raise many kinds of exception; each damaged byte here once stood for one of them."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(ramp(24, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = [encoded(picture, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP")]
    refused = 0
    for turn in range(600):
        data = bytearray(originals[turn % 3])
        for place in random.integers(0, len(data), 1 + turn % 4):
            data[place] = random.integers(256)
        try:
            prepare(bytes(data), ImageSettings(size=8))
        except UnreadableImage:
            refused += 1
    assert 100 < refused < 600


def test_dirt_in_a_folder_is_reported_one_by_one(tmp_path: Path) -> None:
    good = encoded(Image.fromarray(ramp()))
    (tmp_path / "a_good.png").write_bytes(good)
    (tmp_path / "b_empty.jpg").write_bytes(b"")
    (tmp_path / "c_text.jpg").write_text("not a picture")
    (tmp_path / "d_cut.png").write_bytes(good[:-30])
    (tmp_path / "._a_good.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    found = read_all(tmp_path, ImageSettings(size=4))
    assert [type(one) for one in found] == [Row, Bad, Bad, Bad]
    assert [(bad.source, bad.reason.split(":")[0]) for bad in found[1:] if isinstance(bad, Bad)] == [
        ("b_empty.jpg", "the file is empty"),
        ("c_text.jpg", "not an image in JPEG, PNG, WEBP format"),
        ("d_cut.png", "cut off or damaged"),
    ]
    ignored = images.survey([str(tmp_path)], ImageSettings()).ignored
    assert ignored == {"hidden file": 1, "not an image file (.txt)": 1, "not an image file (no suffix)": 1}


def test_a_file_that_vanished_after_the_survey_is_dirt(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(Image.fromarray(ramp())))
    survey = images.survey([str(tmp_path)], ImageSettings())
    (tmp_path / "x.png").unlink()
    [(unit, found, _)] = images.read(survey.slices[0], survey.context, ImageSettings(), lambda _: True)
    assert unit == 0
    assert isinstance(found, Bad)
    assert "could not be read" in found.reason


def test_rows_fit_the_schema_and_unwanted_units_are_not_decoded(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(Image.fromarray(ramp())))
    settings = ImageSettings(size=4)
    [row] = read_all(tmp_path, settings)
    assert isinstance(row, Row)
    schema = images.schema(settings)
    assert schema.names == list(row.values)
    assert schema.field("image").type == pa.fixed_shape_tensor(pa.uint8(), (3, 4, 4))
    assert (row.values["image"].shape, row.values["image"].dtype) == ((3, 4, 4), np.uint8)
    assert (row.values["label"], row.values["name"], row.group, row.split) == (-1, "x.png", "x.png", None)
    survey = images.survey([str(tmp_path)], settings)
    assert list(images.read(survey.slices[0], survey.context, settings, lambda _: False)) == []


def test_fingerprint_is_the_digest_of_the_file(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(ramp()))
    (tmp_path / "x.png").write_bytes(data)
    survey = images.survey([str(tmp_path)], ImageSettings())
    [(_, _, fingerprint)] = images.read(survey.slices[0], survey.context, ImageSettings(), lambda _: True)
    assert fingerprint == hashlib.sha256(data).digest()


def test_original_encoding_keeps_the_bytes_and_decodes_to_the_same_tensors(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(ramp(40, 50)), "JPEG")
    (tmp_path / "x.jpg").write_bytes(data)
    [kept] = read_all(tmp_path, ImageSettings(size=8, encoding="original"))
    [decoded] = read_all(tmp_path, ImageSettings(size=8))
    assert isinstance(kept, Row)
    assert isinstance(decoded, Row)
    assert kept.values["image"] == data
    columns = images.tensors(
        {"image": [data], "label": np.array([3], np.int32)}, ImageSettings(size=8, encoding="original")
    )
    assert torch.equal(columns["image"][0], torch.from_numpy(decoded.values["image"]))
    assert columns["label"].tolist() == [3]


def test_images_of_several_sizes_make_no_batch() -> None:
    small, large = (encoded(Image.new("RGB", (side, side))) for side in (4, 5))
    stored = {"image": [small, large], "label": np.zeros(2, np.int32)}
    with pytest.raises(Failed, match="4 x 4 and 5 x 5"):
        images.tensors(stored, KEEP)
    assert images.tensors({"image": [small, small], "label": np.zeros(2, np.int32)}, KEEP)["image"].shape == (
        2,
        3,
        4,
        4,
    )


def test_written_files_hold_the_pixels(tmp_path: Path) -> None:
    batch = {"image": torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)}
    images.write_files(batch, ["a", "b"], str(tmp_path), ImageSettings())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), batch["image"][1].permute(1, 2, 0).numpy())
    images.write_files({"image": batch["image"][:1, :1]}, ["g"], str(tmp_path), ImageSettings(colour="grey"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "g.png")), batch["image"][0, 0].numpy())


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="nowhere"):
        images.survey([str(tmp_path / "nowhere")], ImageSettings())
    with pytest.raises(Refused, match=r"no image in .*; it holds nothing\. Allowed"):
        images.survey([str(tmp_path)], ImageSettings())
    (tmp_path / "x.gif").write_bytes(encoded(Image.new("L", (2, 2)), "GIF"))
    with pytest.raises(Refused, match=r"1 x not an image file \(\.gif\)"):
        images.survey([str(tmp_path)], ImageSettings())


@pytest.mark.parametrize(
    "wrong",
    [{"size": None}, {"size": 0}, {"crop": "left"}, {"max_pixels": 200_000_000}, {"colour": "cmyk"}, {"sise": 4}],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ImageSettings(**wrong)
