"""Classify a folder of photographs with a plain loop or with Ray Data; print the figures as JSON.

images.py starts it as: python image_contestant.py NAME JOB OUTPUT. JOB is a JSON file with the
folder, the network and the batch size. The contestants decode and resize with the function
`network_input`, as a user writes it with Pillow, on the cores that chunkq has.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.turns import THREADS, Figures

RESIZE, CROP, SCALE = 256, 224, 255.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Settings = dict[str, Any]


def network_input(path: str) -> np.ndarray[Any, Any]:
    """Return an image file as the input (3, CROP, CROP), float32."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    shorter = min(width, height)
    size = (RESIZE * width // shorter, RESIZE * height // shorter)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((n - CROP) / 2) for n in size)
    pixels = np.asarray(image.crop((left, top, left + CROP, top + CROP)), np.float32)
    values = (pixels / np.float32(SCALE) - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def load_network(settings: Settings) -> Any:
    jit: Any = torch.jit
    return jit.load(settings["network"]).eval()


def write(paths: list[str], scores: np.ndarray[Any, Any], output: str) -> None:
    """Write the predictions as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"path": paths, "prediction": scores.argmax(1), "score": scores.max(1)}
    pq.write_table(pa.table(columns), output)


class Images(torch.utils.data.Dataset[Any]):
    """The images as PyTorch's data loader reads them."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(network_input(self.paths[number]))


def loader(settings: Settings, output: str) -> Figures:
    """Run a plain loop over a DataLoader, with the number of worker processes of the settings."""
    paths = sorted(str(path) for path in Path(settings["folder"]).iterdir())
    batches = torch.utils.data.DataLoader(
        Images(paths),
        settings["batch"],
        num_workers=settings["loader_workers"],
        multiprocessing_context="spawn" if settings["loader_workers"] else None,
    )
    net = load_network(settings)
    scores: list[torch.Tensor] = []
    first = 0.0
    with torch.inference_mode():
        for batch in batches:
            scores.append(torch.softmax(net(batch), 1))
            first = first or time.perf_counter()
    seconds = time.perf_counter() - first
    write(paths, torch.cat(scores).numpy(), output)
    return {"images": len(paths), "rate": (len(paths) - len(scores[0])) / seconds}


class Predictor:
    """The network in an actor of Ray."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(THREADS)
        self.net = load_network(settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            scores = torch.softmax(self.net(torch.from_numpy(batch["values"])), 1).numpy()
        return {"path": batch["path"], "prediction": scores.argmax(1), "score": scores.max(1)}


def ray_data(settings: Settings, output: str) -> Figures:
    """Run Ray Data: a map that decodes, then `map_batches` with an actor that has the network."""
    import ray
    import ray.data

    paths = sorted(str(path) for path in Path(settings["folder"]).iterdir())
    ray.init(num_cpus=THREADS, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "values": network_input(row["path"])}

    rows = ray.data.from_items([{"path": path} for path in paths])
    predicted = rows.map(decode, num_cpus=0.5).map_batches(
        Predictor,
        fn_constructor_args=(settings,),
        batch_size=settings["batch"],
        num_cpus=1,
        concurrency=1,
    )
    predicted.write_parquet(output)
    ray.shutdown()
    return {"images": len(paths)}


CONTESTANTS: dict[str, Callable[[Settings, str], Figures]] = {"loader": loader, "ray": ray_data}


def main() -> None:
    """Run the contestant that the command line names and print its figures."""
    name, job, output = sys.argv[1:]
    torch.set_num_threads(THREADS)
    settings: Settings = json.loads(Path(job).read_text())
    started, cpu = time.perf_counter(), os.times()
    figures = CONTESTANTS[name](settings, output)
    seconds, times = time.perf_counter() - started, os.times()
    used = sum(times[:4]) - sum(cpu[:4])
    print(json.dumps({"seconds": seconds, "cpu": used} | figures))


if __name__ == "__main__":
    main()
