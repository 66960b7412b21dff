"""A whole job on this machine: produce, worker processes of its own, finalize."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

from chunkq.errors import ChunkqError, IncompleteError, JobError, ModelError
from chunkq.executors import QUEUE_VARIABLE, open_executor
from chunkq.executors.base import Executor, WorkerName, WorkerOptions, default_depth
from chunkq.executors.hosted import HostedQueue
from chunkq.finalize import finalize_job
from chunkq.job import Job
from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import folder_of
from chunkq.record import JobRecord
from chunkq.tasks import chunk_name
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
    WorkerCommand,
    Workers,
    WorkerThread,
    wait_for_workers,
)

log = logging.getLogger("chunkq.run")

REFRESH_SECONDS = 0.5
RECOVERIES = 2
"""How often lost results are computed again in one run."""


class InterruptedRunError(ChunkqError):
    """The user stopped the run; nothing is lost."""

    exit_code = 130


class ProgressReporter:
    """Is told how a run goes. This one logs complaints and is quiet besides."""

    def message(self, line: str) -> None:
        """Take a line for the user: something that did not go as asked."""
        log.warning("%s", line)

    def checking_model(self, record: JobRecord) -> ModelCheck:
        """Try the network on one batch."""
        return check_model(record)

    def progress(self, label: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Return what is called with (done, total) while one step goes on."""
        return nullcontext(lambda done, total: None)

    def watching(self) -> AbstractContextManager[Callable[[StatusPoller], None]]:
        """Return what is given a look at the job now and then while workers run."""
        return nullcontext(lambda look: None)


@dataclass(frozen=True)
class RunResult:
    """A job that is complete, and its report; `led` unless another node's process did that."""

    job: JobHandle
    report: dict[str, Any]
    led: bool = True


@dataclass(frozen=True)
class RunOptions:
    """How the user wants the workers of a run: None where the job or the default decides."""

    workers: int | None = None
    gpus: str = "all"
    depth: int | None = None


def run_job(
    job: Job,
    *,
    engine: str | None = None,
    queue: str | None = None,
    wishes: RunOptions,
    overwrite: bool = False,
    teller: ProgressReporter,
) -> RunResult:
    """Do all of a job on an engine's queue; the same call again continues.

    Raises what checking, producing and finalizing raise, ModelError if the network fails its
    trial, ChunkqError if the workers give up, InterruptedRunError if it was told to stop. An
    error that the workers explained carries their words as notes.
    """
    chosen, url = engine_of(engine, job, queue)
    check_machine(job, chosen)
    if chosen == "inprocess" and (wishes.workers or 1) > 1:
        raise JobError(
            f"workers: inprocess:// runs one worker, {wishes.workers} were asked for; leave "
            "workers out, or use another queue"
        )
    step = Step.from_environment() if job.cluster == "slurm" else None
    if step is not None and step.rank > 0:
        return _follow(job, chosen, step, wishes, teller)
    prepared = submit.prepare(job)
    submit.check_existing_job(prepared, overwrite=overwrite)
    for line in unused_sections(job, chosen):
        teller.message(f"chunkq: {line}")
    with cluster_for(job, chosen, url, step, wishes.workers) as cluster:
        if chosen != "sqlite":  # away or refusing, it is said before the network is loaded
            with closing(open_executor(cluster.url)) as executor:
                executor.ready()
        if not cluster.launches_remote_workers or step is not None:
            tried = teller.checking_model(prepared.record)
            if tried.error is not None:
                raise ModelError(tried.error)
        for last in (*[False] * RECOVERIES, True):
            opened, failures = _compute(prepared, cluster, wishes, overwrite, teller)
            causes = [_line(group) for group in failures]
            for line in causes:
                teller.message(line)
            try:
                with teller.progress("finalizing blocks") as meter:
                    report = finalize_job(opened, worker=socket.gethostname(), progress=meter)
            except IncompleteError as error:
                failed = {chunk for group in failures for chunk in group.chunks}
                lost = len({*map(chunk_name, error.missing)} - failed)
                if last or not lost:
                    raise _with_details(error, causes) from None
                teller.message(f"chunkq: results of {lost} chunks are lost; computing them again")
                overwrite = False
            else:
                break
        return RunResult(opened, report)


def _compute(
    prepared: submit.PreparedJob,
    cluster: Cluster,
    wishes: RunOptions,
    overwrite: bool,
    teller: ProgressReporter,
) -> tuple[JobHandle, Sequence[FailureGroup]]:
    """Queue what is left and see it through; return the job and its chunks that failed."""
    with closing(open_executor(cluster.url)) as executor:
        with teller.progress("queueing chunks") as meter:
            made = submit.produce(
                prepared, executor, overwrite=overwrite, remember=not cluster.ends, progress=meter
            )
        opened = open_job(made.folder.path)
        if made.done == made.chunks:
            return opened, ()
        cluster.announce()
        look = StatusPoller(opened, executor)
        again = "the same command" + (" without --overwrite" if overwrite else "")
        with teller.watching() as show:

            def look_and_show() -> float:
                _try_to_show(show, look, teller)
                return look.pause(REFRESH_SECONDS)

            crew = start_workers(executor, opened, cluster, wishes, teller.message)
            if wait_for_workers(crew, look_and_show, cluster.has_died):
                raise InterruptedRunError(f"stopped; {again} continues where it was")
        if cluster.has_died():
            raise ChunkqError(f"the cluster that this run made has died; {again} continues")
        if crew.exit_code not in (0, IncompleteError.exit_code):
            raise _with_details(
                ChunkqError(f"the worker gave up, and said why; {again} continues"), crew.messages
            )
        return opened, look().failures


def launch_cluster_workers(executor: Executor, produced: submit.ProduceResult) -> bool:
    """Have a running cluster's own workers begin with a job, if it asks for them; tells whether.

    Other queues have no workers of their own: `chunkq work` will take the job from them. Raises
    QueueError if the cluster has no workers either.
    """
    opened = open_job(produced.folder.path)
    asked = opened.record.job.cluster == "running" and isinstance(executor, HostedQueue)
    if not asked or produced.done == produced.chunks:
        return False
    config = opened.record.job.dask_config
    cluster = Cluster(executor.url, launches_remote_workers=True, depth=config.threads_per_worker)
    start_workers(executor, opened, cluster, RunOptions(), log.warning)
    return True


def start_workers(
    executor: Executor,
    opened: JobHandle,
    cluster: Cluster,
    wishes: RunOptions,
    say: Callable[[str], None],
) -> Workers:
    """Start or hire those who work on a job: of the user's wishes and the job's, the user's."""
    job = opened.record.job
    depth = wishes.depth or cluster.depth
    if cluster.launches_remote_workers and isinstance(executor, HostedQueue):
        gpu = not is_cpu_only(job)
        depth = depth or default_depth(gpu=gpu)
        hired = executor.launch_remote_workers(
            opened.folder.path, gpu=gpu, depth=depth, nodes=cluster.nodes
        )
        return ClusterWorkers(hired, say)
    if not executor.owns_process:
        return _worker_thread(executor, opened, depth, say)
    options = ["--gpus", "none" if is_cpu_only(job) else wishes.gpus, "--job", opened.folder.output]
    if wishes.workers:
        options += ["-w", str(wishes.workers)]
    elif cluster.per_node:
        options += ["--per-node", str(cluster.per_node)]
    options += ["--depth", str(depth)] if depth else []
    return WorkerCommand(options, {QUEUE_VARIABLE: cluster.url}, say)


def _worker_thread(
    executor: Executor,
    opened: JobHandle,
    depth: int | None,
    say: Callable[[str], None],
) -> Workers:
    """Start the one worker that shares this process."""
    device = opened.record.job.model.device
    worker = WorkerName.new(device).name
    depth = depth or default_depth(gpu=device == "cuda")
    options = WorkerOptions(worker, depth=depth, burst=True, job=opened.folder.path)
    return WorkerThread(executor, options, say)


def _follow(
    job: Job, engine: str, step: Step, wishes: RunOptions, teller: ProgressReporter
) -> RunResult:
    """Work for the process that leads, until it says that all is done."""
    leader = wait_for_leader(job.output, step)
    opened = open_job(folder_of(job.output))

    def is_over() -> bool:
        return has_ended(job.output, step)

    with join_cluster(engine, leader, job) as cluster:
        if cluster is None:
            while not is_over():
                time.sleep(POLL_SECONDS)
        else:
            with closing(open_executor(cluster.url)) as executor:
                crew = start_workers(executor, opened, cluster, wishes, teller.message)
            if wait_for_workers(crew, lambda: POLL_SECONDS, is_over):
                raise InterruptedRunError("stopped")
            if crew.exit_code not in (0, IncompleteError.exit_code) and not is_over():
                raise ChunkqError(f"the worker on node {step.node} gave up, and said why")
    return RunResult(opened, opened.ledger.read_report() or {}, led=False)


def _line(group: FailureGroup) -> str:
    """Return what went wrong with some chunks in one line; finalizing then lists them."""
    chunks = ", ".join(group.chunks[:6]) + (" …" if len(group.chunks) > 6 else "")
    return f"failed: chunk {chunks}: {group.message}"


def _with_details(error: ChunkqError, lines: Sequence[str]) -> ChunkqError:
    for line in lines:
        error.add_note(line)
    return error


def _try_to_show(
    show: Callable[[StatusPoller], None], look: StatusPoller, teller: ProgressReporter
) -> None:
    """Show how far the job is; if it cannot be seen just now, the work goes on all the same."""
    try:
        show(look)
    except Exception as error:
        reason = " ".join(str(error).split())
        teller.message(f"progress cannot be seen: {reason}")
