"""One way to run a network over a stored volume, in a process of its own; prints its figures.

Run by network.py: python contestant.py NAME JOB OUTPUT. Seconds count from the moment when
libraries are imported, and include loading the network. borders.py has contestants of its own.
"""

from __future__ import annotations

import contextlib
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

from benchmarks.turns import THREADS, Figures
from chunkq.job import Job, load_job
from chunkq.plan import Patch, Plan
from chunkq.resolve import resolve
from chunkq.stores import find_source

Contestant = Callable[[Job, str], Callable[[], Figures]]
"""Takes a job and where to write; returns what to time, which gives at least the patches run."""


def read(path: str) -> np.ndarray[Any, Any]:
    """A whole volume, in memory."""
    return np.asarray(stored(path).read().result())


def stored(path: str) -> Any:
    """A volume's array, through tensorstore."""
    place = {"driver": "file", "path": find_source(path).array_path}
    return ts.open({"driver": "zarr3", "kvstore": place}).result()


def create(
    path: str,
    shape: Sequence[int],
    dtype: str,
    chunks: Sequence[int],
    *,
    context: Any = None,
    **more: Any,
) -> Any:
    """An array of zeros in place of what was there; `more` is metadata, such as codecs."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": path},
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
            **more,
        },
    }
    return ts.open(spec, create=True, delete_existing=True, context=context).result()


def beside(path: str) -> Any:
    """An array of the same kind as what chunkq wrote into the same folder."""
    written = stored(str(Path(path).with_name("chunkq.zarr") / "0"))
    place = {"driver": "file", "path": path}
    spec = {
        "driver": "zarr3",
        "kvstore": place,
        "metadata": written.spec().to_json()["metadata"],
    }
    return ts.open(spec, create=True).result()


def batched(patches: Sequence[Patch], size: int) -> Iterator[Sequence[Patch]]:
    """Runs of `size` patches; the last has what is left."""
    for first in range(0, len(patches), size):
        yield patches[first : first + size]


def batches(plan: Plan) -> Iterator[Sequence[Patch]]:
    """The batches that chunkq runs: of one chunk each."""
    for index in plan.indices():
        yield from batched([*plan.patches(plan.chunk(index))], plan.job.model.max_batch_size)


def predictions(
    job: Job,
    net: Any,
    patches: Sequence[Patch],
    values: np.ndarray[Any, Any],
    origin: Sequence[int] = (0, 0, 0),
) -> Iterator[tuple[Patch, torch.Tensor]]:
    """Each patch with what the network gives for it, in the batches that chunkq runs for a chunk.

    `values` are the input from `origin` on.
    """
    size, slot = job.model.max_batch_size, job.model.model_input_shape
    batch = np.zeros((size, *slot), np.float32)
    for some in batched(patches, size):
        for row, patch in zip(batch, some, strict=False):
            row[...] = values[patch.source.slices(origin)].reshape(slot)
        yield from zip(some, net(torch.from_numpy(batch[: len(some)])), strict=True)


def network(job: Job) -> Any:
    jit: Any = torch.jit
    return jit.load(job.model.ts_file).eval()


def bare(job: Job, output: str) -> Callable[[], Figures]:
    """The forward loop alone, over the same patches in the same batches; nothing is kept."""
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
    """Store to store, in this process; `read` and `written` are bytes, as its report says."""
    for late in ("chunkq_producer.runner", "chunkq_worker.runtimes.torch", "zarr"):
        importlib.import_module(late)  # as all libraries are before the clock starts
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
    """MONAI's sliding window: read the store, infer in memory, write the store as chunkq does."""
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
            beside(output).write(result[0].argmax(0).to(torch.uint8).numpy()).result()
        return {"patches": done}

    return run


def copy(job: Job, output: str) -> Callable[[], Figures]:
    """A plain copy by tensorstore, chunk by chunk, into what chunkq wrote beside: the limit."""
    source = stored(job.input[0])
    edge = job.chunksize or source.shape

    def run() -> Figures:
        target = beside(output)
        target = target[0] if target.rank > source.rank else target  # an axis for one channel
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
    """This process's largest resident memory so far (KB).

    On Linux, getrusage's would be at least that of the process that started this one.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compete(contestants: Mapping[str, Contestant]) -> None:
    """Run the contestant of the command line and print its figures.

    Seconds that went by and of processor time, memory (KB), and what it says itself.
    """
    name, job_file, output = sys.argv[1:]
    torch.set_num_threads(THREADS)
    for old in (output, f"{output}.chunkq"):
        shutil.rmtree(old, ignore_errors=True)  # deleting is not part of it
    run = contestants[name](load_job(job_file), output)
    before = peak_memory()
    begun, used = time.perf_counter(), time.process_time()
    figures = run()
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    peak = peak_memory()
    taken = {"seconds": seconds, "cpu": used, "peak": peak, "before": before}
    print(json.dumps(taken | figures))


if __name__ == "__main__":
    compete(CONTESTANTS)
