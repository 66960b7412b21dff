"""`chunkq verify`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import click

from chunkq.enqueue import enqueue
from chunkq.job.job_handle import JobHandle
from chunkq.job.tasks import chunk_count
from chunkq.paths import without_secret
from chunkq.progress_bar import ProgressDisplay
from chunkq.repair import Repair, planned_repair, repair_output
from chunkq.system.standard_output import print_line, print_text
from chunkq.terminal import argument
from chunkq.units import duration, si
from chunkq.verify import Task, Verification, task_name, verify_job
from chunkq_producer.commands.options import (
    job_at,
    json_option,
    output_argument,
    queue_of,
    queue_option,
)

LINES_SHOWN = 20
DAMAGED, INCOMPLETE = 1, 3
"""Exit codes: something is wrong with what is stored; the job is not finished."""


@click.command()
@output_argument
@click.option(
    "--repair", is_flag=True,
    help="Restore metadata, delete foreign objects, queue what must be computed again.",
)  # fmt: skip
@queue_option
@json_option
@click.pass_context
def verify(
    context: click.Context, output: str, repair: bool, queue: str | None, as_json: bool
) -> None:
    """Compare every stored object of OUTPUT, such as labels.zarr, with its checksum.

    The exit code is 0 if the output is complete and sound, 1 if it is damaged, and 3 if it is
    sound but not complete. After --repair it is 0; `chunkq work` and `chunkq finalize` then
    complete the output again.
    """
    job, started = job_at(output), time.monotonic()
    with ProgressDisplay() as display:
        verification = verify_job(job, display)
        report = Report(job, verification, time.monotonic() - started)
        if repair and not verification.is_sound:
            report.repair(queue, display)
    if as_json:
        print_line(json.dumps(report.as_dict(), indent=1))
    else:
        report.print()
    context.exit(report.exit_code)


class Report:
    """What `chunkq verify` prints: what is wrong with an output, and what was repaired."""

    def __init__(self, job: JobHandle, verification: Verification, seconds: float) -> None:
        self._job, self._verification, self._seconds = job, verification, seconds
        self._plan, self._is_repaired, self._queued = planned_repair(job, verification), False, 0

    def repair(self, queue: str | None, display: ProgressDisplay) -> None:
        """Repair the output, and queue the chunks that must be computed again."""
        if not self._plan.chunks:
            repair_output(self._job, self._verification)
        else:
            # The queue is opened first: without one, nothing is changed.
            with queue_of(queue, self._job.record.job.queue) as executor:
                executor.check_ready()
                repair_output(self._job, self._verification)
                self._queued = enqueue(self._job, executor, emit=display).queued
        self._is_repaired = True

    @property
    def exit_code(self) -> int:
        """The exit code of the command."""
        if self._is_repaired:
            return 0
        if not self._verification.is_sound:
            return DAMAGED
        return 0 if self._verification.is_sealed else INCOMPLETE

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
        found, plan = self._verification, self._plan
        return {
            "output": without_secret(self._job.folder.output),
            "state": self.state,
            "objects": found.objects,
            "bytes": found.bytes,
            "seconds": round(self._seconds, 3),
            "damaged": [
                {
                    "object": problem.name or None,
                    "damage": problem.damage,
                    "task": problem.task and task_name(self._job, problem.task),
                }
                for problem in found.problems
            ],
            "documents": {document.name: damage for document, damage in found.documents},
            "pending": list(found.pending),
            "unverified": list(found.unverified),
            "chunks": self._names(plan.chunks),
            "others": [task_name(self._job, task) for task in plan.others],
            "queued": self._queued,
        }

    def print(self) -> None:
        """Print the report."""
        found, output = self._verification, without_secret(self._job.folder.output)
        size = f"{found.objects} objects, {si(found.bytes, 'B')}, {duration(self._seconds)}"
        print_text(f"{self.state}: {output} ({size})")
        self._print_damages()
        quoted = argument(output)
        if self._is_repaired:
            self._print_repair(self._plan, quoted)
        elif not found.is_sound:
            self._print_advice(quoted)
        elif not found.is_sealed:
            missing = chunk_count(len(found.pending))
            print_text(
                f"not computed yet: {missing}; next: chunkq work"
                if found.pending
                else f"next: chunkq finalize {quoted}"
            )

    def _print_damages(self) -> None:
        found = self._verification
        lines = [f"{document.name}: {damage}" for document, damage in found.documents]
        for problem in found.problems:
            task = "" if problem.task is None else task_name(self._job, problem.task)
            name = problem.name or f"commit record of {task}"
            source = f" ({task})" if problem.name and task else ""
            lines.append(f"{name}: {problem.damage}{source}")
        for line in lines[:LINES_SHOWN]:
            print_text(f"  {line}")
        if len(lines) > LINES_SHOWN:
            print_text(f"  and {len(lines) - LINES_SHOWN} more (see --json)")
        if found.unverified:
            print_text(
                f"without checksums: {len(found.unverified)} tasks, which an earlier version of "
                "chunkq has run; they cannot be verified"
            )

    def _print_advice(self, output: str) -> None:
        plan = self._plan
        if plan.chunks:
            names = self._names(plan.chunks)
            shown = ", ".join(names[:LINES_SHOWN])
            more = f" and {len(names) - LINES_SHOWN} more" if len(names) > LINES_SHOWN else ""
            print_text(f"to compute again: {chunk_count(len(names))} ({shown}{more})")
        if plan.chunks or plan.others or plan.documents or plan.foreign:
            print_text(f"next: chunkq verify {output} --repair")

    def _print_repair(self, plan: Repair, output: str) -> None:
        if plan.documents:
            print_text(f"restored: {len(plan.documents)} metadata documents")
        if plan.foreign:
            print_text(f"deleted: {len(plan.foreign)} foreign objects")
        if plan.chunks:
            print_text(f"queued: {chunk_count(self._queued)}; the output is incomplete until then")
            print_text(f"next: chunkq work, then chunkq finalize {output}")
        elif plan.others or not self._verification.is_sealed:
            print_text(f"next: chunkq finalize {output}")

    def _names(self, tasks: Sequence[Task]) -> list[str]:
        return [self._job.chunk_name(item, key.chunk) for item, key in tasks]
