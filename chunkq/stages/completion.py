"""Progress of a job through its stages: which tasks are not committed, and which can run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from chunkq.errors import IncompleteError
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.job.task_records import Failure
from chunkq.job.tasks import Task, chunk_count
from chunkq.paths import without_secret
from chunkq.plan.chunk import Index
from chunkq.queue.contract.executor import Contribution, GateState
from chunkq.stages.base import Stage, TaskKey
from chunkq.stages.registry import stage_of, stages
from chunkq.terminal import argument

Pending = Sequence[tuple[ItemHandle, Index]]
"""Tasks of one stage: the item and the chunk of each."""
NAMES_SHOWN = 20


def uncommitted(item: ItemHandle, stage: Stage) -> list[Index]:
    """Return the chunks of a stage's tasks without a commit record.

    Makes one listing if the item has tasks of the stage.
    """
    if not stage.count(item):
        return []
    committed = item.ledger.committed(stage.kind)
    return [chunk for chunk in stage.chunks(item) if chunk not in committed]


@dataclass(frozen=True)
class JobCompletion:
    """The tasks of a job without a commit record, by kind of stage."""

    job: JobHandle
    pending: dict[str, Pending]

    def missing(self) -> Pending:
        """Return the tasks of queued stages, which workers have to run.

        Those of temporary stages are left out: none is needed unless other tasks are missing.
        """
        return [task for s in counted_stages() for task in self.pending[s.kind]]

    def without(self, stage: Stage, tasks: Pending) -> JobCompletion:
        """Return the progress after these tasks of a stage are committed."""
        done = {(item.number, chunk) for item, chunk in tasks}
        rest = [
            (item, chunk)
            for item, chunk in self.pending[stage.kind]
            if (item.number, chunk) not in done
        ]
        return JobCompletion(self.job, {**self.pending, stage.kind: rest})

    def ready(self, stage: Stage) -> Pending:
        """Return the tasks of a stage all of whose prerequisites are committed."""
        if stage.is_final:
            others = (tasks for kind, tasks in self.pending.items() if kind != stage.kind)
            return [] if any(others) else self.pending[stage.kind]
        absent = {
            (item.number, TaskKey(kind, chunk))
            for kind, tasks in self.pending.items()
            for item, chunk in tasks
            if stage.is_layered or kind != stage.kind
        }
        if not absent:
            return self.pending[stage.kind]
        return [
            (item, chunk)
            for item, chunk in self.pending[stage.kind]
            if not any((item.number, key) in absent for key in stage.waits_for(item, chunk))
        ]

    def complete(self, run: Callable[[Stage, Pending], Pending]) -> JobCompletion:
        """Run the tasks that no queue has, each once its prerequisites are committed.

        `run` runs tasks of one stage and returns those that succeeded. Return the progress after
        them. A task that failed is not run again.
        """
        completion, tried = self, set[tuple[int, TaskKey]]()
        while True:
            any_ready = False
            for stage in stages():
                if stage.is_queued:
                    continue
                keyed = {
                    (item.number, TaskKey(stage.kind, chunk)): (item, chunk)
                    for item, chunk in completion.ready(stage)
                }
                ready = [task for key, task in keyed.items() if key not in tried]
                if ready:
                    any_ready = True
                    tried.update(keyed)
                    completion = completion.without(stage, run(stage, ready))
            if not any_ready:
                return completion


def counted_stages() -> list[Stage]:
    """Return the queued stages whose tasks are the chunks that users count."""
    return [stage for stage in stages() if stage.is_queued and not stage.is_temporary]


def chunks_of(job: JobHandle) -> int:
    """Return the number of chunks of a job: the tasks of its counted stages."""
    return sum(stage.count(item) for stage in counted_stages() for item in job.items)


def job_completion(job: JobHandle) -> JobCompletion:
    """Compare the plans with the ledger. Makes one listing per item and stage."""
    pending: dict[str, Pending] = {
        stage.kind: [(item, chunk) for item in job.items for chunk in uncommitted(item, stage)]
        for stage in stages()
    }
    for stage in stages():
        is_needed = any(pending[later.kind] for later in stages() if later.after == stage.kind)
        if stage.is_temporary and not is_needed:
            pending[stage.kind] = []
    return JobCompletion(job, pending)


def check_completion(
    job: JobHandle, *, allow_missing: bool = False, rerun: str | None = None
) -> JobCompletion:
    """Return the progress of a job before it is finalized.

    Raises IncompleteError with the missing chunks, unless `allow_missing`. `rerun` is what computes
    them, failed ones too; by default the message names the commands for a queue.
    """
    completion = job_completion(job)
    missing = names_of(completion.missing())
    if missing and not allow_missing:
        verb = "is" if len(missing) == 1 else "are"
        raise IncompleteError(
            f"{chunk_count(len(missing))} {verb} not computed yet: {shortened(missing)}; "
            f"{_advice(job, missing, rerun)}",
            missing,
        )
    return completion


def _advice(job: JobHandle, missing: Collection[str], rerun: str | None) -> str:
    """Return what to do about missing chunks, some of which may have failed."""
    failed_tasks, counted = failures(job), {stage.kind for stage in counted_stages()}
    output = argument(without_secret(job.folder.output))
    remedy = f"run `chunkq status {output}` to see why, then " + (
        rerun or f"`chunkq retry {output}` and `chunkq work`"
    )
    if any(stage_of(failure.kind).is_temporary for failure in failed_tasks):
        return f"an input could not be staged; {remedy}"
    names = {job.chunk_name(f.item, f.chunk) for f in failed_tasks if f.kind in counted}
    failed = len(names & {*missing})
    if not failed:
        return rerun or "run `chunkq work`, or `chunkq run` again if the queue has none of them"
    return f"{failed} failed; {remedy}"


def failures(job: JobHandle) -> list[Failure]:
    """Return the last error of every task that failed and has not succeeded since."""
    kinds = [stage.kind for stage in stages()]
    return [failure for item in job.items for failure in item.ledger.failures(kinds)]


def names_of(tasks: Pending) -> list[str]:
    """Return the names of the tasks' chunks."""
    return [item.chunk_name(chunk) for item, chunk in tasks]


def shortened(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    text = ", ".join(names[:NAMES_SHOWN])
    return text + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def missing_prerequisites(item: ItemHandle, stage: Stage, chunk: Index) -> list[TaskKey]:
    """Return the tasks that a task waits for and that are not committed."""
    keys = stage.waits_for(item, chunk)
    return [key for key in keys if not item.ledger.is_committed(key.kind, key.chunk)]


def contributions(item: ItemHandle, committed: TaskKey) -> Iterator[Contribution]:
    """Yield the tasks that wait for a committed task, and its number among what they wait for."""
    for stage in stages():
        for chunk in stage.awaiting(item, committed):
            keys = list(stage.waits_for(item, chunk))
            task = item.task(stage.kind, chunk)
            yield Contribution(task, keys.index(committed), len(keys))


def has_gate(job: JobHandle, stage: Stage) -> bool:
    """Return whether the tasks of a stage can wait: the job has tasks of the stage before it."""
    before = stage.after
    return before is not None and any(stage_of(before).count(item) for item in job.items)


def gate_state(job: JobHandle, kind: str) -> GateState:
    """Return whether the tasks of a gated stage may start, judged by the commit records."""
    before = stage_of(kind).after
    if before is None:
        return GateState.OPEN
    stage = stage_of(before)
    is_complete = not any(uncommitted(item, stage) for item in job.items)
    if not is_complete and stage.is_temporary:
        is_complete = not any(uncommitted(item, stage_of(kind)) for item in job.items)
    return GateState.OPEN if is_complete else GateState.BLOCKED


def queued_tasks(job: JobHandle, stage: Stage) -> Iterator[Task]:
    """Yield the tasks of a stage without a commit record."""
    for item, chunk in job_completion(job).pending[stage.kind]:
        yield item.task(stage.kind, chunk)
