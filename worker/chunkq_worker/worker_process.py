"""One worker process: takes tasks from the queue until it has to end.

Started as `python -m chunkq_worker.worker_process` by the supervisor, which writes one line
of JSON to its standard input and keeps that pipe open: when the supervisor ends, the pipe closes
and this process ends too.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType

from chunkq.errors import ChunkqError, QueueError
from chunkq.executors import open_executor
from chunkq.executors.base import Executor, ExitStatus, WorkerOptions
from chunkq.scratch import remove_own

EXIT_HANDED_BACK = 5


@dataclass(frozen=True, slots=True)
class WorkerProcessOptions:
    """What the supervisor tells a child."""

    queue: str
    worker: str
    depth: int
    burst: bool
    job: str | None
    deadline: float | None
    time_limit: float | None
    quiet: bool

    def to_json(self) -> str:
        """Encode on one line."""
        return json.dumps(asdict(self))


def main() -> int:
    """Run one options; returns the exit code."""
    orders = WorkerProcessOptions(**json.loads(sys.stdin.readline()))
    # Only chunkq's own news: clients of buckets tell where they found their credentials.
    logging.getLogger("chunkq").setLevel(logging.WARNING if orders.quiet else logging.INFO)
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s {orders.worker} %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    options = WorkerOptions(
        worker=orders.worker,
        depth=orders.depth,
        burst=orders.burst,
        job=orders.job,
        deadline=orders.deadline,
        time_limit=orders.time_limit,
        replaceable=True,
    )
    try:
        executor = open_executor(orders.queue)
    except ChunkqError as error:
        ended = ExitStatus.from_error(error)
    else:
        _handle_signals(options, executor)
        ended = executor.run_worker(options)
        executor.close()
    for line in ended.lines:
        sys.stderr.write(f"chunkq: {line}\n")
    return ended.code


def _end_with_supervisor() -> None:
    sys.stdin.read()
    remove_own()
    os._exit(1)


def _handle_signals(options: WorkerOptions, executor: Executor) -> None:
    """First signal: finish what is in flight. Second: hand it back and go at once."""

    def leave() -> None:
        with suppress(QueueError):  # the supervisor hands back what is left
            executor.release(options.worker, counted=False)
        remove_own()
        os._exit(EXIT_HANDED_BACK)

    told = 0.0

    def obey(number: int, frame: FrameType | None) -> None:
        nonlocal told
        now = time.monotonic()
        if not told:
            told = now
            options.stop.set()
        elif now - told > options.settings.same_signal:
            threading.Thread(target=leave).start()

    signal.signal(signal.SIGTERM, obey)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
