"""Interface of a stage: one kind of task of a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

from chunkq.job.job_handle import ItemHandle
from chunkq.plan.chunk import Index
from chunkq.queue.contract.executor import Attempt


class TaskKey(NamedTuple):
    """A task of an item: the kind of its stage, and its chunk."""

    kind: str
    chunk: Index


Report = Callable[[str, int, int], None]
"""Receives what a task does, the number of finished steps, and how many there are."""


def not_reported(label: str, done: int, total: int) -> None:
    """Ignore the progress of a task."""


class Stage(ABC):
    """One kind of task: the tasks of each item, and for each task those that it waits for.

    The tasks of a queued stage are put on the queue by `enqueue`. A task of another stage runs in
    the worker that commits the last task that it waits for. If that worker is killed, the
    finalizer runs it.

    A stage that follows another one as a whole (`after`) is queued behind a gate, which opens when
    every task of that stage has a commit record.

    The results of a temporary stage serve the stage that follows it, and are deleted when the job
    is sealed. Its tasks are complete once those of the stage that follows it are.

    The tasks of a final stage wait for all tasks of the job but those of its own stage. The
    finalizer runs them.

    Tasks of a layered stage can wait for tasks of the same stage.

    A display of progress names its tasks by `label` while the finalizer runs them.

    A task writes its results, then its commit record. Running it again writes the same bytes.
    """

    kind: ClassVar[str]
    label: ClassVar[str] = "finalizing blocks"
    is_queued: ClassVar[bool] = False
    is_temporary: ClassVar[bool] = False
    is_final: ClassVar[bool] = False
    is_layered: ClassVar[bool] = False
    after: ClassVar[str | None] = None

    @abstractmethod
    def chunks(self, item: ItemHandle) -> Iterator[Index]:
        """Yield the chunks of the stage's tasks of an item, in a fixed order."""

    @abstractmethod
    def count(self, item: ItemHandle) -> int:
        """Return the number of the stage's tasks of an item, without enumerating them."""

    def waits_for(self, item: ItemHandle, chunk: Index) -> Sequence[TaskKey]:
        """Return the tasks of the item that must be committed before this one, in a fixed order."""
        return ()

    def awaiting(self, item: ItemHandle, committed: TaskKey) -> Sequence[Index]:
        """Return the chunks of the stage's tasks that wait for a task; inverse of `waits_for`."""
        return ()

    def needs_again(self, item: ItemHandle, chunk: Index) -> Sequence[TaskKey]:
        """Return the tasks that must run again before this task can run again.

        By default all that it waits for, because their results are deleted once it is committed.
        A stage that reads results that remain, such as voxels of the output, overrides this.
        """
        return self.waits_for(item, chunk)

    def stored_objects(self, item: ItemHandle, chunk: Index) -> Iterator[str]:
        """Yield the names in the output of the objects that a task writes, in a fixed order.

        `Commit.stored` has their checksums. Arrays have the names that they have while the job
        runs. No other task writes one of these objects.
        """
        return iter(())

    @abstractmethod
    def run(self, item: ItemHandle, chunk: Index, attempt: Attempt) -> bool:
        """Run one task and commit it; return whether the network ran.

        All tasks that it waits for are committed. Thread-safe.
        """

    def run_with_progress(
        self, item: ItemHandle, chunk: Index, attempt: Attempt, report: Report
    ) -> None:
        """Run one task like `run`, and report its progress if it takes long."""
        self.run(item, chunk, attempt)
