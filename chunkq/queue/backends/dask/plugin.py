"""Plugin of a Dask scheduler: it stores the queue, and starts remote workers as they are needed."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, defaultdict
from typing import Any

import distributed
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import KilledWorker
from tornado.ioloop import PeriodicCallback

from chunkq.queue.backends.dask.page import add_pages
from chunkq.queue.backends.hosted.queue_host import MAX_LOADING_DEATHS, QueueHost
from chunkq.queue.backends.hosted.remote_workers import is_outage

OPERATION = "chunkq"
"""Name of the plugin, and of the operation that it adds to the scheduler."""
REMOTE_TASK = f"{OPERATION}-worker"
"""Prefix of the keys of the Dask tasks that are remote workers, as the dashboard shows it."""
LOOK_SECONDS = 1.0
"""Interval at which the scheduler compares the remote workers with the chunks on the queue."""
SPARE_WORKERS = 8
"""Remote workers that wait for a thread, for an adaptive cluster to see; twice the threads more."""
TASK_SECONDS = 3600.0
"""Duration that Dask assumes for a remote worker, so that it asks for one thread for each."""
MAX_MESSAGE = 300
DIED_LOADING = (
    "queue: workers of the Dask cluster ended again and again before they had the network, "
    "possibly out of memory, or silent for longer than Dask's worker-ttl; see their logs"
)


class QueuePlugin(SchedulerPlugin):
    """Scheduler plugin that adds a `QueueHost` to a scheduler."""

    name = OPERATION
    idempotent = True

    def __init__(self, *, has_page: bool = True) -> None:
        self._has_page = has_page

    async def start(self, scheduler: Any) -> None:
        """Create the queue and register its operation."""
        self._host = host = QueueHost()
        self._launcher = launcher = RemoteWorkerLauncher(scheduler, host)

        def stay_awake() -> None:
            # An idle timeout counts tasks of Dask only, and those of the queue are none.
            if host.has_work():
                scheduler.idle_since = None

        if timeout := scheduler.idle_timeout:
            pause = 1000 * min(LOOK_SECONDS, timeout / 4)
            scheduler.periodic_callbacks[OPERATION] = look = PeriodicCallback(stay_awake, pause)
            look.start()

        def answer(request: str) -> str:
            scheduler.idle_since = None  # whoever asks may be about to queue chunks
            response = host.answer(request)
            launcher.start()
            return response

        scheduler.handlers[OPERATION] = answer
        if self._has_page:
            add_pages(scheduler, host)

    def remove_worker(self, scheduler: Any, worker: str, **options: object) -> None:
        """Expire the leases of a worker that left the cluster or was lost.

        Dask fails a task whose worker has died four times. A task of chunkq is one thread of the
        cluster for a whole job, so deaths count against it only if no chunkq worker has started.
        """
        was_loading = self._host.is_loading(worker)
        has_worked = self._host.expire_workers(worker)
        self._launcher.record_death(has_worked=has_worked, was_loading=was_loading)
        if has_worked:
            for key, task in scheduler.tasks.items():
                if str(key).startswith(REMOTE_TASK):
                    task.suspicious = 0


class RemoteWorkerLauncher:
    """Remote workers of the groups of a queue, as Dask tasks that the scheduler submits itself.

    A remote worker ends when no chunk can be reserved. New ones are submitted while more chunks are
    queued than remote workers wait for a thread. So Dask's adaptive scaling sees them, workers that
    join the cluster get some at once, and workers without any can leave it.
    """

    def __init__(self, scheduler: Any, host: QueueHost) -> None:
        self._scheduler, self._host = scheduler, host
        self._tasks: defaultdict[str, list[Any]] = defaultdict(list)
        self._given_up: Counter[str] = Counter()
        self._lost_loading = 0
        self._most_threads = 1
        self._done = 0
        self._numbers = itertools.count()
        self._loop: asyncio.Task[None] | None = None

    def record_death(self, *, has_worked: bool, was_loading: bool) -> None:
        """Count the deaths of workers before one has its network, or a task is done.

        A worker that the scheduler does not hear, because loading holds Python's lock, is restarted
        by Dask again and again.
        """
        done = self._host.tasks_done()
        if has_worked or done != self._done:
            self._done, self._lost_loading = done, 0
            self._given_up.clear()
        self._lost_loading += was_loading

    def start(self) -> None:
        """Start the loop in the scheduler's event loop if a group needs it."""
        if (self._loop is None or self._loop.done()) and self._host.open_groups():
            self._loop = asyncio.create_task(self._run())

    async def _run(self) -> None:
        client = await distributed.Client(
            self._scheduler.address,
            asynchronous=True,
            set_as_default=False,
            security=self._scheduler.security,
            name=OPERATION,
        )
        async with client:
            while groups := self._host.open_groups():
                for name in groups:
                    self._update(client, name)
                await asyncio.sleep(LOOK_SECONDS)

    def _update(self, client: Any, name: str) -> None:
        """Submit remote workers of a group, and record those that Dask has given up."""
        from chunkq.queue.backends.dask.remote import run_remote_thread

        failed = [task for task in self._tasks[name] if task.status == "error"]
        cut_off = [task for task in failed if is_outage(_error(task))]
        failed = [task for task in failed if task not in cut_off]
        for task in cut_off:
            self._host.record_outage(name, [_text(task)])
        killed = [task for task in failed if isinstance(_error(task), KilledWorker)]
        # Dask gives up a task after four deaths of its workers, or fewer, as a site configures it.
        self._given_up[name] += (self._scheduler.allowed_failures + 1) * len(killed)
        is_tolerable = self._given_up[name] <= MAX_LOADING_DEATHS
        threads = sum(
            worker.nthreads
            for address, worker in self._scheduler.workers.items()
            if worker.status == distributed.Status.running and not self._host.is_silent(address)
        )
        self._most_threads = max(self._most_threads, threads)
        if self._lost_loading > MAX_LOADING_DEATHS * self._most_threads:
            self._lost_loading = 0
            self._host.record_exit(name, [DIED_LOADING])
        if errors := {_text(task) for task in failed if not (is_tolerable and task in killed)}:
            self._host.record_exit(name, sorted(errors))
        running = [task for task in self._tasks[name] if not task.done()]
        suspended = [task for task in running if self._is_suspended(task)]
        active = len(running) - len(suspended)
        limit = 2 * threads + SPARE_WORKERS
        group = self._host.group(name)
        output = group.job.rpartition("/")[2].removesuffix(".chunkq")
        new = [
            client.submit(
                run_remote_thread,
                group.url,
                group.job,
                name,
                key=f"{REMOTE_TASK}-{name}-{next(self._numbers)}-{output}",
                pure=False,
            )
            for _ in range(self._host.wanted_workers(name, active, limit) - active)
        ]
        self._tasks[name] = running + new
        self._host.set_active(name, active + len(new), has_room=threads > 0)
        if prefix := self._scheduler.task_prefixes.get(REMOTE_TASK):
            prefix.duration_average = TASK_SECONDS

    def _is_suspended(self, task: Any) -> bool:
        """Return whether a remote worker runs in a process that is suspended.

        Others compute its chunks, and the run does not wait for it.
        """
        state = self._scheduler.tasks.get(task.key)
        worker = None if state is None else state.processing_on
        return worker is not None and self._host.is_silent(worker.address)


def _error(task: Any) -> BaseException:
    """Return the error of a task that has failed, without waiting for more than its message."""
    error: BaseException = task._state.exception
    return error


def _text(task: Any) -> str:
    """Return the error of a task that has failed as one line, without the name of the task."""
    error = _error(task)
    if isinstance(error, KilledWorker):
        return DIED_LOADING
    if type(error).__name__ == "NoWorkerError":
        return (
            f"queue: the Dask cluster has had no worker for {error.args[1]:g} s, its "
            "no-workers-timeout; start workers, or set a longer timeout"
        )
    return " ".join(str(_error(task)).split())[:MAX_MESSAGE]
