"""Decode image files: JPEG, PNG, TIFF, WebP and what else Pillow reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from io import BytesIO
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from chunkq.errors import ErrorCode
from chunkq.images.image_error import ImageError
from chunkq.images.image_spec import CHANNELS, Mode
from chunkq.install_hint import install_command

Pixels = npt.NDArray[Any]
"""Pixels (H, W, C)."""
Decoded = npt.NDArray[Any] | Image.Image
"""Pixels (H, W, C). Those with 8 bits per channel can be an image of Pillow, which resizes them
without a copy as an array; see `pixels_of`."""
Reserve = Callable[[int], None]
"""Waits until this process may hold so many pixels of an image."""
MAX_PIXELS = 178_956_970
"""Largest number of pixels of an image, Pillow's own limit. Use a volume job for larger ones."""
MAX_CHANNELS = 4
PNG_SIGNATURE, TIFF_SIGNATURES = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_DEPTH, PNG_COLOR = 24, 25
"""Offsets of the bit depth and of the color type in a PNG file."""
DEEP_MODES = ("I", "F")
"""First letters of Pillow's modes with more than 8 bits; all of them have one channel."""
LUMA = np.array([299, 587, 114], np.float64) / 1000
"""Weights of red, green and blue in gray: ITU-R 601-2, as in Pillow."""
FORMATS = (
    "JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "MPO", "AVIF", "DIB", "TGA",
    "ICO", "PCX", "SGI", "QOI", "DDS", "PSD",
)  # fmt: skip
"""Formats that are opened, as far as Pillow has them. It also knows some that start other programs,
such as EPS, which runs Ghostscript."""
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""Part of messages that differs from process to process."""
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 274, 258, 262, 339
"""Tags of EXIF and TIFF."""
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR = 0, 1, 2, 6
"""Values of PHOTOMETRIC."""
UNSIGNED, SIGNED = 1, 2
"""Values of SAMPLE_FORMAT."""
TO_RGB = (6, 7, 33007, 34892)
"""Compressions of TIFF files, all of JPEG, whose YCbCr becomes RGB as it is decoded."""


def unlimited(pixels: int) -> None:
    """Hold any number of pixels; a `Reserve`."""


def decode(content: bytes, mode: Mode, reserve: Reserve = unlimited) -> Decoded:
    """Decode the bytes of an image file to pixels (H, W, C) with the channels of `mode`.

    The pixels are turned as EXIF says. Those with 8 bits per channel are converted by Pillow to
    uint8. Gray with more bits, and colors of PNG and TIFF, keep their values, in their dtype: gray
    is repeated for each color, colors become gray by the weights of ITU-R 601-2, as float32. Pillow
    reduces colors of other formats to 8 bits. Opacity is dropped or is the largest value of the
    dtype (1 for floats). Unsigned values of which 0 is white are inverted. Of a file with several
    images the first one is decoded. `reserve` is called with the number of pixels before they are
    decoded.

    Raises ImageError if the content is no image of `FORMATS`, is damaged or too large, with the
    same message in each process.
    """
    if not content:
        raise ImageError("decode", "the file is empty; replace it")
    try:
        return _decode(content, mode, reserve)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large() from error
    except UnidentifiedImageError as error:
        raise ImageError("decode", "not an image in a supported format; replace it") from error
    except Exception as error:  # decoders raise errors of many types for damaged files
        reason = " ".join(ADDRESS.sub("", f"{error}").split()) or type(error).__name__
        raise ImageError("decode", f"damaged: {reason}; replace it") from error


def _too_large() -> ImageError:
    return ImageError(
        "decode",
        f"more than {MAX_PIXELS} pixels are unsupported; use a smaller image, or a job that "
        "cuts it into patches",
        code=ErrorCode.IMAGE_TOO_LARGE,
    )


def _decode(content: bytes, mode: Mode, reserve: Reserve) -> Decoded:
    if content[:8] == PNG_SIGNATURE and content[PNG_DEPTH] == 16 and content[PNG_COLOR] != 0:
        # Pillow reduces colors of 16 bits to 8.
        return _to_mode(_turned(_deep_png(content, reserve), _orientation(content)), mode)
    try:
        image = _open(content)
    except UnidentifiedImageError:
        if content[:4] not in TIFF_SIGNATURES:
            raise
        return _to_mode(_tiff(content, reserve), mode)
    with image:
        if image.format == "TIFF" and _is_changed_by_pillow(image):
            return _to_mode(_tiff(content, reserve), mode)
        reserve(image.width * image.height)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return of_pillow(image, mode)


def pixels_of(decoded: Decoded) -> Pixels:
    """Return the pixels (H, W, C) of a decoded image."""
    if not isinstance(decoded, Image.Image):
        return decoded
    return np.asarray(decoded).reshape(decoded.height, decoded.width, CHANNELS[decoded.mode])


def of_pillow(image: Image.Image, mode: Mode) -> Decoded:
    """Return an image of Pillow with the channels of `mode`, see `decode`. It is not turned."""
    if image.mode[0] in DEEP_MODES:
        pixels = np.asarray(image)
        return _to_mode(pixels.astype(pixels.dtype.newbyteorder("="))[..., None], mode)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def of_array(pixels: Pixels, mode: Mode) -> Decoded:
    """Return an image (H, W) or (H, W, 1 to 4) with the channels of `mode`, as of a decoded file.

    Raises ImageError for other shapes, and for values that are no numbers.
    """
    pixels = _with_channels(pixels)
    if pixels.dtype != np.uint8:
        return _to_mode(pixels, mode)
    channels = pixels.shape[2]
    return of_pillow(Image.fromarray(pixels[..., 0] if channels == 1 else pixels), mode)


def _open(content: bytes) -> Image.Image:
    """Open an image file without decoding it. Raises UnidentifiedImageError and others."""
    image = Image.open(BytesIO(content), formats=_formats())
    if image.width * image.height > MAX_PIXELS:  # code of users can lift Pillow's own limit
        raise _too_large()
    return image


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _is_changed_by_pillow(image: Image.Image) -> bool:
    """Return whether Pillow does not keep the values of a TIFF image, deep or with signs.

    It reduces colors to 8 bits, does not invert deep gray, and reads int8 as uint8 and uint32 as
    int32.
    """
    tags = getattr(image, "tag_v2", {})
    bits, kind = tags.get(BITS_PER_SAMPLE, (1,)), tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0]
    depth, is_inverted = max(bits), tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if kind == UNSIGNED and (depth == 32 or (depth > 8 and is_inverted)):
        return True
    return (kind == SIGNED and depth == 8) or (len(bits) > 1 and depth > 8)


def _orientation(content: bytes) -> int:
    with _open(content) as image:
        return int(image.getexif().get(ORIENTATION, 1))


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Return pixels turned by an EXIF orientation, 1 to 8; other values mean 1."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _deep_png(content: bytes, reserve: Reserve) -> Pixels:
    """Decode a PNG file whose colors have 16 bits."""
    with _open(content) as image:  # refuses one that is too large
        pixels = image.width * image.height
    try:
        import imagecodecs
    except ImportError:
        raise _no_package("PNG files with 16 bits per color") from None
    reserve(pixels)
    return _with_channels(imagecodecs.png_decode(content))


def _tiff(content: bytes, reserve: Reserve) -> Pixels:
    """Decode the first image of a TIFF file that Pillow does not support, and turn it."""
    try:
        import tifffile
    except ImportError:
        raise _no_package("this TIFF file") from None
    with tifffile.TiffFile(BytesIO(content)) as file:
        page = file.pages.first
        if page.size > MAX_PIXELS * MAX_CHANNELS:  # also of many channels or slices
            raise _too_large()
        reserve(max(page.imagewidth * page.imagelength, page.size // MAX_CHANNELS))
        _check_colors(page)
        ends = map(add, page.dataoffsets, page.databytecounts)
        if max(ends, default=0) > len(content):  # decoders take the part that is there
            raise ImageError("decode", "damaged: image file is truncated; replace it")
        pixels = page.asarray()
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, -1)
        photometric, tag = page.tags.get(PHOTOMETRIC), page.tags.get(ORIENTATION)
    if photometric is not None and photometric.value == WHITE_IS_ZERO and pixels.dtype.kind == "u":
        pixels = pixels.dtype.type((1 << page.bitspersample) - 1) - pixels
    return _turned(_with_channels(pixels), 1 if tag is None else int(tag.value))


def _check_colors(page: Any) -> None:
    """Raise ImageError unless the channels of a TIFF image are gray, or red, green and blue."""
    colors = page.photometric
    if colors in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        return
    if colors == YCBCR and page.compression in TO_RGB:
        return
    raise ImageError(
        "decode",
        f"colors of the kind {getattr(colors, 'name', colors)} are unsupported for "
        f"{page.bitspersample} bits; convert the file to gray or RGB",
    )


def _no_package(what: str) -> ImageError:
    return ImageError(
        "decode",
        f"{what} need packages that are missing; run `{install_command('tiff')}`",
        code=ErrorCode.PACKAGE_MISSING,
    )


def _with_channels(pixels: Pixels) -> Pixels:
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    is_number = pixels.dtype.kind in "uif"
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= MAX_CHANNELS or not is_number:
        raise ImageError(
            "decode",
            f"pixels of shape {list(pixels.shape)} and dtype {pixels.dtype} are unsupported; "
            "convert the file to gray or RGB",
        )
    return pixels


def _to_mode(pixels: Pixels, mode: Mode) -> Pixels:
    """Convert pixels (H, W, 1 to 4) to the channels of a mode, without loss of depth."""
    channels = pixels.shape[2]
    has_opacity = channels in (2, 4)
    colors = pixels[..., : channels - has_opacity]
    if mode == "L":
        if colors.shape[2] == 1:
            return colors
        return (colors @ LUMA).astype(np.float32)[..., None]
    if colors.shape[2] == 1:
        colors = np.repeat(colors, 3, axis=2)
    if mode == "RGB":
        return colors
    if has_opacity:
        opacity = pixels[..., -1:]
    else:
        top = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else 1
        opacity = np.full((*pixels.shape[:2], 1), top, pixels.dtype)
    return np.concatenate([colors, opacity], axis=2)
