"""Pictures of predictions: images with their labels or keypoints, as one picture or as a video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from chunkq.images.decoding import Pixels
from chunkq.plan.label_colors import label_color

Picture = npt.NDArray[np.uint8]
SIDE = 320
"""Longer side of an image in a picture of several."""
FRAMES_PER_SECOND = 25
BACKGROUND, TEXT = (0, 0, 0), (255, 255, 255)


def annotated(pixels: Pixels, row: dict[str, Any], side: int | None = None) -> Picture:
    """Return an image (H, W, C) as RGB (h, w, 3) with what a row of a table says of it.

    Each name of a keypoint has a color; a label is written below. `side` is the length of the
    longer side, by default that of the image.
    """
    image = Image.fromarray(shown(pixels)).convert("RGB")
    factor = 1.0 if side is None else side / max(image.size)
    if factor != 1:
        image = image.resize([max(1, round(n * factor)) for n in image.size])
    draw = ImageDraw.Draw(image)
    radius = max(2, round(max(image.size) / 100))
    for keypoint in chain.from_iterable(row.get("keypoints") or ()):
        x, y = ((keypoint[axis] + 0.5) * factor - 0.5 for axis in "xy")
        corners = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(corners, fill=label_color(_number(keypoint["name"])), outline=TEXT)
    if row.get("label") is not None:
        text = f"{row['label']} {row['score']:.2f}"
        box = draw.textbbox((4, image.height - 16), text)
        draw.rectangle(box, fill=BACKGROUND)
        draw.text((4, image.height - 16), text, fill=TEXT)
    return np.asarray(image)


def write_picture(path: str, pictures: Sequence[Picture]) -> None:
    """Write pictures (h, w, 3) side by side, in rows of about equal length."""
    columns = max(1, round(len(pictures) ** 0.5))
    height, width = (max(one.shape[axis] for one in pictures) for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for number, one in enumerate(pictures):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + one.shape[0], left : left + one.shape[1]] = one
    Image.fromarray(sheet).save(path)


def write_video(path: str, pictures: Iterator[Picture]) -> None:
    """Write pictures (h, w, 3) as the frames of an H.264 video of the size of the first one.

    Raises ImportError if PyAV is missing.
    """
    import av

    first = next(pictures)
    height, width = (max(2, n - n % 2) for n in first.shape[:2])  # as H.264 needs
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for one in chain([first], pictures):
            frame = np.zeros((height, width, 3), np.uint8)
            part = one[:height, :width]
            frame[: part.shape[0], : part.shape[1]] = part
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _number(name: str) -> int:
    """Return a number from 1 on that a name always has, for its color."""
    return 1 + sum(name.encode()) % 10


def shown(pixels: Pixels) -> Picture:
    """Return pixels that a screen can show, uint8; deep ones are spread from the darkest on."""
    values = pixels
    if values.dtype != np.uint8:
        low, high = float(values.min()), float(values.max())
        scaled = (values.astype(np.float64) - low) * (255 / max(high - low, 1e-12))
        values = scaled.astype(np.uint8)
    return values[..., 0] if values.shape[2] == 1 else values
