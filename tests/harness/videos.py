"""Small videos whose frames are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

HEIGHT, WIDTH = 32, 48


def write_video(
    path: Path, frames: int, codec: str = "libx264", shift: int = 0, **options: str
) -> None:
    """Write a video with a bright spot that moves; `shift` is its place in the first frame."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(shift, shift + frames):
            spot = 255 * np.exp(-((x - t % WIDTH) ** 2 + (y - t % HEIGHT) ** 2) / 40)
            pixels = np.repeat(spot[..., None], 3, axis=2).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def all_frames(path: Path, mode: str = "rgb24") -> npt.NDArray[Any]:
    """Return all frames of a video, decoded from the start, (T, H, W[, C])."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format=mode) for frame in container.decode(video=0)])
