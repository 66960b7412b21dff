"""The queues at 10⁴, 10⁵ and 10⁶ tasks: filling them, what they hold, working from the full one.

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
    PATIENCE,
    PROCESSES,
    QUEUES,
    Figure,
    Places,
    fill,
    places,
    table,
    together,
)
from chunkq.executors import open_executor
from chunkq.executors.base import Attempt, WorkerOptions
from chunkq.tasks import Task

SIZES = (10**4, 10**5, 10**6)
TAKEN = 2000
"""Tasks that each of the processes works off."""


def take_some(barrier: Any, answers: Any, url: str) -> None:
    """Work off a number of tasks that do nothing; answer when that began and ended."""
    executor, lock, left = open_executor(url), threading.Lock(), TAKEN
    options = WorkerOptions(f"bench:cpu:{os.getpid()}", DEPTH)

    def count(task: Task, attempt: Attempt) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left <= 0:
                options.stop.set()

    barrier.wait(PATIENCE)
    began = time.time()
    executor.run_tasks(count, options)
    answers.put((began, time.time()))


def held(queue: str, at: Places, url: str) -> int:
    """Bytes that a queue takes: of memory in its server, of disk if it is a file."""
    if queue == "sqlite":
        path = Path(url.removeprefix("sqlite://"))
        return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    if queue in CLUSTERS:
        return int(at.keeper(queue).memory_info().rss)
    return int(at.redis.info("memory")["used_memory"])


def at_size(queue: str, at: Places, count: int) -> list[Figure]:
    """Fill a fresh queue, look at it, and work off its first tasks."""
    url = at.fresh(queue)
    before = held(queue, at, url)
    filling = fill(url, count)
    size = held(queue, at, url) - before
    spans = together(PROCESSES, take_some, url)
    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
    with closing(open_executor(url)) as executor:
        [counts] = executor.jobs().values()
    taken = count - counts.queued
    assert not counts.running
    assert not counts.failed
    return [
        Figure("scale", queue, f"submit {count:,} tasks", filling, "tasks/s"),
        Figure("scale", queue, f"held for {count:,} tasks", size / count, "B/task"),
        Figure("scale", queue, f"drain from {count:,} tasks", taken / seconds, "tasks/s"),
    ]


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--queue", choices=QUEUES)
    options.add_argument("--most", type=int, default=SIZES[-1])
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    figures: list[Figure] = []
    with places() as at:
        for queue in QUEUES if given.queue is None else (given.queue,):
            for count in SIZES:
                if count <= given.most:
                    figures += at_size(queue, at, count)
    Console(width=150).print(table(figures))
    if given.json:
        given.json.write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
