"""Repair an output: restore its documents, and make the tasks of damaged objects run again."""

from __future__ import annotations

from dataclasses import dataclass

from chunkq.job.job_folder import RECORD
from chunkq.job.job_handle import JobHandle
from chunkq.stages.base import TaskKey
from chunkq.stages.registry import stage_of, stages
from chunkq.storage.objects import ObjectFolder
from chunkq.verify import Task, Verification


@dataclass(frozen=True)
class Repair:
    """What was repaired, and the tasks that have to run again.

    `chunks` are those of queued stages, which workers run. `others` follow in the worker that
    commits the last of these, or in the finalizer.
    """

    documents: tuple[str, ...]
    foreign: tuple[str, ...]
    chunks: tuple[Task, ...]
    others: tuple[Task, ...]


def tasks_to_run(job: JobHandle, damaged: list[Task]) -> list[Task]:
    """Return damaged tasks and those that they need, in the order in which their records go.

    A task comes before those that it needs: a task whose record is gone is run again, and finds
    out by itself if one of these is missing.
    """
    order = {stage.kind: number for number, stage in enumerate(stages())}
    tasks = dict.fromkeys(damaged)
    if job.ledger.is_sealed() and any(stage_of(key.kind).is_final for _, key in damaged):
        # A file is made of the whole output, which is deleted when the job is sealed.
        tasks |= dict.fromkeys(
            (item.number, TaskKey(stage.kind, chunk))
            for stage in stages()
            for item in job.items
            for chunk in stage.chunks(item)
        )
    pending = list(tasks)
    while pending:
        number, (kind, chunk) = pending.pop()
        for key in stage_of(kind).needs_again(job.items[number], chunk):
            if (number, key) not in tasks:
                tasks[number, key] = None
                pending.append((number, key))
    return sorted(tasks, key=lambda task: (-order[task[1].kind], task))


def planned_repair(job: JobHandle, verification: Verification) -> Repair:
    """Return what `repair_output` does."""
    tasks = tasks_to_run(job, verification.damaged_tasks)
    return Repair(
        tuple(document.name for document, _ in verification.documents),
        tuple(verification.foreign),
        tuple(task for task in tasks if stage_of(task[1].kind).is_queued),
        tuple(task for task in tasks if not stage_of(task[1].kind).is_queued),
    )


def repair_output(job: JobHandle, verification: Verification) -> Repair:
    """Restore documents, delete foreign objects, and make damaged tasks run again.

    If tasks have to run again, the output is not sealed anymore: its arrays have the names that
    they have while a job runs, and its metadata say that it is incomplete. Damaged objects stay
    until they are written again. Can be repeated after an interruption.

    Raises ChunkReadError, before anything is changed, if an input is missing or was replaced, and
    JobError if another process changes the job.
    """
    repair = planned_repair(job, verification)
    tasks = [*repair.others, *repair.chunks]
    if tasks:
        job.check_inputs()
    objects = ObjectFolder(job.output.path)
    with job.folder.claim(job.folder.objects.get(RECORD)):
        job.check_unchanged()
        for document, _ in verification.documents:
            content = objects.get(document.name)
            objects.put(document.name, document.repaired(content).encode())
        for name in repair.foreign:
            objects.delete(name)
        for problem in verification.problems:
            is_file = problem.task is not None and stage_of(problem.task[1].kind).is_final
            if problem.damage == "missing" and problem.name and not is_file:
                objects.delete_folder(problem.name)  # a folder in the place of an object
        if tasks:
            job.ledger.unseal()
            job.output.unseal()
            job.output.mark_incomplete(check_unchanged=job.check_unchanged)
        for number, key in tasks:
            job.items[number].ledger.delete_commits(key.kind, [key.chunk])
    return repair
