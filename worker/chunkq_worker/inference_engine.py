"""Run a job's network on a device, from one thread."""

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

from chunkq.blend.patch_weights import PatchWeights
from chunkq.blend.sums import Contribution
from chunkq.blend.weights import Weights
from chunkq.errors import JobError, ModelError
from chunkq.job.allowed_paths import allowed_job_path, with_allowed_files
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.job.record import JobRecord
from chunkq.job.tasks import Task
from chunkq.job.user_code import load_blend_weights
from chunkq.plan.plan import Chunk, Plan
from chunkq_worker.batching import Batcher, Halos
from chunkq_worker.child_env import THREADS_VARIABLE
from chunkq_worker.chunk_pipeline import ChunkPipeline, Finish, HostPipeline
from chunkq_worker.frameworks import framework_rule
from chunkq_worker.runtimes.base import Runtime, load_runtime
from chunkq_worker.steps import Steps

ENGINES_CACHED = 2
"""Engines, and with them loaded networks, that a process keeps at most."""
T = TypeVar("T")


class InferenceEngine:
    """A loaded network with the blend weights and buffers of one plan.

    Call it from the device thread only: math libraries create one thread pool per calling thread.
    """

    def __init__(self, record: JobRecord, plan: Plan) -> None:
        """Load the network; raise ModelError or JobError if the job cannot use it."""
        if changed := record.changed_files():
            raise ModelError(
                f"{', '.join(changed)}: the file has changed since the job was produced; restore "
                "it, or produce the job again with --overwrite"
            )
        share = os.environ.get(THREADS_VARIABLE, "")
        self._job = job = record.job
        threads = job.threads or (int(share) if share.isdecimal() else None)
        self._network_key = _network_key(record, plan)
        self._steps = Steps.load(job.model.processing_steps)
        self.runtime: Runtime = load_runtime(job.model, self._steps, threads)
        self._allocate(plan)

    def for_plan(self, plan: Plan) -> InferenceEngine:
        """Return an engine for the same job and another volume; both share the network."""
        other = copy(self)
        other._allocate(plan)
        return other

    def _allocate(self, plan: Plan) -> None:
        self.plan = plan
        self.batcher = Batcher(plan, self._job.model, self.runtime, self._steps, self._network_key)
        self.pipeline = self._create_pipeline(load_blend_weights(self._job.weight_function, plan))
        if not self.runtime.any_batch:  # preparing for one batch size is part of loading
            self.batcher.warm_up()

    def _create_pipeline(self, weights: Weights) -> ChunkPipeline:
        accelerator = self.runtime.accelerator
        if accelerator is None:
            patch_weights = PatchWeights(self.plan, weights, self.runtime.to_device)
            return HostPipeline(self.plan, self.runtime, self.batcher, patch_weights)
        from chunkq_worker.device_pipeline import DevicePipeline  # imports torch

        return DevicePipeline(self.plan, self.runtime, self.batcher, weights, accelerator)

    def compute(self, chunk: Chunk, halos: Halos) -> Contribution:
        """Run all patches of a chunk, wait for the results and return them.

        `halos` contain one array (*chunk.halo.shape) per input.
        """
        result = self.start(chunk, halos)()
        return self.check(chunk, halos) if result is None else result

    def start(self, chunk: Chunk, halos: Halos) -> Finish:
        """Compute a chunk; return a function that waits for its results.

        The device thread continues with the next chunk. If the function returns None, call `check`.
        """
        return self.pipeline.start(chunk, halos)

    def check(self, chunk: Chunk, halos: Halos) -> Contribution:
        """Compute a chunk and check each output; raise PredictionError for one that is not finite.

        Returns the results if all are finite.
        """
        result = self.pipeline.start(chunk, halos, checked=True)()
        if result is None:
            raise RuntimeError("a checked chunk returned no result")
        return result

    def close(self) -> None:
        """Release the network and the device's memory."""
        self.runtime.close()


class Device:
    """The single thread of this process that uses the device, with its loaded networks."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._engines: OrderedDict[str, InferenceEngine] = OrderedDict()
        self._borrowed: dict[str, InferenceEngine] = {}
        self._waiting: set[Task] = set()
        self._lock = threading.Lock()
        self._finished = 0.0

    def is_awaited_by(self, task: Task) -> bool:
        """Return whether a task waits for the device."""
        return task in self._waiting

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Run a function on the device thread."""
        return self._thread.submit(work)

    @contextmanager
    def compute_with(self, job: JobHandle, engine: InferenceEngine) -> Iterator[None]:
        """Use the caller's engine for a job inside the `with` block; the caller closes it."""
        self._borrowed[_job_key(job)] = engine
        try:
            yield
        finally:
            self._borrowed.pop(_job_key(job), None)

    def start(
        self, engine: Callable[[], InferenceEngine], chunk: Chunk, halos: Halos
    ) -> Future[Callable[[], Contribution]]:
        """Start a chunk on the device thread, where `engine` is called.

        The result is a function that waits for the chunk. Do not call it on the device thread.
        """
        return self.run(lambda: self._start(engine(), chunk, halos))

    def _start(
        self, engine: InferenceEngine, chunk: Chunk, halos: Halos
    ) -> Callable[[], Contribution]:
        finish = engine.start(chunk, halos)

        def finish_or_check() -> Contribution:
            result = finish()
            if result is None:
                result = self.run(lambda: engine.check(chunk, halos)).result()
            return result

        return finish_or_check

    def compute(self, item: ItemHandle, chunk: Chunk, halos: Halos) -> ComputedChunk:
        """Wait for the device and compute one chunk; raise the errors of the engine."""
        requested = time.time()
        task = item.task("infer", chunk.index)
        self._waiting.add(task)
        acquired = started = requested

        def start() -> Callable[[], Contribution]:
            nonlocal acquired, started
            acquired = time.time()
            self._waiting.discard(task)
            engine = self._engine(item)
            started = time.time()
            finish = self._start(engine, chunk, halos)
            framework_rule.record(item.job.record.job.model)
            return finish

        result = self.run(start).result()()
        load_seconds = started - acquired
        finished = time.time()
        with self._lock:  # chunks in flight at the same time share the device
            begun = max(started, min(self._finished, finished))
            self._finished = finished
        seconds = {
            "wait": begun - load_seconds - requested,
            "load": load_seconds,
            "compute": finished - begun,
        }
        return ComputedChunk(result, chunk.patches, seconds)

    def _engine(self, item: ItemHandle) -> InferenceEngine:
        job, plan = item.job, item.plan
        key = _job_key(job)
        engine = self._borrowed.get(key) or self._engines.get(key)
        if engine is None:
            framework_rule.check(job.record.job.model)
            while len(self._engines) >= ENGINES_CACHED:
                self._engines.popitem(last=False)[1].close()
            accepted = with_allowed_files(job.record.job, job.folder.path)
            engine = InferenceEngine(replace(job.record, job=accepted), plan)
        elif engine.plan != plan:  # another item of the job
            engine = engine.for_plan(plan)
        if key in self._borrowed:
            self._borrowed[key] = engine
        else:
            self._engines[key] = engine
            self._engines.move_to_end(key)
        return engine


def _network_key(record: JobRecord, plan: Plan) -> Hashable:
    """Return a key that is equal for networks whose batches need the same memory."""
    model = record.job.model.model_copy(update={"max_batch_size": 1})
    return model, plan.volume.inputs, tuple(sorted(record.file_hashes.items()))


def _job_key(job: JobHandle) -> str:
    return f"{job.folder.path} {job.record.digest}"


@dataclass(frozen=True, slots=True)
class ComputedChunk:
    """A chunk's contribution, the number of patches computed, and seconds per stage.

    `wait` is the time until the device was free, `load` the time to load the network (first
    chunk of a job), and `compute` the time on the device, without that of other chunks.
    """

    contribution: Contribution
    patches: int
    seconds: dict[str, float]


_device: Device | None = None
_lock = threading.Lock()


def waits_for_device(task: Task) -> bool:
    """Return whether a task of this process waits for the device while others are computed."""
    try:
        accepted_task = replace(
            task, job=allowed_job_path(task.job)
        )  # the path that `run_task` uses
    except JobError:
        return False
    return _device is not None and _device.is_awaited_by(accepted_task)


def get_device(create: Callable[[], Device] = Device) -> Device:
    """Return the device of this process; create it at the first call."""
    global _device  # noqa: PLW0603 - there is exactly one device per process
    with _lock:
        if _device is None:
            _device = create()
        return _device
