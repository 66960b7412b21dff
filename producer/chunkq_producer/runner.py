"""Run a job from start to end: select its engine, start its workers, then take the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunkq.errors import RESUME, QueueError
from chunkq.job.events import Sink, with_replaced_text
from chunkq.job.job_file import Job
from chunkq_producer.early_process import EarlyStart
from chunkq_producer.engine import select_engine
from chunkq_producer.worker_command import RunOptions, early_workers

if TYPE_CHECKING:
    from chunkq_producer.run_steps import RunResult


def run_job(
    job: Job,
    *,
    engine: str | None = None,
    queue: str | None = None,
    options: RunOptions,
    overwrite: bool = False,
    emit: Sink,
    start: EarlyStart | None = None,
) -> RunResult:
    """Produce, compute and finalize a job. An interrupted run continues with the same call.

    The workers use the process of `start`, if it is not None.

    Raises the errors of checking, producing and finalizing a job, ModelError if the network fails
    its check, ChunkqError if workers end with an error, and InterruptedRunError after a signal.
    Error lines of workers are notes of the raised error.
    """
    selected = select_engine(job, engine, queue, options.workers)
    if start is not None and not selected.starts_early:
        start.end()
    rerun = "run the same command" + (" without --overwrite" if overwrite else "")
    show = with_replaced_text(emit, RESUME, rerun)
    try:
        if selected.step is not None and selected.step.rank > 0:
            from chunkq_producer.run_steps import follow

            return follow(job, selected.name, selected.step, options, show)
        with early_workers(job, selected, options, show, start) as early:
            # Imported here, while the workers import their libraries.
            from chunkq_producer.run_steps import run_steps

            return run_steps(job, selected, options, early, show, rerun, overwrite=overwrite)
    except QueueError as error:
        if RESUME not in str(error):
            raise
        raise error.in_run(rerun) from error
