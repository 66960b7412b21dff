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
from chunkq.executors.base import Executor, Shift, WorkerName, usual_depth
from chunkq.executors.hosted import HostedQueue
from chunkq.finalize import finalize_job
from chunkq.job import Job
from chunkq.ledger import folder_of
from chunkq.opened import OpenJob, open_job
from chunkq.record import JobRecord
from chunkq.tasks import chunk_name
from chunkq_producer import submit
from chunkq_producer.cluster import Cluster, cluster_for, engine_of, on_cpu, part_of, unused
from chunkq_producer.crew import Command, Crew, Hands, WorkerThread, see_through
from chunkq_producer.machine import check_machine
from chunkq_producer.probe import Probe, probe
from chunkq_producer.slurm import LOOK_SECONDS, Step, has_ended, wait_for_leader
from chunkq_producer.watch import FailureGroup, Look

log = logging.getLogger("chunkq.run")

REFRESH_SECONDS = 0.5
RECOVERIES = 2
"""How often lost results are computed again in one run."""


class InterruptedRunError(ChunkqError):
    """The user stopped the run; nothing is lost."""

    exit_code = 130


class Teller:
    """Is told how a run goes. This one logs complaints and is quiet besides."""

    def say(self, line: str) -> None:
        """Take a line for the user: something that did not go as asked."""
        log.warning("%s", line)

    def try_network(self, record: JobRecord) -> Probe:
        """Try the network on one batch."""
        return probe(record)

    def meter(self, label: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Return what is called with (done, total) while one step goes on."""
        return nullcontext(lambda done, total: None)

    def looking(self) -> AbstractContextManager[Callable[[Look], None]]:
        """Return what is given a look at the job now and then while workers run."""
        return nullcontext(lambda look: None)


@dataclass(frozen=True)
class Ran:
    """A job that is complete, and its report; `led` unless another node's process did that."""

    job: OpenJob
    report: dict[str, Any]
    led: bool = True


@dataclass(frozen=True)
class Wishes:
    """How the user wants the workers of a run: None where the job or the default decides."""

    workers: int | None = None
    gpus: str = "all"
    depth: int | None = None


def run_job(
    job: Job,
    *,
    engine: str | None = None,
    queue: str | None = None,
    wishes: Wishes,
    overwrite: bool = False,
    teller: Teller,
) -> Ran:
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
    step = Step.here() if job.cluster == "slurm" else None
    if step is not None and step.rank > 0:
        return _follow(job, chosen, step, wishes, teller)
    prepared = submit.prepare(job)
    submit.check_place(prepared, overwrite=overwrite)
    for line in unused(job, chosen):
        teller.say(f"chunkq: {line}")
    with cluster_for(job, chosen, url, step, wishes.workers) as cluster:
        if chosen != "sqlite":  # away or refusing, it is said before the network is loaded
            with closing(open_executor(cluster.url)) as executor:
                executor.ready()
        if not cluster.hires or step is not None:
            tried = teller.try_network(prepared.record)
            if tried.error is not None:
                raise ModelError(tried.error)
        for last in (*[False] * RECOVERIES, True):
            opened, failures = _compute(prepared, cluster, wishes, overwrite, teller)
            causes = [_line(group) for group in failures]
            for line in causes:
                teller.say(line)
            try:
                with teller.meter("finalizing blocks") as meter:
                    report = finalize_job(opened, worker=socket.gethostname(), progress=meter)
            except IncompleteError as error:
                failed = {chunk for group in failures for chunk in group.chunks}
                lost = len({*map(chunk_name, error.missing)} - failed)
                if last or not lost:
                    raise _explained(error, causes) from None
                teller.say(f"chunkq: results of {lost} chunks are lost; computing them again")
                overwrite = False
            else:
                break
        return Ran(opened, report)


def _compute(
    prepared: submit.Prepared, cluster: Cluster, wishes: Wishes, overwrite: bool, teller: Teller
) -> tuple[OpenJob, Sequence[FailureGroup]]:
    """Queue what is left and see it through; return the job and its chunks that failed."""
    with closing(open_executor(cluster.url)) as executor:
        with teller.meter("queueing chunks") as meter:
            made = submit.produce(
                prepared, executor, overwrite=overwrite, remember=not cluster.ends, progress=meter
            )
        opened = open_job(made.folder.path)
        if made.done == made.chunks:
            return opened, ()
        cluster.announce()
        look = Look(opened, executor)
        again = "the same command" + (" without --overwrite" if overwrite else "")
        with teller.looking() as show:

            def look_and_show() -> float:
                _try_to_show(show, look, teller)
                return look.rest(REFRESH_SECONDS)

            crew = crew_of(executor, opened, cluster, wishes, teller.say)
            if see_through(crew, look_and_show, cluster.has_died):
                raise InterruptedRunError(f"stopped; {again} continues where it was")
        if cluster.has_died():
            raise ChunkqError(f"the cluster that this run made has died; {again} continues")
        if crew.code not in (0, IncompleteError.exit_code):
            raise _explained(
                ChunkqError(f"the worker gave up, and said why; {again} continues"), crew.said
            )
        return opened, look().failures


def set_going(executor: Executor, produced: submit.Produced) -> bool:
    """Have a running cluster's own workers begin with a job, if it asks for them; tells whether.

    Other queues have no workers of their own: `chunkq work` will take the job from them. Raises
    QueueError if the cluster has no workers either.
    """
    opened = open_job(produced.folder.path)
    asked = opened.record.job.cluster == "running" and isinstance(executor, HostedQueue)
    if not asked or produced.done == produced.chunks:
        return False
    config = opened.record.job.dask_config
    cluster = Cluster(executor.url, hires=True, depth=config.threads_per_worker)
    crew_of(executor, opened, cluster, Wishes(), log.warning)
    return True


def crew_of(
    executor: Executor,
    opened: OpenJob,
    cluster: Cluster,
    wishes: Wishes,
    say: Callable[[str], None],
) -> Crew:
    """Start or hire those who work on a job: of the user's wishes and the job's, the user's."""
    job = opened.record.job
    depth = wishes.depth or cluster.depth
    if cluster.hires and isinstance(executor, HostedQueue):
        gpu = not on_cpu(job)
        depth = depth or usual_depth(gpu=gpu)
        hired = executor.hire(opened.folder.path, gpu=gpu, depth=depth, nodes=cluster.nodes)
        return Hands(hired, say)
    if not executor.owns_process:
        return _worker_thread(executor, opened, depth, say)
    options = ["--gpus", "none" if on_cpu(job) else wishes.gpus, "--job", opened.folder.output]
    if wishes.workers:
        options += ["-w", str(wishes.workers)]
    elif cluster.per_node:
        options += ["--per-node", str(cluster.per_node)]
    options += ["--depth", str(depth)] if depth else []
    return Command(options, {QUEUE_VARIABLE: cluster.url}, say)


def _worker_thread(
    executor: Executor,
    opened: OpenJob,
    depth: int | None,
    say: Callable[[str], None],
) -> Crew:
    """Start the one worker that shares this process."""
    device = opened.record.job.model.device
    worker = WorkerName.new(device).text
    depth = depth or usual_depth(gpu=device == "cuda")
    shift = Shift(worker, depth=depth, burst=True, job=opened.folder.path)
    return WorkerThread(executor, shift, say)


def _follow(job: Job, engine: str, step: Step, wishes: Wishes, teller: Teller) -> Ran:
    """Work for the process that leads, until it says that all is done."""
    leader = wait_for_leader(job.output, step)
    opened = open_job(folder_of(job.output))

    def is_over() -> bool:
        return has_ended(job.output, step)

    with part_of(engine, leader, job) as cluster:
        if cluster is None:
            while not is_over():
                time.sleep(LOOK_SECONDS)
        else:
            with closing(open_executor(cluster.url)) as executor:
                crew = crew_of(executor, opened, cluster, wishes, teller.say)
            if see_through(crew, lambda: LOOK_SECONDS, is_over):
                raise InterruptedRunError("stopped")
            if crew.code not in (0, IncompleteError.exit_code) and not is_over():
                raise ChunkqError(f"the worker on node {step.node} gave up, and said why")
    return Ran(opened, opened.ledger.read_report() or {}, led=False)


def _line(group: FailureGroup) -> str:
    """Return what went wrong with some chunks in one line; finalizing then lists them."""
    chunks = ", ".join(group.chunks[:6]) + (" …" if len(group.chunks) > 6 else "")
    return f"failed: chunk {chunks}: {group.message}"


def _explained(error: ChunkqError, lines: Sequence[str]) -> ChunkqError:
    for line in lines:
        error.add_note(line)
    return error


def _try_to_show(show: Callable[[Look], None], look: Look, teller: Teller) -> None:
    """Show how far the job is; if it cannot be seen just now, the work goes on all the same."""
    try:
        show(look)
    except Exception as error:
        reason = " ".join(str(error).split())
        teller.say(f"progress cannot be seen: {reason}")
