"""One job's network on one device, driven by one thread."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

from chunkq.allowed_paths import accepted_files, accepted_job
from chunkq.blend import Accumulator, Contribution, WeightCache, contribution
from chunkq.combine import to_numpy
from chunkq.errors import JobError, ModelError
from chunkq.job_handle import JobHandle
from chunkq.plan import Chunk, Index, Plan
from chunkq.record import JobRecord
from chunkq.tasks import Task
from chunkq.user_code import load_blend_weights
from chunkq_worker.batching import Batcher, Halos
from chunkq_worker.child_env import THREADS_VARIABLE
from chunkq_worker.frameworks import this_process
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.steps import Steps

ENGINES_CACHED = 2
T = TypeVar("T")


class InferenceEngine:
    """A loaded network with the weights and buffers of one plan.

    Only the device thread calls it: math libraries keep a thread pool per calling thread.
    """

    def __init__(self, record: JobRecord, plan: Plan) -> None:
        """Load the network; raises ModelError or JobError if the job cannot be done with it."""
        if changed := record.changed_files():
            raise ModelError(
                f"{', '.join(changed)}: not the file that the job was produced with; put that back "
                "or produce the job again with --overwrite"
            )
        share = os.environ.get(THREADS_VARIABLE, "")
        threads = plan.job.threads or (int(share) if share.isdecimal() else None)
        self._network = _network(record)
        self._steps = Steps.load(plan.job.model.processing_steps)
        self.runtime: Runtime = load_runtime(plan.job.model, self._steps, threads)
        self._allocate(plan)

    def for_plan(self, plan: Plan) -> InferenceEngine:
        """Return an engine for the same job over another volume; both share the network."""
        other = copy(self)
        other._allocate(plan)
        return other

    def _allocate(self, plan: Plan) -> None:
        self.plan = plan
        self._weights = WeightCache(plan, load_blend_weights(plan), self.runtime.to_device)
        self.batcher = Batcher(plan, self.runtime, self._steps, self._network)
        if not self.runtime.any_batch:  # what is prepared for one size counts as loading
            self.batcher.warm_up()

    def compute(self, chunk: Chunk, halos: Halos) -> Contribution:
        """Run all patches a chunk owns over its inputs, each of `halos` (*chunk.halo.shape)."""
        return self.start(chunk, halos)()

    def start(self, chunk: Chunk, halos: Halos) -> Callable[[], Contribution]:
        """Compute a chunk; returns what waits for the results to arrive on the host.

        That may be called by any thread, while this one goes on to the next chunk.
        """
        plan = self.plan
        zeros = self.runtime.zeros((plan.channels, *chunk.region.shape))
        sums = Accumulator(plan, chunk, self._weights, zeros)
        patches = list(plan.patches(chunk))
        self._weights.prepare(patches)
        for patch, prediction in self.batcher.predictions(patches, halos, chunk.halo.start):
            sums.add(patch, prediction)
        results = sums.sums()
        fetched = self.runtime.fetch(results)
        if fetched is not None:
            return lambda: contribution(plan, chunk, fetched())
        made = contribution(plan, chunk, [to_numpy(part) for part in results])
        return lambda: made

    def close(self) -> None:
        """Let go of the network."""
        self.runtime.close()


class Device:
    """The one thread of this process that touches the device, and the networks it holds."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._engines: OrderedDict[str, InferenceEngine] = OrderedDict()
        self._lent: dict[str, InferenceEngine] = {}
        self._waiting: set[tuple[str, Index]] = set()

    def is_awaited_by(self, task: Task) -> bool:
        """Tell whether a task waits until the device is free."""
        return (task.job, task.chunk) in self._waiting

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Have anything done on the device's thread."""
        return self._thread.submit(work)

    @contextmanager
    def compute_with(self, job: JobHandle, engine: InferenceEngine) -> Iterator[None]:
        """Compute a job with a network that someone else has loaded, and goes on to hold."""
        self._lent[_key(job)] = engine
        try:
            yield
        finally:
            self._lent.pop(_key(job), None)

    def compute(self, job: JobHandle, chunk: Chunk, halos: Halos) -> ComputedChunk:
        """Wait for the device and compute one chunk; raises what the engine raises."""
        asked = time.time()
        self._waiting.add((job.folder.path, chunk.index))
        arrived, patches, seconds = self._thread.submit(
            self._compute, job, chunk, halos, asked
        ).result()
        return ComputedChunk(arrived(), patches, seconds)

    def _compute(
        self, job: JobHandle, chunk: Chunk, halos: Halos, asked: float
    ) -> tuple[Callable[[], Contribution], int, dict[str, float]]:
        free = time.time()
        self._waiting.discard((job.folder.path, chunk.index))
        engine = self._engine(job)
        began, before = time.time(), engine.batcher.patches_run
        arrived = engine.start(chunk, halos)
        this_process.record(job.plan.job.model)
        seconds = {"wait": free - asked, "load": began - free, "compute": time.time() - began}
        return arrived, engine.batcher.patches_run - before, seconds

    def _engine(self, job: JobHandle) -> InferenceEngine:
        key = _key(job)
        if key in self._lent:
            return self._lent[key]
        if key not in self._engines:
            this_process.check(job.plan.job.model)
            while len(self._engines) >= ENGINES_CACHED:
                self._engines.popitem(last=False)[1].close()
            accepted = accepted_files(job.record.job, job.folder.path)
            self._engines[key] = InferenceEngine(job.record, replace(job.plan, job=accepted))
        self._engines.move_to_end(key)
        return self._engines[key]


def _network(record: JobRecord) -> Hashable:
    """Return what stands for a network and the memory that a batch of it needs."""
    model = record.job.model.model_copy(update={"max_batch_size": 1})
    return model, len(record.job.input), tuple(sorted(record.file_hashes.items()))


def _key(job: JobHandle) -> str:
    return f"{job.folder.path} {job.record.digest}"


@dataclass(frozen=True, slots=True)
class ComputedChunk:
    """A chunk's contribution, the patches run for it and the seconds that went by.

    `wait` is for the device, `load` for the network (in a job's first chunk), `compute` the rest.
    """

    contribution: Contribution
    patches: int
    seconds: dict[str, float]


_device: Device | None = None
_lock = threading.Lock()


def waits_for_device(task: Task) -> bool:
    """Tell whether a task of this process merely waits for another to be computed."""
    try:
        opened = replace(task, job=accepted_job(task.job))  # as `run_task` opens it
    except JobError:
        return False
    return _device is not None and _device.is_awaited_by(opened)


def get_device(make: Callable[[], Device] = Device) -> Device:
    """Return the process's device, made at first use."""
    global _device  # noqa: PLW0603 - one device per process is the point
    with _lock:
        if _device is None:
            _device = make()
        return _device
