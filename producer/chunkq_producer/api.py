"""Python API of the commands: typed results, errors as exceptions, no output on the terminal."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from chunkq.create import check_job, check_output
from chunkq.enqueue import EnqueueResult
from chunkq.errors import ArgumentError, QueueError
from chunkq.finalize import finalize_job
from chunkq.job.events import Event, Sink, fan_out, ignore, progress_sink, write_log
from chunkq.job.job_file import Job
from chunkq.job.job_handle import open_job
from chunkq.job.job_path import job_folder_of, output_path
from chunkq.job.job_reading import load_job
from chunkq.queue.contract.executor import Executor
from chunkq.queue.registry import open_executor, queue_url
from chunkq.timing.report import Report
from chunkq.verify import verify_job
from chunkq_producer.check_model import complete_job
from chunkq_producer.distribute import distribute as finalize_on_workers
from chunkq_producer.engine import queue_of
from chunkq_producer.job_plan import JobPlan, plan_job, with_model_check
from chunkq_producer.job_status import JobStatus, WorkersRunning, job_status
from chunkq_producer.produce import launch_cluster_workers, produce_job
from chunkq_producer.reports.job_report import JobReport, load_job_report
from chunkq_producer.runner import run_job
from chunkq_producer.verify_report import VerifyReport
from chunkq_producer.worker_command import RunOptions

JobSource = str | Path | Mapping[str, Any]
"""A job file, or a mapping with the same keys."""
PathOrUrl = str | Path
Progress = Callable[[int, int], None]


def _ignore_progress(done: int, total: int) -> None:
    pass


def run(
    job: JobSource,
    *,
    input: PathOrUrl | None = None,
    output: PathOrUrl | None = None,
    executor: str | None = None,
    queue: str | None = None,
    workers: int | None = None,
    gpus: str = "all",
    depth: int | None = None,
    overwrite: bool = False,
    progress: Callable[[JobStatus], None] | None = None,
) -> Report:
    """Produce, compute and finalize a job with worker processes on this machine.

    Equivalent to `chunkq run`; the arguments are the options of that command. While workers run,
    `progress` is called regularly with the job's status, in the calling thread. Returns the
    report that `finalize` writes, a dict with a short representation; `chunkq.report` returns it
    with types. An interrupted run continues with the same call. Warnings of workers are logged to
    `chunkq.run`.

    Raises JobError or StoreError if the job is invalid, ModelError if the network cannot be
    loaded, IncompleteError with the failed chunks (their causes are in its notes and in
    `status`), and InterruptedRunError on Ctrl-C or SIGTERM. In the main thread, chunks in flight
    are finished before InterruptedRunError is raised.
    """
    return run_job(
        _load(job, input, output),
        engine=executor,
        queue=queue,
        options=RunOptions(workers, gpus, depth),
        overwrite=overwrite,
        emit=write_log if progress is None else fan_out(write_log, _status_sink(progress)),
    ).report


def produce(
    job: JobSource,
    *,
    input: PathOrUrl | None = None,
    output: PathOrUrl | None = None,
    queue: str | Executor | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = _ignore_progress,
) -> EnqueueResult:
    """Check a job, write its job folder and queue every chunk that is not computed.

    Equivalent to `chunkq produce`. `queue` is a URL or an open queue, which stays open. It
    defaults to CHUNKQ_QUEUE, then the queue of the job, then the embedded queue. `progress` is
    called with (chunks queued, chunks to queue).

    Raises JobError or StoreError, before anything is written, if the job is invalid or the output
    path holds something else, and QueueError if the queue cannot be reached.
    """
    loaded_job = complete_job(_load(job, input, output))
    checked = check_job(loaded_job)
    check_output(checked, resume=resume, overwrite=overwrite)
    queue_or_url = queue if isinstance(queue, Executor) else queue_of(loaded_job, queue)
    with _queue(queue_or_url, None) as executor:
        result = produce_job(
            checked, executor, resume=resume, overwrite=overwrite, emit=progress_sink(progress)
        )
        launch_cluster_workers(executor, result)
    return result


def plan(
    job: JobSource,
    *,
    input: PathOrUrl | None = None,
    output: PathOrUrl | None = None,
    check_model: bool = False,
    depth: int | None = None,
) -> JobPlan:
    """Check a job and return what it computes and costs. Write nothing.

    Equivalent to `chunkq plan`: `rows()` has its lines, and `as_dict()` what `--json` prints. With
    `check_model`, the network runs on a few patches and chunks in another process, which measures
    time and memory. `depth` is the number of chunks in flight in a worker process.

    Raises JobError or StoreError if the job is invalid, and ModelError if the network cannot be
    used.
    """
    planned = plan_job(_load(job, input, output), depth=depth)
    return with_model_check(planned) if check_model else planned


def report(output: PathOrUrl) -> JobReport:
    """Return how the workers of an output's job spent their time, compared with the plan.

    Equivalent to `chunkq report`; `as_dict()` has what `--json` prints. For a complete output the
    figures are those of `report.json`, else those of the chunks so far. Raises MissingJobError if
    there is no job.
    """
    return load_job_report(open_job(_folder(output)))


def status(output: PathOrUrl, *, queue: str | None = None) -> JobStatus:
    """Return the status of an output's job. Raises MissingJobError if there is no job.

    An unreachable queue is not an error: its figures are None and `queue_problem` has the reason.
    """
    job = open_job(_folder(output))
    try:
        with _queue(queue, job.record.job.queue) as executor:
            return job_status(job, executor)
    except QueueError as error:
        return job_status(job, None, str(error))


def finalize(
    output: PathOrUrl,
    *,
    allow_missing: bool = False,
    distribute: bool = False,
    queue: str | None = None,
    progress: Progress = _ignore_progress,
) -> Report:
    """Complete the blocks that several chunks contribute to, seal the output, return the report.

    With `distribute`, the workers on the job's queue complete the blocks. `progress` is called
    with (blocks done, blocks to finalize). Raises IncompleteError with the missing chunks unless
    `allow_missing`, and MissingJobError if there is no job.
    """
    job = open_job(_folder(output))
    emit = progress_sink(progress)
    if distribute:
        with _queue(queue, job.record.job.queue) as executor:
            finalize_on_workers(job, executor, allow_missing=allow_missing, emit=emit)
    return finalize_job(job, worker=socket.gethostname(), allow_missing=allow_missing, emit=emit)


def verify(
    output: PathOrUrl,
    *,
    repair: bool = False,
    queue: str | Executor | None = None,
    progress: Progress = _ignore_progress,
) -> dict[str, Any]:
    """Compare every stored object of an output with its checksum; return what `--json` prints.

    Equivalent to `chunkq verify`. The key `state` is `sound`, `incomplete`, `damaged` or
    `repaired`. With `repair`, metadata are restored and chunks are put on the queue, as for
    `produce`. `progress` is called with (tasks verified, tasks). Raises MissingJobError if there is
    no job, and before anything is changed QueueError if the queue cannot be reached, and
    ChunkReadError if an input is missing or was replaced.
    """
    job, started, emit = open_job(_folder(output)), time.monotonic(), progress_sink(progress)
    report = VerifyReport(job, verify_job(job, emit), time.monotonic() - started)
    if repair and report.needs_queue:
        with _queue(queue, job.record.job.queue) as executor:
            report.repair(executor, ignore)
    elif repair:
        report.repair(None, ignore)
    return report.as_dict()


def _status_sink(function: Callable[[JobStatus], None]) -> Sink:
    """Return a sink that calls a user's function with the job's status while workers run."""

    def emit(event: Event) -> None:
        if isinstance(event, WorkersRunning):
            function(event.poller())

    return emit


def _load(job: JobSource, input: PathOrUrl | None, output: PathOrUrl | None) -> Job:
    return load_job(
        job,
        input=None if input is None else _path("input", input),
        output=None if output is None else _path("output", output),
    )


def _path(name: str, value: PathOrUrl) -> str:
    """Return the path or URL of an argument; raise ArgumentError for a value of another type."""
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(f"{name}: expected a path or a URL, found {type(value).__name__}")
    return os.fspath(value)


def _folder(output: PathOrUrl) -> str:
    """Return the path of an output's job folder."""
    return job_folder_of(output_path(_path("output", output), Path.cwd()))


@contextmanager
def _queue(queue: str | Executor | None, job_queue: str | None) -> Iterator[Executor]:
    """Yield an open queue: the one passed, or one that is opened and closed."""
    if isinstance(queue, Executor):
        yield queue
        return
    with closing(open_executor(queue_url(queue, job_queue))) as executor:
        yield executor
