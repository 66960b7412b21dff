"""Decoding of image files, against Pillow used directly."""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image, ImageOps

from chunkq.errors import ErrorCode
from chunkq.images import decoding
from chunkq.images.image_error import ImageError

Pixels = npt.NDArray[Any]
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def decode(content: bytes, mode: Any) -> Pixels:
    return decoding.pixels_of(decoding.decode(content, mode))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"),
        ("P", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("RGB", "WEBP"), ("RGBA", "WEBP"),
        ("RGB", "TIFF"), ("CMYK", "TIFF"), ("RGB", "BMP"), ("P", "GIF"),
    ],
)  # fmt: skip
def test_pixels_of_8_bits_are_those_that_pillow_converts(stored: str, kind: str, mode: str) -> None:
    content = saved(Image.fromarray(RGB).convert(stored), kind)
    expected = np.asarray(Image.open(BytesIO(content)).convert(mode))
    pixels = decode(content, mode)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected.reshape(5, 7, -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(RGB), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(content))).convert("RGB"))
    pixels = decode(content, "RGB")
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.shape == ((7, 5, 3) if orientation > 4 else (5, 7, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_png_of_16_bits_is_turned_as_one_of_8_bits(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    shallow = saved(Image.fromarray(RGB), "PNG", exif=exif)
    deep = bytes(imagecodecs.png_encode(RGB.astype(np.uint16) * 257))
    start = shallow.index(b"eXIf") - 4
    length = int.from_bytes(shallow[start : start + 4], "big") + 12
    header = deep.index(b"IDAT") - 4
    deep = deep[:header] + shallow[start : start + length] + deep[header:]
    np.testing.assert_array_equal(decode(deep, "RGB"), decode(shallow, "RGB").astype("u2") * 257)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_of_16_bits_keeps_its_values(kind: str) -> None:
    deep = RNG.integers(0, 1 << 16, (5, 7)).astype(np.uint16)
    content = saved(Image.fromarray(deep), kind)
    np.testing.assert_array_equal(decode(content, "L")[..., 0], deep)
    np.testing.assert_array_equal(decode(content, "RGB"), np.repeat(deep[..., None], 3, axis=2))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_colors_of_a_tiff_with_more_than_8_bits_keep_their_values(
    byteorder: Any, dtype: str
) -> None:
    deep = (RNG.random((5, 7, 3)) * 60000).astype(dtype)
    file = BytesIO()
    tifffile.imwrite(file, deep, photometric="rgb", byteorder=byteorder)
    pixels = decode(file.getvalue(), "RGB")
    assert pixels.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(pixels, deep)


def tiff(pixels: Any, **options: Any) -> bytes:
    file = BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "dtype",
    ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64"],
)
def test_gray_of_a_tiff_keeps_its_values(dtype: str) -> None:
    is_float = np.dtype(dtype).kind == "f"
    limits: Any = np.finfo("float16") if is_float else np.iinfo(dtype)
    stored = np.array([[limits.min, 0, 1, 100, limits.max]], dtype)
    pixels = decode(tiff(stored, photometric="minisblack"), "L")[..., 0]
    np.testing.assert_array_equal(pixels.astype(np.float64), stored.astype(np.float64))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_gray_of_which_0_is_white_is_inverted(dtype: str) -> None:
    stored = np.array([[0, 1, 200, np.iinfo(dtype).max]], dtype)
    pixels = decode(tiff(stored, photometric="miniswhite"), "L")[..., 0]
    np.testing.assert_array_equal(pixels, np.iinfo(dtype).max - stored)


def test_deep_colors_of_another_kind_are_an_error_of_the_image() -> None:
    cmyk = np.full((4, 5, 4), 40000, np.uint16)
    indexed = {"photometric": "palette", "colormap": np.zeros((3, 1 << 16), np.uint16)}
    files = [tiff(cmyk, photometric="separated"), tiff(cmyk[..., 0], **indexed)]
    for content in files:
        with pytest.raises(ImageError) as caught:
            decode(content, "RGB")
        assert caught.value.code == ErrorCode.IMAGE_DAMAGED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_deep_tiff_is_turned_as_a_shallow_one(orientation: int) -> None:
    files = [BytesIO(), BytesIO()]
    tag = (274, "H", 1, orientation, True)
    for file, pixels in zip(files, (RGB, RGB.astype(np.uint16) * 257), strict=True):
        tifffile.imwrite(file, pixels, photometric="rgb", extratags=[tag])
    shallow, deep = (decode(file.getvalue(), "RGB") for file in files)
    np.testing.assert_array_equal(deep, shallow.astype(np.uint16) * 257)


def test_deep_colors_become_gray_by_the_weights_of_shallow_ones() -> None:
    deep = bytes(imagecodecs.png_encode(RGB.astype(np.uint16) * 257))
    gray = decode(deep, "L")[..., 0]
    shallow = np.asarray(Image.fromarray(RGB).convert("L"))
    assert np.abs(gray / 257 - shallow).max() <= 1
    opaque = decode(deep, "RGBA")
    assert (opaque[..., 3] == 65535).all()


def damaged() -> dict[str, bytes]:
    png, jpeg = saved(Image.fromarray(RGB), "PNG"), saved(Image.fromarray(RGB), "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty": b"",
        "text": b"no image",
        "page": b"<!DOCTYPE html><html></html>",
        "half a png": png[: len(png) // 2],
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "flipped bits": bytes(flipped),
        "header only": png[:33],
        "signature only": png[:8],
        "a deep tiff without its last byte": tiff(
            RGB.astype(np.uint16), photometric="rgb", compression="lzw"
        )[:-1],
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_damaged_content_is_an_error_of_its_image(kind: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(damaged()[kind], "RGB")
    assert (caught.value.code, caught.value.stage) == (ErrorCode.IMAGE_DAMAGED, "decode")


def png_that_declares(width: int, height: int, depth: int) -> bytes:
    png = bytearray(saved(Image.fromarray(RGB), "PNG"))
    png[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    png[24] = depth
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_file_that_declares_a_huge_image_is_refused_before_it_is_decoded(
    depth: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError) as caught:
        decode(png_that_declares(50_000, 50_000, depth), "RGB")
    assert caught.value.code == ErrorCode.IMAGE_TOO_LARGE


def test_a_tiff_of_many_channels_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64)
    file = BytesIO()
    pixels = np.zeros((8, 8, 5), np.uint16)
    tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig")
    with pytest.raises(ImageError) as caught:
        decode(file.getvalue(), "RGB")
    assert caught.value.code == ErrorCode.IMAGE_TOO_LARGE


def test_a_lack_of_memory_is_no_error_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(b"content", "RGB")


def test_the_message_of_a_damaged_image_is_the_same_in_each_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object, **options: object) -> Image.Image:
        raise OSError(f"cannot read {object()}")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError) as caught:
        decode(b"content", "RGB")
    assert "0x" not in str(caught.value)


def test_a_format_that_starts_another_program_is_no_image() -> None:
    postscript = saved(Image.fromarray(RGB), "EPS")
    with pytest.raises(ImageError) as caught:
        decode(postscript, "RGB")
    assert caught.value.code == ErrorCode.IMAGE_DAMAGED
    assert "Ghostscript" not in str(caught.value)
