"""Check a job's network in a separate process.

`python -m chunkq_worker.model_check [--depth DEPTH --folder FOLDER]` reads a job record on standard
input and writes the fields of a `ModelCheckResult` as one line of JSON. Without `--depth` it loads
the network and runs a batch of zeros. With `--depth` it also runs patches from the middle of the
volume in different batches, and computes chunks, DEPTH in flight, to measure the memory of a
worker process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.box import Box
from chunkq.errors import ChunkqError
from chunkq.job_handle import JobHandle
from chunkq.memory import peak_bytes
from chunkq.padded_reading import read_padded
from chunkq.plan import Patch, Plan
from chunkq.record import JobRecord
from chunkq.sample_job import copy_job
from chunkq_worker.batching import Batcher, Halos
from chunkq_worker.child_env import child_env
from chunkq_worker.devices import cores
from chunkq_worker.inference_engine import InferenceEngine, get_device
from chunkq_worker.measure_memory import measure_memory

MAX_CHUNKS_SEARCHED = 1000
"""Of a job with more chunks, only the middle and the first chunk are candidates."""
ROUNDS = 3
"""Number of timed batches; the median is reported."""


@dataclass
class ModelCheckResult:
    """What was measured; None where the check was not run.

    `load_seconds` includes the first batch.

    Of real patches: `batch_seconds`; `lowest` and `highest` raw output value; whether all outputs
    are `finite`; the largest difference of a patch's output between two positions in the batch
    (`by_position`) and between two batch sizes (`by_batch_size`). The second size is `other_size`,
    or None if the network supports one size only. `tile_norms` are layers that normalize by
    statistics of the patch.

    Memory in bytes: `peak_bytes` and `device_bytes` are the peak resident memory of the process and
    the peak on the device at the end, `loaded_bytes` the resident peak with the network loaded, and
    `worker_bytes` the resident peak after computing `chunks` chunks with `depth` in flight.
    `memory_error` is the error that prevented measuring `worker_bytes`.
    """

    error: str | None = None
    batch: int | None = None
    load_seconds: float | None = None
    batch_seconds: float | None = None
    patches: int | None = None
    finite: bool | None = None
    lowest: float | None = None
    highest: float | None = None
    by_position: float | None = None
    by_batch_size: float | None = None
    other_size: int | None = None
    tile_norms: tuple[str, ...] = ()
    peak_bytes: int | None = None
    device_bytes: int | None = None
    device: str | None = None
    depth: int | None = None
    chunks: int | None = None
    loaded_bytes: int | None = None
    worker_bytes: int | None = None
    memory_error: str | None = None


def main(*argv: str) -> None:
    """Run the check and write its result to standard output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, help="chunks in flight; default: compute no chunks")
    parser.add_argument("--folder", help="empty folder for the chunks; the caller removes it")
    arguments = parser.parse_args(argv)
    result = ModelCheckResult()
    try:
        record = JobRecord.from_json(sys.stdin.buffer.read())
        run_check(result, record, arguments.depth, arguments.folder)
    except ChunkqError as error:
        result.error = str(error)
    sys.stdout.write(json.dumps(asdict(result)) + "\n")


def run_check(
    result: ModelCheckResult,
    record: JobRecord,
    depth: int | None = None,
    folder: str | None = None,
) -> None:
    """Load the network and fill in the result; raise ChunkqError if it cannot be used.

    With `depth`, also run patches, and compute chunks in the empty `folder`, `depth` in flight.
    """
    # Load on the device thread, as a worker does: libraries allocate memory per calling thread.
    on_device = get_device().run
    before = time.perf_counter()
    engine = on_device(lambda: InferenceEngine(record, record.plan())).result()
    result.load_seconds = time.perf_counter() - before
    result.loaded_bytes = peak_bytes()
    if depth is not None and folder is not None:
        result.depth = depth
        _measure_memory(result, engine, copy_job(record, folder))
    before = time.perf_counter()
    on_device(engine.batcher.warm_up).result()
    result.load_seconds += time.perf_counter() - before
    result.batch, result.device = engine.batcher.size, engine.runtime.device
    if depth is not None:
        on_device(lambda: _run_patches(result, engine, record)).result()
    result.tile_norms = engine.runtime.tile_norms()
    result.peak_bytes, result.device_bytes = peak_bytes(), engine.runtime.device_bytes()


def _restart_with_worker_env() -> None:
    """Restart this process with the environment of a worker process, unless it has it."""
    worker_env = {**os.environ, **child_env(cores())}
    if worker_env != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], worker_env)


def _measure_memory(result: ModelCheckResult, engine: InferenceEngine, job: JobHandle) -> None:
    try:
        measurement = measure_memory(engine, job, result.depth or 1)
    except Exception as error:  # errors of the network are raised by the batch of zeros after this
        result.memory_error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    else:
        result.chunks, result.worker_bytes = measurement.chunks, measurement.worker_bytes


def _run_patches(result: ModelCheckResult, engine: InferenceEngine, record: JobRecord) -> None:
    patches = middle_patches(engine.plan, engine.batcher.size)
    window = _bounding_box(patches)
    job = record.job
    halos = [
        read_padded(source.open(), window, job.pad_mode, job.pad_value) for source in record.sources
    ]
    _time_and_compare(result, engine, patches, halos, window.start)


def middle_patches(plan: Plan, max_patches: int) -> list[Patch]:
    """Return up to `max_patches` patches of one chunk.

    The chunk has at least that many if one does, and is the nearest to the middle among those.
    """
    middle = tuple(blocks // 2 for blocks in plan.blocks)
    few = plan.costs.chunks <= MAX_CHUNKS_SEARCHED
    candidates = map(plan.chunk, plan.indices() if few else [middle, (0,) * plan.rank])
    chunk = min(
        candidates,
        key=lambda chunk: (
            -min(max_patches, chunk.patches),
            sum(abs(i - m) for i, m in zip(chunk.index, middle, strict=True)),
        ),
    )
    return list(islice(plan.patches(chunk), max_patches))


def _bounding_box(patches: Sequence[Patch]) -> Box:
    starts = [patch.source.start for patch in patches]
    stops = [patch.source.stop for patch in patches]
    return Box(
        tuple(map(min, zip(*starts, strict=True))), tuple(map(max, zip(*stops, strict=True)))
    )


def _time_and_compare(
    result: ModelCheckResult,
    engine: InferenceEngine,
    patches: list[Patch],
    halos: Halos,
    origin: tuple[int, ...],
) -> None:
    """Time the network, and compare its outputs for other batches; fill in the result."""
    seconds, first = [], _raw_outputs(engine.batcher, patches, halos, origin)
    for _ in range(ROUNDS):
        before = time.perf_counter()
        _raw_outputs(engine.batcher, patches, halos, origin)
        seconds.append(time.perf_counter() - before)
    result.batch_seconds, result.patches = median(seconds), len(patches)
    result.finite = bool(np.isfinite(first).all())
    result.lowest, result.highest = float(np.nanmin(first)), float(np.nanmax(first))
    if len(patches) > 1:
        rotated = _raw_outputs(engine.batcher, [*patches[1:], patches[0]], halos, origin)
        result.by_position = _max_difference(np.roll(rotated, 1, axis=0), first)
    size = engine.batcher.size
    if size > 1:
        smaller_batcher = engine.batcher.of_size(max(1, size // 2))
        try:
            smaller_outputs = _raw_outputs(
                smaller_batcher, patches[: smaller_batcher.size], halos, origin
            )
        except Exception:
            return  # the network supports one batch size only, which is allowed
        result.other_size = smaller_batcher.size
        result.by_batch_size = _max_difference(smaller_outputs, first[: len(smaller_outputs)])


def _raw_outputs(
    batcher: Batcher, patches: Sequence[Patch], halos: Halos, origin: tuple[int, ...]
) -> npt.NDArray[Any]:
    while True:
        outputs = batcher.raw(patches[: batcher.size], halos, origin)
        if outputs is not None:
            return outputs


def _max_difference(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    count = min(len(a), len(b))
    return float(np.nanmax(np.abs(a[:count] - b[:count]), initial=0.0))


if __name__ == "__main__":
    logging.getLogger("chunkq").setLevel(logging.ERROR)
    _restart_with_worker_env()
    main(*sys.argv[1:])
