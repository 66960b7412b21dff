"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chunkq.errors import MissingJobError
from chunkq.job.job_path import job_folder_of, output_path
from chunkq.queue.contract.executor import Executor
from chunkq.queue.registry import QUEUE_VARIABLE, open_shared, queue_url

if TYPE_CHECKING:
    from chunkq.job.job_folder import JobFolder
    from chunkq.job.job_handle import JobHandle

input_option = click.option(
    "-i", "--input", "input_", help="Input volume; replaces the job file's."
)
output_option = click.option("-o", "--output", help="Output path; replaces the job file's.")
queue_option = click.option(
    "--queue", help=f"Queue URL (default: ${QUEUE_VARIABLE}, then the job's, then a local file)."
)
output_argument = click.argument("output")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def job_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Pass the path of the job file as `job`: the argument JOB, or `-c` as for SPINN's command."""

    @click.argument("job", type=click.Path(path_type=Path), required=False)
    @click.option(
        "-c", "--config", type=click.Path(path_type=Path), help="The job file, in place of JOB."
    )
    @wraps(command)
    def with_job(*, job: Path | None, config: Path | None, **options: Any) -> None:
        if job is not None and config is not None:
            raise click.UsageError(f"found two job files, {job} and -c {config}; use one of them")
        if job is None and config is None:
            raise click.UsageError("Missing argument 'JOB', the path of a job file.")
        command(job=job or config, **options)

    return with_job


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
