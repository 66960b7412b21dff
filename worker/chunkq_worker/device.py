"""The single thread of this process that uses the device, and the networks loaded there."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from chunkq.blend.sums import Contribution
from chunkq.errors import JobError
from chunkq.job.allowed_paths import allowed_job_path, with_allowed_files
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.job.job_path import job_folder_of
from chunkq.job.record import JobRecord
from chunkq.job.tasks import Task
from chunkq.plan.chunk import Chunk, Index
from chunkq.plan.patch_selection import PatchSelection
from chunkq.plan.plan import Plan
from chunkq_worker.batching import Halos
from chunkq_worker.cancellation import stopped_by
from chunkq_worker.frameworks import framework_rule
from chunkq_worker.inference_engine import ENGINES_CACHED, InferenceEngine
from chunkq_worker.loading import loading
from chunkq_worker.value_watch import ChunkWatch, ValueWatch

if TYPE_CHECKING:
    from chunkq_worker.images.engine import Heads, ImageEngine
    from chunkq_worker.images.rows import Values

T = TypeVar("T")
E = TypeVar("E", InferenceEngine, "ImageEngine")


class Device:
    """The single thread of this process that uses the device, with its loaded networks."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._engines: OrderedDict[str, InferenceEngine | ImageEngine] = OrderedDict()
        self._borrowed: dict[str, InferenceEngine] = {}
        self._watches: dict[str, ChunkWatch] = {}
        self._waiting: set[Task] = set()
        self._lock = threading.Lock()
        self._finished = 0.0

    def is_awaited_by(self, task: Task) -> bool:
        """Return whether a task waits for the device."""
        return task in self._waiting

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Run a function on the device thread."""
        return self._thread.submit(work)

    def load(self, record: JobRecord) -> Future[InferenceEngine]:
        """Load the network of a job, which need not exist yet, for its largest item.

        The engine is kept for the chunks of the job. The error is JobError if this worker does not
        accept the job.
        """
        folder = job_folder_of(record.job.output)
        return self.run(lambda: self._load(allowed_job_path(folder), record, record.plan()))

    def load_images(self, record: JobRecord) -> Future[ImageEngine]:
        """Load the network of a job over images like `load`."""
        folder = job_folder_of(record.job.output)
        return self.run(lambda: self._load_images(allowed_job_path(folder), record))

    def images(self, item: ItemHandle, chunk: Index) -> ImageSession:
        """Return the network of a job over images, for the batches of one chunk."""
        return ImageSession(self, item, chunk)

    def compute_images(
        self, item: ItemHandle, chunk: Index, batch: Sequence[Values]
    ) -> tuple[Heads, dict[str, float]]:
        """Wait for the device and run a batch of images; return the heads, and seconds per stage.

        The network is loaded if it is not, also between the batches of a chunk.
        """
        task, requested = item.task("infer", chunk), time.time()
        self._waiting.add(task)

        def run() -> tuple[Heads, dict[str, float]]:
            acquired = time.time()
            self._waiting.discard(task)
            engine = self._image_engine(item)
            started = time.time()
            heads = engine(batch)
            framework_rule.record(item.job.record.job.model)
            seconds = {
                "wait": acquired - requested,
                "load": started - acquired,
                "compute": time.time() - started,
            }
            return heads, seconds

        return self.run(run).result()

    def _image_engine(self, item: ItemHandle) -> ImageEngine:
        job = item.job
        key = _job_key(job.folder.path, job.record)
        engine = self._engines.get(key)
        if engine is None or isinstance(engine, InferenceEngine):
            engine = self._load_images(job.folder.path, job.record)
        self._engines.move_to_end(key)
        return engine

    def _load_images(self, folder: str, record: JobRecord) -> ImageEngine:
        from chunkq_worker.images.engine import ImageEngine  # imports an extra

        return self._loaded(folder, record, ImageEngine)

    @contextmanager
    def compute_with(
        self, job: JobHandle, engine: InferenceEngine, watch: ChunkWatch | None = None
    ) -> Iterator[None]:
        """Use the caller's engine for a job inside the `with` block; the caller closes it.

        `watch` gets the values of one of the chunks, if it is set.
        """
        key = _job_key(job.folder.path, job.record)
        self._borrowed[key] = engine
        if watch is not None:
            self._watches[key] = watch
        try:
            yield
        finally:
            self._borrowed.pop(key, None)
            self._watches.pop(key, None)

    def start(
        self,
        engine: Callable[[], InferenceEngine],
        chunk: Chunk,
        halos: Halos,
        selection: PatchSelection,
        stop: Event | None = None,
        watch: ValueWatch | None = None,
    ) -> Future[Callable[[], tuple[Contribution, ...]]]:
        """Start the selected patches of a chunk on the device thread, where `engine` is called.

        The result is a function that waits for the chunk. Do not call it on the device thread.
        The chunk is given up between two batches once `stop` is set. `watch` gets the values of its
        first batch.
        """
        return self.run(lambda: self._start(engine(), chunk, halos, selection, stop, watch))

    def _start(
        self,
        engine: InferenceEngine,
        chunk: Chunk,
        halos: Halos,
        selection: PatchSelection,
        stop: Event | None = None,
        watch: ValueWatch | None = None,
    ) -> Callable[[], tuple[Contribution, ...]]:
        def run_in_device_thread(run: Callable[[Chunk, Halos, PatchSelection], T]) -> T:
            with stopped_by(stop):
                return run(chunk, halos, selection)

        finish = run_in_device_thread(partial(engine.start, watch=watch))

        def finish_or_check() -> tuple[Contribution, ...]:
            result = finish()
            if result is None:
                result = self.run(lambda: run_in_device_thread(engine.check)).result()
            return result

        return finish_or_check

    def compute(
        self, item: ItemHandle, chunk: Chunk, halos: Halos, selection: PatchSelection
    ) -> ComputedChunk:
        """Wait for the device and run the selected patches of one chunk; raise engine errors."""
        requested = time.time()
        task = item.task("infer", chunk.index)
        self._waiting.add(task)
        acquired = started = requested

        def start() -> Callable[[], tuple[Contribution, ...]]:
            nonlocal acquired, started
            acquired = time.time()
            self._waiting.discard(task)
            engine = self._engine(item)
            started = time.time()
            watch = self._watches.get(_job_key(item.job.folder.path, item.job.record))
            value_watch = None if watch is None else watch.of(item.number, chunk)
            finish = self._start(engine, chunk, halos, selection, watch=value_watch)
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
        return ComputedChunk(result, len(selection.run), seconds)

    def _engine(self, item: ItemHandle) -> InferenceEngine:
        job, plan = item.job, item.plan
        key = _job_key(job.folder.path, job.record)
        engine = self._borrowed.get(key) or self._engines.get(key)
        if not isinstance(engine, InferenceEngine):
            engine = self._load(job.folder.path, job.record, plan)
        elif engine.plan != plan:  # another item of the job
            engine = engine.for_plan(plan)
        if key in self._borrowed:
            self._borrowed[key] = engine
        else:
            self._engines[key] = engine
            self._engines.move_to_end(key)
        return engine

    def _load(self, folder: str, record: JobRecord, plan: Plan) -> InferenceEngine:
        return self._loaded(folder, record, lambda accepted: InferenceEngine(accepted, plan))

    def _loaded(self, folder: str, record: JobRecord, create: Callable[[JobRecord], E]) -> E:
        """Load the network of a job with `create`, in the place of one that is not needed."""
        framework_rule.check(record.job.model)
        while len(self._engines) >= ENGINES_CACHED:
            self._engines.popitem(last=False)[1].close()
        accepted = with_allowed_files(record.job, folder)
        with loading():
            engine = create(replace(record, job=accepted))
        self._engines[_job_key(folder, record)] = engine
        return engine


class ImageSession:
    """The network of a job over images, for the batches of one chunk; a `Network` of rows.

    `seconds` are those of all batches, per stage.
    """

    def __init__(self, device: Device, item: ItemHandle, chunk: Index) -> None:
        self._device, self._item, self._chunk = device, item, chunk
        self.seconds = {"wait": 0.0, "load": 0.0, "compute": 0.0}

    def __call__(self, batch: Sequence[Values]) -> Heads:
        """Return what the network returns for images (C, h, w): (n, ...) per head."""
        heads, seconds = self._device.compute_images(self._item, self._chunk, batch)
        for stage, value in seconds.items():
            self.seconds[stage] += value
        return heads


def _job_key(folder: str, record: JobRecord) -> str:
    return f"{folder} {record.digest}"


@dataclass(frozen=True, slots=True)
class ComputedChunk:
    """A chunk's contributions, the number of patches computed, and seconds per stage.

    There is one contribution per output.
    `wait` is the time until the device was free, `load` the time to load the network (first
    chunk of a job), and `compute` the time on the device, without that of other chunks.
    """

    contributions: tuple[Contribution, ...]
    patches: int
    seconds: dict[str, float]


_device: Device | None = None


_lock = threading.Lock()


def waits_for_device(task: Task) -> bool:
    """Return whether a task of this process waits for the device while others are computed."""
    try:
        path = allowed_job_path(task.job)  # as in `run_task`
    except JobError:
        return False
    return _device is not None and _device.is_awaited_by(replace(task, job=path))


def get_device(create: Callable[[], Device] = Device) -> Device:
    """Return the device of this process; create it at the first call."""
    global _device  # noqa: PLW0603 - there is exactly one device per process
    with _lock:
        if _device is None:
            _device = create()
        return _device
