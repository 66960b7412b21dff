"""One way to run a network over a stored volume, in a process of its own; prints its figures.

Run by network.py: python contestant.py NAME JOB OUTPUT. Seconds count from the moment when
libraries are imported, and include loading the network.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts
import torch

from chunkq.job import Job, load_job
from chunkq.plan import Patch, Plan
from chunkq.resolve import resolve
from chunkq.stores import find_source

THREADS = 2


def read(job: Job) -> np.ndarray[Any, Any]:
    """The whole input, in memory."""
    source = find_source(job.input[0])
    return np.asarray(_open(source.array_path).read().result())


def _open(path: str) -> Any:
    return ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()


def write(values: np.ndarray[Any, Any], path: str, chunk: int = 32) -> None:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": path},
        "metadata": {
            "shape": values.shape,
            "data_type": str(values.dtype),
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [chunk] * values.ndim},
            },
        },
    }
    store = ts.open(spec, create=True, delete_existing=True).result()
    store.write(values).result()


def batches(plan: Plan) -> Iterator[list[Patch]]:
    """The batches that chunkq runs: of one chunk each."""
    size = plan.job.model.max_batch_size
    for index in plan.indices():
        patches = list(plan.patches(plan.chunk(index)))
        for first in range(0, len(patches), size):
            yield patches[first : first + size]


def network(job: Job) -> torch.jit.ScriptModule:
    loaded = torch.jit.load(job.model.ts_file)
    loaded.eval()
    return loaded


def bare(job: Job, output: str) -> Callable[[], int]:
    """The forward loop alone, over the same patches in the same batches; nothing is kept."""
    source = find_source(job.input[0])
    plan, volume = resolve(job, source.volume), read(job)
    slot = job.model.model_input_shape

    def run() -> int:
        net, done = network(job), 0
        batch = np.zeros((job.model.max_batch_size, *slot), np.float32)
        with torch.inference_mode():
            for patches in batches(plan):
                for row, patch in zip(batch, patches, strict=False):
                    row[...] = volume[patch.source.slices((0, 0, 0))].reshape(slot)
                net(torch.from_numpy(batch[: len(patches)]))
                done += len(patches)
        return done

    return run


def chunkq(job: Job, output: str) -> Callable[[], int]:
    """Store to store, in this process."""
    from chunkq import Predictor

    values = job.as_dict()
    source = values.pop("input")[0]
    del values["output"]

    def run() -> int:
        with Predictor.from_config(values) as predictor:
            report = predictor.predict_to_store(source, output, overwrite=True)
        return int(report["patches"])

    return run


def monai(job: Job, output: str) -> Callable[[], int]:
    """MONAI's sliding window: read the store, infer in memory, write the store."""
    from monai.inferers import sliding_window_inference

    patch = job.model.model_input_shape[-3:]

    def run() -> int:
        net, done = network(job), 0

        def forward(batch: torch.Tensor) -> torch.Tensor:
            nonlocal done
            done += len(batch)
            result: torch.Tensor = net(batch)
            return result

        with torch.inference_mode():
            volume = torch.from_numpy(read(job)).float()[None, None]
            result = sliding_window_inference(
                volume,
                patch,
                job.model.max_batch_size,
                forward,
                overlap=0.5,
                mode="gaussian",
            )
            write(result[0].argmax(0).to(torch.uint8).numpy(), output)
        return done

    return run


def copy(job: Job, output: str) -> Callable[[], int]:
    """A plain copy of the arrays by tensorstore, chunk by chunk: the physical limit."""
    source = _open(find_source(job.input[0]).array_path)
    metadata = source.spec().to_json()["metadata"]
    edge = job.chunksize or source.shape

    def run() -> int:
        kvstore = {"driver": "file", "path": output}
        spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
        target = ts.open(spec, create=True, delete_existing=True).result()
        for low in np.ndindex(*(-(-n // c) for n, c in zip(source.shape, edge, strict=True))):
            box = tuple(
                slice(i * c, min((i + 1) * c, n))
                for i, c, n in zip(low, edge, source.shape, strict=True)
            )
            target[box].write(source[box].read().result()).result()
        return 0

    return run


CONTESTANTS = {"bare": bare, "chunkq": chunkq, "monai": monai, "copy": copy}


def main() -> None:
    name, job_file, output = sys.argv[1:]
    torch.set_num_threads(THREADS)
    run = CONTESTANTS[name](load_job(job_file), output)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    patches = run()
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "patches": patches, "peak": peak, "before": before}))


if __name__ == "__main__":
    main()
