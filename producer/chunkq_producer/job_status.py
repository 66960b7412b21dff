"""What a job is doing: gathered in a few listings, shown on a screen or in a log."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from chunkq.errors import QueueError, cause
from chunkq.executors.base import Counts, Executor, WorkerName
from chunkq.job_handle import JobHandle
from chunkq.ledger import Failure, RecentCommits
from chunkq.paths import without_secret
from chunkq.tasks import chunk_name

FRESH_SECONDS = 60.0
"""So long after the last commit somebody may still be at work, on a queue not known here."""
RECENT_COMMITS = 64
"""Newest commit records looked into for speed and for what each worker's time went to."""
PATIENCE = 10
"""A look at a job may take one part in this many of the time between looks."""


@dataclass(frozen=True)
class WorkerState:
    """One worker: where it is, what it runs and, of its recent chunks, where the time went."""

    name: str
    host: str
    device: str
    running: tuple[str, ...]
    recent_chunks: int
    stage_shares: dict[str, float]
    device_wait_share: float | None
    last_seen: float | None


@dataclass(frozen=True)
class FailureGroup:
    """Chunks that failed with the same message, ignoring digits."""

    error: str
    message: str
    chunks: tuple[str, ...]
    traceback: str


@dataclass(frozen=True)
class JobStatus:
    """A job at one moment. Queue figures are None when the queue cannot be asked."""

    output: str
    chunks: int
    done: int
    running: int | None
    queued: int | None
    failed: int | None
    blocks_to_finalize: int
    blocks_finalized: int
    sealed: bool
    voxels_per_second: float | None
    seconds_left: float | None
    workers: tuple[WorkerState, ...]
    failures: tuple[FailureGroup, ...]
    queue_problem: str | None = None
    lost_from_queue: bool = False
    """Whether chunks are neither done nor failed nor on this queue, and nobody commits any."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def job_status(job: JobHandle, executor: Executor | None, problem: str | None = None) -> JobStatus:
    """Look at ledger and queue once. Raises OSError as the storage does."""
    folder, ledger, plan = job.folder, job.ledger, job.plan
    recent = ledger.recent_commits("infer", RECENT_COMMITS)
    done, finalized = recent.total, ledger.count("finalize")
    counts, running, lost = Counts(), [], []
    if executor is not None:
        try:
            counts = executor.counts(folder.path)
            running = executor.running(folder.path)
            lost = executor.failed(folder.path) if counts.failed else []
        except QueueError as error:
            executor, problem = None, str(error)
    rate = _chunks_per_second(recent)
    left = plan.costs.chunks - done
    voxels = prod(plan.volume.shape)
    failures = ledger.failures()
    known = {failure.chunk for failure in failures}
    vanished = [task.chunk for task in lost if task.chunk not in known]
    asked = executor is not None
    # A run on a cluster of its own works off a queue that is not this one.
    fresh = max((c.finished for c in recent.records), default=0.0) > time.time() - FRESH_SECONDS
    forgotten = asked and left > counts.queued + counts.running + counts.failed and not fresh
    return JobStatus(
        output=without_secret(folder.output),
        chunks=plan.costs.chunks,
        done=done,
        running=counts.running if asked else None,
        queued=counts.queued if asked else None,
        failed=counts.failed if asked else None,
        blocks_to_finalize=plan.costs.finalized_blocks,
        blocks_finalized=finalized,
        sealed=ledger.is_sealed() and job.output.is_sealed(),
        voxels_per_second=rate and rate * voxels / plan.costs.chunks,
        seconds_left=left / rate if rate and left and not forgotten else None,
        workers=_workers(running, recent),
        failures=_grouped(failures, vanished),
        queue_problem=problem,
        lost_from_queue=forgotten,
    )


class StatusPoller:
    """Looks at one job whenever it is called."""

    def __init__(
        self, job: JobHandle, executor: Executor | None, problem: str | None = None
    ) -> None:
        self._job, self._executor, self._problem = job, executor, problem
        self.seconds = 0.0

    def __call__(self) -> JobStatus:
        """Return the job's status now."""
        before = time.monotonic()
        found = job_status(self._job, self._executor, self._problem)
        self.seconds = time.monotonic() - before
        return found

    def pause(self, least: float) -> float:
        """Return how long to wait before the next look, so that looking stays cheap (s)."""
        return max(least, self.seconds * PATIENCE)


def _chunks_per_second(newest: RecentCommits) -> float | None:
    """Return the speed over the newest commits, from the start of the first of them."""
    if not newest.records:
        return None
    span = max(c.finished for c in newest.records) - min(c.started for c in newest.records)
    return len(newest.records) * newest.step / span if span > 0 else None


def _workers(running: list[Any], newest: RecentCommits) -> tuple[WorkerState, ...]:
    now_running: dict[str, list[str]] = {}
    for item in running:
        now_running.setdefault(item.worker, []).append(chunk_name(item.task.chunk))
    names = sorted({c.worker for c in newest.records} | now_running.keys())
    return tuple(_worker(name, now_running.get(name, []), newest) for name in names)


def _worker(name: str, running: list[str], newest: RecentCommits) -> WorkerState:
    mine = [c for c in newest.records if c.worker == name]
    totals: Counter[str] = Counter()
    for commit in mine:
        totals.update(commit.seconds)
    totals.pop("wait", None)  # for the device to finish another chunk: nothing is lost by it
    whole = sum(totals.values())
    span = max(c.finished for c in mine) - min(c.started for c in mine) if mine else 0.0
    where = WorkerName.parse(name)
    return WorkerState(
        name=name,
        host=where.host,
        device=where.device,
        running=tuple(running),
        recent_chunks=len(mine),
        stage_shares={stage: seconds / whole for stage, seconds in totals.items()} if whole else {},
        device_wait_share=max(0.0, 1 - newest.step * totals["compute"] / span) if span else None,
        last_seen=max((c.finished for c in mine), default=None),
    )


def _grouped(failures: list[Failure], vanished: list[tuple[int, ...]]) -> tuple[FailureGroup, ...]:
    groups: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        groups.setdefault(cause(failure.error, failure.message), []).append(failure)
    found = [
        FailureGroup(
            error=error,
            message=members[0].message,
            chunks=tuple(chunk_name(f.chunk) for f in sorted(members, key=lambda f: f.chunk)),
            traceback=members[-1].traceback,
        )
        for (error, _), members in groups.items()
    ]
    if vanished:
        found.append(
            FailureGroup(
                error="WorkerVanished",
                message="the worker was killed or ran out of memory each time",
                chunks=tuple(chunk_name(chunk) for chunk in sorted(vanished)),
                traceback="",
            )
        )
    return tuple(sorted(found, key=lambda group: -len(group.chunks)))


def status_line(status: JobStatus) -> str:
    """Return the status as one line for a log."""
    parts = [f"{status.done}/{status.chunks} chunks done"]
    for label in ("running", "queued", "failed"):
        count = getattr(status, label)
        if count:
            parts.append(f"{count} {label}")
    if status.blocks_finalized:
        parts.append(f"{status.blocks_finalized}/{status.blocks_to_finalize} blocks finalized")
    if status.voxels_per_second and status.done < status.chunks:
        parts.append(f"{_si(status.voxels_per_second)}voxels/s")
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    if status.sealed:
        parts.append("sealed")
    return ", ".join(parts)


def status_screen(status: JobStatus, width: int) -> RenderableType:
    """Return the status for a terminal of `width` columns."""
    lines: list[RenderableType] = [Text(status.output, style="bold", overflow="fold")]
    bar = Table.grid()  # a bar alone does not end its line
    bar.add_row(ProgressBar(total=status.chunks, completed=status.done, width=min(60, width - 2)))
    lines.append(bar)
    lines.append(Text(status_line(status)))
    if status.queue_problem:
        lines.append(Text(status.queue_problem, style="yellow"))
    if status.workers:
        lines.append(_worker_table(status.workers))
    for group in status.failures:
        shown = ", ".join(group.chunks[:6]) + (" …" if len(group.chunks) > 6 else "")
        lines.append(Text(f"failed {len(group.chunks)}: {group.message}", style="red"))
        lines.append(Text(f"  chunks {shown}", style="red"))
    if status.lost_from_queue:
        lines.append(
            Text(
                "some chunks are neither done nor on this queue; next: the `chunkq run` or "
                "`chunkq produce` that began the job, again",
                style="yellow",
            )
        )
    if status.done == status.chunks and not status.sealed:
        lines.append(Text(f"next: chunkq finalize {status.output}"))
    return Group(*lines)


def _worker_table(workers: tuple[WorkerState, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("host", "device", "running", "recent", "device waits", "stages"):
        table.add_column(heading, overflow="fold", no_wrap=False)
    for worker in workers:
        waits = worker.device_wait_share
        stages = " ".join(f"{stage} {share:.0%}" for stage, share in worker.stage_shares.items())
        running = ", ".join(worker.running[:4]) or _ago(worker.last_seen)
        share = "" if waits is None else f"{waits:.0%}"
        device = worker.device if worker.device in ("", "cpu") else f"GPU {worker.device}"
        table.add_row(worker.host, device, running, str(worker.recent_chunks), share, stages)
    return table


def duration(seconds: float) -> str:
    """Return seconds as `1 h 02 min`, `3 min 05 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _ago(moment: float | None) -> str:
    return "" if moment is None else f"idle {duration(max(0.0, time.time() - moment))}"


def _si(value: float) -> str:
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"
