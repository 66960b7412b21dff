"""Verify an output: compare every stored object with its checksum, and every document."""

from __future__ import annotations

import errno
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from chunkq.job.events import Sink, StageProgress, ignore
from chunkq.job.exported_output import ExportedOutput, first_item
from chunkq.job.image_output import StoredArray
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.job.ledger import BATCH_SIZE
from chunkq.job.object_checksums import decode_checksums, encode_checksums
from chunkq.job.output_documents import Damage, WrittenDocument
from chunkq.job.output_layouts import ARRAY_DOCUMENTS
from chunkq.job.task_records import EXPORT, Commit
from chunkq.plan.chunk import Index
from chunkq.stages.base import Stage, TaskKey
from chunkq.stages.registry import stages
from chunkq.storage.checksums import NOT_STORED, object_checksum
from chunkq.storage.objects import ObjectFolder

PROGRESS_STAGE = "verifying the output"
READERS = 16
"""Tasks whose objects are read concurrently, if they fit into `READER_BYTES`."""
READER_BYTES = 1 << 30
"""Limit of the bytes of objects of a bucket that are in memory."""
MAX_ITEMSIZE = 8
UNREADABLE = frozenset({errno.EIO, errno.EILSEQ, errno.ENODATA, getattr(errno, "EUCLEAN", 0)})
"""Errors of a disk that cannot read back what was written."""

Task = tuple[int, TaskKey]
"""Number of an item, and a task of it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with an object of the output, or with the commit record of a task.

    `name` is the present name of the object in the output, empty for a commit record. The objects
    of a task are made again by `task`. A `foreign` object was not written by the job.
    """

    name: str
    damage: Damage | Literal["foreign", "unreadable"]
    task: Task | None = None


@dataclass(frozen=True)
class Verification:
    """What is wrong with an output.

    objects     number of objects that were compared with their checksums
    bytes       their size
    pending     names of the tasks of an unfinished job that are not committed
    unverified  names of the tasks whose commit records have no checksums of objects
    problems    objects, and commit records of tasks
    documents   metadata documents that are missing or changed
    """

    is_sealed: bool
    objects: int
    bytes: int
    pending: tuple[str, ...]
    unverified: tuple[str, ...]
    problems: tuple[Problem, ...]
    documents: tuple[tuple[WrittenDocument, Damage], ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong with what is stored; the job can be unfinished."""
        return not (self.problems or self.documents or self.unverified)

    @property
    def damaged_tasks(self) -> list[Task]:
        """The tasks whose objects or commit record are damaged, each once."""
        return list(dict.fromkeys(p.task for p in self.problems if p.task is not None))

    @property
    def foreign(self) -> list[str]:
        """The names of the objects that the job did not write."""
        return [problem.name for problem in self.problems if problem.damage == "foreign"]


def verify_job(job: JobHandle, emit: Sink = ignore) -> Verification:
    """Read every object of an output and compare it with its checksum.

    Tasks without a commit record are not verified; in a sealed output each of these is a problem.
    Changes nothing. Raises OSError if the storage fails.
    """
    check = _Check(job, emit)
    is_sealed = job.ledger.is_sealed()
    for stage in check.stages:
        for item in job.items:
            check.verify_tasks(stage, item, is_sealed=is_sealed)
    check.verify_files(is_sealed=is_sealed)
    check.find_foreign()
    state = "complete" if is_sealed else "incomplete"
    return Verification(
        is_sealed,
        check.objects,
        check.bytes,
        tuple(check.pending),
        tuple(check.unverified),
        tuple(check.problems),
        tuple(damaged_documents(job, state)),
    )


def task_name(job: JobHandle, task: Task) -> str:
    """Return the name of a task for messages: its kind, and the name of its chunk."""
    item, (kind, chunk) = task
    return f"{kind} {job.chunk_name(item, chunk)}"


def damaged_documents(job: JobHandle, state: str) -> Iterator[tuple[WrittenDocument, Damage]]:
    """Yield the metadata documents that an output in this state must have and that differ."""
    objects = ObjectFolder(job.output.path)
    for document in job.output.documents(state):
        if (damage := document.damage(objects.get(document.name))) is not None:
            yield document, damage


@dataclass(frozen=True)
class _TaskResult:
    """The objects of one task, or None for the checksums if its record has none."""

    names: Sequence[str]
    checksums: Sequence[int] | None
    problems: Sequence[Problem]
    bytes: int


@dataclass
class _Check:
    """The state of a verification. `used` has the objects of each array that may exist."""

    job: JobHandle
    emit: Sink
    objects: int = 0
    bytes: int = 0
    done: int = 0
    pending: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._arrays = self.job.output.arrays
        self._used: list[npt.NDArray[np.bool_]] = [
            np.zeros(array.grid.counts, np.bool_) for array in self._arrays
        ]
        self._numbers = {array.running: number for number, array in enumerate(self._arrays)}
        self._folder = ObjectFolder(self.job.output.path)
        largest = max((_object_bytes(array) for array in self._arrays), default=1)
        self._readers = max(1, min(READERS, READER_BYTES // largest))
        output = self.job.output
        self._files = output.files if isinstance(output, ExportedOutput) else ()
        # The store of files is deleted when they are complete.
        is_deleted = bool(self._files) and self.job.ledger.is_sealed()
        self.stages = [s for s in stages() if not (s.is_temporary or s.is_final or is_deleted)]
        counts = (stage.count(item) for stage in self.stages for item in self.job.items)
        self._total = sum(counts) + len(self._files)
        self._progress(0)

    def verify_tasks(self, stage: Stage, item: ItemHandle, *, is_sealed: bool) -> None:
        """Verify the objects of the tasks of a stage."""
        recorded = item.ledger.committed(stage.kind)
        valid = set[Index]()
        with ThreadPoolExecutor(self._readers) as pool:

            def start(commit: Commit) -> Future[_TaskResult]:
                return pool.submit(self._verify_task, stage, item, commit)

            for commit, result in _pipelined(start, _commits(item, stage, recorded), self._readers):
                valid.add(commit.chunk)
                self._add(item, commit, result)
        for chunk in stage.chunks(item):
            if chunk in valid:
                continue
            key = TaskKey(stage.kind, chunk)
            self._use(stage.stored_objects(item, chunk))
            if chunk in recorded:
                self.problems.append(Problem("", "damaged", (item.number, key)))
            elif is_sealed:
                self.problems.append(Problem("", "missing", (item.number, key)))
            else:
                self.pending.append(task_name(self.job, (item.number, key)))
            self._progress(1)

    def _verify_task(self, stage: Stage, item: ItemHandle, commit: Commit) -> _TaskResult:
        """Compare the objects of one task with the checksums of its commit record."""
        names = list(stage.stored_objects(item, commit.chunk))
        task = (item.number, TaskKey(commit.kind, commit.chunk))
        if commit.stored is None:
            return _TaskResult(names, None, (), 0)
        try:
            checksums = decode_checksums(commit.stored, len(names))
        except ValueError:
            return _TaskResult(names, None, [Problem("", "damaged", task)], 0)
        problems, size = [], 0
        for name, checksum in zip(names, checksums, strict=True):
            if checksum == NOT_STORED:
                continue
            present = self._present_name(name)
            try:
                fingerprint = self._folder.fingerprint(present)
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
                problems.append(Problem(present, "unreadable", task))
                continue
            if fingerprint is None:
                problems.append(Problem(present, "missing", task))
                continue
            size += fingerprint.size
            if object_checksum(fingerprint.crc32) != checksum:
                problems.append(Problem(present, "damaged", task))
        return _TaskResult(names, checksums, problems, size)

    def _add(self, item: ItemHandle, commit: Commit, result: _TaskResult) -> None:
        self.problems += result.problems
        self.bytes += result.bytes
        if result.checksums is None:
            self._use(result.names)
            if not result.problems:
                key = TaskKey(commit.kind, commit.chunk)
                self.unverified.append(task_name(self.job, (item.number, key)))
        else:
            self.objects += len(result.names)
            self._use(
                name
                for name, checksum in zip(result.names, result.checksums, strict=True)
                if checksum != NOT_STORED
            )
        self._progress(1)

    def verify_files(self, *, is_sealed: bool) -> None:
        """Compare the files of a job, whose output is not Zarr, with their checksums."""
        for file in self._files:
            item = self.job.items[first_item(self.job.record, file)]
            task = (item.number, TaskKey(EXPORT, (file.number,)))
            folder, _, name = file.path.rpartition("/")
            commits = item.ledger.commits(EXPORT, [(file.number,)])
            self._progress(1)
            if not commits:
                if is_sealed:
                    self.problems.append(Problem("", "missing", task))
                else:
                    self.pending.append(task_name(self.job, task))
                continue
            fingerprint = ObjectFolder(folder).fingerprint(name)
            self.objects += 1
            if fingerprint is None:
                self.problems.append(Problem(name, "missing", task))
                continue
            self.bytes += fingerprint.size
            if encode_checksums([object_checksum(fingerprint.crc32)]) != commits[0].stored:
                self.problems.append(Problem(name, "damaged", task))

    def find_foreign(self) -> None:
        """Find the objects in the folders of the arrays that no task has written."""
        for array, used in zip(self._arrays, self._used, strict=True):
            for name in ObjectFolder(f"{self.job.output.path}/{array.folder}").names():
                if name in ARRAY_DOCUMENTS:
                    continue
                index = array.grid.index_of(name)
                if index is None or not used[index]:
                    self.problems.append(Problem(f"{array.folder}/{name}", "foreign"))

    def _use(self, names: Iterable[str]) -> None:
        """Mark objects that may exist."""
        for name in names:
            number, key = self._split(name)
            if number is not None and (index := self._arrays[number].grid.index_of(key)):
                self._used[number][index] = True

    def _present_name(self, name: str) -> str:
        """Return the present name of an object that has this name while the job runs."""
        number, key = self._split(name)
        return name if number is None else f"{self._arrays[number].folder}/{key}"

    def _split(self, name: str) -> tuple[int | None, str]:
        """Return the number of the array of an object and its name there; None outside of them."""
        end = name.find("/")
        while end >= 0:
            if (number := self._numbers.get(name[:end])) is not None:
                return number, name[end + 1 :]
            end = name.find("/", end + 1)
        return None, name

    def _progress(self, done: int) -> None:
        self.done += done
        self.emit(StageProgress(PROGRESS_STAGE, self.done, self._total))


def _commits(item: ItemHandle, stage: Stage, recorded: Iterable[Index]) -> Iterator[Commit]:
    """Yield the valid ones of the commit records of these chunks, read in batches."""
    chunks = iter(recorded)
    while batch := list(islice(chunks, BATCH_SIZE)):
        yield from item.ledger.commits(stage.kind, batch)


def _pipelined(
    start: Callable[[Commit], Future[_TaskResult]], commits: Iterable[Commit], depth: int
) -> Iterator[tuple[Commit, _TaskResult]]:
    """Yield the results of the commits in order, while `depth` more are in flight."""
    in_flight: deque[tuple[Commit, Future[_TaskResult]]] = deque()
    try:
        for commit in commits:
            in_flight.append((commit, start(commit)))
            if len(in_flight) > depth:
                first, future = in_flight.popleft()
                yield first, future.result()
        while in_flight:
            first, future = in_flight.popleft()
            yield first, future.result()
    finally:
        for _, future in in_flight:
            future.cancel()


def _object_bytes(array: StoredArray) -> int:
    """Return the largest size (bytes) of an object of an array before compression."""
    return math.prod(array.grid.chunk) * MAX_ITEMSIZE
