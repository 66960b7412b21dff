"""Compare chunkq on a GPU with a bare forward loop, and measure the gain of each option.

Run: python benchmarks/gpu.py [--rounds N] [--json FILE]. All contestants run in turns in one
process over the same patches of one volume in memory. A ratio is the median of the ratios of each
round. Without a CUDA device there are no figures; `--rehearse` runs a few patches on the CPU to
test the script.
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


def block(n_in, n_out):
    layers = []
    for inner in (n_in, n_out):
        layers += [nn.Conv3d(inner, n_out, 3, padding=1), nn.BatchNorm3d(n_out), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A small U-Net of three levels."""

    def __init__(self, width=16, classes=3):
        super().__init__()
        self.down = nn.ModuleList([block(1, width), block(width, 2 * width)])
        self.deep = block(2 * width, 4 * width)
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.last = nn.Conv3d(width, classes, 1)

    def forward(self, x):
        x, skips = x / 255, []
        for part in self.down:
            x = part(x)
            skips.append(x)
            x = nn.functional.max_pool3d(x, 2)
        x = self.deep(x)
        for part in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = part(torch.cat([x, skips.pop()], 1))
        return self.last(x)
'''

Figures = dict[str, Any]
Run = Callable[[], int]
"""Function that runs all patches and returns their number."""


class Setup:
    """Network files, volume and device that all contestants share."""

    def __init__(self, folder: Path, device: str, edge: int, patch: int) -> None:
        self.folder, self.device, self.patch = folder, device, patch
        self.shape = (edge,) * 3
        self.values = np.random.default_rng(0).integers(0, 255, self.shape, dtype=np.uint8)
        (folder / "unet.py").write_text(NETWORK)
        torch.manual_seed(0)
        torch.save(self.network().state_dict(), folder / "unet.pt")

    def network(self) -> torch.nn.Module:
        """Return the network in eval mode, with new random weights."""
        names: dict[str, Any] = {"__name__": "unet"}
        exec(NETWORK, names)
        module: torch.nn.Module = names["UNet"]()
        return module.eval()

    def plan(self, **model: Any) -> Plan:
        """Return the plan of the job; `model` overrides keys of `model_config`."""
        torch_keys = {
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
                **(torch_keys if model.get("runtime", "torch") == "torch" else {}),
                "model_input_shape": [1, *(self.patch,) * 3],
                "model_output_shape": [3, *(self.patch,) * 3],
                "max_batch_size": BATCH,
                "device": self.device,
                **model,
            },
        }
        return resolve(parse_job(values), Volume(self.shape, "uint8"))


def chunkq(setup: Setup, **model: Any) -> tuple[InferenceEngine, Run]:
    """Return an engine, and a function that computes every chunk from memory to host arrays."""
    plan = setup.plan(**model)
    hashes = JobRecord.create(plan.job, ()).file_hashes
    engine = InferenceEngine(JobRecord(plan.job, (), hashes), plan)
    chunks = [chunk for chunk in map(plan.chunk, plan.indices()) if chunk.is_active]
    halos = [_padded(setup.values, chunk.halo) for chunk in chunks]

    def run() -> int:
        before, previous = engine.batcher.patches_run, None
        for chunk, halo in zip(chunks, halos, strict=True):
            finish = engine.start(chunk, [halo])
            if previous is not None:
                previous()  # overlaps with this chunk, as in the chunk's own thread
            previous = finish
        if previous is not None:
            previous()
        return engine.batcher.patches_run - before

    return engine, run


def _padded(values: np.ndarray[Any, Any], box: Any) -> np.ndarray[Any, Any]:
    """Return the voxels of a box, with zeros outside the volume."""
    voxels = np.zeros(box.shape, values.dtype)
    inside = [
        (max(low, 0), min(high, n))
        for low, high, n in zip(box.start, box.stop, values.shape, strict=True)
    ]
    source = tuple(slice(low, high) for low, high in inside)
    target = tuple(
        slice(low - start, high - start)
        for (low, high), start in zip(inside, box.start, strict=True)
    )
    voxels[target] = values[source]
    return voxels


def bare(setup: Setup) -> Run:
    """Run only the forward loop on batches in pinned memory; keep no output."""
    plan = setup.plan()
    net, on_cuda = setup.network().to(setup.device), setup.device == "cuda"
    shape = (BATCH, *plan.job.model.model_input_shape)
    batch = torch.randint(0, 255, shape, dtype=torch.uint8)
    batch = batch.pin_memory() if on_cuda else batch

    def run() -> int:
        done = 0
        with torch.inference_mode():
            for chunk in map(plan.chunk, plan.indices()):
                for first in range(0, chunk.patches, BATCH):
                    count = min(BATCH, chunk.patches - first)
                    net(batch[:count].to(setup.device, non_blocking=True).float())
                    done += count
        return done

    return run


def _unstaged(setup: Setup) -> Run:
    engine, run = chunkq(setup)
    with mock.patch.object(engine.runtime, "feed", BatchFeed):
        engine.batcher = engine.batcher.of_size(engine.batcher.size)
    return run


def _not_ahead(setup: Setup) -> Run:
    engine, run = chunkq(setup)
    engine.batcher._feed.double_buffered = False
    return run


def _onnx(setup: Setup, *, bound: bool) -> Run:
    """Run the network with ONNX Runtime; batches are bound on the device or come from the host."""
    from chunkq_worker.runtimes import onnx_cuda

    path = setup.folder / "unet.onnx"
    if not path.exists():
        example = torch.zeros((2, 1, *(setup.patch,) * 3))
        sizes = {"x": {0: torch.export.Dim("batch")}}
        torch.onnx.export(
            setup.network(), (example,), path, dynamo=True, dynamic_shapes=sizes, verbose=False
        )
    keys = {"runtime": "onnx", "type": "file", "model_file": str(path)}
    if bound:
        return chunkq(setup, **keys)[1]
    with mock.patch.object(onnx_cuda, "_free_bytes", return_value=None):
        return chunkq(setup, **keys)[1]


CONTESTANTS: dict[str, Callable[[Setup], Run]] = {
    "chunkq": lambda setup: chunkq(setup)[1],
    "bare": bare,
    "without pinned staging": _unstaged,
    "without the next batch ahead": _not_ahead,
    "channels_last": lambda setup: chunkq(setup, channels_last=True)[1],
    "autocast bfloat16": lambda setup: chunkq(setup, autocast="bfloat16")[1],
    "autocast float16": lambda setup: chunkq(setup, autocast="float16")[1],
    "compile": lambda setup: chunkq(setup, compile=True)[1],
    "cuda_graph": lambda setup: chunkq(setup, cuda_graph=True)[1],
    "bfloat16, channels_last, compile": lambda setup: chunkq(
        setup, autocast="bfloat16", channels_last=True, compile=True
    )[1],
    "onnx, bound": lambda setup: _onnx(setup, bound=True),
    "onnx, through the host": lambda setup: _onnx(setup, bound=False),
}
REHEARSED = ("chunkq", "bare", "without the next batch ahead", "channels_last", "autocast bfloat16")
BASELINES = {"onnx, through the host": "onnx, bound"}
"""Contestant to compare with, if it is not plain chunkq."""


def seconds_of(run: Run, device: str) -> float:
    """Return the seconds of a run, the work of the device included."""
    with _idle(device):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


@contextmanager
def _idle(device: str) -> Iterator[None]:
    """Wait until the device has no work before the block starts."""
    if device == "cuda":
        torch.cuda.synchronize()
    yield


def busy_share(run: Run) -> Figures:
    """Return the shares of a run's time in which kernels and copies run on the device."""
    from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == DeviceType.CUDA]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
    if not spans:
        return {"kernels": None, "copies": None}
    total = max(end for *_, end in spans) - min(start for _, start, _ in spans)
    copies = [(a, b) for name, a, b in spans if name.startswith("Mem")]
    kernels = [(a, b) for name, a, b in spans if not name.startswith("Mem")]
    return {"kernels": covered(kernels) / total, "copies": covered(copies) / total}


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of the spans."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def measure(setup: Setup, names: Sequence[str], rounds: int) -> Figures:
    """Return the figures of each contestant; one that cannot run has the reason instead."""
    runs: dict[str, Run] = {}
    parts: dict[str, Figures] = {}
    for name in names:
        try:
            runs[name] = CONTESTANTS[name](setup)
            parts[name] = {"patches": runs[name]()}  # a first run, which is not measured
        except (ImportError, ModelError) as error:
            runs.pop(name, None)
            parts[name] = {"skipped": str(error).splitlines()[0]}
    turns = [
        {name: seconds_of(run, setup.device) for name, run in runs.items()} for _ in range(rounds)
    ]
    for name, run in runs.items():
        other = BASELINES.get(name, "chunkq")
        seconds = statistics.median(turn[name] for turn in turns)
        ratios = [turn[other] / turn[name] for turn in turns if other in turn]
        parts[name] |= {
            "seconds": seconds,
            "patches_per_second": parts[name]["patches"] / seconds,
            "compared_with": other,
            "speedup": statistics.median(ratios) if ratios else None,
            "rounds": ratios,
            "busy": busy_share(run) if setup.device == "cuda" else None,
        }
    return parts


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    figures: Figures = {"device": None}
    if arguments.rehearse or torch.cuda.is_available():
        device = "cpu" if arguments.rehearse else "cuda"
        names = REHEARSED if arguments.rehearse else tuple(CONTESTANTS)
        with tempfile.TemporaryDirectory() as folder:
            setup = Setup(Path(folder), device, *((16, 8) if arguments.rehearse else (256, 64)))
            parts = measure(setup, names, arguments.rounds)
        figures = {
            "device": None if arguments.rehearse else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "parts": parts,
        }
        for name, part in parts.items():
            print(name, json.dumps(part), flush=True)
    else:
        print("no CUDA device: nothing measured; use --rehearse to test the script on the CPU")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
