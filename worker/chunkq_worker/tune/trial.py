"""Run one setting of a job in a separate process and measure its speed and memory.

`python -m chunkq_worker.tune.trial` reads `TrialOptions` as one line of JSON on standard input and
writes the fields of a `Measurement` as one line of JSON. It ends when its standard input closes.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq import json_values
from chunkq.create import check_job, create_job
from chunkq.errors import ChunkqError
from chunkq.job.job_file import load_job
from chunkq.job.job_handle import JobHandle
from chunkq.job.record import JobRecord
from chunkq.job.sample_job import largest_item
from chunkq.plan.plan import Chunk, Patch
from chunkq.plan.sample_chunks import fullest_chunk, sample_chunks
from chunkq.queue.contract.executor import Attempt
from chunkq.storage.padded_reading import read_padded
from chunkq.system.memory import peak_bytes
from chunkq.system.parent_process import when_parent_ends
from chunkq_worker.batching import Halos
from chunkq_worker.device import get_device
from chunkq_worker.inference_engine import InferenceEngine
from chunkq_worker.run_task import run_task
from chunkq_worker.tune.search import Measurement, Stage, TrialStatus

ROUNDS = 3
"""Number of timed rounds in stage `network`; the median is reported."""
SAMPLE_PATCHES = 2
"""Number of patches whose outputs are compared with those of other settings."""
MAX_TIMED_PATCHES = 10_000


@dataclass(frozen=True, slots=True)
class TrialOptions:
    """The options of a trial: `record` is a job record as JSON, `seconds` the time to measure.

    `folder` is an empty folder for temporary files. In stage `network`, the outputs of the first
    patches are written to the file `sample`.
    """

    stage: Stage
    record: str
    depth: int
    seconds: float
    folder: str
    sample: str


class TooLargeError(Exception):
    """The batch did not fit into memory and was halved, so the setting cannot be measured."""


def main() -> None:
    """Run the trial and write its measurement to standard output."""
    options = json_values.decode(TrialOptions, sys.stdin.buffer.readline())
    when_parent_ends(lambda: os._exit(1))
    stages: dict[Stage, Callable[[TrialOptions, JobRecord], Measurement]] = {
        "network": _measure_network,
        "pipeline": _measure_pipeline,
    }
    try:
        record = JobRecord.from_json(options.record.encode())
        measurement = stages[options.stage](options, record)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ChunkqError):
            reason = f"the trial raised {type(error).__name__}: {reason}"
        status: TrialStatus = "too large" if _is_out_of_memory(error) else "failed"
        # A file name in the message may be invalid Unicode, which JSON cannot store.
        measurement = Measurement(status, note=reason.encode(errors="replace").decode())
    sys.stdout.buffer.write(b"\n%b\n" % json_values.encode(measurement))
    sys.stdout.flush()
    os._exit(0)  # do not wait for a compiler's helper processes or reader threads


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory is too small."""
    message = str(error).lower()
    phrases = ("out of memory", "can't allocate memory")
    is_memory_error = isinstance(error, (MemoryError, TooLargeError))
    return is_memory_error or any(phrase in message for phrase in phrases)


def _load_engine(record: JobRecord) -> tuple[InferenceEngine, float]:
    """Return the engine with its loaded network, and the seconds to load it."""
    before = time.perf_counter()
    engine = InferenceEngine(record, record.plan())
    _check_batch(engine, record)
    return engine, time.perf_counter() - before


def _check_batch(engine: InferenceEngine, record: JobRecord) -> None:
    requested = record.job.model.max_batch_size
    if engine.batcher.size < requested:
        raise TooLargeError(f"a batch of {requested} does not fit")


def _measure_network(options: TrialOptions, record: JobRecord) -> Measurement:
    """Time the network and the blending on patches of one chunk in the middle of the volume."""
    engine, load_seconds = _load_engine(record)
    job, plan = record.job, engine.plan
    chunk = fullest_chunk(plan)
    halos = [
        read_padded(source.open(), chunk.halo, job.pad_mode, job.pad_value)
        for source in record.sources
    ]
    patches = list(islice(plan.patches(chunk), MAX_TIMED_PATCHES))
    np.save(options.sample, _sample_outputs(engine, patches, halos, chunk))
    chunk_run = engine.pipeline.open(chunk, halos)

    def run(batch_patches: list[Patch]) -> float:
        before = time.perf_counter()
        chunk_run.add(batch_patches)
        chunk_run.wait()
        return time.perf_counter() - before

    size = engine.batcher.size
    run(patches[:size])
    batch_seconds = max(run(patches[:size]), 1e-9)
    timed_patches = patches[: max(1, int(options.seconds / ROUNDS / batch_seconds)) * size]
    repeats = max(1, int(options.seconds / ROUNDS / batch_seconds * size / len(timed_patches)))
    seconds = [sum(run(timed_patches) for _ in range(repeats)) for _ in range(ROUNDS)]
    chunk_run.finish()()  # included in the peak memory
    _check_batch(engine, record)
    rate = len(timed_patches) * repeats / max(median(seconds), 1e-9)
    return _measurement(engine, rate, load_seconds)


def _sample_outputs(
    engine: InferenceEngine, patches: list[Patch], halos: Halos, chunk: Chunk
) -> npt.NDArray[Any]:
    """Return the network's raw output for the first SAMPLE_PATCHES patches (n, C, *Q)."""
    size, outputs = engine.batcher.size, []
    for first in range(0, min(SAMPLE_PATCHES, len(patches)), size):
        output = engine.batcher.raw(patches[first : first + size], halos, chunk.halo.start)
        if output is None:
            raise TooLargeError(f"a batch of {size} does not fit")
        outputs.append(output)
    return np.concatenate(outputs)[:SAMPLE_PATCHES]


def _measure_pipeline(options: TrialOptions, record: JobRecord) -> Measurement:
    """Time entire chunks of the job, with its output in a temporary folder."""
    output = str(Path(options.folder) / "out.zarr")
    job = create_job(check_job(load_job(record.job.as_dict(), output=output)))
    device = get_device()
    engine, load_seconds = device.run(lambda: _load_engine(job.record)).result()
    with device.compute_with(job, engine):
        rate = _patches_per_second(job, options)
    _check_batch(engine, record)
    return _measurement(engine, rate, load_seconds)


def _patches_per_second(job: JobHandle, options: TrialOptions) -> float:
    """Return patches per second over sample chunks, the middle one first, `depth` in flight."""
    item = largest_item(job)
    chunks = [chunk for chunk in sample_chunks(item.plan) if chunk.is_active]

    def compute(chunk: Chunk) -> int:
        run_task(item.task("infer", chunk.index), Attempt(1, "tune"))
        return chunk.patches

    if len(chunks) > options.depth:  # with fewer chunks, all of them have to be timed
        compute(chunks.pop(0))
    remaining, in_flight, patches = iter(chunks), set[Future[int]](), 0
    start_time = time.perf_counter()
    with ThreadPoolExecutor(options.depth) as pool:
        started = 0
        while True:
            seconds = time.perf_counter() - start_time
            may_start = started <= options.depth or seconds < options.seconds
            while may_start and len(in_flight) < options.depth and (chunk := next(remaining, None)):
                in_flight.add(pool.submit(compute, chunk))
                started += 1
            if not in_flight:
                break
            done, in_flight = wait(in_flight, return_when=FIRST_COMPLETED)
            patches += sum(future.result() for future in done)
    return patches / max(time.perf_counter() - start_time, 1e-9)


def _measurement(engine: InferenceEngine, rate: float, load_seconds: float) -> Measurement:
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
