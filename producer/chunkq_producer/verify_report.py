"""What is wrong with an output and what was repaired, as text and as JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from chunkq.enqueue import enqueue
from chunkq.job.events import Sink
from chunkq.job.job_handle import JobHandle
from chunkq.job.tasks import chunk_count
from chunkq.paths import without_secret
from chunkq.queue.contract.executor import Executor
from chunkq.queue.registry import queue_url
from chunkq.repair import planned_repair, repair_output
from chunkq.terminal import argument
from chunkq.units import seconds, si
from chunkq.verify import Task, Verification, task_name

LINES_SHOWN = 20
DAMAGED, INCOMPLETE = 1, 3
"""Exit codes: something is wrong with what is stored; the job is not finished."""


class VerifyReport:
    """The result of `verify_job`, and of a repair."""

    def __init__(self, job: JobHandle, verification: Verification, duration: float) -> None:
        self._job, self._verification, self._duration = job, verification, duration
        self._plan = planned_repair(job, verification)
        self._is_repaired, self._queued, self._work = False, 0, "work"

    @property
    def needs_queue(self) -> bool:
        """Whether chunks must be computed again."""
        return bool(self._plan.chunks)

    def repair(self, executor: Executor | None, emit: Sink) -> None:
        """Repair the output unless it is sound, and queue the chunks that must be computed again.

        `executor` is the queue if `needs_queue`. Raises the errors of `repair_output`.
        """
        if self._verification.is_sound:
            return
        repair_output(self._job, self._verification)
        if executor is not None:
            self._queued = enqueue(self._job, executor, emit=emit).queued
            if executor.url != queue_url(None):
                self._work = f"work --queue {argument(without_secret(executor.url))}"
        self._is_repaired = True

    @property
    def exit_code(self) -> int:
        """The exit code of the command."""
        return {"damaged": DAMAGED, "incomplete": INCOMPLETE}.get(self.state, 0)

    @property
    def state(self) -> str:
        """`sound`, `incomplete`, `damaged`, or `repaired`."""
        if self._is_repaired:
            return "repaired"
        if not self._verification.is_sound:
            return "damaged"
        return "sound" if self._verification.is_sealed else "incomplete"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        verification, plan = self._verification, self._plan
        return {
            "output": without_secret(self._job.folder.output),
            "state": self.state,
            "objects": verification.objects,
            "bytes": verification.bytes,
            "seconds": round(self._duration, 3),
            "damaged": [
                {
                    "object": problem.name or None,
                    "damage": problem.damage,
                    "task": problem.task and task_name(self._job, problem.task),
                }
                for problem in verification.problems
            ],
            "documents": {document.name: damage for document, damage in verification.documents},
            "pending": list(verification.pending),
            "unverified": list(verification.unverified),
            "chunks": self._names(plan.chunks),
            "others": [task_name(self._job, task) for task in plan.others],
            "queued": self._queued,
        }

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        verification, output = self._verification, without_secret(self._job.folder.output)
        objects = _count(verification.objects, "object")
        size = f"{objects}, {si(verification.bytes, 'B')}, {seconds(self._duration)}"
        yield f"{self.state}: {output} ({size})"
        yield from self._damages()
        quoted = argument(output)
        if self._is_repaired:
            yield from self._repairs(quoted)
        elif not verification.is_sound:
            yield from self._advice(quoted)
        elif verification.pending:
            tasks = _count(len(verification.pending), "task")
            yield f"not computed yet: {tasks}; next: chunkq work"
        elif not verification.is_sealed:
            yield f"next: chunkq finalize {quoted}"

    def _damages(self) -> Iterator[str]:
        verification = self._verification
        lines = [f"{document.name}: {damage}" for document, damage in verification.documents]
        for problem in verification.problems:
            task = "" if problem.task is None else task_name(self._job, problem.task)
            name = problem.name or f"commit record of {task}"
            source = f" ({task})" if problem.name and task else ""
            lines.append(f"{name}: {problem.damage}{source}")
        yield from (f"  {line}" for line in lines[:LINES_SHOWN])
        if len(lines) > LINES_SHOWN:
            yield f"  and {len(lines) - LINES_SHOWN} more (see --json)"
        if verification.unverified:
            count = _count(len(verification.unverified), "task")
            yield f"without checksums, from an earlier version of chunkq: {count}"

    def _advice(self, output: str) -> Iterator[str]:
        plan = self._plan
        if plan.chunks:
            names = self._names(plan.chunks)
            first = ", ".join(names[:LINES_SHOWN])
            more = f" and {len(names) - LINES_SHOWN} more" if len(names) > LINES_SHOWN else ""
            yield f"to compute again: {chunk_count(len(names))} ({first}{more})"
        if plan.chunks or plan.others or plan.documents or plan.foreign:
            yield f"next: chunkq verify {output} --repair"

    def _repairs(self, output: str) -> Iterator[str]:
        plan = self._plan
        if plan.documents:
            yield f"restored: {_count(len(plan.documents), 'metadata document')}"
        if plan.foreign:
            yield f"deleted: {_count(len(plan.foreign), 'foreign object')}"
        if plan.chunks:
            yield f"queued: {chunk_count(len(plan.chunks))}; the output is incomplete until then"
            yield f"next: chunkq {self._work}, then chunkq finalize {output}"
        elif plan.others or not self._verification.is_sealed:
            yield f"next: chunkq finalize {output}"

    def _names(self, tasks: Sequence[Task]) -> list[str]:
        return [self._job.chunk_name(item, key.chunk) for item, key in tasks]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
