"""`chunkq work`."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import click

from chunkq.allowed_paths import ALLOW_VARIABLE, AllowedPaths, accepted_job
from chunkq.errors import IncompleteError, JobError, MissingJobError
from chunkq.executors import QUEUE_VARIABLE, open_shared, queue_url
from chunkq.executors.base import DEPTH_ON_CPU, DEPTH_ON_GPU, Counts, Executor, default_depth
from chunkq.executors.settings import override_settings
from chunkq.finalize import job_completion
from chunkq.job_handle import open_job
from chunkq.job_path import output_path
from chunkq.ledger import folder_of
from chunkq.paths import without_secret
from chunkq_worker.devices import Slot, slots
from chunkq_worker.supervisor import Supervisor


@click.command()
@click.option("--queue", help=f"Queue URL; else ${QUEUE_VARIABLE}, else the embedded queue.")
@click.option("--gpus", default="all", show_default=True, help="all, none, or e.g. 0,1.")
@click.option(
    "-w", "--workers", default=1, show_default=True, type=click.IntRange(1),
    help="Processes per GPU; without a GPU, processes in all.",
)  # fmt: skip
@click.option(
    "--per-node", type=click.IntRange(1), help="Processes in all, spread over the devices.",
)  # fmt: skip
@click.option(
    "--depth", type=click.IntRange(1),
    help=f"Chunks in flight per process; default {DEPTH_ON_GPU} on a GPU, else {DEPTH_ON_CPU}.",
)  # fmt: skip
@click.option("--burst", is_flag=True, help="End when nothing is left to do.")
@click.option("--max-time", help="Begin nothing that will not fit: seconds, or 90m, 2h, 1h30m.")
@click.option(
    "--time-limit",
    help="End a process in which a chunk takes longer: seconds, or 90m, 2h; by default ten times "
    "the longest chunk seen, at least 10 minutes.",
)
@click.option(
    "--lease", type=click.FloatRange(0.5),
    help="Seconds after which a silent worker's chunks go to others; default 20.",
)  # fmt: skip
@click.option("--job", help="Only work on the job of this output.")
@click.option(
    "--allow", multiple=True,
    help="Run jobs and code only from below this path; may be repeated. "
    f"Default: the lines of ${ALLOW_VARIABLE}, else every path.",
)  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Only say what goes wrong.")
@click.option("--lifeline", is_flag=True, hidden=True, help="End when standard input does.")
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
    quiet: bool,
    lifeline: bool,
) -> None:
    """Take chunks from the queue and compute them: one process per GPU, or on the CPU.

    Ctrl-C or SIGTERM finishes what is in flight and takes no more; the same again hands it back
    at once.
    """
    base = Path.cwd()
    allowed = AllowedPaths.of(allow, base) if allow else AllowedPaths.from_environment(base)
    if allowed is not None:
        allowed.to_environment()
    if lease is not None:
        override_settings(lease=lease)
    url = queue_url(queue)
    taken = slots(gpus, workers, per_node)
    deadline = None if max_time is None else time.time() + seconds_in("--max-time", max_time)
    limit = None if time_limit is None else seconds_in("--time-limit", time_limit)
    executor = open_shared(url)
    executor.ready()
    if lifeline:
        threading.Thread(target=_stop_with_parent, daemon=True).start()
    folder = None if job is None else folder_of(output_path(job, base))
    before = _jobs(executor, folder)
    supervisor = Supervisor(
        queue=url,
        executor=executor,
        slots=taken,
        depth=depth or default_depth(gpu=taken[0] != Slot(None)),
        burst=burst,
        job=folder,
        deadline=deadline,
        time_limit=limit,
        quiet=quiet,
        hide_gpus=gpus == "none",
    )
    code = supervisor.run()
    after = _jobs(executor, folder)
    executor.close()
    failed = _failed(after) - _failed(before)
    lost = _lost(before, after) if burst and supervisor.queue_was_unreachable else []
    if lost and code == 0:
        raise IncompleteError(
            "the queue was lost meanwhile, and with it chunks of "
            f"{', '.join(without_secret(output) for output in lost)}; `chunkq produce --resume` "
            "of the job queues them again",
            [],
        )
    if failed > 0 and code == 0:
        raise IncompleteError(
            f"{failed} chunks failed; `chunkq status OUT` says why, `chunkq retry OUT` queues them "
            "again",
            [],
        )
    sys.exit(code)


def _jobs(executor: Executor, job: str | None) -> dict[str, Counts]:
    """Count the tasks of one job or of all on the queue, by job folder."""
    return executor.jobs() if job is None else {job: executor.counts(job)}


def _failed(jobs: Mapping[str, Counts]) -> int:
    return sum(counts.failed for counts in jobs.values())


def _lost(before: Mapping[str, Counts], after: Mapping[str, Counts]) -> list[str]:
    """Return the outputs of those jobs whose chunks are neither done nor on the queue any more."""
    lost = []
    for path, counts in before.items():
        now = after.get(path, Counts())
        if not counts.queued + counts.running or now.queued + now.running:
            continue
        # A removed job has lost nothing, and a refused one is not opened.
        with suppress(MissingJobError, JobError):
            job = open_job(accepted_job(path))
            if len(job_completion(job).unfinished) > now.failed:
                lost.append(job.folder.output)
    return lost


def seconds_in(option: str, text: str) -> float:
    """Read `90`, `90s`, `15m`, `2h` or `1h30m` as seconds; raises JobError otherwise."""
    text = text.strip()
    if text.isdecimal():
        text += "s"
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not found or not text:
        raise JobError(f"{option}: {text!r} is no time; write 90, 15m, 2h or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(hours * 3600 + minutes * 60 + seconds)


def _stop_with_parent() -> None:
    sys.stdin.read()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
