"""What a GPU is busy with, beside a bare forward loop, and what each option gains.

Run: python benchmarks/gpu.py [--rounds N] [--json FILE]. All contestants run over the same patches
of one volume in memory, in one process, and take turns; each ratio is the median of those taken
round by round. Without a CUDA device it says so and has no figures; `--rehearse` runs a few patches
on the CPU, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from chunkq_worker.inference_engine import InferenceEngine
from chunkq_worker.runtimes.base import BatchFeed

from chunkq.errors import ModelError
from chunkq.job import parse_job
from chunkq.plan import Plan, Volume
from chunkq.record import JobRecord
from chunkq.resolve import resolve

ROUNDS = 5
BATCH = 8
NETWORK = '''\
import torch
from torch import nn


def block(given, made):
    layers = []
    for one, other in ((given, made), (made, made)):
        layers += [nn.Conv3d(one, other, 3, padding=1), nn.BatchNorm3d(other), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three levels, as small as such networks are."""

    def __init__(self, width=16, classes=3):
        super().__init__()
        self.down = nn.ModuleList([block(1, width), block(width, 2 * width)])
        self.deep = block(2 * width, 4 * width)
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.last = nn.Conv3d(width, classes, 1)

    def forward(self, x):
        x, kept = x / 255, []
        for part in self.down:
            x = part(x)
            kept.append(x)
            x = nn.functional.max_pool3d(x, 2)
        x = self.deep(x)
        for part in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = part(torch.cat([x, kept.pop()], 1))
        return self.last(x)
'''

Figures = dict[str, Any]
Run = Callable[[], int]
"""Runs all patches; returns how many."""


class Ground:
    """The network's files, the volume and the device that all contestants share."""

    def __init__(self, folder: Path, device: str, edge: int, patch: int) -> None:
        self.folder, self.device, self.patch = folder, device, patch
        self.shape = (edge,) * 3
        self.values = np.random.default_rng(0).integers(0, 255, self.shape, dtype=np.uint8)
        (folder / "unet.py").write_text(NETWORK)
        torch.manual_seed(0)
        torch.save(self.network().state_dict(), folder / "unet.pt")

    def network(self) -> torch.nn.Module:
        names: dict[str, Any] = {"__name__": "unet"}
        exec(NETWORK, names)
        made: torch.nn.Module = names["UNet"]()
        return made.eval()

    def plan(self, **model: Any) -> Plan:
        own = {
            "runtime": "torch",
            "type": "class",
            "class_file": str(self.folder / "unet.py"),
            "class_name": "UNet",
            "checkpoint": str(self.folder / "unet.pt"),
        }
        values = {
            "input": "memory",
            "output": "memory",
            "inference_type": "sliding_window",
            "strides": [self.patch // 2] * 3,
            "weight_function": ["weight_gaussian"],
            "combine": "soft",
            "chunksize": [self.shape[0] // 2] * 3,
            "model_config": {
                **(own if model.get("runtime", "torch") == "torch" else {}),
                "model_input_shape": [1, *(self.patch,) * 3],
                "model_output_shape": [3, *(self.patch,) * 3],
                "max_batch_size": BATCH,
                "device": self.device,
                **model,
            },
        }
        return resolve(parse_job(values), Volume(self.shape, "uint8"))


def chunkq(ground: Ground, **model: Any) -> tuple[InferenceEngine, Run]:
    """Read-to-write's middle: each chunk of the volume becomes arrays on the host."""
    plan = ground.plan(**model)
    hashes = JobRecord.create(plan.job, ()).file_hashes
    engine = InferenceEngine(JobRecord(plan.job, (), hashes), plan)
    chunks = [plan.chunk(index) for index in plan.indices()]
    active = [chunk for chunk in chunks if chunk.is_active]
    halos = [_padded(ground.values, chunk.halo) for chunk in active]

    def run() -> int:
        before, waiting = engine.batcher.patches_run, None
        for chunk, halo in zip(active, halos, strict=True):
            arrived = engine.start(chunk, [halo])
            if waiting is not None:
                waiting()  # as the chunk's own thread does meanwhile
            waiting = arrived
        if waiting is not None:
            waiting()
        return engine.batcher.patches_run - before

    return engine, run


def _padded(values: np.ndarray[Any, Any], box: Any) -> np.ndarray[Any, Any]:
    """The box of the volume, zeros where it reaches beyond."""
    found = np.zeros(box.shape, values.dtype)
    inside = [
        (max(low, 0), min(high, n))
        for low, high, n in zip(box.start, box.stop, values.shape, strict=True)
    ]
    there = tuple(slice(low, high) for low, high in inside)
    here = tuple(
        slice(low - start, high - start)
        for (low, high), start in zip(inside, box.start, strict=True)
    )
    found[here] = values[there]
    return found


def bare(ground: Ground) -> Run:
    """The forward loop alone on batches that lie in pinned memory; nothing is kept."""
    plan = ground.plan()
    net, on_cuda = ground.network().to(ground.device), ground.device == "cuda"
    shape = (BATCH, *plan.job.model.model_input_shape)
    batch = torch.randint(0, 255, shape, dtype=torch.uint8)
    batch = batch.pin_memory() if on_cuda else batch

    def run() -> int:
        done = 0
        with torch.inference_mode():
            for chunk in map(plan.chunk, plan.indices()):
                for first in range(0, chunk.patches, BATCH):
                    count = min(BATCH, chunk.patches - first)
                    net(batch[:count].to(ground.device, non_blocking=True).float())
                    done += count
        return done

    return run


def _unstaged(ground: Ground) -> Run:
    engine, run = chunkq(ground)
    with mock.patch.object(engine.runtime, "feed", BatchFeed):
        engine.batcher = engine.batcher.of_size(engine.batcher.size)
    return run


def _not_ahead(ground: Ground) -> Run:
    engine, run = chunkq(ground)
    engine.batcher._feed.ahead = False
    return run


def _onnx(ground: Ground, *, bound: bool) -> Run:
    """The same network by ONNX Runtime, its batches bound on the device or given on the host."""
    from chunkq_worker.runtimes import onnx_cuda

    path = ground.folder / "unet.onnx"
    if not path.exists():
        example = torch.zeros((2, 1, *(ground.patch,) * 3))
        sizes = {"x": {0: torch.export.Dim("batch")}}
        torch.onnx.export(
            ground.network(), (example,), path, dynamo=True, dynamic_shapes=sizes, verbose=False
        )
    keys = {"runtime": "onnx", "type": "file", "model_file": str(path)}
    if bound:
        return chunkq(ground, **keys)[1]
    with mock.patch.object(onnx_cuda, "_free_bytes", return_value=None):
        return chunkq(ground, **keys)[1]


CONTESTANTS: dict[str, Callable[[Ground], Run]] = {
    "chunkq": lambda ground: chunkq(ground)[1],
    "bare": bare,
    "without pinned staging": _unstaged,
    "without the next batch ahead": _not_ahead,
    "channels_last": lambda ground: chunkq(ground, channels_last=True)[1],
    "autocast bfloat16": lambda ground: chunkq(ground, autocast="bfloat16")[1],
    "autocast float16": lambda ground: chunkq(ground, autocast="float16")[1],
    "compile": lambda ground: chunkq(ground, compile=True)[1],
    "cuda_graph": lambda ground: chunkq(ground, cuda_graph=True)[1],
    "bfloat16, channels_last, compile": lambda ground: chunkq(
        ground, autocast="bfloat16", channels_last=True, compile=True
    )[1],
    "onnx, bound": lambda ground: _onnx(ground, bound=True),
    "onnx, through the host": lambda ground: _onnx(ground, bound=False),
}
REHEARSED = ("chunkq", "bare", "without the next batch ahead", "channels_last", "autocast bfloat16")
BESIDE = {"onnx, through the host": "onnx, bound"}
"""What a contestant is compared with, unless it is plain chunkq."""


def seconds_of(run: Run, device: str) -> float:
    with _idle(device):
        begun = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun


@contextmanager
def _idle(device: str) -> Iterator[None]:
    """Begin when nothing is left to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    yield


def busy_share(run: Run) -> Figures:
    """The shares of the time from first to last of a run in which kernels ran, or copies did."""
    from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    found = [e for e in profiled.events() if e.device_type == DeviceType.CUDA]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in found]
    if not spans:
        return {"kernels": None, "copies": None}
    whole = max(end for *_, end in spans) - min(start for _, start, _ in spans)
    copies = [(a, b) for name, a, b in spans if name.startswith("Mem")]
    kernels = [(a, b) for name, a, b in spans if not name.startswith("Mem")]
    return {"kernels": covered(kernels) / whole, "copies": covered(copies) / whole}


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of what at least one of the spans covers."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def measure(ground: Ground, names: Sequence[str], rounds: int) -> Figures:
    runs: dict[str, Run] = {}
    parts: dict[str, Figures] = {}
    for name in names:
        try:
            runs[name] = CONTESTANTS[name](ground)
            parts[name] = {"patches": runs[name]()}  # so that nothing is done for the first time
        except (ImportError, ModelError) as error:
            runs.pop(name, None)
            parts[name] = {"left out": str(error).splitlines()[0]}
    turns = [
        {name: seconds_of(run, ground.device) for name, run in runs.items()} for _ in range(rounds)
    ]
    for name, run in runs.items():
        other = BESIDE.get(name, "chunkq")
        seconds = statistics.median(turn[name] for turn in turns)
        ratios = [turn[other] / turn[name] for turn in turns if other in turn]
        parts[name] |= {
            "seconds": seconds,
            "patches_per_second": parts[name]["patches"] / seconds,
            "beside": other,
            "times_as_fast": statistics.median(ratios) if ratios else None,
            "rounds": ratios,
            "busy": busy_share(run) if ground.device == "cuda" else None,
        }
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    figures: Figures = {"device": None}
    if asked.rehearse or torch.cuda.is_available():
        device = "cpu" if asked.rehearse else "cuda"
        names = REHEARSED if asked.rehearse else tuple(CONTESTANTS)
        with tempfile.TemporaryDirectory() as folder:
            ground = Ground(Path(folder), device, *((16, 8) if asked.rehearse else (256, 64)))
            parts = measure(ground, names, asked.rounds)
        figures = {
            "device": None if asked.rehearse else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "parts": parts,
        }
        for name, found in parts.items():
            print(name, json.dumps(found), flush=True)
    else:
        print("no CUDA device is found here, so there is nothing to measure")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
