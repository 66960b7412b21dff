"""Run a job from start to end: produce, start workers, finalize."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

from chunkq.errors import ChunkqError, ErrorCode, IncompleteError, JobError, ModelError
from chunkq.executors import QUEUE_VARIABLE, open_executor
from chunkq.executors.base import Executor, WorkerName, WorkerOptions, default_depth
from chunkq.executors.hosted import HostedQueue
from chunkq.finalize import finalize_job
from chunkq.job import Job
from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import job_folder_of
from chunkq.record import JobRecord
from chunkq.tasks import chunk_count, chunk_name
from chunkq_producer import submit
from chunkq_producer.cluster import (
    Cluster,
    cluster_for,
    engine_of,
    is_cpu_only,
    join_cluster,
    unused_sections,
)
from chunkq_producer.job_status import FailureGroup, StatusPoller
from chunkq_producer.machine import check_machine
from chunkq_producer.model_check import ModelCheck, check_model
from chunkq_producer.slurm import POLL_SECONDS, Step, has_ended, wait_for_leader
from chunkq_producer.workers import (
    ClusterWorkers,
    PrintLine,
    WorkerCommand,
    Workers,
    WorkerThread,
    wait_for_workers,
)

log = logging.getLogger("chunkq.run")

REFRESH_SECONDS = 0.5
MAX_RECOVERIES = 2
"""How often one run computes lost results again."""


class InterruptedRunError(ChunkqError):
    """A signal stopped the run. Computed chunks are kept."""

    exit_code = 130
    code = ErrorCode.INTERRUPTED


class ProgressReporter:
    """Receive the progress of a run. This base class logs warnings and shows no progress."""

    def message(self, line: str) -> None:
        """Report a warning or an error line of a worker."""
        log.warning("%s", line)

    def check_model(self, record: JobRecord) -> ModelCheck:
        """Run the network on one batch."""
        return check_model(record)

    def progress(self, label: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Return a context with a function that is called with (done, total) during one step."""
        return nullcontext(lambda done, total: None)

    def watch(self) -> AbstractContextManager[Callable[[StatusPoller], None]]:
        """Return a context with a function that is called regularly while workers run."""
        return nullcontext(lambda poller: None)


@dataclass(frozen=True)
class RunResult:
    """A complete job and its report. `is_leader` is False on nodes that followed another one."""

    job: JobHandle
    report: dict[str, Any]
    is_leader: bool = True


@dataclass(frozen=True)
class RunOptions:
    """The user's options for the workers of a run. None selects the job's value or a default."""

    workers: int | None = None
    gpus: str = "all"
    depth: int | None = None


def run_job(
    job: Job,
    *,
    engine: str | None = None,
    queue: str | None = None,
    options: RunOptions,
    overwrite: bool = False,
    reporter: ProgressReporter,
) -> RunResult:
    """Produce, compute and finalize a job. An interrupted run continues with the same call.

    Raises the errors of checking, producing and finalizing a job, ModelError if the network fails
    its check, ChunkqError if workers end with an error, and InterruptedRunError after a signal.
    Error lines of workers are notes of the raised error.
    """
    engine, url = engine_of(engine, job, queue)
    check_machine(job, engine)
    if engine == "inprocess" and (options.workers or 1) > 1:
        raise JobError(
            f"workers: the queue inprocess:// runs 1 worker, found {options.workers}; remove "
            "workers or use another queue"
        )
    step = Step.from_environment() if job.cluster == "slurm" else None
    if step is not None and step.rank > 0:
        return _follow(job, engine, step, options, reporter)
    prepared = submit.prepare(job)
    submit.check_existing_job(prepared, overwrite=overwrite)
    for line in unused_sections(job, engine):
        reporter.message(f"chunkq: {line}")
    with cluster_for(job, engine, url, step, options.workers) as cluster:
        if engine != "sqlite":  # report an unreachable server before loading the network
            with closing(open_executor(cluster.url)) as executor:
                executor.check_ready()
        if not cluster.launches_remote_workers or step is not None:
            check = reporter.check_model(prepared.record)
            if check.error is not None:
                raise ModelError(check.error)
        for is_last in (*[False] * MAX_RECOVERIES, True):
            handle, failures = _compute(prepared, cluster, options, overwrite, reporter)
            causes = [_failure_line(group) for group in failures]
            for line in causes:
                reporter.message(line)
            try:
                with reporter.progress("finalizing blocks") as progress:
                    report = finalize_job(handle, worker=socket.gethostname(), progress=progress)
            except IncompleteError as error:
                failed = {chunk for group in failures for chunk in group.chunks}
                lost = len({*map(chunk_name, error.missing)} - failed)
                if is_last or not lost:
                    raise _with_notes(error, causes) from None
                reporter.message(
                    f"chunkq: results of {chunk_count(lost)} are lost; computing them again"
                )
                overwrite = False
            else:
                break
        return RunResult(handle, report)


def _compute(
    prepared: submit.PreparedJob,
    cluster: Cluster,
    options: RunOptions,
    overwrite: bool,
    reporter: ProgressReporter,
) -> tuple[JobHandle, Sequence[FailureGroup]]:
    """Queue the remaining chunks and wait for the workers; return the job and its failures."""
    with closing(open_executor(cluster.url)) as executor:
        with reporter.progress("queueing chunks") as progress:
            result = submit.produce(
                prepared,
                executor,
                overwrite=overwrite,
                store_queue=not cluster.is_temporary,
                progress=progress,
            )
        handle = open_job(result.folder.path)
        if result.done == result.chunks:
            return handle, ()
        cluster.announce()
        poller = StatusPoller(handle, executor)
        rerun = "run the same command" + (" without --overwrite" if overwrite else "")
        with reporter.watch() as show:

            def poll() -> float:
                _try_to_show(show, poller, reporter)
                return poller.pause(REFRESH_SECONDS)

            workers = start_workers(executor, handle, cluster, options, reporter.message)
            if wait_for_workers(workers, poll, cluster.has_died):
                raise InterruptedRunError(f"run: interrupted; {rerun} to continue")
        if cluster.has_died():
            raise ChunkqError(
                f"run: the cluster that this run started has ended; {rerun} to continue",
                code=ErrorCode.CLUSTER_UNAVAILABLE,
            )
        if workers.exit_code not in (0, IncompleteError.exit_code):
            raise _with_notes(
                ChunkqError(
                    f"run: a worker ended with an error; fix the cause above, then {rerun}",
                    code=ErrorCode.WORKER_FAILED,
                ),
                workers.messages,
            )
        return handle, poller().failures


def launch_cluster_workers(executor: Executor, produced: submit.ProduceResult) -> bool:
    """Start remote workers for a job with `cluster: running`; return whether any were started.

    Other jobs need `chunkq work`. Raises QueueError if the cluster has no worker processes.
    """
    handle = open_job(produced.folder.path)
    job = handle.record.job
    if produced.done == produced.chunks or job.cluster != "running":
        return False
    if not isinstance(executor, HostedQueue):
        return False
    depth = job.dask_config.threads_per_worker
    cluster = Cluster(executor.url, launches_remote_workers=True, depth=depth)
    start_workers(executor, handle, cluster, RunOptions(), log.warning)
    return True


def start_workers(
    executor: Executor,
    handle: JobHandle,
    cluster: Cluster,
    options: RunOptions,
    print_line: PrintLine,
) -> Workers:
    """Start the workers of a job. The user's options have precedence over the job's."""
    job = handle.record.job
    depth = options.depth or cluster.depth
    if cluster.launches_remote_workers and isinstance(executor, HostedQueue):
        gpu = not is_cpu_only(job)
        depth = depth or default_depth(gpu=gpu)
        remote_workers = executor.launch_remote_workers(
            handle.folder.path, gpu=gpu, depth=depth, nodes=cluster.nodes
        )
        return ClusterWorkers(remote_workers, print_line)
    if not executor.owns_process:
        return _worker_thread(executor, handle, depth, print_line)
    gpus = "none" if is_cpu_only(job) else options.gpus
    arguments = ["--gpus", gpus, "--job", handle.folder.output]
    if options.workers:
        arguments += ["-w", str(options.workers)]
    elif cluster.per_node:
        arguments += ["--per-node", str(cluster.per_node)]
    arguments += ["--depth", str(depth)] if depth else []
    return WorkerCommand(arguments, {QUEUE_VARIABLE: cluster.url}, print_line)


def _worker_thread(
    executor: Executor, handle: JobHandle, depth: int | None, print_line: PrintLine
) -> Workers:
    """Start the worker of a queue that exists only in this process."""
    device = handle.record.job.model.device
    worker = WorkerName.new(device).name
    depth = depth or default_depth(gpu=device == "cuda")
    options = WorkerOptions(worker, depth=depth, burst=True, job=handle.folder.path)
    return WorkerThread(executor, options, print_line)


def _follow(
    job: Job, engine: str, step: Step, options: RunOptions, reporter: ProgressReporter
) -> RunResult:
    """Run workers on this node until the leading process has finished the job."""
    leader = wait_for_leader(job.output, step)
    handle = open_job(job_folder_of(job.output))

    def is_over() -> bool:
        return has_ended(job.output, step)

    with join_cluster(engine, leader, job) as cluster:
        if cluster is None:
            while not is_over():
                time.sleep(POLL_SECONDS)
        else:
            with closing(open_executor(cluster.url)) as executor:
                workers = start_workers(executor, handle, cluster, options, reporter.message)
            if wait_for_workers(workers, lambda: POLL_SECONDS, is_over):
                raise InterruptedRunError(f"run: interrupted on node {step.node}")
            if workers.exit_code not in (0, IncompleteError.exit_code) and not is_over():
                raise ChunkqError(
                    f"run: a worker on node {step.node} ended with an error; fix the cause above, "
                    "then run the same command",
                    code=ErrorCode.WORKER_FAILED,
                )
    return RunResult(handle, handle.ledger.read_report() or {}, is_leader=False)


def _failure_line(group: FailureGroup) -> str:
    """Return the cause of some failures and their first chunks; finalizing lists all chunks."""
    chunks = ", ".join(group.chunks[:6]) + (" …" if len(group.chunks) > 6 else "")
    return f"failed: chunk {chunks}: {group.message}"


def _with_notes(error: ChunkqError, lines: Sequence[str]) -> ChunkqError:
    for line in lines:
        error.add_note(line)
    return error


def _try_to_show(
    show: Callable[[StatusPoller], None], poller: StatusPoller, reporter: ProgressReporter
) -> None:
    """Show the status. A failure to read it must not stop the run."""
    try:
        show(poller)
    except Exception as error:
        reason = " ".join(str(error).split())
        reporter.message(f"chunkq: the progress cannot be read: {reason}; the run continues")
