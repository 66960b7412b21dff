"""The commands as functions: typed results, errors as exceptions, nothing printed."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import override

from chunkq.errors import QueueError
from chunkq.executors import open_executor, queue_url
from chunkq.executors.base import Executor
from chunkq.finalize import finalize_job
from chunkq.job import Job, load_job
from chunkq.job_handle import open_job
from chunkq.job_path import output_path
from chunkq.ledger import folder_of
from chunkq_producer import submit
from chunkq_producer.cluster import queue_of
from chunkq_producer.distribute import distribute as have_workers_complete
from chunkq_producer.job_status import JobStatus, StatusPoller, job_status
from chunkq_producer.runner import ProgressReporter, RunOptions, launch_cluster_workers, run_job
from chunkq_producer.submit import ProduceResult

JobSource = str | Path | Mapping[str, Any]
"""A job file, or a mapping with the same keys."""
Place = str | Path
Progress = Callable[[int, int], None]


def _quiet(done: int, total: int) -> None:
    pass


def run(
    job: JobSource,
    *,
    input: Place | None = None,
    output: Place | None = None,
    executor: str | None = None,
    queue: str | None = None,
    workers: int | None = None,
    gpus: str = "all",
    depth: int | None = None,
    overwrite: bool = False,
    progress: Callable[[JobStatus], None] | None = None,
) -> dict[str, Any]:
    """Produce, work and finalize a job on this machine, with worker processes; as `chunkq run`.

    Arguments are the command's options; `progress` is called with the job's status now and then
    while workers run, in this thread. Returns the report that `finalize` writes. The same call
    again continues. What workers complain of goes to the log `chunkq.run`.

    Raises JobError or StoreError if the job cannot be done as written, ModelError if the network
    cannot be loaded, IncompleteError with the list of chunks that failed (their causes are its
    notes, and in `status`), InterruptedRunError when stopped by Ctrl-C or SIGTERM: called from
    the main thread, chunks in flight are finished first.
    """
    checked = _load(job, input, output)
    return run_job(
        checked,
        engine=executor,
        queue=queue,
        wishes=RunOptions(workers, gpus, depth),
        overwrite=overwrite,
        teller=_StatusReporter(progress),
    ).report


def produce(
    job: JobSource,
    *,
    input: Place | None = None,
    output: Place | None = None,
    queue: str | Executor | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = _quiet,
) -> ProduceResult:
    """Check a job, write its job folder, queue every chunk that is not done; as the command does.

    `queue` is a URL, or an open queue, which stays open; else CHUNKQ_QUEUE, the job's own or the
    embedded one. `progress` is called with (chunks queued, chunks to queue). Raises JobError or
    StoreError, before anything is written, if the job cannot be done as written or something
    else is in the output's place; QueueError if the queue is away.
    """
    checked = _load(job, input, output)
    prepared = submit.prepare(checked)
    submit.check_existing_job(prepared, resume=resume, overwrite=overwrite)
    url = queue if isinstance(queue, Executor) else queue_of(checked, queue)
    with _queue(url, None) as executor:
        made = submit.produce(
            prepared, executor, resume=resume, overwrite=overwrite, progress=progress
        )
        launch_cluster_workers(executor, made)
    return made


def status(output: Place, *, queue: str | None = None) -> JobStatus:
    """Return how far the job of an output is. Raises MissingJobError where there is none.

    A queue that cannot be reached is no error: its figures are None, `queue_problem` says why.
    """
    job = open_job(_folder(output))
    try:
        with _queue(queue, job.record.job.queue) as executor:
            return job_status(job, executor)
    except QueueError as error:
        return job_status(job, None, str(error))


def finalize(
    output: Place,
    *,
    allow_missing: bool = False,
    distribute: bool = False,
    queue: str | None = None,
    progress: Progress = _quiet,
) -> dict[str, Any]:
    """Complete the blocks that several chunks share and seal the output; returns the report.

    With `distribute` the workers on the job's queue complete the blocks. `progress` is called
    with (blocks done, blocks in all). Raises IncompleteError with the list of chunks if some are
    not computed, unless `allow_missing`; MissingJobError where there is no job.
    """
    job = open_job(_folder(output))
    if distribute:
        with _queue(queue, job.record.job.queue) as executor:
            have_workers_complete(job, executor, allow_missing=allow_missing, progress=progress)
    return finalize_job(
        job, worker=socket.gethostname(), allow_missing=allow_missing, progress=progress
    )


class _StatusReporter(ProgressReporter):
    """Passes the job's status on to a function, if there is one."""

    def __init__(self, progress: Callable[[JobStatus], None] | None) -> None:
        self._progress = progress

    @override
    @contextmanager
    def watching(self) -> Iterator[Callable[[StatusPoller], None]]:
        progress = self._progress
        yield (lambda look: None) if progress is None else (lambda look: progress(look()))


def _load(job: JobSource, input: Place | None, output: Place | None) -> Job:
    return load_job(
        job,
        input=None if input is None else str(input),
        output=None if output is None else str(output),
    )


def _folder(output: Place) -> str:
    """Return the path of an output's job folder."""
    return folder_of(output_path(str(output), Path.cwd()))


@contextmanager
def _queue(given: str | Executor | None, of_job: str | None) -> Iterator[Executor]:
    if isinstance(given, Executor):
        yield given
        return
    with closing(open_executor(queue_url(given, of_job))) as executor:
        yield executor
