"""`chunkq verify`."""

from __future__ import annotations

import json
import time

import click

from chunkq.progress_bar import ProgressDisplay
from chunkq.system.standard_output import print_line, print_text
from chunkq.verify import verify_job
from chunkq_producer.commands.options import (
    job_at,
    json_option,
    output_argument,
    queue_of,
    queue_option,
)
from chunkq_producer.verify_report import VerifyReport


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
        report = VerifyReport(job, verify_job(job, display), time.monotonic() - started)
        if repair and report.needs_queue:
            # The queue is opened first: without one, nothing is changed.
            with queue_of(queue, job.record.job.queue) as executor:
                executor.check_ready()
                report.repair(executor, display)
        elif repair:
            report.repair(None, display)
    if as_json:
        print_line(json.dumps(report.as_dict(), indent=1))
    else:
        for line in report.lines():
            print_text(line)
    context.exit(report.exit_code)
