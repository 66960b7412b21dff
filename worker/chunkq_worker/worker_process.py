"""Run one worker process of a supervisor.

The supervisor starts `python -m chunkq_worker.worker_process`, writes one line of JSON to its
standard input, if it is early some time later, and keeps the pipe open. Before the job exists, it
passes on the lines of a run. When the supervisor ends, the pipe closes and this process ends too.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from queue import SimpleQueue

from typing_extensions import override

from chunkq.errors import ChunkqError, ErrorCode, QueueError
from chunkq.lazy_imports import without_collection
from chunkq.queue.contract.executor import (
    EXIT_QUEUE_UNREACHABLE,
    Executor,
    ExitStatus,
    WorkerOptions,
)
from chunkq.queue.registry import open_executor
from chunkq.system.framework_logs import hide_framework_logs
from chunkq.system.parent_process import when_parent_ends
from chunkq.system.scratch import delete_own_folders
from chunkq.system.standard_output import to_standard_error
from chunkq.terminal import columns, wrapped
from chunkq_worker.early_start import prepare
from chunkq_worker.loading import reporting_to
from chunkq_worker.stop_signals import StopSignals
from chunkq_worker.worker_main import serve

log = logging.getLogger("chunkq.worker")

EXIT_REQUEUED = 5
LOADING, LOADED = b"1", b"0"


@dataclass(frozen=True, slots=True)
class WorkerProcessOptions:
    """The options that a supervisor sends to a worker process, see `WorkerOptions`.

    A process that `is_early` starts before its job exists. It writes the result of the check of the
    network to the descriptor `report`, unless that is None. It writes LOADING to the descriptor
    `loading` before it loads a network, and LOADED afterwards. It sets the variables `environment`;
    None removes one. `is_cut_off` is whether the process before it ended because it could not reach
    the queue, and said so.
    """

    queue: str
    worker: str
    depth: int
    burst: bool
    job: str | None
    deadline: float | None
    time_limit: float | None
    quiet: bool
    is_early: bool = False
    report: int | None = None
    loading: int | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    is_cut_off: bool = False


def main() -> int:
    """Read the options, run tasks until the worker ends, and return the exit code."""
    from chunkq import json_values  # imports pydantic, which the supervisor does not need

    signals = StopSignals()
    hide_framework_logs()
    to_standard_error()
    lines: SimpleQueue[bytes] = SimpleQueue()
    when_parent_ends(_abort, lines.put)
    with without_collection():
        import_module(
            "chunkq_worker.device"
        )  # before the options are known, if the process is early
    process_options = json_values.decode(WorkerProcessOptions, lines.get())
    _set_environment(process_options.environment)
    # INFO for chunkq only: clients of object stores log the source of their credentials.
    logging.getLogger("chunkq").setLevel(logging.WARNING if process_options.quiet else logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _LineFormatter(f"%(asctime)s {process_options.worker} %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    on_loading = _loading_reporter(process_options.loading)
    if process_options.is_early:
        with reporting_to(on_loading):
            signals.forget(prepare(lines.get, process_options.report))
    options = WorkerOptions(
        worker=process_options.worker,
        depth=process_options.depth,
        burst=process_options.burst,
        job=process_options.job,
        deadline=process_options.deadline,
        time_limit=process_options.time_limit,
        replaceable=True,
        on_loading=on_loading,
    )
    try:
        executor = open_executor(process_options.queue)
    except ChunkqError as error:
        status = ExitStatus.from_error(error)
        if process_options.is_cut_off and error.code is ErrorCode.QUEUE_UNAVAILABLE:
            return status.code
    else:
        if process_options.is_cut_off:
            log.warning("the queue can be reached again")
        signals.stop(options, partial(_requeue_and_exit, options, executor))
        has_stopped = options.stop.is_set()  # while this process started
        status = ExitStatus() if has_stopped else executor.run_worker(serve, options)
        executor.close()
    is_restarted = status.code == EXIT_QUEUE_UNREACHABLE and not signals.have_stopped
    minutes = options.settings.queue_absence / 60
    advice = f"; trying again, for about {minutes:.0f} minutes" if is_restarted else ""
    for line in status.lines:
        text = wrapped(f"chunkq: {line}{advice}", columns(sys.stderr))
        sys.stderr.write(f"{text}\n")
    return status.code


def _set_environment(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _loading_reporter(descriptor: int | None) -> Callable[[bool], None]:
    """Return the function that writes to the supervisor's pipe."""
    if descriptor is None:
        return lambda is_loading: None
    os.set_inheritable(descriptor, False)  # the pipe closes when this process ends

    def report(is_loading: bool) -> None:
        with suppress(OSError):
            os.write(descriptor, LOADING if is_loading else LOADED)

    return report


class _LineFormatter(logging.Formatter):
    """Formatter whose lines break between words on a terminal."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return wrapped(super().format(record), columns(sys.stderr))


def _abort() -> None:
    delete_own_folders()
    os._exit(1)


def _requeue_and_exit(options: WorkerOptions, executor: Executor) -> None:
    with suppress(QueueError):  # then the supervisor requeues the chunks
        executor.release(options.worker, counted=False)
    delete_own_folders()
    os._exit(EXIT_REQUEUED)


def _exit_quickly(code: int) -> None:
    """End the process without the teardown of its libraries, which takes up to a second.

    Functions that libraries or the user registered for the end are called.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit_quickly(main())
