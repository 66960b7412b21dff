"""The steps of a run: check, produce, compute and finalize a job."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module

from chunkq.create import CheckedJob, check_job, check_output
from chunkq.errors import ChunkqError, ErrorCode, IncompleteError, QueueError
from chunkq.finalize import finalize_job
from chunkq.job.events import Message, Sink, StageProgress
from chunkq.job.job_file import Job
from chunkq.job.job_folder import JobFolder
from chunkq.job.job_handle import JobHandle, open_job
from chunkq.job.job_path import job_folder_of
from chunkq.job.output_shapes import unknown_heads
from chunkq.job.tasks import chunk_count
from chunkq.paths import without_secret
from chunkq.queue.registry import open_executor
from chunkq.system.interrupts import first_signal_kept
from chunkq.timing.report import Report
from chunkq_producer.check_model import STAGE as CHECK_STAGE
from chunkq_producer.check_model import check_model, complete_job
from chunkq_producer.cluster import Cluster, cluster_for, join_cluster
from chunkq_producer.engine import Engine
from chunkq_producer.job_status import FailureGroup
from chunkq_producer.produce import produce_job
from chunkq_producer.slurm import POLL_SECONDS, Announcement, Step, has_ended, wait_for_leader
from chunkq_producer.worker_command import RunOptions, WorkerCommand, Workers
from chunkq_producer.workers import (
    InterruptedRunError,
    WorkersOfLeader,
    ended_cluster,
    have_failed,
    run_workers,
    start_workers,
    wait_for_workers,
)

MAX_RECOVERIES = 2
"""How often one run computes lost results again."""
STOPPING = (
    "chunkq: stopping after the check of the network and the first chunks; press Ctrl-C again to "
    "stop now"
)


@dataclass(frozen=True)
class RunResult:
    """A complete job and its report. `is_leader` is False on nodes that followed another one."""

    job: JobHandle
    report: Report
    is_leader: bool = True


def run_steps(
    job: Job,
    engine: Engine,
    options: RunOptions,
    early: WorkerCommand | None,
    emit: Sink,
    rerun: str,
    *,
    overwrite: bool,
) -> RunResult:
    """Run a job, with workers that have started `early` if the engine has them.

    `rerun` is what the user does to continue a run that was cut off.
    Raises like `run_job`.
    """
    if unknown_heads(job):
        job = complete_job(job, emit)
    checked = check_job(job)
    check_output(checked, overwrite=overwrite)
    for line in engine.warnings:
        emit(Message(f"chunkq: {line}"))
    for line in checked.warnings:
        emit(Message(f"chunkq: warning: {line}"))
    with cluster_for(job, engine, options.workers) as cluster, _named(cluster, rerun):
        is_interrupted = _check_before_writing(checked, engine, cluster, early, overwrite, emit)
        for recovery in range(MAX_RECOVERIES + 1):
            is_first = recovery == 0
            handle, failures = _compute(
                checked,
                cluster,
                options,
                overwrite and is_first,
                rerun,
                early if is_first else None,
                emit,
                is_interrupted=is_interrupted,
            )
            try:
                report = finalize_job(handle, worker=socket.gethostname(), rerun=rerun, emit=emit)
            except IncompleteError as error:
                is_last = recovery == MAX_RECOVERIES
                _raise_unless_lost(error, failures, is_last=is_last, emit=emit)
            else:
                break
    return RunResult(handle, report)


@contextmanager
def _named(cluster: Cluster, rerun: str) -> Iterator[None]:
    """Replace the error of an unreachable queue if the run's own cluster has ended."""
    try:
        yield
    except QueueError as error:
        if cluster.has_died():
            raise ended_cluster(rerun) from error
        raise


def _check_before_writing(
    job: CheckedJob,
    engine: Engine,
    cluster: Cluster,
    early: WorkerCommand | None,
    overwrite: bool,
    emit: Sink,
) -> bool:
    """Check the queue and the network; return whether a signal came while the network was checked.

    Such a signal is one during the first chunk, which uses what the check has computed. A second
    one ends the run at once. The network of a complete job is not needed, so it is not checked.
    Raises QueueError if the queue cannot be reached, and the errors of the network's check.
    """
    if engine.name != "sqlite":
        with closing(open_executor(cluster.url)) as executor:
            executor.check_ready()
            for line in executor.risks():
                emit(Message(f"chunkq: warning: {line}"))
    if not overwrite and _is_complete(job):
        output = without_secret(job.record.job.output)
        emit(Message(f"chunkq: note: {output} is complete already; use --overwrite to start again"))
        return False
    if early is None and cluster.launches_remote_workers and engine.step is None:
        return False
    with first_signal_kept(lambda: emit(Message(STOPPING))) as received:
        if early is not None:
            emit(StageProgress(CHECK_STAGE))
            early.start_check(job.record)
            import_module("zarr")  # creates the output; imported while the workers load the network
            check = early.check()
        else:
            check = check_model(job.record, emit=emit)
    for line in check.notes:
        emit(Message(f"chunkq: note: {line}"))
    for label, text in check.values.rows():
        emit(Message(f"chunkq: {label} of the network: {text}"))
    for line in check.value_warnings():
        emit(Message(f"chunkq: warning: {line}"))
    return received.is_set()


def _is_complete(job: CheckedJob) -> bool:
    """Return whether the output of a job, which `check_output` has accepted, is complete."""
    folder = JobFolder(job_folder_of(job.record.job.output))
    record = folder.read_record()
    return record is not None and folder.ledger(record.epoch).is_sealed()


def _compute(
    job: CheckedJob,
    cluster: Cluster,
    options: RunOptions,
    overwrite: bool,
    rerun: str,
    early: WorkerCommand | None,
    emit: Sink,
    *,
    is_interrupted: bool,
) -> tuple[JobHandle, Sequence[FailureGroup]]:
    """Queue the remaining chunks and run the workers; return the job and its failures."""
    with closing(open_executor(cluster.url)) as executor:
        produced = produce_job(
            job,
            executor,
            overwrite=overwrite,
            store_queue=not cluster.is_temporary,
            emit=emit,
        )
        if produced.done == produced.chunks and is_interrupted:
            raise InterruptedRunError.of(rerun)
        if produced.done == produced.chunks:
            return produced.job, ()
        cluster.announce()
        failures = run_workers(
            executor,
            produced.job,
            cluster,
            options,
            rerun,
            emit,
            early,
            is_interrupted=is_interrupted,
        )
    for line in map(_failure_line, failures):
        emit(Message(line))
    return produced.job, failures


def _raise_unless_lost(
    error: IncompleteError, failures: Sequence[FailureGroup], *, is_last: bool, emit: Sink
) -> None:
    """Raise the error, with the causes as notes, unless results were lost and are computed again.

    Chunks are lost if they are missing although they did not fail, and did not wait for an input
    that could not be staged.
    """
    failed = {chunk for group in failures for chunk in group.chunks}
    waits = any(group.is_staging for group in failures)
    lost = 0 if waits else len({*error.missing} - failed)
    if is_last or not lost:
        raise error.with_notes(map(_failure_line, failures)) from None
    line = f"chunkq: results of {chunk_count(lost)} are lost; computing them again"
    emit(Message(line))


def follow(job: Job, engine: str, step: Step, options: RunOptions, emit: Sink) -> RunResult:
    """Run workers on this node until the leading process has finished the job.

    A node can be so late that the cluster has ended before it could join; it has nothing to do.
    """
    leader = wait_for_leader(job.output, step)
    handle = open_job(job_folder_of(job.output))
    try:
        _run_workers_of(leader, job, handle, engine, step, options, emit)
    except InterruptedRunError:
        raise
    except ChunkqError:
        if not has_ended(job.output, step):
            raise
    return RunResult(handle, Report(handle.ledger.read_report() or {}), is_leader=False)


def _run_workers_of(
    leader: Announcement,
    job: Job,
    handle: JobHandle,
    engine: str,
    step: Step,
    options: RunOptions,
    emit: Sink,
) -> None:
    """Run workers in the cluster of the leading process until it ends."""

    def is_over() -> bool:
        return has_ended(job.output, step)

    with join_cluster(engine, leader, job) as cluster:
        workers: Workers
        if cluster.launches_remote_workers:
            workers = WorkersOfLeader(lambda: is_over() or cluster.has_died())
        else:
            with closing(open_executor(cluster.url)) as executor:
                workers = start_workers(executor, handle, cluster, options, emit)
        if wait_for_workers(workers, lambda: POLL_SECONDS, is_over):
            raise InterruptedRunError(f"run: interrupted on node {step.node}")
        if cluster.has_died():
            raise ChunkqError(
                f"run: the node {step.node} has left the cluster of this run, because its "
                "processes ended; run the same command to continue",
                code=ErrorCode.CLUSTER_UNAVAILABLE,
            )
        if have_failed(workers):
            raise ChunkqError(
                f"run: a worker on node {step.node} ended with an error; fix the cause above, "
                "then run the same command",
                code=ErrorCode.WORKER_FAILED,
            )


def _failure_line(group: FailureGroup) -> str:
    """Return the cause of some failures and their first chunks; finalizing lists all chunks."""
    return f"failed: {group.names('chunk')}: {group.message}"
