"""Resize, crop and normalize an image, and map points of the result back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from chunkq.errors import ErrorCode
from chunkq.images.decoding import MAX_PIXELS, Pixels
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


def transform(pixels: Pixels, spec: ImageSpec) -> tuple[npt.NDArray[np.float32], Placement]:
    """Return the input of a network (C, h, w), float32, of pixels (H, W, C), and where it lies.

    Resizing is bilinear and antialiased, as in Pillow, and rounds pixels of 8 bits. The shorter
    side gets the length `resize`, the longer one is rounded down. The crop begins at half of the
    difference, rounded half to even, as in torchvision.

    Raises ImageError if the image is smaller than the crop, or so narrow that it has more than
    MAX_PIXELS when it is resized.
    """
    height, width = pixels.shape[:2]
    resized = _resized_shape((height, width), spec.resize)
    if resized[0] * resized[1] > max(MAX_PIXELS, height * width):
        raise ImageError(
            "transform",
            f"{height} x {width} pixels are resized to {resized[0]} x {resized[1]}, more than "
            f"{MAX_PIXELS}; use an image of other proportions, or set both sides of image.resize",
            code=ErrorCode.IMAGE_UNSUITABLE,
        )
    if resized != (height, width):
        pixels = _resize(pixels, resized)
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
        pixels = pixels[top : top + spec.crop[0], left : left + spec.crop[1]]
    size = pixels.shape[:2]
    padding = [(0, p - n) for n, p in zip(size, spec.padded(size), strict=True)]
    if any(after for _, after in padding):
        pixels = np.pad(pixels, (*padding, (0, 0)))
    values = np.ascontiguousarray(np.moveaxis(pixels, 2, 0), np.float32)
    if spec.scale != 1:
        values = values / np.float32(spec.scale)
    for terms, apply in ((spec.mean, np.subtract), (spec.std, np.divide)):
        if terms:
            values = apply(values, np.array(terms, np.float32)[:, None, None])
    return values, Placement((height, width), resized, origin, size)


def _resized_shape(shape: tuple[int, int], resize: int | tuple[int, int] | None) -> tuple[int, int]:
    if resize is None:
        return shape
    if isinstance(resize, tuple):
        return resize
    height, width = shape
    if height <= width:
        return resize, resize * width // height
    return resize * height // width, resize


def _resize(pixels: Pixels, shape: tuple[int, int]) -> Pixels:
    size = shape[::-1]
    if pixels.dtype == np.uint8:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        return resized.reshape(*shape, pixels.shape[2])
    channels = [
        Image.fromarray(np.ascontiguousarray(pixels[..., c], np.float32)).resize(
            size, Image.Resampling.BILINEAR
        )
        for c in range(pixels.shape[2])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)
