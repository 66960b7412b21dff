"""Load one setting of a job in a separate process and measure its speed and memory in turns.

`python -m chunkq_worker.tune.trial` reads `TrialOptions` as one line of JSON on standard input,
loads the network and writes a `Measurement` as one line of JSON. Each further line is a `Turn`,
which it answers with another measurement. It ends when its standard input closes.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq import json_values
from chunkq.create import check_job, create_job
from chunkq.errors import ChunkqError
from chunkq.job.job_handle import JobHandle
from chunkq.job.job_reading import load_job
from chunkq.job.record import JobRecord
from chunkq.job.sample_job import largest_item
from chunkq.plan.chunk import Chunk, Patch
from chunkq.plan.sample_chunks import fullest_chunk, sample_chunks
from chunkq.queue.contract.executor import Attempt
from chunkq.storage.padded_reading import read_padded
from chunkq.system.framework_logs import hide_framework_logs
from chunkq.system.memory import peak_bytes
from chunkq.system.standard_output import to_standard_error
from chunkq_worker.device import get_device
from chunkq_worker.inference_engine import InferenceEngine
from chunkq_worker.run_task import run_task
from chunkq_worker.tune.search import Measurement, Stage, TrialStatus

MIN_SAMPLE_PATCHES, MAX_SAMPLE_PATCHES = 2, 16
"""Number of patches whose outputs are compared with those of other settings, ..."""
SAMPLE_VALUES = 1 << 24
"""... within these limits such that they have so many values."""
MAX_TIMED_PATCHES = 10_000


@dataclass(frozen=True, slots=True)
class TrialOptions:
    """The options of a trial: `record` is a job record as JSON.

    `folder` is an empty folder for temporary files. In stage `network`, the outputs of some patches
    are written to the file `sample`.
    """

    stage: Stage
    record: str
    depth: int
    folder: str
    sample: str


@dataclass(frozen=True, slots=True)
class Turn:
    """A request to measure for `seconds`; 0 releases memory and has no answer."""

    seconds: float


class TooLargeError(Exception):
    """The batch did not fit into memory and was halved, so the setting cannot be measured."""


class Trial(ABC):
    """A loaded setting that is measured in turns."""

    engine: InferenceEngine
    load_seconds: float

    @abstractmethod
    def rate(self, seconds: float) -> float:
        """Return patches per second over about `seconds`."""

    def measure(self, seconds: float) -> Measurement:
        """Return the measurement of one turn."""
        rate = self.rate(seconds)
        _check_batch(self.engine)
        return self.measurement(rate)

    def measurement(self, rate: float = 0.0) -> Measurement:
        """Return a measurement with the memory that was used so far."""
        runtime = self.engine.runtime
        return Measurement(
            "ok",
            rate=rate,
            load_seconds=self.load_seconds,
            peak_bytes=peak_bytes(),
            device_bytes=runtime.device_bytes(),
            note=runtime.device,
        )

    def release(self) -> None:
        """Return unused memory of torch to the device, for the process of another setting."""
        if self.engine.runtime.accelerator is not None:
            import torch

            torch.cuda.empty_cache()


def main() -> None:
    """Load the trial, then answer each line of standard input until it closes."""
    hide_framework_logs()
    answers = os.fdopen(os.dup(1), "wb")
    to_standard_error()
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)  # do not wait for a compiler's helper processes or reader threads

    threading.Thread(target=read, name="parent", daemon=True).start()
    options = json_values.decode(TrialOptions, lines.get())
    trial = _answer(answers, lambda: _load(options))
    while trial is not None:
        seconds = json_values.decode(Turn, lines.get()).seconds
        if not seconds:
            trial.release()
        elif _answer(answers, lambda: trial, seconds) is None:
            break
    threading.Event().wait()  # until standard input closes


def _answer(
    answers: BinaryIO, load: Callable[[], Trial], seconds: float | None = None
) -> Trial | None:
    """Write the measurement of a turn, or of loading; return the trial unless it failed."""
    trial: Trial | None = None
    try:
        trial = load()
        measurement = trial.measurement() if seconds is None else trial.measure(seconds)
    except Exception as error:
        trial, measurement = None, _failure(error)
    answers.write(json_values.encode(measurement) + b"\n")
    answers.flush()
    return trial


def _load(options: TrialOptions) -> Trial:
    record = JobRecord.from_json(options.record.encode())
    return (
        NetworkTrial(options, record) if options.stage == "network" else ChunkTrial(options, record)
    )


def _failure(error: Exception) -> Measurement:
    reason = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ChunkqError):
        reason = f"the trial raised {type(error).__name__}: {reason}"
    status: TrialStatus = "too large" if _is_out_of_memory(error) else "failed"
    # A file name in the message may be invalid Unicode, which JSON cannot store.
    return Measurement(status, note=reason.encode(errors="replace").decode())


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
    _check_batch(engine)
    return engine, time.perf_counter() - before


def _check_batch(engine: InferenceEngine) -> None:
    requested = engine.batcher.model.max_batch_size
    if engine.batcher.size < requested:
        raise TooLargeError(f"a batch of {requested} does not fit")


class NetworkTrial(Trial):
    """Times the network and the blending on patches of one chunk in the middle of the volume."""

    def __init__(self, options: TrialOptions, record: JobRecord) -> None:
        """Load the network and write the sample."""
        self.engine, self.load_seconds = _load_engine(record)
        job, plan = record.job, self.engine.plan
        self._chunk = fullest_chunk(plan)
        self._halos = [
            read_padded(array, self._chunk.halo, job.pad_mode, job.pad_value)
            for array in record.largest_item.open()
        ]
        self._patches = list(islice(plan.patches(self._chunk), MAX_TIMED_PATCHES))
        np.savez(options.sample, *self._sample())
        self._is_warm = False

    @override
    def rate(self, seconds: float) -> float:
        chunk_run = self.engine.pipeline.open(self._chunk, self._halos)

        def run(patches: list[Patch]) -> float:
            before = time.perf_counter()
            chunk_run.add(patches)
            chunk_run.wait()
            return max(time.perf_counter() - before, 1e-9)

        patches, size = self._patches, self.engine.batcher.size
        if not self._is_warm:
            run(patches[:size])
            self._is_warm = True
        batches = max(1, int(seconds / run(patches[:size])))
        timed = patches[: batches * size]
        repeats = max(1, batches * size // len(timed))
        total = sum(run(timed) for _ in range(repeats))
        chunk_run.finish()()  # included in the peak memory
        return len(timed) * repeats / total

    @override
    def release(self) -> None:
        super().release()
        self._is_warm = False

    def _sample(self) -> list[npt.NDArray[Any]]:
        """Return the raw outputs (n, C, *Q) of each head for patches in the middle of the chunk."""
        size, plan = self.engine.batcher.size, self.engine.plan
        number = SAMPLE_VALUES // sum(head.channels * prod(head.patch) for head in plan.heads)
        number = max(MIN_SAMPLE_PATCHES, min(MAX_SAMPLE_PATCHES, number))
        middle = max(0, (len(self._patches) - number) // 2)
        patches, outputs = self._patches[middle : middle + number], []
        for first in range(0, len(patches), size):
            origin = self._chunk.halo.start
            output = self.engine.batcher.raw(patches[first : first + size], self._halos, origin)
            if output is None:
                raise TooLargeError(f"a batch of {size} does not fit")
            outputs.append(output)
        return [np.concatenate(batches) for batches in zip(*outputs, strict=True)]


class ChunkTrial(Trial):
    """Times entire chunks of the job, with its output in a temporary folder."""

    def __init__(self, options: TrialOptions, record: JobRecord) -> None:
        """Load the network."""
        self._options, self._record, self._turns = options, record, 0
        self._device = get_device()
        self.engine, self.load_seconds = self._device.run(lambda: _load_engine(record)).result()
        self._is_warm = False

    @override
    def rate(self, seconds: float) -> float:
        # Committed chunks are not computed again, so each turn has a job folder of its own.
        self._turns += 1
        folder = Path(self._options.folder) / str(self._turns)
        output = str(folder / "out.zarr")
        values = self._record.job.as_dict()
        for key in ("mask", "skip_empty"):  # sample chunks are computed whole
            values.pop(key, None)
        job = create_job(check_job(load_job(values, output=output)))
        try:
            with self._device.compute_with(job, self.engine):
                return self._patches_per_second(job, seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @override
    def release(self) -> None:
        self._device.run(super().release).result()
        self._is_warm = False

    def _patches_per_second(self, job: JobHandle, seconds: float) -> float:
        """Return patches per second over sample chunks, the middle one first.

        Before the first turn, and after memory was released, one chunk is not timed.
        """
        depth, item = self._options.depth, largest_item(job)
        chunks = [chunk for chunk in sample_chunks(item.plan) if chunk.is_active]

        def compute(chunk: Chunk) -> int:
            run_task(item.task("infer", chunk.index), Attempt(1, "tune"))
            return chunk.patches

        # With few chunks, all of them have to be timed.
        if not self._is_warm and len(chunks) > depth:
            compute(chunks.pop(0))
        self._is_warm = True
        start_time = time.perf_counter()
        patches = _compute_for(seconds, chunks, compute, depth)
        return patches / max(time.perf_counter() - start_time, 1e-9)


def _compute_for(
    seconds: float, chunks: Sequence[Chunk], compute: Callable[[Chunk], int], depth: int
) -> int:
    """Compute chunks, `depth` at a time, and start new ones for `seconds`; return the patches."""
    remaining, in_flight, patches = iter(chunks), set[Future[int]](), 0
    start_time = time.perf_counter()
    with ThreadPoolExecutor(depth) as pool:
        started = 0
        while True:
            may_start = started <= depth or time.perf_counter() - start_time < seconds
            while may_start and len(in_flight) < depth and (chunk := next(remaining, None)):
                in_flight.add(pool.submit(compute, chunk))
                started += 1
            if not in_flight:
                return patches
            done, in_flight = wait(in_flight, return_when=FIRST_COMPLETED)
            patches += sum(future.result() for future in done)


if __name__ == "__main__":
    logging.getLogger("chunkq").setLevel(logging.CRITICAL)
    main()
