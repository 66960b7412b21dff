"""Resize, crop and normalize an image, and map points of the result back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from chunkq.errors import ErrorCode
from chunkq.images.decoding import MAX_PIXELS, Decoded, Pixels, pixels_of
from chunkq.images.image_error import ImageError
from chunkq.images.image_spec import ImageSpec

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Placement:
    """Where the input of a network lies on its image.

    shape    height and width of the image, in pixels
    resized  height and width after resizing
    origin   first row and column of the resized image that the input has
    size     height and width of the input without padding, which is at its end
    """

    shape: tuple[int, int]
    resized: tuple[int, int]
    origin: tuple[int, int]
    size: tuple[int, int]

    def to_image(self, points: Floats) -> Floats:
        """Return points (…, 2) of the input, as (x, y), in pixels of the image.

        Integers are centers of pixels, in both.
        """
        factors = np.array([s / r for s, r in zip(self.shape, self.resized, strict=True)])[::-1]
        shifted: Floats = (points + np.array(self.origin[::-1]) + 0.5) * factors - 0.5
        return shifted


def transform(decoded: Decoded, spec: ImageSpec) -> tuple[npt.NDArray[np.float32], Placement]:
    """Return the input of a network (C, h, w), float32, of an image (H, W, C), and where it lies.

    Resizing is bilinear and antialiased, as in Pillow, and rounds pixels of 8 bits. The shorter
    side gets the length `resize`, the longer one is rounded down. The crop begins at half of the
    difference, rounded half to even, as in torchvision.

    Raises ImageError if the image has no pixels, is smaller than the crop, or so narrow that it has
    more than MAX_PIXELS when it is resized.
    """
    height, width = _shape(decoded)
    if not height or not width:
        raise ImageError(
            "transform",
            f"{height} x {width} pixels are none; use another image",
            code=ErrorCode.IMAGE_UNSUITABLE,
        )
    resized = _resized_shape((height, width), spec.resize)
    if resized[0] * resized[1] > max(MAX_PIXELS, height * width):
        raise ImageError(
            "transform",
            f"{height} x {width} pixels are resized to {resized[0]} x {resized[1]}, more than "
            f"{MAX_PIXELS}; use an image of other proportions, or set both sides of image.resize",
            code=ErrorCode.IMAGE_UNSUITABLE,
        )
    if resized != (height, width):
        decoded = _resize(decoded, resized)
    origin = (0, 0)
    if spec.crop is not None:
        if any(n < c for n, c in zip(resized, spec.crop, strict=True)):
            raise ImageError(
                "transform",
                f"{resized[0]} x {resized[1]} pixels are less than the crop of {spec.crop[0]} x "
                f"{spec.crop[1]}; set image.resize, or use a smaller image.crop",
                code=ErrorCode.IMAGE_UNSUITABLE,
            )
        top, left = (round((n - c) / 2) for n, c in zip(resized, spec.crop, strict=True))
        origin = (top, left)
        decoded = _crop(decoded, origin, spec.crop)
    pixels = pixels_of(decoded)
    size = _shape(pixels)
    padding = [(0, p - n) for n, p in zip(size, spec.padded(size), strict=True)]
    if any(after for _, after in padding):
        pixels = np.pad(pixels, (*padding, (0, 0)))
    values = np.moveaxis(pixels, 2, 0).astype(np.float32, order="C")
    if spec.scale != 1:
        values /= np.float32(spec.scale)
    if spec.mean:
        values -= np.array(spec.mean, np.float32)[:, None, None]
    if spec.std:
        values /= np.array(spec.std, np.float32)[:, None, None]
    return values, Placement((height, width), resized, origin, size)


def _shape(decoded: Decoded) -> tuple[int, int]:
    """Return height and width."""
    if isinstance(decoded, Image.Image):
        return decoded.height, decoded.width
    height, width = decoded.shape[:2]
    return height, width


def _crop(decoded: Decoded, origin: tuple[int, int], size: tuple[int, int]) -> Decoded:
    (top, left), (height, width) = origin, size
    if isinstance(decoded, Image.Image):
        return decoded.crop((left, top, left + width, top + height))
    return decoded[top : top + height, left : left + width]


def _resized_shape(shape: tuple[int, int], resize: int | tuple[int, int] | None) -> tuple[int, int]:
    if resize is None:
        return shape
    if isinstance(resize, tuple):
        return resize
    height, width = shape
    if height <= width:
        return resize, resize * width // height
    return resize * height // width, resize


def _resize(decoded: Decoded, shape: tuple[int, int]) -> Decoded:
    size = shape[::-1]
    if isinstance(decoded, Image.Image):
        return decoded.resize(size, Image.Resampling.BILINEAR)
    pixels: Pixels = decoded
    if pixels.dtype == np.uint8:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return image.resize(size, Image.Resampling.BILINEAR)
    channels = [
        Image.fromarray(np.ascontiguousarray(pixels[..., c], np.float32)).resize(
            size, Image.Resampling.BILINEAR
        )
        for c in range(pixels.shape[2])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)
