"""The command `chunkq check-model`, which the producer starts as a separate process.

It reads a job record on standard input and writes a `CheckReport` to a file.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any, BinaryIO

import click
import numpy as np
import numpy.typing as npt

from chunkq.cli import as_chunkq_error
from chunkq.job.allowed_paths import ALLOW_VARIABLE
from chunkq.job.job_handle import JobHandle, open_job
from chunkq.job.record import JobRecord
from chunkq.model_check import CheckReport, MemoryCheck, ModelCheck, PatchCheck, ValueCheck
from chunkq.storage import chunk_cache
from chunkq.system.cores import available_cores
from chunkq.system.memory import peak_bytes
from chunkq.system.signal_masks import discard_blocked_sigterm
from chunkq.system.standard_output import to_standard_error
from chunkq_worker.batching import Batcher
from chunkq_worker.child_env import child_env
from chunkq_worker.device import get_device
from chunkq_worker.inference_engine import InferenceEngine
from chunkq_worker.measure_memory import measure_memory
from chunkq_worker.output_shapes import find_output_shapes
from chunkq_worker.runtimes.returned_values import unused_note
from chunkq_worker.trial_batch import TrialBatch, check_on_patches
from chunkq_worker.value_watch import ValueWatch

ROUNDS = 3
"""Number of timed batches; the median is reported."""
REPEATS = 3
"""Repetitions of a batch, of which outputs must agree. Some random layers change few of them."""


@click.command("check-model", hidden=True)
@click.option("--depth", type=click.IntRange(1), help="Chunks in flight; default: compute none.")
@click.option("--job", "job_folder", help="Folder of a copy of the job, for the chunks.")
@click.option("--shapes", "only_shapes", is_flag=True, help="Find the shapes of the outputs only.")
@click.option("--report", type=click.File("wb"), required=True, help="File for the report.")
def check_model(
    depth: int | None, job_folder: str | None, only_shapes: bool, report: BinaryIO
) -> None:
    """Load the network of the job record on standard input, and run a batch of patches.

    With --shapes, run a batch of zeros instead, and report the shapes that the job does not
    declare. With --depth, also time patches from the middle of the volume in different batches, and
    compute chunks, DEPTH in flight, to measure the memory of a worker process.
    """
    logging.getLogger("chunkq").setLevel(logging.ERROR)
    _restart_with_worker_env()
    discard_blocked_sigterm()  # the parent, which gets it too, decides
    to_standard_error()
    record = sys.stdin.buffer.read()
    result = report_shapes(record) if only_shapes else report_check(record, depth, job_folder)
    result.write(report.fileno())


def report_check(
    record: bytes,
    depth: int | None = None,
    job_folder: str | None = None,
    *,
    keeps_batch: bool = False,
) -> CheckReport:
    """Check the network of a job record; return the result or the error. See `run_check`."""
    try:
        decoded = JobRecord.from_json(record)
        return CheckReport(run_check(decoded, depth, job_folder, keeps_batch=keeps_batch))
    except Exception as error:
        known = as_chunkq_error(error)
        return CheckReport(error=str(known), code=known.code)


def report_shapes(record: bytes) -> CheckReport:
    """Find the shapes that the job of a record does not declare; return them or the error."""
    try:
        decoded = JobRecord.from_json(record)
        volume = decoded.largest_item.volume
        shapes = get_device().run(lambda: find_output_shapes(decoded.job, volume)).result()
        return CheckReport(shapes=tuple(shapes.values()))
    except Exception as error:
        known = as_chunkq_error(error)
        return CheckReport(error=str(known), code=known.code)


def run_check(
    record: JobRecord,
    depth: int | None = None,
    job_folder: str | None = None,
    *,
    keeps_batch: bool = False,
) -> ModelCheck:
    """Load and run the network; raise ChunkqError if it cannot be used.

    With `depth`, also run patches, and compute chunks of the job in `job_folder`, `depth` in
    flight. That job is a copy of the record's job with an empty output. With `keeps_batch`, the
    outputs of the batch are kept for the chunk that has it.
    """
    if record.job.is_image:
        from chunkq_worker.images.image_check import check_images  # for such jobs only

        return check_images(record, is_timed=depth is not None)
    # Load on the device thread, as a worker does: libraries allocate memory per calling thread.
    on_device = get_device().run
    before = time.perf_counter()
    engine = get_device().load(record).result()
    load_seconds = time.perf_counter() - before
    loaded_bytes = peak_bytes()
    memory = None
    if depth is not None and job_folder is not None:
        memory = _measure_memory(engine, open_job(job_folder), depth)
    before = time.perf_counter()
    engine.checks.repeats = REPEATS
    with engine.batcher.keeping_batch() if keeps_batch else nullcontext():
        values = on_device(lambda: _run_batches(engine, record)).result()
    load_seconds += time.perf_counter() - before
    patches = None
    if depth is not None:
        patches = on_device(lambda: _run_patches(engine, record)).result()
    return ModelCheck(
        batch=engine.batcher.size,
        device=engine.runtime.device,
        load_seconds=load_seconds,
        loaded_bytes=loaded_bytes,
        peak_bytes=peak_bytes(),
        device_bytes=engine.runtime.device_bytes(),
        tile_norms=tuple(engine.runtime.tile_norms()),
        notes=(*engine.runtime.notes(), *unused_note(engine.runtime.unused_heads)),
        output_warnings=tuple(engine.checks.warnings),
        values=values,
        patches=patches,
        memory=memory,
    )


def _restart_with_worker_env() -> None:
    """Restart this process with the environment of a worker process, unless it has it.

    The user names the job, so every path is allowed.
    """
    worker_env = {**os.environ, **child_env(available_cores())}
    worker_env.pop(ALLOW_VARIABLE, None)
    worker_env[chunk_cache.VARIABLE] = "0"  # the plan adds what a worker keeps of a whole job
    if worker_env != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], worker_env)


def _run_batches(engine: InferenceEngine, record: JobRecord) -> ValueCheck:
    """Run a batch of patches, or of zeros if no patch could be read."""
    watch = ValueWatch(engine.plan.outputs)
    with engine.batcher.watched_by(watch):
        check_on_patches(record, engine.plan, engine.batcher)
    if not engine.batcher.has_run:
        engine.batcher.warm_up()
    has_steps = record.job.model.processing_steps is not None
    return replace(watch.result(), has_preprocessing=has_steps)


def _measure_memory(engine: InferenceEngine, job: JobHandle, depth: int) -> MemoryCheck:
    try:
        measurement = measure_memory(engine, job, depth)
    except Exception as error:  # errors of the network are raised by the batch after this
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return MemoryCheck(depth, error=reason)
    return MemoryCheck(depth, measurement.chunks, measurement.worker_bytes)


def _run_patches(engine: InferenceEngine, record: JobRecord) -> PatchCheck:
    return _time_and_compare(engine, TrialBatch.read(record, engine.plan, engine.batcher.size))


def _time_and_compare(engine: InferenceEngine, batch: TrialBatch) -> PatchCheck:
    """Time the network, and compare its outputs for other batches."""
    patches = batch.patches
    seconds, first = [], batch.raw(engine.batcher, patches)
    for _ in range(ROUNDS):
        before = time.perf_counter()
        batch.raw(engine.batcher, patches)
        seconds.append(time.perf_counter() - before)
    by_position = None
    if len(patches) > 1:
        rotated = batch.raw(engine.batcher, [*patches[1:], patches[0]])
        by_position = _max_difference([np.roll(head, 1, axis=0) for head in rotated], first)
    other_size, by_batch_size = _compare_sizes(engine.batcher, batch, first)
    return PatchCheck(
        patches=len(patches),
        batch_seconds=median(seconds),
        finite=all(bool(np.isfinite(head).all()) for head in first),
        largest=max(map(_largest, first)),
        by_position=by_position,
        by_batch_size=by_batch_size,
        other_size=other_size,
    )


def _compare_sizes(
    batcher: Batcher, batch: TrialBatch, outputs: Sequence[npt.NDArray[Any]]
) -> tuple[int, float] | tuple[None, None]:
    """Return half the batch size, and the largest difference of the outputs with it.

    The values are None if the network supports one batch size only, which is allowed.
    """
    if batcher.size == 1:
        return None, None
    smaller_batcher = batcher.of_size(max(1, batcher.size // 2))
    try:
        smaller = batch.raw(smaller_batcher, batch.patches)
    except Exception:
        return None, None
    return smaller_batcher.size, _max_difference(smaller, outputs)


def _max_difference(first: Sequence[npt.NDArray[Any]], second: Sequence[npt.NDArray[Any]]) -> float:
    """Return the largest difference of a head, as if all heads had the largest value of all."""
    largest = max(map(_largest, second))
    differences = []
    for a, b in zip(first, second, strict=True):
        count = min(len(a), len(b))
        difference = float(np.nanmax(np.abs(a[:count] - b[:count]), initial=0.0))
        differences.append(difference * largest / (_largest(b) or 1.0))
    return max(differences)


def _largest(values: npt.NDArray[Any]) -> float:
    return float(np.nanmax(np.abs(values), initial=0.0))
