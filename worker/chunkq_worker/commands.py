"""`chunkq work`."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import click

from chunkq.errors import IncompleteError, JobError
from chunkq.executors import QUEUE_VARIABLE, open_executor, queue_url
from chunkq.executors.base import DEPTH_ON_CPU, DEPTH_ON_GPU, Executor
from chunkq.ledger import folder_of
from chunkq.paths import absolute
from chunkq_worker.devices import Slot, slots
from chunkq_worker.run import ALLOW_VARIABLE
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
@click.option("--job", help="Only work on the job of this output.")
@click.option("--allow", multiple=True, help="Only accept jobs below this path; may be repeated.")
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
    job: str | None,
    allow: tuple[str, ...],
    quiet: bool,
    lifeline: bool,
) -> None:
    """Take chunks from the queue and compute them: one process per GPU, or on the CPU.

    Ctrl-C or SIGTERM finishes what is in flight and takes no more; the same again hands it back
    at once.
    """
    if allow:
        os.environ[ALLOW_VARIABLE] = "\n".join(absolute(place, Path.cwd()) for place in allow)
    url = queue_url(queue)
    taken = slots(gpus, workers, per_node)
    deadline = None if max_time is None else time.time() + seconds_in("--max-time", max_time)
    limit = None if time_limit is None else seconds_in("--time-limit", time_limit)
    executor = open_executor(url)
    executor.ready()
    if lifeline:
        threading.Thread(target=_stop_with_parent, daemon=True).start()
    folder = None if job is None else folder_of(absolute(job, Path.cwd()))
    failed_before = _failed(executor, folder)
    code = Supervisor(
        queue=url,
        executor=executor,
        slots=taken,
        depth=depth or (DEPTH_ON_CPU if taken[0] == Slot(None) else DEPTH_ON_GPU),
        burst=burst,
        job=folder,
        deadline=deadline,
        time_limit=limit,
        quiet=quiet,
        hide_gpus=gpus == "none",
    ).run()
    failed = _failed(executor, folder) - failed_before
    executor.close()
    if failed > 0 and code == 0:
        raise IncompleteError(
            f"{failed} chunks failed; `chunkq status OUT` says why, `chunkq retry OUT` queues them "
            "again",
            [],
        )
    sys.exit(code)


def _failed(executor: Executor, job: str | None) -> int:
    """Count failed tasks, of one job or of all."""
    if job is not None:
        return executor.counts(job).failed
    return sum(counts.failed for counts in executor.jobs().values())


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
