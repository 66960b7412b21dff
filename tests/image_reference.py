"""Plain loop over images with Pillow and NumPy, as the expected result of a classification job.

It is derived from docs/guides/images.md alone and imports nothing from chunkq.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(n, C, H, W) -> (n, classes)"""


@dataclass(frozen=True)
class Settings:
    """Keys of `image` of a job whose pixels become RGB; `crop` is both sides of a square."""

    resize: int
    crop: int
    scale: float = 255.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


@dataclass
class Result:
    """What a plain loop finds: scores by path, and the paths that it could not read."""

    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)


def network_input(content: bytes, settings: Settings) -> NDArray[np.float32]:
    """Return an image as the input (3, H, W) of the network."""
    with Image.open(BytesIO(content)) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("RGB")
    width, height = image.size
    shorter = settings.resize
    size = (
        (shorter, shorter * height // width)
        if width <= height
        else (shorter * width // height, shorter)
    )
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((n - settings.crop) / 2) for n in size)
    image = image.crop((left, top, left + settings.crop, top + settings.crop))
    values = np.asarray(image, np.float32) / np.float32(settings.scale)
    values = (values - np.float32(settings.mean)) / np.float32(settings.std)
    return values.transpose(2, 0, 1)


def softmax(outputs: NDArray[Any]) -> NDArray[np.float64]:
    """Return the softmax of outputs (classes)."""
    powers = np.exp(np.asarray(outputs, np.float64) - outputs.max())
    return np.asarray(powers / powers.sum())


def plain_loop(
    paths: Iterable[str], read: Callable[[str], bytes], network: Network, settings: Settings
) -> Result:
    """Predict images one by one; `read` returns the content of a file or raises OSError."""
    result = Result()
    for path in paths:
        try:
            batch = network_input(read(path), settings)[None]
        except Exception:  # decoders raise errors of many types for damaged files
            result.unreadable.add(path)
            continue
        result.scores[path] = softmax(network(batch)[0])
    return result
