"""Produce a job: create it, then queue its remaining chunks."""

from __future__ import annotations

from chunkq.create import CheckedJob, create_job, stored_job
from chunkq.enqueue import EnqueueResult, check_not_running, enqueue
from chunkq.job.events import Message, Sink, ignore, write_log
from chunkq.job.job_path import job_folder_of
from chunkq.job.mask_source import nothing_inside
from chunkq.queue.backends.hosted.hosted import HostedQueue
from chunkq.queue.contract.executor import Executor
from chunkq_producer.cluster import Cluster
from chunkq_producer.worker_command import RunOptions
from chunkq_producer.workers import start_workers


def produce_job(
    job: CheckedJob,
    executor: Executor,
    *,
    resume: bool = False,
    overwrite: bool = False,
    store_queue: bool = True,
    emit: Sink = ignore,
) -> EnqueueResult:
    """Create the job and its output, or continue it; then queue every chunk without a commit.

    With `store_queue`, the job record contains the URL of the queue for later commands. Raises
    the errors of `create_job`, and JobError if a worker runs the job that is to be replaced.
    """
    replaced = None
    if overwrite:
        folder = job_folder_of(job.record.job.output)
        replaced = stored_job(folder)
        check_not_running(folder, replaced, executor)
    queue = executor.url if store_queue else None
    handle = create_job(job, queue=queue, resume=resume, overwrite=overwrite)
    result = enqueue(handle, executor, replaced=replaced, emit=emit)
    if not result.chunks:
        keys = job.record.job
        line = nothing_inside(keys.fill_value, has_mask=keys.mask is not None)
        emit(Message(f"chunkq: warning: {line}"))
    return result


def launch_cluster_workers(executor: Executor, produced: EnqueueResult) -> bool:
    """Start remote workers for a job with `cluster: running`; return whether any were started.

    Other jobs need `chunkq work`. Raises QueueError if the cluster has no worker processes.
    """
    job = produced.job.record.job
    if produced.done == produced.chunks or job.cluster != "running":
        return False
    if not isinstance(executor, HostedQueue):
        return False
    depth = job.dask_config.threads_per_worker
    cluster = Cluster(executor.url, launches_remote_workers=True, depth=depth)
    start_workers(executor, produced.job, cluster, RunOptions(), write_log)
    return True
