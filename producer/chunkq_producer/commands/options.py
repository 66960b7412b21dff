"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click

from chunkq.executors import QUEUE_VARIABLE, open_shared, queue_url
from chunkq.executors.base import Executor
from chunkq.job_handle import JobHandle, open_job
from chunkq.job_path import output_path
from chunkq.ledger import JobFolder, folder_of

job_argument = click.argument("job", type=click.Path(path_type=Path))
input_option = click.option("-i", "--input", "input_", help="Volume to read, instead of the job's.")
output_option = click.option("-o", "--output", help="Output to write, instead of the job's.")
queue_option = click.option(
    "--queue", help=f"Queue URL; else ${QUEUE_VARIABLE}, else the embedded queue."
)
output_argument = click.argument("output")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@contextmanager
def queue_of(given: str | None, of_job: str | None = None) -> Iterator[Executor]:
    """Connect to the queue; close the connection at the end."""
    with closing(open_shared(queue_url(given, of_job))) as executor:
        yield executor


def folder_at(output: str) -> JobFolder:
    """Return the job folder of an output path as the user wrote it."""
    return JobFolder(folder_of(output_path(output, Path.cwd())))


def job_at(output: str) -> JobHandle:
    """Open the job of an output path; raises MissingJobError where there is none."""
    return open_job(folder_at(output).path)
