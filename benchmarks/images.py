"""Compare a job over photographs with a plain loop over a DataLoader and with Ray Data.

Run: python benchmarks/images.py [PART ...] [--rounds N] [--minutes N] [--json FILE]. Photographs
are JPEG files of 500 x 375 pixels of noise that is smooth, resized to 256 and cropped to 224.
`network` has a residual network whose forward pass takes most of the time, `decoder` a network
without cost. All contestants have one process with the network, two threads for it, the same
network, batch size and cores, decode with Pillow, and write one row per image as Parquet. The loop
has the number of loader processes, 0 to 2, that is fastest in a trial.

Contestants run as whole commands, in turns, over a few images and over many. Images per second are
the images that the large folder has more, divided by the seconds that it takes longer: imports,
loading and the start of workers or of Ray are left out. A ratio is that of one round. Ray, which
takes longest, takes part in the first two rounds. A part starts no round that would not end within
its share of the minutes, but has two.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from chunkq_worker.child_env import child_env
from PIL import Image

from benchmarks import image_contestant as contestant
from benchmarks import turns
from benchmarks.turns import THREADS, Figures, Turn

ROUNDS, LEAST_ROUNDS, MINUTES = 5, 2, 7.0
BATCH = 32
SHAPE = (375, 500)
NAMES = ("chunkq", "loader", "ray")


@dataclass(frozen=True)
class Part:
    """Width of the network of a part, and the images of its two folders.

    A network of width 0 has no cost.
    """

    width: int
    few: int
    many: int


PARTS = {"network": Part(64, 128, 1664), "decoder": Part(0, 256, 3328)}


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

    def __init__(self, name: str, folder: Path, photographs: Sequence[Path]) -> None:
        self.name, self.folder, self.network = name, folder, folder / "network.ts"
        part = PARTS[name]
        self.counts = {"few": part.few, "many": part.many}
        for size, count in self.counts.items():
            (folder / size).mkdir(parents=True)
            for path in photographs[:count]:
                os.link(path, folder / size / path.name)
        write_network(self.network, part.width)
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

    def run(self, name: str, size: str) -> Figures:
        """Run a contestant as a command; return its seconds, and what the loop prints of itself."""
        environment = os.environ | child_env(THREADS) | {"OMP_NUM_THREADS": str(THREADS)}
        command = self.command(name, size)
        started = time.perf_counter()
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
        if result.returncode:
            raise SystemExit(f"{name}: {result.stdout}{result.stderr}")
        note(f"{self.name}: {name}, {self.counts[size]} images: {seconds:.1f} s")
        own = json.loads(result.stdout.splitlines()[-1]) if name == "loader" else {}
        return own | {"seconds": seconds}

    def choose_loader(self) -> None:
        """Give the plain loop the number of loader processes that is fastest after its start."""
        rates = {}
        for workers in range(THREADS + 1):
            self.loader_workers = workers
            rates[workers] = self.run("loader", "many")["rate"]
        self.loader_workers = max(rates, key=rates.__getitem__)

    def figures(self, name: str) -> Figures:
        """Return the seconds of a contestant over few and over many images, and its rate."""
        few, many = (self.run(name, size)["seconds"] for size in self.counts)
        if many <= few:
            raise SystemExit(
                f"{name}: the large folder took {many:.1f} s, the small one {few:.1f} s; stop what "
                "else the machine does, or use more --images"
            )
        more = self.counts["many"] - self.counts["few"]
        return {"few": few, "seconds": many, "rate": more / (many - few)}


def compare(contest: Contest, rounds: int, seconds: float) -> Figures:
    """Run the contestants in turns; ratios are chunkq's images per second by the others'.

    `rounds` is how many there are at most. Rounds end within `seconds`, if two can.
    """
    ends = time.monotonic() + seconds
    contest.choose_loader()
    results: list[Turn] = []
    while len(results) < LEAST_ROUNDS or (
        len(results) < rounds and time.monotonic() + _seconds_without_ray(results[-1]) < ends
    ):
        names = NAMES if len(results) < LEAST_ROUNDS else NAMES[:-1]
        order = names if len(results) % 2 == 0 else names[::-1]
        results.append({name: contest.figures(name) for name in order})

    def turns_of(name: str) -> list[Turn]:
        return [turn for turn in results if name in turn]

    def medians(key: str) -> dict[str, float]:
        return {n: statistics.median(turn[n][key] for turn in turns_of(n)) for n in NAMES}

    others = NAMES[1:]
    return {
        "images": contest.counts,
        "rounds": len(results),
        "loader_workers": contest.loader_workers,
        "rate": medians("rate"),
        "seconds": medians("seconds"),
        "few": medians("few"),
        "ratios": {n: turns.ratios(turns_of(n), "chunkq", n, "rate") for n in others},
        "command_ratios": {n: turns.ratios(turns_of(n), n, "chunkq") for n in others},
    }


def _seconds_without_ray(turn: Turn) -> float:
    return sum(turn[name]["few"] + turn[name]["seconds"] for name in NAMES[:-1])


def note(line: str) -> None:
    """Print what was done."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        started, folder = time.monotonic(), Path(name)
        write_photographs(folder / "all", max(PARTS[part].many for part in parts))
        photographs = sorted((folder / "all").iterdir())
        for number, part in enumerate(parts):
            left = 60 * arguments.minutes - (time.monotonic() - started)
            contest = Contest(part, folder / part, photographs)
            figures[part] = compare(contest, arguments.rounds, left / (len(parts) - number))
            print(part, json.dumps(figures[part]), flush=True)
    if arguments.json:
        earlier = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps(earlier | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
