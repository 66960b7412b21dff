"""Runs one setting of a job and says how fast it was, in a process of its own.

`python -m chunkq_worker.tune.trial` reads its `Orders` as one line of JSON and writes the fields
of a `Measured` as another. Its standard input is its lifeline: when that closes, it ends.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

import chunkq
from chunkq.blend import Accumulator, WeightCache
from chunkq.errors import ChunkqError
from chunkq.executors.base import Attempt
from chunkq.job_handle import JobHandle, open_job
from chunkq.memory import peak_bytes
from chunkq.plan import Chunk, Patch
from chunkq.record import JobRecord
from chunkq.stores import open_array, read_padded
from chunkq.tasks import Task
from chunkq.user_code import load_blend_weights
from chunkq_worker.batching import Halos
from chunkq_worker.inference_engine import InferenceEngine, get_device
from chunkq_worker.inline import NoQueue
from chunkq_worker.run_task import run_task
from chunkq_worker.tune.search import Measurement, Stage
from chunkq_worker.tune.space import fullest, near_middle

ROUNDS = 3
"""Timed rounds of the network alone; the median counts."""
SAMPLE = 2
"""Patches whose output is compared with that of other settings."""
MAX_PATCHES = 10_000
NOWHERE = "sqlite:///nowhere/queue.db"


@dataclass(frozen=True, slots=True)
class TrialOptions:
    """What a trial is told: `record` is a job record as JSON, `seconds` how long to measure.

    `folder` is an empty one for temporary files, `sample` a file for the output of the first
    patches, written in stage `network`.
    """

    stage: Stage
    record: str
    depth: int
    seconds: float
    folder: str
    sample: str


class TooLargeError(Exception):
    """The batch did not fit and was halved, so this is another setting."""


def main() -> None:
    """Answer on standard output."""
    orders = TrialOptions(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stages: dict[Stage, Callable[[TrialOptions, JobRecord], Measurement]] = {
        "network": _network,
        "pipeline": _pipeline,
    }
    try:
        record = JobRecord.from_json(orders.record.encode())
        found = stages[orders.stage](orders, record)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ChunkqError):
            reason = f"the trial raised {type(error).__name__}: {reason}"
        found = Measurement("too large" if _is_memory(error) else "failed", note=reason)
    sys.stdout.write("\n" + json.dumps(asdict(found)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a compiler's helpers or a reader's threads must not keep it


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _is_memory(error: Exception) -> bool:
    """Tell whether an error says that something did not fit."""
    words = str(error).lower()
    known = ("out of memory", "runs out of memory", "can't allocate memory")
    return isinstance(error, (MemoryError, TooLargeError)) or any(word in words for word in known)


def _loaded(record: JobRecord) -> tuple[InferenceEngine, float]:
    """Return the loaded network and the seconds it took."""
    before = time.perf_counter()
    engine = InferenceEngine(record, record.plan())
    _check_batch(engine, record)
    return engine, time.perf_counter() - before


def _check_batch(engine: InferenceEngine, record: JobRecord) -> None:
    asked = record.job.model.max_batch_size
    if engine.batcher.size < asked:
        raise TooLargeError(f"a batch of {asked} does not fit")


def _network(orders: TrialOptions, record: JobRecord) -> Measurement:
    """Time the network and the blending on patches of one chunk amid the volume."""
    engine, load_seconds = _loaded(record)
    job, plan = record.job, engine.plan
    chunk = fullest(plan)
    halos = [
        read_padded(open_array(source.array_path), chunk.halo, job.pad_mode, job.pad_value)
        for source in record.sources
    ]
    patches = list(islice(plan.patches(chunk), MAX_PATCHES))
    np.save(orders.sample, _sample(engine, patches, halos, chunk))
    weights = WeightCache(plan, load_blend_weights(plan), engine.runtime.to_device)
    zeros = engine.runtime.zeros((plan.channels, *chunk.region.shape))
    sums = Accumulator(plan, chunk, weights, zeros)

    def run(some: list[Patch]) -> float:
        before = time.perf_counter()
        for patch, prediction in engine.batcher.predictions(some, halos, chunk.halo.start):
            sums.add(patch, prediction)
        return time.perf_counter() - before

    size = engine.batcher.size
    run(patches[:size])
    one = max(run(patches[:size]), 1e-9)
    taken = patches[: max(1, int(orders.seconds / ROUNDS / one)) * size]
    repeats = max(1, int(orders.seconds / ROUNDS / one * size / len(taken)))
    seconds = [sum(run(taken) for _ in range(repeats)) for _ in range(ROUNDS)]
    sums.contribution()  # for its memory
    _check_batch(engine, record)
    rate = len(taken) * repeats / max(median(seconds), 1e-9)
    return _measured(engine, rate, load_seconds)


def _sample(
    engine: InferenceEngine, patches: list[Patch], halos: Halos, chunk: Chunk
) -> npt.NDArray[Any]:
    """Return what the network gives for the first patches, in batches as full as they come."""
    size, outputs = engine.batcher.size, []
    for first in range(0, min(SAMPLE, len(patches)), size):
        found = engine.batcher.raw(patches[first : first + size], halos, chunk.halo.start)
        if found is None:
            raise TooLargeError(f"a batch of {size} does not fit")
        outputs.append(found)
    return np.concatenate(outputs)[:SAMPLE]


def _pipeline(orders: TrialOptions, record: JobRecord) -> Measurement:
    """Time whole chunks of a job like any other, but for its output in a temporary folder."""
    output = str(Path(orders.folder) / "out.zarr")
    made = chunkq.produce(record.job.as_dict(), output=output, queue=NoQueue(NOWHERE))
    job, device = open_job(made.folder.path), get_device()
    engine, load_seconds = device.run(lambda: _loaded(job.record)).result()
    with device.compute_with(job, engine):
        rate = _rate(job, orders)
    _check_batch(engine, record)
    return _measured(engine, rate, load_seconds)


def _rate(job: JobHandle, orders: TrialOptions) -> float:
    """Return patches per second of chunks from the middle on, `depth` of them in flight."""
    chunks = near_middle(job.plan)

    def compute(chunk: Chunk) -> int:
        run_task(Task("infer", job.folder.path, chunk.index), Attempt(1, "tune"))
        return chunk.patches

    if len(chunks) > orders.depth:  # else all of them are needed for the clock
        compute(chunks.pop(0))
    left, flying, patches = iter(chunks), set[Future[int]](), 0
    began = time.perf_counter()
    with ThreadPoolExecutor(orders.depth) as pool:
        begun = 0
        while True:
            fresh = begun <= orders.depth or time.perf_counter() - began < orders.seconds
            while fresh and len(flying) < orders.depth and (chunk := next(left, None)):
                flying.add(pool.submit(compute, chunk))
                begun += 1
            if not flying:
                break
            done, flying = wait(flying, return_when=FIRST_COMPLETED)
            patches += sum(future.result() for future in done)
    return patches / max(time.perf_counter() - began, 1e-9)


def _measured(engine: InferenceEngine, rate: float, load_seconds: float) -> Measurement:
    return Measurement(
        "ok",
        rate=rate,
        load_seconds=load_seconds,
        peak_bytes=peak_bytes(),
        device_bytes=engine.runtime.device_bytes(),
        note=engine.runtime.device,
    )


if __name__ == "__main__":
    logging.getLogger("chunkq").setLevel(logging.CRITICAL)
    main()
