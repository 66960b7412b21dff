"""Run a network over a stored volume in one of several ways; print the figures as JSON.

network.py starts it as: python contestant.py NAME JOB OUTPUT. The clock starts after the libraries
are imported and before the network is loaded. As in chunkq's worker processes, what is imported is
excluded from garbage collection. borders.py has its own contestants.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch

from benchmarks.turns import KEPT_OUTPUT, THREADS, Figures
from chunkq.job.job_file import Job
from chunkq.job.job_reading import load_job
from chunkq.job.resolve import resolve
from chunkq.plan.chunk import Patch
from chunkq.plan.plan import Plan
from chunkq.storage.images import find_source

Contestant = Callable[[Job, str], Callable[[], Figures]]
"""Function of a job and an output path; returns the timed function, whose figures name patches."""


def read(path: str) -> np.ndarray[Any, Any]:
    """Return a stored volume as an array in memory."""
    return np.asarray(stored(path).read().result())


def stored(path: str) -> Any:
    """Open a stored volume with tensorstore."""
    store = {"driver": "file", "path": find_source(path).path}
    return ts.open({"driver": "zarr3", "kvstore": store}).result()


def create(
    path: str,
    shape: Sequence[int],
    dtype: str,
    chunks: Sequence[int],
    *,
    context: Any = None,
    **metadata: Any,
) -> Any:
    """Create an array of zeros and delete what exists; `metadata` is added, such as codecs."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": path},
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
            **metadata,
        },
    }
    return ts.open(spec, create=True, delete_existing=True, context=context).result()


def like_chunkq(path: str) -> Any:
    """Create an array with the metadata of chunkq's output that network.py keeps in this folder."""
    output = stored(str(Path(path).with_name(KEPT_OUTPUT) / "0"))
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": path},
        "metadata": output.spec().to_json()["metadata"],
    }
    return ts.open(spec, create=True).result()


def batched(patches: Sequence[Patch], size: int) -> Iterator[Sequence[Patch]]:
    """Yield batches of `size` patches; the last one may be smaller."""
    for first in range(0, len(patches), size):
        yield patches[first : first + size]


def batches(plan: Plan, size: int) -> Iterator[Sequence[Patch]]:
    """Yield chunkq's batches of at most `size` patches, each with patches of one chunk."""
    for index in plan.indices():
        yield from batched([*plan.patches(plan.chunk(index))], size)


def predictions(
    job: Job,
    net: Any,
    patches: Sequence[Patch],
    values: np.ndarray[Any, Any],
    origin: Sequence[int] = (0, 0, 0),
) -> Iterator[tuple[Patch, torch.Tensor]]:
    """Yield each patch with its prediction, in chunkq's batches for a chunk.

    `values` is the input from the index `origin` on.
    """
    size, slot = job.model.max_batch_size, job.model.model_input_shape
    batch = np.zeros((size, *slot), np.float32)
    for group in batched(patches, size):
        for row, patch in zip(batch, group, strict=False):
            row[...] = values[patch.source.slices(origin)].reshape(slot)
        yield from zip(group, net(torch.from_numpy(batch[: len(group)])), strict=True)


def network(job: Job) -> Any:
    """Load the job's TorchScript network."""
    jit: Any = torch.jit
    return jit.load(job.model.ts_file).eval()


def bare(job: Job, output: str) -> Callable[[], Figures]:
    """Run only the forward loop, over the same patches in the same batches; keep no output."""
    source = find_source(job.input[0])
    plan, volume = resolve(job, source.volume), read(job.input[0])

    def run() -> Figures:
        net, done = network(job), 0
        with torch.inference_mode():
            for index in plan.indices():
                patches = list(plan.patches(plan.chunk(index)))
                done += sum(1 for _ in predictions(job, net, patches, volume))
        return {"patches": done}

    return run


def chunkq(job: Job, output: str) -> Callable[[], Figures]:
    """Run chunkq store to store in this process; `read` and `written` are bytes of its report."""
    for module in ("chunkq_producer.run_steps", "chunkq_worker.runtimes.torch", "zarr"):
        importlib.import_module(module)  # all libraries are imported before the clock starts
    from chunkq import Predictor

    values = job.as_dict()
    source = values.pop("input")[0]
    del values["output"]

    def run() -> Figures:
        with Predictor.from_config(values) as predictor:
            report = predictor.predict_to_store(source, output, overwrite=True)
        moved = report["bytes"]
        return {
            "patches": report["patches"],
            "read": moved["input"] + moved["pieces_read"],
            "written": moved["output"] + moved["pieces_written"],
        }

    return run


def monai(job: Job, output: str) -> Callable[[], Figures]:
    """Run MONAI's sliding window in memory, between reading and writing the stores."""
    from monai.inferers import sliding_window_inference  # type: ignore[import-not-found]

    patch = job.model.model_input_shape[-3:]

    def run() -> Figures:
        net, done = network(job), 0

        def forward(batch: torch.Tensor) -> torch.Tensor:
            nonlocal done
            done += len(batch)
            result: torch.Tensor = net(batch)
            return result

        with torch.inference_mode():
            volume = torch.from_numpy(read(job.input[0])).float()[None, None]
            result = sliding_window_inference(
                volume,
                patch,
                job.model.max_batch_size,
                forward,
                overlap=0.5,
                mode="gaussian",
            )
            labels = result[0].argmax(0).to(torch.uint8).numpy()
            like_chunkq(output).write(labels).result()
        return {"patches": done}

    return run


def copy(job: Job, output: str) -> Callable[[], Figures]:
    """Copy the input with tensorstore, chunk by chunk, into an array like chunkq's: the limit."""
    source = stored(job.input[0])
    edge = job.chunksize or source.shape

    def run() -> Figures:
        target = like_chunkq(output)
        target = target[0] if target.rank > source.rank else target  # a channel axis of length 1
        for low in np.ndindex(*(-(-n // c) for n, c in zip(source.shape, edge, strict=True))):
            box = tuple(
                slice(i * c, min((i + 1) * c, n))
                for i, c, n in zip(low, edge, source.shape, strict=True)
            )
            target[box].write(source[box].read().result()).result()
        return {"patches": 0}

    return run


CONTESTANTS: dict[str, Contestant] = {
    "bare": bare,
    "chunkq": chunkq,
    "monai": monai,
    "copy": copy,
}


def peak_memory() -> int:
    """Return the peak resident memory of this process (KB).

    On Linux, the value of getrusage would include the peak of the parent process.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compete(contestants: Mapping[str, Contestant]) -> None:
    """Run the contestant that the command line names and print its figures.

    They are wall-clock and CPU seconds, start and end by the monotonic clock, memory (KB), and the
    figures of the contestant.
    """
    name, job_file, output = sys.argv[1:]
    torch.set_num_threads(THREADS)
    for path in (output, f"{output}.chunkq"):
        shutil.rmtree(path, ignore_errors=True)  # deletion is not measured
    run = contestants[name](load_job(job_file), output)
    gc.collect()
    gc.freeze()
    before = peak_memory()
    started, cpu = time.monotonic(), time.process_time()
    figures = run()
    ended, cpu = time.monotonic(), time.process_time() - cpu
    resources = {
        "seconds": ended - started,
        "clock": [started, ended],
        "cpu": cpu,
        "peak": peak_memory(),
        "before": before,
    }
    print(json.dumps(resources | figures))


if __name__ == "__main__":
    compete(CONTESTANTS)
