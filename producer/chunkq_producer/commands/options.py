"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chunkq.errors import MissingJobError
from chunkq.job.job_path import job_folder_of, output_path
from chunkq.queue.contract.executor import Executor
from chunkq.queue.registry import QUEUE_VARIABLE, open_shared, queue_url

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from chunkq.job.job_folder import JobFolder
    from chunkq.job.job_handle import JobHandle


def complete_folders(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell complete a folder, such as an output."""
    from click.shell_completion import CompletionItem  # for shells only

    return [CompletionItem(incomplete, type="dir")]


job_argument = click.argument("job", type=click.Path(path_type=Path), required=False)
config_option = click.option(
    "-c", "--config", type=click.Path(path_type=Path),
    help="The job file, in place of JOB, as for SPINN's command.",
)  # fmt: skip
input_option = click.option(
    "-i", "--input", "input_", help="Input volume; replaces the job file's."
)
output_option = click.option(
    "-o", "--output", help="Output path; replaces the job file's.", shell_complete=complete_folders
)
queue_option = click.option(
    "--queue", help=f"Queue URL (default: ${QUEUE_VARIABLE}, then the job's, then a local file)."
)
output_argument = click.argument("output", shell_complete=complete_folders)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@contextmanager
def queue_of(queue: str | None, job_queue: str | None = None) -> Iterator[Executor]:
    """Yield a connection to the queue; close it at the end."""
    with closing(open_shared(queue_url(queue, job_queue))) as executor:
        yield executor


def folder_at(output: str) -> JobFolder:
    """Return the job folder of an output path; relative paths start at the current folder.

    Raises MissingJobError if the path is that of a job file.
    """
    from chunkq.job.job_folder import JobFolder  # imports NumPy, which `jobs` does not need

    if output.endswith((".yaml", ".yml", ".json")) and Path(output).is_file():
        raise MissingJobError(
            f"{output}: found a job file; expected the path of an output, such as labels.zarr"
        )
    return JobFolder(job_folder_of(output_path(output, Path.cwd())))


def job_at(output: str) -> JobHandle:
    """Open the job of an output path. Raises MissingJobError if there is none."""
    from chunkq.job.job_handle import open_job

    return open_job(folder_at(output).path)
