"""A folder of small images of three colors, some of them damaged, and a job over it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from chunkq.job.job_handle import JobHandle

COLORS = ("red", "green", "blue")
SIZE = 8
NETWORK = """
import os
import time

import numpy as np

def colors(batch):
    gate = {gate!r}
    with open({runs!r}, "a") as file:
        file.write("x" * len(batch))
    while gate and not os.path.exists(gate):
        time.sleep(0.02)
    if batch.shape[1] != 3:
        raise ValueError("three channels, please")
    return 10 * batch.mean(axis=(2, 3)).astype(np.float32)
"""


def write_photos(folder: Path, count: int = 12) -> dict[str, str]:
    """Write images below `photos/COLOR/` and three damaged files; return these with their codes.

    Names are relative to the folder `photos`.
    """
    rng = np.random.default_rng(3)
    for number in range(count):
        color = number % 3
        pixels = rng.integers(0, 90, (SIZE + number % 4, SIZE + number % 5, 3), np.uint8)
        pixels[..., color] += 120
        path = folder / "photos" / COLORS[color] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    damaged = {"green/001b.png": b"", "red/zz.jpg": b"\xff\xd8\xff no image"}
    for name, content in damaged.items():
        (folder / "photos" / name).write_bytes(content)
    os.symlink(folder / "nowhere", folder / "photos" / "blue" / "gone.png")
    return dict.fromkeys(damaged, "image_damaged") | {"blue/gone.png": "image_missing"}


def photo_job(folder: Path, *, gate: str = "", **keys: Any) -> dict[str, Any]:
    """Write the network beside the photos; return the keys of a job. It waits for a file `gate`."""
    text = NETWORK.format(runs=str(folder / "runs"), gate=gate)
    (folder / "network.py").write_text(text)
    return {
        "input": str(folder / "photos"),
        "output": str(folder / "out.parquet"),
        "inference_type": "image",
        "image": {"resize": SIZE, "crop": SIZE, "scale": 255},
        "classes": list(COLORS),
        "truth": {"regex": "photos/([^/]+)/"},
        "chunksize": [4],
        "threads": 2,
        "model_config": {
            "runtime": "numpy",
            "type": "class",
            "class_file": str(folder / "network.py"),
            "class_name": "colors",
            "max_batch_size": 3,
        },
    } | keys


def runs(folder: Path) -> int:
    """Return how many images the network has computed."""
    path = folder / "runs"
    return len(path.read_text()) if path.exists() else 0


def errors_of(job: JobHandle) -> dict[str, str]:
    """Return the code of each failed image by its path below the folder `photos`."""
    table: pa.Table = pq.read_table(f"{job.ledger.path}/errors.parquet")
    return {row["path"].partition("/photos/")[2]: row["code"] for row in table.to_pylist()}
