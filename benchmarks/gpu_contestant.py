"""Serve the contestants of gpu.py in one process: JSON requests on stdin, JSON answers on stdout.

gpu.py starts it as: python gpu_contestant.py FOLDER DEVICE [--rehearse], with the packages of one
tree of chunkq first on PYTHONPATH. A process keeps its networks loaded, so a contestant's first run
is its warm-up. All contestants but `bare` run from store to store.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch

import chunkq
from benchmarks import gpu_cases, gpu_trace
from benchmarks.gpu_cases import Case, volume_path

Figures = dict[str, Any]
Run = Callable[[str], Figures]
"""Function of a volume's name that computes it once and returns figures."""
BARE_INPUTS = 4
"""Batches between which the bare loop alternates."""


class Contestants:
    """The networks of one process, by case, contestant and options."""

    def __init__(self, folder: Path, device: str, *, is_rehearsal: bool) -> None:
        self.folder, self.device, self._is_rehearsal = folder, device, is_rehearsal
        self._runs: dict[str, tuple[Run, Callable[[], None]]] = {}
        sys.path.insert(0, str(folder))

    def case(self, name: str) -> Case:
        case = gpu_cases.CASES[name]
        return gpu_cases.rehearsed(case) if self._is_rehearsal else case

    def setup(self) -> Figures:
        """Write the files that the networks need; return the versions."""
        weights = torch.jit.load(gpu_cases.ROOT / "examples" / "brain" / "unet.ts").state_dict()
        torch.save(dict(weights), self.folder / "unet.pt")
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else None
        return {"gpu": gpu, "torch": torch.__version__, "chunkq": str(Path(chunkq.__file__).parent)}

    def run(self, name: str, case: str, volume: str, **options: Any) -> Figures:
        """Run a contestant once; return seconds, patches and bytes of device memory."""
        return self._measured(self._contestant(name, case, options), volume)

    def profile(self, name: str, case: str, volume: str, **options: Any) -> Figures:
        """Run a contestant once with torch's profiler; return the counts of its trace."""
        if self.device != "cuda":
            return {}
        from torch.profiler import ProfilerActivity, profile

        run = self._contestant(name, case, options)
        warned = self._synchronizing_calls(run, volume)
        with profile(activities=[ProfilerActivity.CUDA]):  # the first one initializes the tracer
            torch.zeros(1, device="cuda").add_(1)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            figures = self._measured(run, volume)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            path = Path(folder) / "trace.json"
            profiled.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        counts = gpu_trace.counts(events, figures["seconds"])
        return figures | counts | {"synchronizing_calls": warned}

    def _synchronizing_calls(self, run: Run, volume: str) -> int:
        """Return how many operations of a run torch reports as synchronizing."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(volume)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA" in str(one.message) for one in caught)

    def release(self, name: str, case: str, **options: Any) -> Figures:
        """Release a contestant's network."""
        _, close = self._runs.pop(_key(name, case, options), (None, _nothing))
        close()
        self._free()
        return {}

    def agreement(self, one: str, other: str) -> Figures:
        """Return the share of voxels with equal labels in two stored outputs."""
        first, second = (_open(Path(path) / "0").read().result() for path in (one, other))
        return {"equal": float(np.mean(first == second))}

    def precision(self, case: str, volume: str, precisions: list[str]) -> Figures:
        """Compare chunkq's averages in each precision with those of all patches.

        The reference sums in float64. It runs the network once in float32 without TF32, and once
        in float64. A difference is divided by max(1, |y|).
        """
        averages = {}
        for precision in precisions:
            run, close = self._chunkq(
                self.case(case), {"precision": precision, "combine": "weighted_avg"}
            )
            stored = _open(Path(run(volume)["output"]) / "0").read().result()
            averages[precision] = torch.from_numpy(stored).to(self.device)
            close()
        figures: Figures = {}
        for dtype, precision in product((torch.float32, torch.float64), precisions):
            if precision == precisions[0]:
                _set_float32("float32")
                expected = self._average(self.case(case), volume, dtype)
            values = averages[precision].double()
            scale = expected.abs().clamp_min(1.0)
            top = expected.topk(2, 0).values
            is_wrong = values.argmax(0) != expected.argmax(0)
            reference = str(dtype).removeprefix("torch.")
            figures[f"{precision} against {reference}"] = {
                "largest_difference": float(((values - expected).abs() / scale).max()),
                "other_labels": int(is_wrong.sum()),
                "other_labels_beyond_1e-5": int((is_wrong & (top[0] - top[1] > 1e-5)).sum()),
            }
        return figures | {"voxels": values[0].numel()}

    def _measured(self, run: Run, volume: str) -> Figures:
        on_cuda = self.device == "cuda"
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_cuda else 0
        figures = run(volume)
        if on_cuda:
            figures["device_bytes"] = torch.cuda.max_memory_allocated()
            figures["device_bytes_before"] = before
        return figures

    def _contestant(self, name: str, case: str, options: dict[str, Any]) -> Run:
        key = _key(name, case, options)
        if key not in self._runs:
            self._runs[key] = CONTESTANTS[name](self, self.case(case), options)
        return self._runs[key][0]

    def _free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    # --------------------------------------------------------------------------- contestants

    def _chunkq(self, case: Case, options: dict[str, Any]) -> tuple[Run, Callable[[], None]]:
        """Run chunkq in this process, on the path that a worker uses."""
        from chunkq_worker import inline

        from chunkq import Predictor

        finalizing = importlib.import_module("chunkq.finalize")

        options = dict(options)
        tree = options.pop("tree", "now")
        depth, finalizers = options.pop("depth", None), options.pop("finalizers", None)
        precision = options.get("precision", case.precision)
        values = gpu_cases.job(case, self.folder, self.device, **options)
        predictor = Predictor.from_config(values)
        label = "-".join([tree, *(f"{key}={value}" for key, value in options.items())])
        usual_depth, usual_threads = inline.default_depth, finalizing.FINALIZER_THREADS

        def run(volume: str) -> Figures:
            _set_float32(precision)
            inline.default_depth = usual_depth if depth is None else lambda gpu: depth
            finalizing.FINALIZER_THREADS = finalizers or usual_threads
            output = self.folder / f"{case.name}-{volume}-{label}.zarr"
            _delete(output)
            source = volume_path(case, volume, self.folder)
            started = time.perf_counter()
            report = predictor.predict_to_store(str(source), str(output))
            seconds = time.perf_counter() - started
            plan = predictor.plan((case.edges[volume],) * 3, "uint8")
            return {
                "seconds": seconds,
                "patches": report["patches"],
                "chunks": plan.costs.chunks,
                "chunksize": list(plan.chunksize),
                "bytes": report["bytes"],
                "stages": report["seconds"],
                "finalizing": report["finalizing"],
                "output": str(output),
            }

        return run, predictor.close

    def _bare(self, case: Case, options: dict[str, Any]) -> tuple[Run, Callable[[], None]]:
        """Run only the forward loop on batches that are on the device; keep no output."""
        net = self._network(case)
        shape = (BARE_INPUTS, case.batch, 1, *(case.patch,) * 3)
        batches = torch.randint(0, 255, shape, device=self.device).float()

        def run(volume: str) -> Figures:
            _set_float32(case.precision)
            total, done, number = case.patches(volume), 0, 0
            self._wait()
            started = time.perf_counter()
            with torch.inference_mode():
                while done < total:
                    size = min(case.batch, total - done)
                    self._forward(net, batches[number % BARE_INPUTS, :size], case.precision)
                    done, number = done + size, number + 1
            self._wait()
            return {"seconds": time.perf_counter() - started, "patches": done}

        return run, _nothing

    def _plain(self, case: Case, options: dict[str, Any]) -> tuple[Run, Callable[[], None]]:
        """Run a user's own float32 loop with sums on the device.

        Convolutions use TF32, which is torch's default, unless the option `tf32` is false.
        """
        net, allows_tf32 = self._network(case), options.get("tf32", True)
        name = "plain" if allows_tf32 else "plain-float32"

        def run(volume: str) -> Figures:
            torch.backends.cudnn.allow_tf32 = allows_tf32
            torch.set_float32_matmul_precision("highest")
            started = time.perf_counter()
            values = _open(volume_path(case, volume, self.folder)).read().result()
            with torch.inference_mode():
                average = self._sums(case, volume, values, net, torch.float32)
                labels = average.argmax(0).to(torch.uint8).cpu().numpy()
            output = self._write(case, volume, name, labels)
            seconds = time.perf_counter() - started
            self._free()
            return {"seconds": seconds, "patches": case.patches(volume), "output": str(output)}

        return run, _nothing

    def _monai(self, case: Case, options: dict[str, Any]) -> tuple[Run, Callable[[], None]]:
        """Run MONAI's sliding window; option `sums` is the device of its sums."""
        from monai.inferers import sliding_window_inference

        net, sums = self._network(case), options.get("sums", self.device)

        def run(volume: str) -> Figures:
            _set_float32(case.precision)
            done = 0

            def forward(batch: torch.Tensor) -> torch.Tensor:
                nonlocal done
                done += len(batch)
                return self._forward(net, batch, case.precision)

            started = time.perf_counter()
            values = _open(volume_path(case, volume, self.folder)).read().result()
            with torch.inference_mode():
                result = sliding_window_inference(
                    torch.from_numpy(values).to(sums).float()[None, None],
                    (case.patch,) * 3,
                    case.batch,
                    forward,
                    overlap=0.5,
                    mode="gaussian",
                    sw_device=self.device,
                    device=sums,
                )
                labels = result[0].argmax(0).to(torch.uint8).cpu().numpy()
            del result
            self._write(case, volume, "monai", labels)
            seconds = time.perf_counter() - started
            self._free()
            return {"seconds": seconds, "patches": done}

        return run, _nothing

    # ------------------------------------------------------------------------- parts of them

    def _network(self, case: Case) -> torch.nn.Module:
        import gpu_networks

        net: torch.nn.Module = getattr(gpu_networks, case.factory)()
        if case.is_trained:
            net.load_state_dict(torch.load(self.folder / "unet.pt", weights_only=True))
        return net.eval().to(self.device)

    def _forward(self, net: torch.nn.Module, batch: torch.Tensor, precision: str) -> torch.Tensor:
        is_half = precision.endswith("16")
        dtype = getattr(torch, precision) if is_half else None
        with torch.autocast(self.device, dtype=dtype, enabled=is_half):
            outputs: torch.Tensor = net(batch)
        return outputs

    def _average(self, case: Case, volume: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the weighted average of all patches, with a network of a dtype."""
        values = _open(volume_path(case, volume, self.folder)).read().result()
        with torch.inference_mode():
            return self._sums(case, volume, values, self._network(case).to(dtype), dtype, True)

    def _sums(
        self,
        case: Case,
        volume: str,
        values: np.ndarray[Any, Any],
        net: torch.nn.Module,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> torch.Tensor:
        """Return the weighted average (C, V, V, V); sums are float64 if `exact`."""
        sums_dtype = torch.float64 if exact else torch.float32
        place = torch.arange(case.patch, dtype=torch.float64, device=self.device)
        line = torch.exp(-((place - (case.patch - 1) / 2) ** 2) / (2 * (case.patch / 8) ** 2))
        weights = (line[:, None, None] * line[:, None] * line).to(sums_dtype)
        shape = (case.edges[volume],) * 3
        sums = torch.zeros((3, *shape), dtype=sums_dtype, device=self.device)
        total = torch.zeros(shape, dtype=sums_dtype, device=self.device)
        for boxes in _batched(case, volume):
            batch = torch.from_numpy(np.stack([values[box] for box in boxes])[:, None])
            predictions = net(batch.to(self.device).to(dtype))
            for box, prediction in zip(boxes, predictions, strict=True):
                sums[(slice(None), *box)] += prediction * weights
                total[box] += weights
        return sums / total

    def _write(self, case: Case, volume: str, name: str, labels: np.ndarray[Any, Any]) -> Path:
        """Write labels with the metadata of chunkq's output of the same volume; return the path."""
        path = self.folder / f"{case.name}-{volume}-{name}.zarr"
        _delete(path)
        like = self.folder / f"{case.name}-{volume}-now.zarr" / "0"
        spec = _open(like).spec().to_json() if like.exists() else {}
        metadata = spec.get("metadata", {"shape": list(labels.shape), "data_type": "uint8"})
        store = {"driver": "file", "path": str(path / "0")}
        array = ts.open(
            {"driver": "zarr3", "kvstore": store, "metadata": metadata}, create=True
        ).result()
        array.write(labels).result()
        return path

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


CONTESTANTS = {
    "chunkq": Contestants._chunkq,
    "bare": Contestants._bare,
    "plain": Contestants._plain,
    "monai": Contestants._monai,
}


def _nothing() -> None:
    pass


def _key(name: str, case: str, options: dict[str, Any]) -> str:
    return json.dumps([name, case, options], sort_keys=True)


def _set_float32(precision: str) -> None:
    """Allow TF32 in this process unless the precision is float32."""
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")


def _open(path: Path) -> Any:
    store = {"driver": "file", "path": str(path)}
    return ts.open({"driver": "zarr3", "kvstore": store}).result()


def _delete(output: Path) -> None:
    for path in (str(output), f"{output}.chunkq"):
        shutil.rmtree(path, ignore_errors=True)


def _batched(case: Case, volume: str) -> Iterator[list[tuple[slice, slice, slice]]]:
    boxes = [
        (slice(z, z + case.patch), slice(y, y + case.patch), slice(x, x + case.patch))
        for z, y, x in product(case.starts(volume), repeat=3)
    ]
    for first in range(0, len(boxes), case.batch):
        yield boxes[first : first + case.batch]


def main() -> None:
    """Answer requests until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("device")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's output is no answer
    served = Contestants(arguments.folder, arguments.device, is_rehearsal=arguments.rehearse)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(served, request.pop("do"))(**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
