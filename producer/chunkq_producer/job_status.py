"""Status of a job: read from the ledger and the queue, formatted for a terminal or a log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chunkq.errors import QueueError, failure_key
from chunkq.job.events import Event
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.job.ledger import STAGED
from chunkq.job.task_records import Failure, RecentCommits
from chunkq.job.tasks import Task
from chunkq.paths import without_secret
from chunkq.plan.costs import total_costs
from chunkq.progress_bar import Bar
from chunkq.queue.contract.executor import Executor, RunningTask, TaskCounts, WorkerName
from chunkq.stages import completion
from chunkq.stages.ingest import copies
from chunkq.stages.registry import stage_of
from chunkq.summaries import one_line
from chunkq.tables import FittingTable
from chunkq.terminal import argument
from chunkq.units import device_cost, duration, money, si

ACTIVE_SECONDS = 60.0
"""A job is active for this time after its last commit, possibly on another queue."""
RECENT_COMMITS = 64
"""Newest commit records from which speed and time shares are computed."""
SINGULAR = {"images": "image", "patches": "patch"}
MIN_PAUSE_FACTOR = 10
"""The pause between two polls is at least this many times the duration of a poll."""


@dataclass(frozen=True)
class WorkerState:
    """One worker: host, device, running chunks, and how its recent chunks spent their time."""

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
    """Chunks that failed with the same message, ignoring digits.

    With `is_staging`, `chunks` are names of inputs that could not be staged.
    """

    error: str
    message: str
    chunks: tuple[str, ...]
    traceback: str
    is_staging: bool = False

    def names(self, word: str) -> str:
        """Return the first names, for a message; behind `word` if they are of chunks."""
        names = ", ".join(self.chunks[:6]) + (" …" if len(self.chunks) > 6 else "")
        return names if self.is_staging else f"{word} {names}"


@dataclass(frozen=True, repr=False)
class JobStatus:
    """Status of a job at one moment. Queue figures are None if the queue cannot be reached.

    Progress, speed and remaining time count patches: chunks have different numbers of them.
    `patches_done` is an estimate while more chunks are done than are looked at. Patches that are
    known to be empty beforehand are not counted; those that turn out empty are done with their
    chunk. Each patch stands for an equal part of the output's voxels.

    `waiting` chunks wait until the inputs are staged. `staged_share` is the part of them, by size,
    that is staged; None if the job stages none.
    """

    output: str
    chunks: int
    done: int
    patches: int
    patches_done: int
    running: int | None
    queued: int | None
    failed: int | None
    waiting: int | None
    inputs_to_stage: int
    inputs_staged: int
    staged_share: float | None
    blocks_to_finalize: int
    blocks_finalized: int
    sealed: bool
    patches_per_second: float | None
    voxels_per_second: float | None
    seconds_left: float | None
    workers: tuple[WorkerState, ...]
    failures: tuple[FailureGroup, ...]
    queue_problem: str | None = None
    lost_from_queue: bool = False
    """Whether chunks are not done, not failed and not on this queue, and the job is not active."""
    is_idle: bool = False
    """Whether chunks are queued and none is running, so that nothing says how long they take."""
    level_parts: int = 0
    level_parts_done: int = 0
    """Parts of the levels of pyramids, and those that are written."""
    unit: str = "patches"
    """What `patches` counts: `images` in a job over images."""
    image_errors: int | None = None
    """Images without a result, of a job over images; an estimate while chunks are done."""
    cost_left: float | None = None
    """Price of the remaining time on the devices of the recent workers, if the job has a price."""

    def __repr__(self) -> str:
        return one_line("JobStatus", {"output": self.output, "state": status_line(self)})


def job_status(job: JobHandle, executor: Executor | None, problem: str | None = None) -> JobStatus:
    """Read the ledger and the queue once. Raises OSError if the storage fails.

    `problem` is the reason why there is no `executor`.
    """
    costs = job.costs
    by_item = [item.ledger.recent_commits("infer", RECENT_COMMITS) for item in job.items]
    recent = RecentCommits.merged(by_item, RECENT_COMMITS)
    done, finalized = recent.total, job.recent_commits("finalize", 0).total
    patches_done = sum(map(_patches_done, job.items, by_item))
    counts, running, failed_tasks = TaskCounts(), [], []
    if executor is not None:
        try:
            counts = executor.counts(job.id)
            running = executor.running(job.id)
            failed_tasks = executor.failed(job.id) if counts.failed else []
        except QueueError as error:
            executor, problem = None, str(error)
    rate = _patches_per_second(recent)
    staging = Staging.of(job, needed=costs.chunks > done)
    level_parts = sum(map(stage_of("downsample").count, job.items))
    remaining, patches_left = costs.chunks - done, costs.patches - patches_done
    voxels = sum(item.plan.region.size for item in job.items)
    voxels_per_patch = voxels / total_costs(item.plan for item in job.items).patches
    failures = completion.failures(job)
    recorded = {(failure.kind, failure.item, failure.chunk) for failure in failures}
    unexplained = [t for t in failed_tasks if (t.kind, t.item, t.chunk) not in recorded]
    reachable = executor is not None
    # A run with its own cluster uses another queue than this one.
    last_commit = max((commit.finished for commit in recent.records), default=0.0)
    is_active = last_commit > time.time() - ACTIVE_SECONDS
    keys = job.record.job
    on_queue = counts.queued + counts.running + counts.failed + counts.waiting
    lost_from_queue = reachable and remaining > on_queue and not is_active
    is_idle = remaining > 0 and counts.queued > 0 and not counts.running
    ends = rate and remaining and not (lost_from_queue or is_idle)
    seconds_left = patches_left / rate if rate and ends else None
    workers = _workers(job, running, recent)
    return JobStatus(
        output=without_secret(job.folder.output),
        chunks=costs.chunks,
        done=done,
        patches=costs.patches,
        patches_done=patches_done,
        running=counts.running if reachable else None,
        queued=counts.queued if reachable else None,
        failed=counts.failed if reachable else None,
        waiting=counts.waiting if reachable else None,
        inputs_to_stage=staging.inputs,
        inputs_staged=staging.staged,
        staged_share=staging.share,
        blocks_to_finalize=costs.finalized_blocks,
        blocks_finalized=finalized,
        sealed=job.ledger.is_sealed() and job.output.is_sealed(),
        patches_per_second=rate,
        voxels_per_second=rate and rate * voxels_per_patch,
        seconds_left=seconds_left,
        workers=workers,
        failures=_failure_groups(job, failures, unexplained),
        queue_problem=problem,
        lost_from_queue=lost_from_queue,
        is_idle=is_idle,
        level_parts=level_parts,
        level_parts_done=job.recent_commits("downsample", 0).total if level_parts else 0,
        unit="images" if keys.is_image else "patches",
        image_errors=_image_errors(recent) if keys.is_image else None,
        cost_left=device_cost(seconds_left, keys.price, len(workers)),
    )


def _image_errors(recent: RecentCommits) -> int:
    """Return the number of images without a result, estimated from those of recent chunks."""
    errors = sum(commit.errors for commit in recent.records)
    return round(errors * recent.total / max(1, len(recent.records)))


@dataclass(frozen=True)
class Staging:
    """How many inputs a job stages, how many are staged, and the share of their slabs."""

    inputs: int
    staged: int
    share: float | None

    @classmethod
    def of(cls, job: JobHandle, *, needed: bool) -> Staging:
        """Read the progress, unless it is not `needed` anymore because all chunks are done."""
        total = [(image, copy) for image in job.images for _, copy in copies(image)]
        if not total:
            return cls(0, 0, None)
        if not needed:
            return cls(len(total), len(total), 1.0)
        stage = stage_of(STAGED)
        staged = sum(len(item.ledger.committed(STAGED)) for item in job.items if stage.count(item))
        sizes = [copy.slabs.size * copy.dtype.itemsize for _, copy in total]
        written = [copy.slabs_written() / copy.slabs.count for _, copy in total]
        share = sum(size * part for size, part in zip(sizes, written, strict=True)) / sum(sizes)
        return cls(len(total), staged, share)


@dataclass
class StatusPoller:
    """Callable that returns the current status of one job.

    `min_pause` is the time (s) to wait before the next call, so that polling stays cheap.
    """

    job: JobHandle
    executor: Executor | None
    problem: str | None = None
    min_pause: float = field(default=0.0, init=False)

    def __call__(self) -> JobStatus:
        """Return the job's status now."""
        started = time.monotonic()
        status = job_status(self.job, self.executor, self.problem)
        self.min_pause = MIN_PAUSE_FACTOR * (time.monotonic() - started)
        return status


@dataclass(frozen=True, slots=True)
class WorkersRunning(Event):
    """Workers run a job. This event is repeated; a sink that shows the status calls `poller`."""

    poller: StatusPoller


def _patches_done(item: ItemHandle, recent: RecentCommits) -> int:
    """Return the patches of an item's finished chunks, estimated from those of the sample."""
    if recent.total == item.tasks.costs.chunks:
        return item.tasks.costs.patches
    patches = item.tasks.count_patches(recent.chunks)
    return round(patches * recent.total / max(1, len(recent.chunks)))


def _patches_per_second(recent: RecentCommits) -> float | None:
    """Return the speed over the recent commits, from the start of their first chunk."""
    if not recent.records:
        return None
    span = max(c.finished for c in recent.records) - min(c.started for c in recent.records)
    patches = sum(commit.patches + commit.skipped for commit in recent.records)
    return patches * recent.step / span if span > 0 else None


def _workers(
    job: JobHandle, running: list[RunningTask], recent: RecentCommits
) -> tuple[WorkerState, ...]:
    now_running: dict[str, list[str]] = {}
    for entry in running:
        now_running.setdefault(entry.worker, []).append(_task_name(job, entry.task))
    names = sorted({c.worker for c in recent.records} | now_running.keys())
    return tuple(_worker_state(name, now_running.get(name, []), recent) for name in names)


def _worker_state(name: str, running: list[str], recent: RecentCommits) -> WorkerState:
    commits = [c for c in recent.records if c.worker == name]
    totals: Counter[str] = Counter()
    for commit in commits:
        totals.update(commit.seconds)
    totals.pop("wait", None)  # the device computes another chunk of this worker meanwhile
    total = sum(totals.values())
    span = max(c.finished for c in commits) - min(c.started for c in commits) if commits else 0.0
    parts = WorkerName.parse(name)
    return WorkerState(
        name=name,
        host=parts.host,
        device=parts.device,
        running=tuple(running),
        recent_chunks=len(commits),
        stage_shares={stage: seconds / total for stage, seconds in totals.items()} if total else {},
        device_wait_share=max(0.0, 1 - recent.step * totals["compute"] / span) if span else None,
        last_seen=max((c.finished for c in commits), default=None),
    )


def _failure_groups(
    job: JobHandle, failures: list[Failure], unexplained: list[Task]
) -> tuple[FailureGroup, ...]:
    """Group recorded failures by cause; `unexplained` tasks failed without a record."""

    def names(tasks: Iterable[Failure | Task]) -> tuple[str, ...]:
        ordered = sorted(tasks, key=lambda task: (task.item, task.chunk))
        return tuple(_task_name(job, task) for task in ordered)

    failures_by_cause: dict[tuple[str, str, bool], list[Failure]] = {}
    for failure in failures:
        cause = (*failure_key(failure.error, failure.message), failure.kind == STAGED)
        failures_by_cause.setdefault(cause, []).append(failure)
    groups = [
        FailureGroup(
            error=error,
            message=members[0].message,
            chunks=names(members),
            traceback=members[-1].traceback,
            is_staging=is_staging,
        )
        for (error, _, is_staging), members in failures_by_cause.items()
    ]
    if unexplained:
        groups.append(
            FailureGroup(
                error="WorkerVanished",
                message="the worker process was killed in every attempt, possibly out of memory",
                chunks=names(unexplained),
                traceback="",
            )
        )
    return tuple(sorted(groups, key=lambda group: -len(group.chunks)))


def _task_name(job: JobHandle, task: Failure | Task) -> str:
    """Return the name of a task's chunk, or of the input that it stages."""
    if task.kind != STAGED:
        return job.chunk_name(task.item, task.chunk)
    number = job.items[task.item].item.image.number + task.chunk[0]
    return f"input.{number}" if len(job.record.sources) > 1 else "input"


def status_line(status: JobStatus, *, with_next_step: bool = True) -> str:
    """Return the status as one line for a log."""
    idle = "none running" if with_next_step and status.is_idle else ""
    return ", ".join(filter(None, (_task_line(status), idle, _speed_line(status))))


def _task_line(status: JobStatus) -> str:
    """Return the states of chunks and blocks."""
    noun = "chunk" if status.chunks == 1 else "chunks"
    parts = [f"{status.done}/{status.chunks} {noun} done"]
    if status.inputs_staged < status.inputs_to_stage:
        inputs = f"{status.inputs_staged}/{status.inputs_to_stage} inputs staged"
        parts.insert(0, f"{inputs} ({status.staged_share or 0:.0%})")
    for label in ("running", "queued", "waiting", "failed"):
        count = getattr(status, label)
        if count:
            parts.append(f"{count} {label}")
    if status.blocks_finalized:
        parts.append(f"{status.blocks_finalized}/{status.blocks_to_finalize} blocks finalized")
    if status.level_parts_done:
        parts.append(f"{status.level_parts_done}/{status.level_parts} parts of pyramids")
    if status.image_errors:
        about = "" if status.done <= RECENT_COMMITS else "about "
        noun = "image" if status.image_errors == 1 else "images"
        parts.append(f"{about}{status.image_errors} {noun} without a result")
    if status.sealed:
        parts.append("complete")
    return ", ".join(parts)


def _speed_line(status: JobStatus) -> str:
    """Return the progress in patches, the speed and the remaining time while chunks remain."""
    if status.done == status.chunks:
        return ""
    noun = SINGULAR[status.unit] if status.patches == 1 else status.unit
    parts = [f"{status.patches_done}/{status.patches} {noun}"]
    if status.patches_per_second:
        parts.append(si(status.patches_per_second, f"{status.unit}/s"))
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    if status.cost_left is not None:
        parts.append(f"{money(status.cost_left)} to pay")
    return ", ".join(parts)


def status_screen(status: JobStatus, width: int, *, with_next_step: bool = True) -> RenderableType:
    """Return the status for a terminal of `width` columns.

    A run takes the next step itself, so it shows the status without it.
    """
    lines: list[RenderableType] = [Text(status.output, style="bold", overflow="fold")]
    bar = Table.grid()  # a bar outside a table does not end its line
    bar.add_row(Bar(status.patches_done, status.patches, min(60, width - 2)))
    lines.append(bar)
    lines += map(Text, filter(None, (_task_line(status), _speed_line(status))))
    if status.queue_problem:
        lines.append(Text(status.queue_problem, style="yellow"))
    if status.workers:
        lines.append(_worker_table(status.workers))
    for group in status.failures:
        lines.append(Text(f"failed {len(group.chunks)}: {group.message}", style="red"))
        lines.append(Text(f"  {group.names('chunks')}", style="red"))
    if not with_next_step:
        return Group(*lines)
    if status.lost_from_queue:
        lines.append(
            Text(
                "some chunks are neither done nor on this queue; next: repeat the `chunkq run` or "
                "`chunkq produce` command of this job",
                style="yellow",
            )
        )
    if status.is_idle:
        lines.append(
            Text(
                "no chunk is running; start workers with `chunkq work --burst`, or repeat the "
                "`chunkq run` command of this job",
                style="yellow",
            )
        )
    if status.done == status.chunks and not status.sealed:
        lines.append(Text(f"next: chunkq finalize {argument(status.output)}"))
    return Group(*lines)


def _worker_table(workers: tuple[WorkerState, ...]) -> FittingTable:
    headings = ("host", "device", "running", "recent", "device idle", "stages")
    rows = []
    for worker in workers:
        wait = worker.device_wait_share
        stages = " ".join(f"{stage} {share:.0%}" for stage, share in worker.stage_shares.items())
        running = ", ".join(worker.running[:4]) or _ago(worker.last_seen)
        idle = "" if wait is None else f"{wait:.0%}"
        device = worker.device if worker.device in ("", "cpu") else f"GPU {worker.device}"
        rows.append((worker.host, device, running, str(worker.recent_chunks), idle, stages))
    return FittingTable(headings, rows, left=range(len(headings)), wraps=(5,))


def _ago(moment: float | None) -> str:
    return "" if moment is None else f"idle {duration(max(0.0, time.time() - moment))}"
