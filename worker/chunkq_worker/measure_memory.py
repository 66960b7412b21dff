"""A worker's chunks in small: real stages, arrays and files, with hardly any network.

Memory follows from what the allocator makes of all that coexists, so it is tried, not guessed:
chunks go through `infer_chunk` of a job that is thrown away, as many at once as in a real process,
and blocks are completed. The network runs for as many batches as there is time for, at least once a
chunk, beside that chunk's arrays; all other batches get its answer again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from chunkq import buffers
from chunkq.combine import Array, to_numpy
from chunkq.executors.base import Attempt
from chunkq.finalize import complete_block
from chunkq.job_handle import JobHandle
from chunkq.memory import peak_bytes
from chunkq.plan import Index, Plan
from chunkq.tasks import Task
from chunkq_worker.infer import infer_chunk
from chunkq_worker.inference_engine import InferenceEngine, get_device
from chunkq_worker.inline import Contributions
from chunkq_worker.runtimes.base import Runtime

MAX_CHUNKS = 27
"""Chunks of a rehearsal, at most: in a volume, one and all around it."""
SECONDS = 20.0
"""No chunk is begun after so long, but the few that it takes to fill the pipeline."""
POLL_SECONDS = 0.002


class ReplayRuntime(Runtime):
    """A network that is run for some batches; the others get a copy of its last answer.

    Of `batches` in all it is run for as many as SECONDS are enough for, evenly spread, and for one
    in `chunk` at least: how it breaks up the heap is part of the memory. Where others still read or
    write, an answer takes as long as the network took, so that as many chunks wait for the device
    as do behind the real one.
    """

    def __init__(self, network: Runtime, chunk: int, batches: int, flights: ChunksInFlight) -> None:
        self.device, self.any_batch = network.device, network.any_batch
        self._network, self._chunk, self._batches = network, chunk, batches
        self._each, self._flights = chunk, flights
        self._calls = 0
        self._answer: Array = None
        self._seconds = 0.0
        self.kept_bytes = 0

    @override
    def __call__(self, batch: npt.NDArray[Any]) -> Array:
        fits = self._answer is not None and len(self._answer) >= len(batch)
        self._calls += 1
        if not fits or (self._calls - 1) % self._each == 0:
            before = time.perf_counter()
            answer = self._network(batch)
            self._seconds = time.perf_counter() - before
            if not fits:
                self._keep(answer)
                affordable = ceil(self._batches * self._seconds / SECONDS)
                self._each = max(1, min(self._chunk, affordable))
            return answer
        due = time.perf_counter() + self._seconds
        while time.perf_counter() < due and self._flights.are_moving():
            time.sleep(POLL_SECONDS)
        return self._network.to_device(np.array(self._answer[: len(batch)]))

    def _keep(self, answer: Array) -> None:
        """Keep an answer outside the allocator's heap, which is to look as without it."""
        values = to_numpy(answer)
        self._answer = buffers.cast(values, values.dtype)
        self.kept_bytes += values.nbytes

    @override
    def zeros(self, shape: tuple[int, ...]) -> Array:
        return self._network.zeros(shape)

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
    """The chunks in flight, at most `depth` at once."""

    def __init__(self, job: JobHandle, depth: int) -> None:
        self._job, self._depth = job, depth
        self._flying: set[Task] = set()
        self._lock = threading.Lock()
        self._contributions = Contributions()
        self.landed = 0

    def are_moving(self) -> bool:
        """Tell whether any chunk besides the computed one is read or written."""
        device = get_device()
        with self._lock:
            return sum(not device.is_awaited_by(task) for task in self._flying) > 1

    def run(self, chunks: Sequence[Index]) -> None:
        """Compute chunks until the time is up, and complete blocks; raises what either raises."""
        until = time.perf_counter() + SECONDS
        # So many that the pipeline is full, and one block complete.
        few = max(self._depth + 2, len(self._job.plan.contributors(chunks[0])))

        def one(number: int) -> None:
            if number >= few and time.perf_counter() > until:
                return
            task = Task("infer", self._job.folder.path, chunks[number])
            with self._lock:
                self._flying.add(task)
            attempt = Attempt(1, "rehearsal")
            try:
                outcome = infer_chunk(task, attempt)
                for block in self._contributions.note(outcome.contributions):
                    complete_block(self._job, block, attempt)
            finally:
                with self._lock:
                    self._flying.discard(task)
                    self.landed += 1

        with ThreadPoolExecutor(self._depth) as pool:
            for _ in pool.map(one, range(len(chunks))):
                pass


@dataclass(frozen=True, slots=True)
class MemoryMeasurement:
    """How many chunks were computed, and a worker's largest resident memory meanwhile."""

    chunks: int
    worker_bytes: int


def measure_memory(engine: InferenceEngine, job: JobHandle, depth: int) -> MemoryMeasurement:
    """Compute some chunks of a job, `depth` at once, as the first thing done with a network.

    Raises what computing them raises.
    """
    chunks = some_chunks(job.plan)
    flights = ChunksInFlight(job, depth)
    network = engine.runtime
    batches = [-(-job.plan.chunk(i).patches // engine.batcher.size) for i in chunks]
    device = get_device()
    # `over` makes a batcher for what the engine holds as its network just then.
    engine.runtime = replay = ReplayRuntime(network, max(batches), sum(batches), flights)
    try:
        playing = device.run(lambda: engine.for_plan(job.plan)).result()
    finally:
        engine.runtime = network
    with device.compute_with(job, playing):
        flights.run(chunks)
    return MemoryMeasurement(flights.landed, peak_bytes() - replay.kept_bytes)


def some_chunks(plan: Plan) -> list[Index]:
    """Return up to MOST_CHUNKS chunks: all, or those around the middle one and it.

    First those that contribute to the middle one's block, itself the very first.
    """
    middle = tuple(blocks // 2 for blocks in plan.blocks)
    near = [
        range(max(0, centre - 1), min(blocks, centre + 2))
        for centre, blocks in zip(middle, plan.blocks, strict=True)
    ]
    few = plan.costs.chunks <= MAX_CHUNKS
    found = [i for i in (plan.indices() if few else product(*near)) if plan.chunk(i).is_active]
    first = set(plan.contributors(middle))
    found.sort(key=lambda i: (i != middle, i not in first, i))
    return found[:MAX_CHUNKS]
