"""The main function of a worker process, used by every engine that starts workers."""

from __future__ import annotations

import os
import sys
import threading
from functools import partial

from chunkq.errors import ChunkqError, TaskTimeoutError
from chunkq.queue.contract.executor import EXIT_TASK_TIMEOUT, Executor, ExitStatus, WorkerOptions
from chunkq.system.framework_logs import hide_framework_logs
from chunkq.system.scratch import delete_own_folders

LEDGER_SECONDS = 5.0
"""Time to record a timeout in the ledger before the process ends."""


def serve(executor: Executor, options: WorkerOptions) -> ExitStatus:
    """Run tasks of a queue until the options end the worker; return its exit status.

    A chunk that exceeds its time limit ends this process if the worker owns it.
    """
    hide_framework_logs()
    # Imported here so that signals are handled while the network's libraries load.
    from chunkq.stages.ingest import is_advancing
    from chunkq_worker.device import waits_for_device
    from chunkq_worker.frameworks import framework_rule
    from chunkq_worker.run_task import check_gate, run_task

    framework_rule.enforced = options.replaceable
    options.is_waiting = lambda task: waits_for_device(task) or is_advancing(task)
    options.check_gate = partial(check_gate, worker=options.worker)
    try:
        executor.run_tasks(run_task, options)
    except TaskTimeoutError as error:
        if not executor.owns_process:
            return ExitStatus(EXIT_TASK_TIMEOUT, [str(error)])
        sys.stderr.write(f"chunkq: {error}\n")
        _exit_with_hanging_threads(error)
    except ChunkqError as error:
        return ExitStatus.from_error(error)
    return ExitStatus()


def _exit_with_hanging_threads(error: TaskTimeoutError) -> None:
    """Record the timed-out tasks in the ledger, then end this process.

    Recording runs in a thread with a time limit, because the ledger's storage may hang as well.
    """
    from chunkq_worker.run_task import record_failure

    def record_failures() -> None:
        for lease in error.leases:
            record_failure(lease.task, lease.attempt, error)

    recorder = threading.Thread(target=record_failures, daemon=True)
    recorder.start()
    recorder.join(LEDGER_SECONDS)
    delete_own_folders()
    os._exit(EXIT_TASK_TIMEOUT)
