"""The command `chunkq work`."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import click

from chunkq.errors import RESUME, ErrorCode, IncompleteError, JobError, MissingJobError
from chunkq.job.allowed_paths import (
    ALLOW_VARIABLE,
    PACKAGES_VARIABLE,
    AllowedPaths,
    allowed_job_path,
)
from chunkq.job.job_path import job_folder_of, output_of, output_path
from chunkq.job.tasks import JobId, chunk_count
from chunkq.paths import without_secret
from chunkq.queue.contract.executor import (
    DEFAULT_DEPTH_CPU,
    DEFAULT_DEPTH_GPU,
    Executor,
    TaskCounts,
    default_depth,
    jobs_at,
)
from chunkq.queue.contract.settings import override_settings
from chunkq.queue.registry import QUEUE_VARIABLE, open_shared, queue_url
from chunkq.system.parent_process import when_parent_ends
from chunkq.terminal import argument
from chunkq_worker.devices import Slot, slots
from chunkq_worker.supervisor import Supervisor


@click.command()
@click.option(
    "--queue", help=f"Queue URL (default: ${QUEUE_VARIABLE}, then a local file).",
)  # fmt: skip
@click.option(
    "--gpus", default="all", show_default=True, help="GPUs to use: all, none, or 0,1.",
)  # fmt: skip
@click.option(
    "-w", "--workers", default=1, show_default=True, type=click.IntRange(1),
    help="Worker processes per GPU; without a GPU, in total.",
)  # fmt: skip
@click.option(
    "--per-node", type=click.IntRange(1),
    help="Worker processes in total, distributed over the GPUs.",
)  # fmt: skip
@click.option(
    "--depth", type=click.IntRange(1),
    help="Chunks per process that are read, computed or written at the same time "
    f"(default: {DEFAULT_DEPTH_GPU} on a GPU, else {DEFAULT_DEPTH_CPU}).",
)  # fmt: skip
@click.option(
    "--burst", is_flag=True, help="Exit when no chunk is left, instead of waiting for more."
)
@click.option(
    "--max-time",
    help="Exit after this time, and start no chunk that would exceed it: seconds, or 90m, 2h, "
    "1h30m.",
)
@click.option(
    "--time-limit",
    help="Restart a process in which one chunk takes longer: seconds, or 90m, 2h. Default: ten "
    "times the longest chunk so far, at least 10 minutes.",
)
@click.option(
    "--lease", type=click.FloatRange(0.5),
    help="Seconds without a heartbeat after which a worker's chunks are requeued; default 20.",
)  # fmt: skip
@click.option("--job", help="Only compute chunks of the job with this output.")
@click.option(
    "--allow", multiple=True,
    help="Only accept jobs and code below this path; can be repeated. "
    f"Default: the lines of ${ALLOW_VARIABLE}, else every path.",
)  # fmt: skip
@click.option(
    "--allow-package", multiple=True,
    help="With --allow: also import this installed package, by its top-level name, for jobs that "
    f"name a class of it; can be repeated. Default: the lines of ${PACKAGES_VARIABLE}, else none.",
)  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Only log warnings and errors.")
@click.option("--lifeline", is_flag=True, hidden=True, help="Stop when standard input closes.")
@click.option(
    "--early", type=int, hidden=True,
    help="Check the network before the job exists, and report to this file descriptor.",
)  # fmt: skip
def work(
    queue: str | None,
    gpus: str,
    workers: int,
    per_node: int | None,
    depth: int | None,
    burst: bool,
    max_time: str | None,
    time_limit: str | None,
    lease: float | None,
    job: str | None,
    allow: tuple[str, ...],
    allow_package: tuple[str, ...],
    quiet: bool,
    lifeline: bool,
    early: int | None,
) -> None:
    """Compute the chunks on a queue, with one process per GPU, or one on the CPU.

    The command waits for more chunks until Ctrl-C or SIGTERM. It then finishes the chunks that
    it has started. A second Ctrl-C requeues them and exits at once.
    """
    base = Path.cwd()
    allowed = AllowedPaths.from_options(allow, allow_package, base)
    if allowed is not None:
        allowed.to_environment()
    if lease is not None:
        override_settings(lease=lease)
    url = queue_url(queue)
    worker_slots = slots(gpus, workers, per_node)
    deadline = None if max_time is None else time.time() + parse_duration("--max-time", max_time)
    limit = None if time_limit is None else parse_duration("--time-limit", time_limit)
    folder = None if job is None else job_folder_of(output_path(job, base))
    supervisor = Supervisor(
        queue=url,
        slots=worker_slots,
        depth=depth or default_depth(gpu=worker_slots[0] != Slot(None)),
        burst=burst,
        job=folder,
        deadline=deadline,
        time_limit=limit,
        quiet=quiet,
        hide_gpus=gpus == "none",
    )
    if lifeline:
        when_parent_ends(partial(_stop, supervisor), supervisor.receive)
    if early is not None and not supervisor.start_early(early):
        return
    executor = open_shared(url)
    executor.check_ready()
    for line in () if lifeline else executor.risks():
        click.echo(f"chunkq: warning: {line}", err=True)
    before = _jobs(executor, folder)
    if folder is not None and not before and not lifeline:
        click.echo(f"chunkq: warning: {_not_queued(folder)}", err=True)
    code = supervisor.run(executor)
    after = _jobs(executor, folder)
    executor.close()
    failed = _failed(before, after)
    # A run looks into the job's folder itself when its workers have ended.
    looks = burst and (supervisor.queue_was_unreachable or not lifeline)
    lost = _lost_jobs(before, after) if looks else {}
    if lost and code in (0, IncompleteError.exit_code):
        raise IncompleteError(
            "the queue was lost in part: "
            + ", ".join(f"{chunk_count(n)} of {without_secret(out)}" for out, n in lost.items())
            + (" is" if [*lost.values()] == [1] else " are")
            + " neither done nor queued"
            + ("" if lifeline else f"; {RESUME} with the job to queue them again"),
            [],
            code=ErrorCode.QUEUE_LOST,
        )
    if failed and code in (0, IncompleteError.exit_code):
        if lifeline:  # the run that started this process names them
            sys.exit(IncompleteError.exit_code)
        count = sum(failed.values())
        first, *others = map(argument, failed)
        more = f" (and of {', '.join(others)})" if others else ""
        raise IncompleteError(
            f"{count} {'chunk' if count == 1 else 'chunks'} failed; run `chunkq status {first}`"
            f"{more} to see why, and `chunkq retry {first}` to queue them again",
            [],
        )
    sys.exit(code)


def _not_queued(folder: str) -> str:
    """Return what to print for a job of which the queue has no task."""
    from chunkq.job.job_folder import JobFolder  # NumPy and pydantic, only in this case

    output = without_secret(output_of(folder))
    if JobFolder(folder).read_record() is None:
        return f"--job: no job at {output}; fix the path"
    return f"--job: no chunk of {output} is on this queue"


def _jobs(executor: Executor, path: str | None) -> dict[JobId, TaskCounts]:
    """Return the task counts of the jobs with one folder, or of all jobs on the queue."""
    return executor.jobs() if path is None else jobs_at(executor, path)


def _failed(
    before: Mapping[JobId, TaskCounts], after: Mapping[JobId, TaskCounts]
) -> dict[str, int]:
    """Return the outputs with chunks that failed in the meantime, and how many."""
    failed: Counter[str] = Counter()
    for job, counts in after.items():
        output = without_secret(output_of(job.path))
        failed[output] += counts.failed - before.get(job, TaskCounts()).failed
    return {output: count for output, count in failed.items() if count > 0}


def _lost_jobs(
    before: Mapping[JobId, TaskCounts], after: Mapping[JobId, TaskCounts]
) -> dict[str, int]:
    """Return outputs of jobs, with the number of chunks neither committed nor on the queue."""
    if not before:
        return {}
    # These import NumPy and pydantic, which a supervisor does not need before its processes start.
    from chunkq.job.job_handle import open_job
    from chunkq.stages.completion import job_completion

    lost = {}
    for id, counts in before.items():
        now = after.get(id, TaskCounts())
        was_active = counts.queued + counts.running + counts.waiting
        if not was_active or now.queued + now.running + now.waiting:
            continue
        # Skip jobs whose folder was removed, and jobs that this worker does not accept.
        with suppress(MissingJobError, JobError):
            job = open_job(allowed_job_path(id.path))
            missing = len(job_completion(job).missing()) - now.failed
            if job.record.epoch == id.epoch and missing > 0:
                lost[job.folder.output] = missing
    return lost


def parse_duration(option: str, text: str) -> float:
    """Return the seconds of `90`, `90s`, `15m`, `2h` or `1h30m`; raise JobError otherwise."""
    text = text.strip()
    if text.isdecimal():
        text += "s"
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not text:
        raise JobError(f"{option}: invalid duration {text!r}; use 90, 15m, 2h or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(hours * 3600 + minutes * 60 + seconds)


def _stop(supervisor: Supervisor) -> None:
    supervisor.end_early()
    for _ in range(2):  # the second signal requeues what is still in flight
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
