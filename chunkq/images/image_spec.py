"""`ImageSpec`: how the pixels of an image file become the input of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["L", "RGB", "RGBA"]
CHANNELS: dict[str, int] = {"L": 1, "RGB": 3, "RGBA": 4}
"""Mode -> number of channels."""


@dataclass(frozen=True)
class ImageSpec:
    """The key `image` of a job.

    mode    channels of the input: gray, red, green and blue, or these and opacity
    resize  length of the shorter side, or (height, width), in pixels; None keeps the size
    crop    (height, width) that is cut from the center; None keeps all
    scale   divisor of the pixels
    mean    subtracted from each channel of the divided pixels
    std     divisor of each channel after that
    multiple  height and width are padded at the end with black pixels to a multiple of it
    """

    mode: Mode = "RGB"
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    multiple: int = 1

    @property
    def channels(self) -> int:
        """Number of channels of the input."""
        return CHANNELS[self.mode]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of every input of the network; None if they vary."""
        size = self.crop or (self.resize if isinstance(self.resize, tuple) else None)
        return None if size is None else self.padded(size)

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return a height and a width after padding."""
        height, width = (-(-n // self.multiple) * self.multiple for n in size)
        return height, width
