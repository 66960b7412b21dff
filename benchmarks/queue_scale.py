"""Measure the queues at 10⁴, 10⁵ and 10⁶ tasks: filling, size, and running tasks of a full queue.

Run: python benchmarks/queue_scale.py [--queue NAME] [--most N] [--json FILE].
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.queues import (
    CLUSTERS,
    DEPTH,
    PROCESSES,
    QUEUES,
    TIMEOUT,
    Figure,
    QueueServers,
    fill,
    queue_servers,
    run_together,
    table,
)
from chunkq.job.tasks import Task
from chunkq.queue.contract.executor import Attempt, WorkerOptions
from chunkq.queue.registry import open_executor

SIZES = (10**4, 10**5, 10**6)
TASKS_PER_PROCESS = 2000


def run_some(barrier: Any, answers: Any, url: str) -> None:
    """Run TASKS_PER_PROCESS tasks that do nothing; answer with start and end."""
    executor, lock, remaining = open_executor(url), threading.Lock(), TASKS_PER_PROCESS
    options = WorkerOptions(f"bench:cpu:{os.getpid()}", DEPTH)

    def count(task: Task, attempt: Attempt) -> None:
        nonlocal remaining
        with lock:
            remaining -= 1
            if remaining <= 0:
                options.stop.set()

    barrier.wait(TIMEOUT)
    started = time.time()
    executor.run_tasks(count, options)
    answers.put((started, time.time()))


def queue_bytes(queue: str, servers: QueueServers, url: str) -> int:
    """Return the size of a queue (bytes): on disk for SQLite, otherwise in the server's memory."""
    if queue == "sqlite":
        path = Path(url.removeprefix("sqlite://"))
        return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    if queue in CLUSTERS:
        return int(servers.server_process(queue).memory_info().rss)
    return int(servers.redis.info("memory")["used_memory"])


def measure(queue: str, servers: QueueServers, count: int) -> list[Figure]:
    """Fill an empty queue, measure its size, and run its first tasks."""
    url = servers.empty_queue(queue)
    before = queue_bytes(queue, servers, url)
    rate = fill(url, count)
    size = queue_bytes(queue, servers, url) - before
    spans = run_together(PROCESSES, run_some, url)
    seconds = max(end for _, end in spans) - min(start for start, _ in spans)
    with closing(open_executor(url)) as executor:
        [counts] = executor.jobs().values()
    run = count - counts.queued
    assert not counts.running
    assert not counts.failed
    return [
        Figure("scale", queue, f"submit {count:,} tasks", rate, "tasks/s"),
        Figure("scale", queue, f"size for {count:,} tasks", size / count, "B/task"),
        Figure("scale", queue, f"drain from {count:,} tasks", run / seconds, "tasks/s"),
    ]


def main() -> None:
    """Measure, print a table, and write JSON if requested."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--queue", choices=QUEUES)
    options.add_argument("--most", type=int, default=SIZES[-1])
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    figures: list[Figure] = []
    with queue_servers() as servers:
        for queue in QUEUES if arguments.queue is None else (arguments.queue,):
            for count in SIZES:
                if count <= arguments.most:
                    figures += measure(queue, servers, count)
    Console(width=150).print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
