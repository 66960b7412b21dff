"""Tasks as RQ jobs: one RQ queue per chunkq job, all in one Redis database.

Reads use plain commands. Every change is one Lua script, because the worker of RQ moves a job in
several commands and deletes it by id. If it were killed between two commands, the task would be
stuck; if it were suspended past its lease, it would end the attempt of another worker.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

from redis.exceptions import OutOfMemoryError
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat, utcparse
from rq.worker_registration import clean_worker_registry, register

from chunkq.errors import RESUME, QueueError
from chunkq.job.tasks import JobId, Task, encode_message
from chunkq.queue.backends.rq.connect import (
    check_server,
    connect,
    outages_of,
    server_risks,
    translated_errors,
)
from chunkq.queue.backends.rq.names import job_of, queue_name, queue_prefix, rq_id, stored_job
from chunkq.queue.backends.rq.scripts import Scripts
from chunkq.queue.contract.executor import (
    MAX_ATTEMPTS,
    Attempt,
    Contribution,
    RunningTask,
    TaskCounts,
    WorkerOptions,
)
from chunkq.queue.leases.task_loop import Lease, LeaseQueue

log = logging.getLogger("chunkq.queue")

BATCH = 1000
"""Tasks per script. A script blocks other clients for about 10 ms."""
MAX_QUEUED = 1_000_000
"""Queued tasks of one job at which the producer waits for workers; about 500 MB in Redis."""
WORKER_TTL = 60
MAX_MESSAGE_BYTES = 1 << 16
ORDER, JOBS = "chunkq:queues", "chunkq:jobs"


class RqExecutor(LeaseQueue):
    """Queue `redis://`, `rediss://` for TLS, or `unix://`, for workers on any number of hosts."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = connect(url)
        self._scripts = Scripts(self._client)
        self._rq_worker: SimpleWorker | None = None
        with translated_errors(url):
            self._client.ping()
            check_server(self._client, url)

    @cached_property
    def _retrying_scripts(self) -> Scripts:
        """Scripts on a connection that retries while the server is unreachable, for workers."""
        return Scripts(connect(self.url, patient=True), outages_of(self.url).request)

    def check_ready(self) -> None:
        """Raise QueueError for a replica, or a user who may not run scripts that write."""
        with translated_errors(self.url):
            self._scripts("ready")

    def risks(self) -> list[str]:
        """Return that the server deletes tasks when it is full, or forgets them when it ends."""
        with translated_errors(self.url):
            return list(server_risks(self._client))

    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks in batches. Wait for workers while MAX_QUEUED tasks of a job are queued."""
        queued, stream, has_logged = 0, iter(tasks), False
        full_job: JobId | None = None
        others: dict[JobId, list[str]] = {}
        while batch := list(islice(stream, BATCH)):
            if full_job is not None:
                self._wait_for_workers(full_job, quiet=has_logged)
                full_job, has_logged = None, True
            by_job: dict[JobId, list[Task]] = {}
            for task in batch:
                by_job.setdefault(task.job_id, []).append(task)
            for job, job_tasks in by_job.items():
                pairs = [part for task in job_tasks for part in (rq_id(task), _message(task))]
                head = (queue_name(job), stored_job(job), utcformat(now()), MAX_ATTEMPTS)
                with translated_errors(self.url):
                    new, total, known = self._scripts("submit", *head, *pairs)
                queued += new
                others.setdefault(job, []).extend(_texts(known))
                if total >= MAX_QUEUED:
                    full_job = job
        return queued + sum(self._restore(job, ids) for job, ids in others.items() if ids)

    def _restore(self, job: JobId, ids: Sequence[str]) -> int:
        """Queue tasks that only look as if they were on the queue; return how many.

        A server that deletes keys when it is full, or a tool, can delete the list of a queue and
        keep the tasks. A task that leaves its list meanwhile may be queued twice, but runs once.
        """
        name = queue_name(job)
        with translated_errors(self.url):
            kinds = _texts(self._client.zrange(f"chunkq:gates:{name}", 0, -1))
            lists = [f"rq:queue:{name}", *(f"chunkq:waiting:{name}:{kind}" for kind in kinds)]
            lost = dict.fromkeys(ids)
            for key in lists:
                for first in range(0, self._client.llen(key), BATCH):
                    # From the end: workers take tasks from the other one.
                    for id in _texts(self._client.lrange(key, -first - BATCH, -first - 1)):
                        lost.pop(id, None)
            left = list(lost)
            return sum(
                int(self._scripts("restore", name, stored_job(job), *left[first : first + BATCH]))
                for first in range(0, len(left) + 1, BATCH)
            )

    def counts(self, job: JobId) -> TaskCounts:
        """Return the numbers of tasks of a job by state; a task with an expired lease is queued."""
        with translated_errors(self.url):
            return TaskCounts(*self._scripts("counts", queue_name(job)))

    def jobs(self) -> dict[JobId, TaskCounts]:
        """Return the numbers of tasks of every job on the queue."""
        with translated_errors(self.url):
            stored = _texts(self._client.hvals(JOBS))
        all_counts = {job: self.counts(job) for job in sorted(map(job_of, stored))}
        return {job: counts for job, counts in all_counts.items() if counts != TaskCounts()}

    def running(self, job: JobId) -> list[RunningTask]:
        """Return the tasks of a job whose leases have not expired."""
        name = queue_name(job)
        with translated_errors(self.url):
            seconds, micros = self._client.time()
            entries = self._client.zrangebyscore(f"rq:wip:{name}", seconds + micros / 1e6, "+inf")
            ids = [entry.rpartition(":")[0] for entry in _texts(entries)]
            rows = self._fields(ids, "data", "worker_name", "started_at")
        return [
            RunningTask(task, (worker or b"").decode(), utcparse(since.decode()).timestamp())
            for message, worker, since in rows
            if since and (task := _task(message)) is not None
        ]

    def failed(self, job: JobId) -> list[Task]:
        """Return the failed tasks of a job."""
        with translated_errors(self.url):
            ids = _texts(self._client.zrange(f"rq:failed:{queue_name(job)}", 0, -1))
            rows = self._fields(ids, "data")
        return [task for (message,) in rows if (task := _task(message)) is not None]

    def retry(self, job: JobId) -> int:
        """Queue the failed tasks of a job with all their attempts."""
        return self._run_in_batches("retry", queue_name(job), MAX_ATTEMPTS, BATCH)

    def cancel(self, job: JobId) -> int:
        """Remove all tasks and gates of a job."""
        return self._run_in_batches("cancel", queue_name(job), BATCH)

    def close_gate(self, job: JobId, kind: str) -> None:
        """Make the queued tasks of a kind wait. Each script looks at one batch of queued tasks."""
        with translated_errors(self.url):
            left = self._retrying_scripts("close_gate", queue_name(job), kind, 0)
            while left > 0:
                size = min(left, BATCH)
                left -= size
                self._retrying_scripts("close_gate", queue_name(job), kind, size)

    def open_gate(self, job: JobId, kind: str) -> None:
        """Queue the waiting tasks of a kind."""
        with translated_errors(self.url):
            while self._retrying_scripts("open_gate", queue_name(job), kind, BATCH):
                pass

    def waiting(self, options: WorkerOptions) -> list[tuple[JobId, str]]:
        """Return the jobs of a worker whose tasks only wait, with the first waiting kind."""
        with translated_errors(self.url):
            rows = _texts(self._retrying_scripts("waiting", *_job_filter(options)))
        return [(job_of(job), kind) for job, kind in zip(rows[::2], rows[1::2], strict=True)]

    def release(self, worker: str, *, counted: bool = True) -> int:
        """End the leases of a worker. A second call has no effect."""
        with translated_errors(self.url):
            leases = self._scripts("leases", worker)
            if not leases:
                return 0
            stamp = utcformat(now())
            return int(self._scripts("end_attempt", int(counted), stamp, worker, *leases))

    def extend(self, worker: str, seconds: float) -> None:
        """Make the leases of a worker end `seconds` from now."""
        with translated_errors(self.url):
            if leases := self._scripts("leases", worker):
                self._scripts("renew", seconds, worker, *leases)

    def record_contributions(self, job: JobId, contributions: Sequence[Contribution]) -> list[Task]:
        """Record contributions of a committed task; return the tasks that this completes."""
        tasks = {c.task.id: c.task for c in contributions}
        parts = [part for c in contributions for part in (c.task.id, c.number, c.total)]
        with translated_errors(self.url):
            ids = self._retrying_scripts("record_contributions", queue_name(job), *parts)
        return [tasks[id] for id in _texts(ids)]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        if "_retrying_scripts" in self.__dict__:
            self._retrying_scripts.close()

    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Lease one task, or return None if no task is available."""
        while True:
            attempt, stamp = uuid.uuid4().hex, utcformat(now())
            with translated_errors(self.url):
                reserved = self._retrying_scripts(
                    "reserve",
                    options.worker,
                    stamp,
                    attempt,
                    options.settings.lease,
                    *_job_filter(options),
                )
            if reserved is None:
                return None
            name, task_id, message, retries_left = reserved
            task = _task(message)
            if task is not None and rq_id(task).encode() == task_id:
                number = max(1, MAX_ATTEMPTS - int(retries_left))
                return Lease(task, Attempt(number, options.worker), attempt)
            log.error("deleted from the queue: not a chunkq task: %r", message[:200])
            with translated_errors(self.url):
                self._retrying_scripts("ack", name, task_id, attempt, options.worker, 0)

    def ack(self, lease: Lease) -> None:
        """Delete a finished task."""
        seconds = time.time() - lease.since
        with translated_errors(self.url):
            self._retrying_scripts("ack", *_names(lease), lease.attempt.worker, seconds)

    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an unsuccessful attempt. After the last one store the traceback for RQ's tools."""
        stamp, worker = utcformat(now()), lease.attempt.worker
        with translated_errors(self.url):
            ended = self._retrying_scripts("end_attempt", 1, stamp, worker, *_names(lease))
            if ended and lease.attempt.is_last:
                job = Job(rq_id(lease.task), self._client, JSONSerializer)
                text = "".join(traceback.format_exception(error))
                with suppress(OutOfMemoryError):  # the ledger has the traceback, too
                    Result.create_failure(job, -1, text, worker_name=worker)

    def requeue(self, lease: Lease) -> None:
        """Queue a task first, without counting the attempt."""
        with translated_errors(self.url):
            self._retrying_scripts(
                "end_attempt", 0, utcformat(now()), lease.attempt.worker, *_names(lease)
            )

    def is_drained(self, options: WorkerOptions) -> bool:
        """Return whether the jobs of a worker have neither queued nor running tasks."""
        with translated_errors(self.url):
            return bool(self._retrying_scripts("drained", *_job_filter(options)))

    def renew(self, options: WorkerOptions, leases: Sequence[Lease]) -> None:
        """Extend leases of a worker, and update its heartbeat for RQ's tools."""
        with translated_errors(self.url):
            names = [part for lease in leases for part in _names(lease)]
            self._retrying_scripts("renew", options.settings.lease, options.worker, *names)
            if self._rq_worker is not None:
                with suppress(OutOfMemoryError):
                    self._update_entry(self._rq_worker, leases)

    @contextmanager
    def registered(self, options: WorkerOptions) -> Iterator[None]:
        """Register the worker in RQ while the context is open."""
        outages_of(self.url).start(options.stop)
        with translated_errors(self.url):
            rq_worker = self._rq_worker = SimpleWorker(
                [],
                name=options.worker,
                connection=connect(self.url, patient=True),
                serializer=JSONSerializer,
                worker_ttl=WORKER_TTL,
            )
            with suppress(OutOfMemoryError):  # an unregistered worker can still empty a full Redis
                rq_worker.register_birth()
        try:
            yield
        finally:
            self._rq_worker = None
            with suppress(QueueError), translated_errors(self.url):
                rq_worker.register_death()
            rq_worker.connection.close()

    def _update_entry(self, rq_worker: SimpleWorker, leases: Sequence[Lease]) -> None:
        """Write the complete entry of a worker, in case Redis lost its data meanwhile."""
        connection = rq_worker.connection
        names = _texts(connection.zrange(ORDER, 0, -1))
        rq_worker.queues = [Queue(n, connection=connection) for n in names]
        for queue in rq_worker.queues:
            clean_worker_registry(queue)
        with connection.pipeline() as pipeline:
            rq_worker.heartbeat(pipeline=pipeline)
            pipeline.hset(rq_worker.key, mapping=rq_worker.serialize())
            pipeline.expire(rq_worker.key, WORKER_TTL + 60)
            register(rq_worker, pipeline)
            rq_worker.set_state("busy" if leases else "idle", pipeline=pipeline)
            current = rq_id(leases[-1].task) if leases else None
            rq_worker.set_current_job_id(current, pipeline=pipeline)
            pipeline.execute()

    def _wait_for_workers(self, job: JobId, *, quiet: bool) -> None:
        if not quiet:
            log.warning(
                "%d chunks are queued; waiting for workers before queueing the rest "
                "(if interrupted, %s to continue)",
                MAX_QUEUED,
                RESUME,
            )
        while (counts := self.counts(job)).queued + counts.waiting >= MAX_QUEUED:
            time.sleep(1)

    def _fields(self, ids: Sequence[str], *fields: str) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipeline:
            for task_id in ids:
                pipeline.hmget(f"rq:job:{task_id}", fields)
            return pipeline.execute()

    def _run_in_batches(self, script: str, *arguments: str | int) -> int:
        total = 0
        with translated_errors(self.url):
            while changed := self._scripts(script, *arguments):
                total += changed
        return total


def _message(task: Task) -> bytes:
    """Encode a task like a function call of RQ. The function name is for display only."""
    before, after = _around_chunk(task.kind, task.job, task.epoch, task.item)
    return f"{before}[{','.join(map(str, task.chunk))}]{after}".encode()


@lru_cache(maxsize=64)
def _around_chunk(kind: str, job: str, epoch: str, item: int) -> tuple[str, str]:
    """Return the texts before and after the chunk in the messages of tasks that differ in it."""
    message: list[Any] = [f"chunkq.{kind}", None, [Task(kind, job, epoch, item, ()).as_dict()], {}]
    before, _, after = encode_message(message).rpartition("[]")
    return before, after


def _task(message: bytes | None) -> Task | None:
    """Decode a message, or return None if it is not a task. RQ's tools compress on requeue."""
    try:
        with suppress(zlib.error):
            message = zlib.decompressobj().decompress(message or b"", MAX_MESSAGE_BYTES)
        _, _, (values,), _ = json.loads(message or b"")
        return Task.from_dict(values)
    except (ValueError, TypeError, RecursionError, QueueError):
        return None


def _texts(values: Any) -> list[str]:
    return [value.decode() for value in values]


def _names(lease: Lease) -> tuple[str, str, str]:
    return queue_name(lease.task.job_id), rq_id(lease.task), lease.token


def _job_filter(options: WorkerOptions) -> tuple[str, ...]:
    """Return the arguments of the Lua function `selected_queues`."""
    prefix = "" if options.job is None else queue_prefix(options.job)
    return (prefix, *(queue_name(job) for job in sorted(options.skipped_jobs)))
