"""Compare a job over photographs with a plain loop over a DataLoader and with Ray Data.

Run: python benchmarks/images.py [PART ...] [--rounds N] [--images N] [--json FILE]. Photographs are
JPEG files of 500 x 375 pixels of noise that is smooth, resized to 256 and cropped to 224.
`network` has a residual network whose forward pass takes most of the time, `decoder` a network
without cost. All contestants have one process with the network, two threads for it, the same
network, batch size and cores, decode with Pillow, and write one row per image as Parquet. The loop
has the number of loader processes, 0 to 2, that is fastest in a trial.

Contestants run as whole commands, in turns, over a few images and over many. Images per second are
the images that the large folder has more, divided by the seconds that it takes longer: imports,
loading and the start of workers or of Ray are left out. A ratio is that of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from chunkq_worker.child_env import child_env
from PIL import Image

from benchmarks import image_contestant as contestant
from benchmarks import turns
from benchmarks.turns import THREADS, Figures

ROUNDS, IMAGES, FEW = 5, 2000, 200
BATCH = 32
SHAPE = (375, 500)
PARTS = {"network": 64, "decoder": 0}
"""Name of a part -> width of its network; 0 is a network without cost."""
NAMES = ("chunkq", "loader", "ray")


def write_photographs(folder: Path, count: int) -> None:
    """Write smooth noise as JPEG files, all of them different."""
    folder.mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        image = coarse.resize(SHAPE[::-1], Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (*SHAPE, 3), dtype=np.int16)
        pixels = (np.asarray(image, np.int16) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06}.jpg", quality=90)


def write_network(path: Path, width: int) -> None:
    """Write a residual network (n, 3, 224, 224) -> (n, 10) as TorchScript, with random weights."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.first = nn.Conv2d(channels, channels, 3, padding=1)
            self.second = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.relu(x + self.second(torch.relu(self.first(x))))
            return out

    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.AvgPool2d(32), nn.Flatten(), nn.Linear(3 * 7 * 7, 10)]
    if width:
        layers = [nn.Conv2d(3, width // 2, 7, 4, 3), nn.ReLU(), Block(width // 2)]
        layers += [nn.Conv2d(width // 2, width, 3, 2, 1), nn.ReLU(), Block(width), Block(width)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    jit: Any = torch.jit
    jit.save(jit.trace(nn.Sequential(*layers).eval(), torch.zeros(2, 3, 224, 224)), str(path))


def job_values(folder: Path, network: Path, output: Path) -> dict[str, Any]:
    """Return the job that computes what the contestants compute."""
    return {
        "input": str(folder),
        "output": str(output),
        "inference_type": "image",
        "image": {
            "mode": "RGB",
            "resize": contestant.RESIZE,
            "crop": contestant.CROP,
            "scale": contestant.SCALE,
            "mean": list(contestant.MEAN),
            "std": list(contestant.STD),
        },
        "top_k": 1,
        "threads": THREADS,
        "model_config": {
            "runtime": "torch",
            "type": "torchscript",
            "ts_file": str(network),
            "max_batch_size": BATCH,
        },
    }


class Contest:
    """Folders of few and of many photographs, a network, and the commands that classify them."""

    def __init__(self, folder: Path, images: int, few: int, width: int) -> None:
        self.folder, self.network = folder, folder / "network.ts"
        self.counts = {"few": few, "many": images}
        for name, count in self.counts.items():
            write_photographs(folder / name, count)
        write_network(self.network, width)
        self.loader_workers = 0
        self._runs = 0

    def command(self, name: str, size: str) -> list[str]:
        """Write the files of a contestant; return its command."""
        self._runs += 1
        output = self.folder / f"{name}{self._runs}.parquet"
        job = self.folder / f"{name}{self._runs}.json"
        if name == "chunkq":
            job.write_text(json.dumps(job_values(self.folder / size, self.network, output)))
            queue = f"sqlite://{self.folder}/queue{self._runs}.db"
            options = ["-w", "1", "--gpus", "none", "--queue", queue]
            return [sys.executable, "-W", "ignore", "-m", "chunkq", "run", str(job), *options]
        settings = {
            "folder": str(self.folder / size),
            "network": str(self.network),
            "batch": BATCH,
            "loader_workers": self.loader_workers,
        }
        job.write_text(json.dumps(settings))
        module = "benchmarks.image_contestant"
        return [sys.executable, "-W", "ignore", "-m", module, name, str(job), str(output)]

    def run(self, name: str, size: str) -> float:
        """Run a contestant as a command; return its seconds."""
        environment = os.environ | child_env(THREADS) | {"OMP_NUM_THREADS": str(THREADS)}
        command = self.command(name, size)
        started = time.perf_counter()
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
        if result.returncode:
            raise SystemExit(f"{name}: {result.stdout}{result.stderr}")
        return seconds

    def choose_loader(self) -> None:
        """Give the plain loop the number of loader processes that is fastest."""
        seconds = {}
        for workers in range(THREADS + 1):
            self.loader_workers = workers
            seconds[workers] = self.run("loader", "many")
        self.loader_workers = min(seconds, key=seconds.__getitem__)

    def figures(self, name: str) -> Figures:
        """Return the seconds of a contestant over few and over many images, and its rate."""
        few, many = (self.run(name, size) for size in self.counts)
        if many <= few:
            raise SystemExit(
                f"{name}: the large folder took {many:.1f} s, the small one {few:.1f} s; stop what "
                "else the machine does, or use more --images"
            )
        more = self.counts["many"] - self.counts["few"]
        return {"few": few, "seconds": many, "rate": more / (many - few)}


def compare(contest: Contest, names: Sequence[str], rounds: int) -> Figures:
    """Run the contestants in turns; ratios are chunkq's images per second by the others'."""
    contest.choose_loader()
    results = turns.take_turns(names, rounds, contest.figures)
    others = [name for name in names if name != "chunkq"]

    def medians(key: str) -> dict[str, float]:
        return {n: statistics.median(turn[n][key] for turn in results) for n in names}

    return {
        "images": contest.counts,
        "loader_workers": contest.loader_workers,
        "rate": medians("rate"),
        "seconds": medians("seconds"),
        "few": medians("few"),
        "ratios": {other: turns.ratios(results, "chunkq", other, "rate") for other in others},
        "command_ratios": {other: turns.ratios(results, other, "chunkq") for other in others},
    }


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures: Figures = {}
    for part in arguments.parts or list(PARTS):
        with tempfile.TemporaryDirectory() as folder:
            contest = Contest(Path(folder), arguments.images, FEW, PARTS[part])
            figures[part] = compare(contest, NAMES, arguments.rounds)
        print(part, json.dumps(figures[part]), flush=True)
    if arguments.json:
        earlier = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps(earlier | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
