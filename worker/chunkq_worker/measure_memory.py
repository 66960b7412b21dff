"""Measure the memory of a worker by computing sample chunks of a job.

Memory depends on how the allocator handles arrays that exist at the same time, so it is measured
instead of estimated. Chunks of a temporary job run through `infer_chunk`, as many in parallel as in
a real worker process, and blocks are finalized. The network runs for as many batches as the time
allows, and at least once per chunk. All other batches get a copy of its last answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq.blend.combine import Array, as_float, to_numpy
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.job.sample_job import largest_item
from chunkq.job.tasks import Task
from chunkq.plan.chunk import Chunk
from chunkq.plan.sample_chunks import sample_chunks
from chunkq.queue.contract.executor import Attempt
from chunkq.system import buffers
from chunkq.system.memory import peak_bytes
from chunkq_worker.device import get_device
from chunkq_worker.inference_engine import InferenceEngine
from chunkq_worker.inline import Contributions
from chunkq_worker.run_task import run_task
from chunkq_worker.runtimes.base import Runtime

MAX_CHUNKS = 27
"""Largest number of sample chunks: in 3-D, one chunk and all its neighbors."""
MAX_SECONDS = 20.0
"""Time after which no chunk is started, except those needed to fill the pipeline."""
POLL_SECONDS = 0.002


class ReplayRuntime(Runtime):
    """Run the network for some batches, and return a copy of its last answer for the others.

    The network runs for evenly spaced batches out of `batches`: as many as fit into MAX_SECONDS,
    and at least one in every `chunk` batches, because heap fragmentation by the network is part
    of the result. While other chunks are read or written, a copied answer takes as long as the
    network did, so that as many chunks wait for the device as in a real worker. `kept_bytes` is
    the size of the stored answer.
    """

    def __init__(
        self, network: Runtime, chunk: int, batches: int, in_flight: ChunksInFlight
    ) -> None:
        self.device, self.any_batch = network.device, network.any_batch
        self.accelerator = network.accelerator
        self.reads_device_memory = network.reads_device_memory
        self._network, self._chunk, self._batches = network, chunk, batches
        self._interval, self._in_flight = chunk, in_flight
        self._calls = 0
        self._answer: tuple[npt.NDArray[Any], ...] = ()
        self._seconds = 0.0
        self.kept_bytes = 0

    @override
    def __call__(self, batch: Array) -> tuple[Array, ...]:
        is_long_enough = bool(self._answer) and len(self._answer[0]) >= len(batch)
        self._calls += 1
        if not is_long_enough or (self._calls - 1) % self._interval == 0:
            before = time.perf_counter()
            answer = self._network(batch)
            self._seconds = time.perf_counter() - before
            self.output_dtypes = self._network.output_dtypes
            if not is_long_enough:
                self._keep(answer)
                affordable = ceil(self._batches * self._seconds / MAX_SECONDS)
                self._interval = max(1, min(self._chunk, affordable))
            return answer
        due = time.perf_counter() + self._seconds
        while time.perf_counter() < due and self._in_flight.has_active_io():
            time.sleep(POLL_SECONDS)
        copies = (np.array(values[: len(batch)]) for values in self._answer)
        return tuple(map(self._network.to_device, copies))

    def _keep(self, answer: Sequence[Array]) -> None:
        """Store an answer outside the allocator's heap, so that the heap is not changed by it."""
        arrays = [to_numpy(as_float(values)) for values in answer]
        self._answer = tuple(buffers.cast(values, values.dtype) for values in arrays)
        self.kept_bytes += sum(values.nbytes for values in arrays)

    @override
    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return self._network.zeros(shape, dtype)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        return self._network.to_device(array)

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        return self._network.is_out_of_memory(error)

    @override
    def close(self) -> None:
        self._network.close()


class ChunksInFlight:
    """Compute chunks of a job with up to `depth` in flight; `finished` counts them."""

    def __init__(self, item: ItemHandle, depth: int) -> None:
        self._item, self._depth = item, depth
        self._tasks: set[Task] = set()
        self._lock = threading.Lock()
        self._contributions = Contributions()
        self.finished = 0

    def has_active_io(self) -> bool:
        """Return whether a chunk besides the one on the device is being read or written."""
        device = get_device()
        with self._lock:
            return sum(not device.is_awaited_by(task) for task in self._tasks) > 1

    def run(self, chunks: Sequence[Chunk]) -> None:
        """Compute chunks until MAX_SECONDS are over, and finalize blocks; raise their errors."""
        deadline = time.perf_counter() + MAX_SECONDS
        # At least enough chunks to fill the pipeline and to finalize one block.
        min_chunks = max(self._depth + 2, len(self._item.plan.contributors(chunks[0].index)))

        def compute(number: int) -> None:
            if number >= min_chunks and time.perf_counter() > deadline:
                return
            task = self._item.task("infer", chunks[number].index)
            with self._lock:
                self._tasks.add(task)
            attempt = Attempt(1, "memory measurement")
            try:
                result = run_task(task, attempt)
                for block in self._contributions.record(result.contributions):
                    run_task(block, attempt)
            finally:
                with self._lock:
                    self._tasks.discard(task)
                    self.finished += 1

        with ThreadPoolExecutor(self._depth) as pool:
            for _ in pool.map(compute, range(len(chunks))):
                pass


@dataclass(frozen=True, slots=True)
class MemoryMeasurement:
    """The number of chunks computed, and the peak resident memory of the process in bytes."""

    chunks: int
    worker_bytes: int


def measure_memory(engine: InferenceEngine, job: JobHandle, depth: int) -> MemoryMeasurement:
    """Compute sample chunks of a job with `depth` in flight, and return the peak memory.

    `engine` must not have computed before. Errors of the chunks are raised.
    """
    item = largest_item(job)
    chunks = [chunk for chunk in sample_chunks(item.plan) if chunk.is_active][:MAX_CHUNKS]
    in_flight = ChunksInFlight(item, depth)
    network = engine.runtime
    batches = [-(-chunk.patches // engine.batcher.size) for chunk in chunks]
    device = get_device()
    # `for_plan` creates a batcher for the engine's current runtime.
    engine.runtime = replay = ReplayRuntime(network, max(batches), sum(batches), in_flight)
    try:
        measuring_engine = device.run(lambda: engine.for_plan(item.plan)).result()
    finally:
        engine.runtime = network
    measuring_engine.batcher.checks = None  # copied answers agree
    with device.compute_with(job, measuring_engine):
        in_flight.run(chunks)
    return MemoryMeasurement(in_flight.finished, peak_bytes() - replay.kept_bytes)
