"""`chunkq finalize`."""

from __future__ import annotations

import json
import socket
from typing import Any

import click

from chunkq.finalize import finalize_job
from chunkq.job.job_handle import JobHandle
from chunkq.job.tasks import chunk_count
from chunkq.paths import without_secret
from chunkq.progress_bar import ProgressDisplay
from chunkq.system.standard_output import print_line, print_text
from chunkq.terminal import print_error
from chunkq.units import counted, duration, si
from chunkq_producer import distribute as distribution
from chunkq_producer.commands.options import (
    job_at,
    json_option,
    output_argument,
    queue_of,
    queue_option,
)


@click.command()
@output_argument
@click.option("--allow-missing", is_flag=True, help="Finish even if chunks are missing.")
@click.option("--distribute", is_flag=True, help="Let the workers of the queue merge the overlaps.")
@click.option(
    "--threads", type=click.IntRange(1),
    help="Overlaps merged in parallel (default: 2 if they fit into 2 GiB).",
)  # fmt: skip
@queue_option
@json_option
def finalize(
    output: str,
    allow_missing: bool,
    distribute: bool,
    threads: int | None,
    queue: str | None,
    as_json: bool,
) -> None:
    """Merge the overlaps between chunks and mark OUTPUT, such as labels.zarr, as complete.

    If chunks are missing, the command lists them and the exit code is 3. With --allow-missing,
    the blocks that need them stay 0 and the output is marked as incomplete.
    """
    job = job_at(output)
    if distribute:
        complete_on_workers(job, queue, allow_missing=allow_missing)
    report = finalize_and_seal(job, allow_missing=allow_missing, threads=threads)
    if as_json:
        print_line(json.dumps(report, indent=1))
    else:
        print_result(job, report)


def complete_on_workers(job: JobHandle, queue: str | None, *, allow_missing: bool) -> None:
    """Queue the blocks on the job's queue and wait until workers have completed them."""
    with (
        queue_of(queue, job.record.job.queue) as executor,
        ProgressDisplay() as display,
    ):
        distribution.distribute(job, executor, allow_missing=allow_missing, emit=display)


def finalize_and_seal(
    job: JobHandle, *, allow_missing: bool = False, threads: int | None = None
) -> dict[str, Any]:
    """Finalize and seal with a progress bar; return the report."""
    with ProgressDisplay() as display:
        return finalize_job(
            job,
            worker=socket.gethostname(),
            allow_missing=allow_missing,
            threads=threads,
            emit=display,
        )


def print_result(job: JobHandle, report: dict[str, Any]) -> None:
    """Print warnings, the state of the output and a summary of the time."""
    output = without_secret(job.folder.output)
    for warning in report["warnings"]:
        print_error(f"chunkq: warning: {warning}")
    if report["missing"]:
        print_text(f"incomplete: {output} ({chunk_count(len(report['missing']))} missing)")
        return
    finalized = report["finalized_blocks"]
    blocks = f"{counted(finalized, 'block', 'blocks')} finalized, " if finalized else ""
    nouns = ("image", "images") if job.record.job.is_image else ("patch", "patches")
    print_text(
        f"complete: {output} ({chunk_count(report['chunks'])}, "
        f"{counted(report['patches'], *nouns)}, {blocks}{duration(report['wall_seconds'])})"
    )
    print_text(time_summary(report))
    if job.record.job.is_image:
        from chunkq.image_report import image_lines, nothing_predicted  # for such jobs only

        for line in image_lines(report["images"]):
            print_text(line)
        if nothing_predicted(report["images"]):
            print_error(
                "chunkq: warning: the table has no row, because no image has a result; fix the "
                "cause and use --overwrite. With max_errors, such a job ends with exit code 3"
            )


def time_summary(report: dict[str, Any]) -> str:
    """Return one line: shares of the stages, device utilization, finalize time, peak memory."""
    seconds = report["seconds"]
    finalizing = seconds["finalize"]
    stages = {s: t for s, t in seconds.items() if s not in ("wait", "finalize")}
    total = sum(stages.values()) or 1.0
    shares = ", ".join(f"{stage} {time / total:.0%}" for stage, time in stages.items())
    busy = [worker["device_busy_share"] for worker in report["workers"].values()]
    average = sum(busy) / len(busy) if busy else 0.0
    return (
        f"time: {shares}; devices busy {average:.0%}; finalizing {finalizing:.1f} s; "
        f"at most {si(report['peak_rss_bytes'], 'B')} per worker"
    )
