"""Tasks as RQ jobs: one RQ queue per chunkq job, all of them in one Redis database.

Reading goes through plain commands, every change through one Lua script. RQ's own worker moves
a job in several steps and deletes it by name; killed between two steps, or woken after its
lease, it would hold up or end what is another's.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from typing import Any

from redis.exceptions import OutOfMemoryError
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat, utcparse
from rq.worker_registration import clean_worker_registry, register

from chunkq.errors import QueueError
from chunkq.executors.base import (
    MAX_ATTEMPTS,
    Attempt,
    BlockContribution,
    Counts,
    Running,
    WorkerOptions,
)
from chunkq.executors.leases import Lease, LeaseQueue
from chunkq.executors.rq.connect import check_server, connect, translated_errors
from chunkq.executors.rq.scripts import Scripts
from chunkq.tasks import Task, chunk_name, job_key, parse_chunk

log = logging.getLogger("chunkq.queue")

BATCH = 1000
"""Tasks that one script queues, and so the longest that others wait for it: some 10 ms."""
MAX_QUEUED = 1_000_000
"""Queued tasks of one job beyond which its producer waits for workers; about 500 MB."""
WORKER_TTL = 60
LONGEST_MESSAGE = 1 << 16
ORDER, JOBS = "chunkq:queues", "chunkq:jobs"


class RqExecutor(LeaseQueue):
    """`redis://`, `rediss://` for TLS, or `unix://`; any number of hosts."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._quick = connect(url)
        self._ask = Scripts(self._quick)
        self._card: SimpleWorker | None = None
        with translated_errors(url):
            self._quick.ping()
            check_server(self._quick, url)

    @cached_property
    def _retrying_scripts(self) -> Scripts:
        """For workers and long filling: waits while the server is away."""
        return Scripts(connect(self.url, patient=True))

    def ready(self) -> None:
        """Check that this user may run scripts that write, and that this is no replica."""
        with translated_errors(self.url):
            self._ask("ready")

    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks a thousand at a time; waits for workers while very many are queued."""
        queued, stream, full, told = 0, iter(tasks), "", False
        while batch := list(islice(stream, BATCH)):
            if full:
                self._wait_for_workers(full, quietly=told)
                full, told = "", True
            by_job: dict[str, list[Task]] = {}
            for task in batch:
                by_job.setdefault(task.job, []).append(task)
            for job, some in by_job.items():
                pairs = [part for task in some for part in (task.id, _message(task))]
                arguments = (queue_name(job), job, utcformat(now()), MAX_ATTEMPTS, *pairs)
                with translated_errors(self.url):
                    fresh, waiting = self._ask("submit", *arguments)
                queued += fresh
                if waiting >= MAX_QUEUED:
                    full = job
        return queued

    def counts(self, job: str) -> Counts:
        """Count a job's tasks by state; one whose lease ran out waits again."""
        with translated_errors(self.url):
            return Counts(*self._ask("counts", queue_name(job)))

    def jobs(self) -> dict[str, Counts]:
        """Count the tasks of every job on the queue."""
        with translated_errors(self.url):
            found = _texts(self._quick.hvals(JOBS))
        counted = {job: self.counts(job) for job in sorted(found)}
        return {job: counts for job, counts in counted.items() if counts != Counts()}

    def running(self, job: str) -> list[Running]:
        """List a job's tasks whose lease holds."""
        name = queue_name(job)
        with translated_errors(self.url):
            seconds, micros = self._quick.time()
            held = self._quick.zrangebyscore(f"rq:wip:{name}", seconds + micros / 1e6, "+inf")
            ids = [entry.rpartition(":")[0] for entry in _texts(held)]
            rows = self._fields(ids, "data", "worker_name", "started_at")
        return [
            Running(task, (worker or b"").decode(), utcparse(since.decode()).timestamp())
            for message, worker, since in rows
            if since and (task := _task(message)) is not None
        ]

    def failed(self, job: str) -> list[Task]:
        """List a job's failed tasks."""
        with translated_errors(self.url):
            ids = _texts(self._quick.zrange(f"rq:failed:{queue_name(job)}", 0, -1))
            rows = self._fields(ids, "data")
        return [task for (message,) in rows if (task := _task(message)) is not None]

    def retry(self, job: str) -> int:
        """Queue a job's failed tasks afresh."""
        return self._in_parts("retry", queue_name(job), MAX_ATTEMPTS, BATCH)

    def cancel(self, job: str) -> int:
        """Take a job off the queue."""
        return self._in_parts("cancel", queue_name(job), BATCH)

    def release(self, worker: str, *, counted: bool = True) -> int:
        """End a worker's leases; its tasks are nobody's then, so saying it twice counts once."""
        with translated_errors(self.url):
            held = self._ask("held", worker)
            if not held:
                return 0
            stamp = utcformat(now())
            return int(self._ask("end_attempt", int(counted), stamp, worker, *held))

    def record_contributions(
        self, job: str, contributions: Sequence[BlockContribution]
    ) -> list[Task]:
        """Mark a chunk as contributor of blocks; return the finalize tasks of complete ones."""
        parts = [part for m in contributions for part in (chunk_name(m.block), m.member, m.of)]
        with translated_errors(self.url):
            found = map(
                parse_chunk,
                _texts(self._retrying_scripts("record_contributions", queue_name(job), *parts)),
            )
        return [Task("finalize", job, block) for block in found if block is not None]

    def close(self) -> None:
        """Let go of the connections."""
        self._quick.close()
        if "_steady" in self.__dict__:
            self._retrying_scripts.close()

    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Begin one task, or return None if there is none to begin now."""
        while True:
            attempt, stamp = uuid.uuid4().hex, utcformat(now())
            with translated_errors(self.url):
                begun = self._retrying_scripts(
                    "reserve",
                    options.worker,
                    stamp,
                    attempt,
                    options.settings.lease,
                    *_job_filter(options),
                )
            if begun is None:
                return None
            name, task_id, message, left = begun
            task = _task(message)
            if task is not None and task.id.encode() == task_id:
                number = max(1, MAX_ATTEMPTS - int(left))
                return Lease(task, Attempt(number, options.worker), attempt)
            log.error("dropped from the queue: not a chunkq task: %r", message[:200])
            with translated_errors(self.url):
                self._retrying_scripts("ack", name, task_id, attempt, options.worker, 0)

    def ack(self, lease: Lease) -> None:
        """Take a finished task off the queue."""
        took = time.time() - lease.since
        with translated_errors(self.url):
            self._retrying_scripts("ack", *_names(lease), lease.attempt.worker, took)

    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an attempt; after the last one RQ's tools show the traceback."""
        stamp, worker = utcformat(now()), lease.attempt.worker
        with translated_errors(self.url):
            ended = self._retrying_scripts("end_attempt", 1, stamp, worker, *_names(lease))
            if ended and lease.attempt.is_last:
                job = Job(lease.task.id, self._quick, JSONSerializer)
                told = "".join(traceback.format_exception(error))
                with suppress(OutOfMemoryError):  # the ledger has it
                    Result.create_failure(job, -1, told, worker_name=worker)

    def requeue(self, lease: Lease) -> None:
        """Put a task back as if it had not been begun."""
        with translated_errors(self.url):
            self._retrying_scripts(
                "end_attempt", 0, utcformat(now()), lease.attempt.worker, *_names(lease)
            )

    def is_drained(self, options: WorkerOptions) -> bool:
        """Tell whether what a options works on has neither queued nor running tasks."""
        with translated_errors(self.url):
            return bool(self._retrying_scripts("drained", *_job_filter(options)))

    def renew(self, options: WorkerOptions, held: Sequence[Lease]) -> None:
        """Put off the end of leases, and let RQ's tools see that the worker lives."""
        with translated_errors(self.url):
            names = [part for lease in held for part in _names(lease)]
            self._retrying_scripts("renew", options.settings.lease, *names)
            if self._card is not None:
                with suppress(OutOfMemoryError):
                    self._show(self._card, held)

    @contextmanager
    def registered(self, options: WorkerOptions) -> Iterator[None]:
        """Be listed among RQ's workers."""
        with translated_errors(self.url):
            card = self._card = SimpleWorker(
                [],
                name=options.worker,
                connection=connect(self.url, patient=True),
                serializer=JSONSerializer,
                worker_ttl=WORKER_TTL,
            )
            with suppress(OutOfMemoryError):  # listed or not, a worker empties a full Redis
                card.register_birth()
        try:
            yield
        finally:
            self._card = None
            with suppress(QueueError), translated_errors(self.url):
                card.register_death()
            card.connection.close()

    def _show(self, card: SimpleWorker, held: Sequence[Lease]) -> None:
        """Refresh a worker's entry; written anew each time, as Redis may have been emptied."""
        names = _texts(card.connection.zrange(ORDER, 0, -1))
        card.queues = [Queue(n, connection=card.connection) for n in names]
        for queue in card.queues:
            clean_worker_registry(queue)
        with card.connection.pipeline() as pipeline:
            card.heartbeat(pipeline=pipeline)
            pipeline.hset(card.key, mapping=card.serialize())
            pipeline.expire(card.key, WORKER_TTL + 60)
            register(card, pipeline)
            card.set_state("busy" if held else "idle", pipeline=pipeline)
            card.set_current_job_id(held[-1].task.id if held else None, pipeline=pipeline)
            pipeline.execute()

    def _wait_for_workers(self, job: str, *, quietly: bool) -> None:
        if not quietly:
            log.warning(
                "%d chunks are queued, which is plenty; the rest follows as workers take them "
                "(stopped here, `chunkq produce --resume` queues it)",
                MAX_QUEUED,
            )
        while self.counts(job).queued >= MAX_QUEUED:
            time.sleep(1)

    def _fields(self, ids: Sequence[str], *fields: str) -> list[Any]:
        with self._quick.pipeline(transaction=False) as pipeline:
            for task_id in ids:
                pipeline.hmget(f"rq:job:{task_id}", fields)
            return pipeline.execute()

    def _in_parts(self, script: str, *arguments: str | int) -> int:
        total = 0
        with translated_errors(self.url):
            while changed := self._ask(script, *arguments):
                total += changed
        return total


def queue_name(job: str) -> str:
    """Return the RQ queue of a job folder's URI: the output's name, and a key to tell it apart."""
    output = job.rstrip("/").rpartition("/")[2].removesuffix(".chunkq")
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', output)[:40]}-{job_key(job)}"


def _message(task: Task) -> bytes:
    """Encode as RQ encodes a call of a function; the name is shown and never looked up."""
    return json.dumps([f"chunkq.{task.kind}", None, [task.as_dict()], {}]).encode()


def _task(message: bytes | None) -> Task | None:
    """Decode a message; None if it is none of ours. RQ's own tools pack what they requeue."""
    try:
        with suppress(zlib.error):
            message = zlib.decompressobj().decompress(message or b"", LONGEST_MESSAGE)
        _, _, (values,), _ = json.loads(message or b"")
        return Task.from_dict(values)
    except (ValueError, TypeError, RecursionError, QueueError):
        return None


def _texts(values: Any) -> list[str]:
    return [value.decode() for value in values]


def _names(lease: Lease) -> tuple[str, str, str]:
    return queue_name(lease.task.job), lease.task.id, lease.token


def _job_filter(options: WorkerOptions) -> tuple[str, ...]:
    """Return what of the queue a options may begin, as the scripts take it."""
    if options.job is not None:
        return ("only", queue_name(options.job))
    return ("except", *(queue_name(job) for job in sorted(options.skipped_jobs)))
