"""What a worker process does, whoever started it: work off a queue until its options ends."""

from __future__ import annotations

import os
import sys
import threading

from chunkq.errors import ChunkqError, TaskTimeoutError
from chunkq.executors.base import EXIT_TASK_TIMEOUT, Executor, ExitStatus, WorkerOptions
from chunkq.scratch import remove_own

LEDGER_SECONDS = 5.0


def serve(executor: Executor, options: WorkerOptions) -> ExitStatus:
    """Work off a queue; a chunk that hangs ends the process, if that is the worker's own."""
    # Imported here so that signals already work while the network's libraries load.
    from chunkq_worker.frameworks import this_process
    from chunkq_worker.inference_engine import waits_for_device
    from chunkq_worker.run_task import run_task

    this_process.enforced = options.replaceable
    options.is_waiting = waits_for_device
    try:
        executor.run_tasks(run_task, options)
    except TaskTimeoutError as error:
        if not executor.owns_process:
            return ExitStatus(EXIT_TASK_TIMEOUT, [str(error)])
        sys.stderr.write(f"chunkq: {error}\n")
        _leave_hanging(error)
    except ChunkqError as error:
        return ExitStatus.from_error(error)
    return ExitStatus()


def _leave_hanging(error: TaskTimeoutError) -> None:
    """End this process although threads of it hang; the ledger is told, if it does not hang too."""
    from chunkq_worker.run_task import record_failure

    def tell() -> None:
        for lease in error.leases:
            record_failure(lease.task, lease.attempt, error)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(LEDGER_SECONDS)
    remove_own()
    os._exit(EXIT_TASK_TIMEOUT)
