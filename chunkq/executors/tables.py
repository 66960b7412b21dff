"""A queue as one SQL table: its statements, and the executor that speaks to it.

The table may lie in a file of this machine, or in the memory of a cluster's own head, which is
then asked over the network. Hence its methods take and give nothing but JSON's values.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from chunkq.errors import QueueError
from chunkq.executors import table_schema
from chunkq.executors.base import (
    MAX_ATTEMPTS,
    Attempt,
    BlockContribution,
    Counts,
    Running,
    WorkerOptions,
)
from chunkq.executors.leases import Lease, LeaseQueue
from chunkq.tasks import Task, chunk_name, parse_chunk

log = logging.getLogger("chunkq.queue")

BATCH = 1000

COMPLETE = "complete"
RUNNING_COLUMNS = "iif(state = 'running' AND lease_until < ?, 'queued', state)"

# A lease that ran out counts as an attempt; past the last one the task is failed, not begun.
# {filter} keeps each inner query on an index that gives rows in order, however long the queue.
RESERVE = """
UPDATE tasks SET state = 'running', attempts = attempts + 1, worker = :worker, since = :now,
                 lease_until = :now + :lease
WHERE number = (
    SELECT number FROM (
        SELECT number FROM tasks WHERE state = 'running' AND lease_until < :now
               AND attempts < :most {filter}
        ORDER BY number LIMIT 1
    )
    UNION ALL
    SELECT number FROM (
        SELECT number FROM tasks WHERE state = 'queued' {filter}
        ORDER BY number LIMIT 1
    )
    LIMIT 1
)
RETURNING id, message, attempts
"""
EXPIRE_LAST_ATTEMPTS = """
UPDATE tasks SET state = 'failed', lease_until = NULL
WHERE state = 'running' AND lease_until < :now AND attempts >= :most
"""
# Tried again after all others: what was amiss may have passed by then.
NACK = """
UPDATE tasks SET state = CASE WHEN attempts >= :most THEN 'failed' ELSE 'queued' END,
                 number = (SELECT max(number) + 1 FROM tasks), lease_until = NULL
WHERE id = :id AND worker = :worker AND state = 'running'
"""
SUBMIT = """
INSERT INTO tasks (id, job, message) VALUES (?, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = 'queued', attempts = 0, worker = NULL, lease_until = NULL
WHERE state = 'failed'
"""
RECORD_CONTRIBUTION = """
INSERT INTO blocks (job, block, marks) VALUES (?, ?, ?)
ON CONFLICT (job, block) DO UPDATE SET marks = excluded.marks
"""
FORGET_BLOCKS = """
DELETE FROM blocks WHERE job = :job AND NOT EXISTS (SELECT 1 FROM tasks WHERE job = :job)
"""


class TaskTable:
    """Tasks with their states and leases, in a SQLite database; one connection a thread.

    Of each block with a committed contributor it keeps one digit a contributor, 1 for the
    committed ones, and nothing but that it is complete once all are; as long as its job has
    tasks here.

    A task's `id`, its `job` and its `message` are text; times are Unix times (s). What ends a
    lease that is another's by now changes nothing.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._threads = threading.local()
        self._connections: list[sqlite3.Connection] = []
        try:
            with self._database() as database:
                table_schema.prepare(database)
        except QueueError as error:
            self.close()
            named = str(error).startswith("queue: ")
            message = str(error) if named else f"queue: {path}: {error}"
            raise QueueError(message, code=error.code) from error.__cause__

    def submit(self, rows: Sequence[tuple[str, str, str]]) -> int:
        """Queue (id, job, message) rows in one transaction; returns how many are newly queued."""
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            before = database.total_changes
            database.executemany(SUBMIT, rows)
            queued = database.total_changes - before
            database.execute("COMMIT")
        return queued

    def counts(self, job: str) -> dict[str, int]:
        """Count a job's tasks by state; one whose lease ran out waits again."""
        with self._database() as database:
            rows = database.execute(
                f"SELECT {RUNNING_COLUMNS} AS shown, count(*) FROM tasks WHERE job = ? "
                "GROUP BY shown",
                (time.time(), job),
            ).fetchall()
        return dict(rows)

    def jobs(self) -> dict[str, dict[str, int]]:
        """Count the tasks of every job; one whose lease ran out waits again."""
        with self._database() as database:
            rows = database.execute(
                f"SELECT job, {RUNNING_COLUMNS} AS shown, count(*) FROM tasks GROUP BY job, shown",
                (time.time(),),
            ).fetchall()
        states: dict[str, dict[str, int]] = {}
        for job, state, count in rows:
            states.setdefault(job, {})[state] = count
        return states

    def running(self, job: str) -> list[tuple[str, str, float]]:
        """Return message, worker and begin of a job's tasks whose lease holds."""
        with self._database() as database:
            return database.execute(
                "SELECT message, worker, since FROM tasks WHERE state = 'running' AND job = ? "
                "AND lease_until >= ? ORDER BY number",
                (job, time.time()),
            ).fetchall()

    def failed(self, job: str) -> list[str]:
        """Return the messages of a job's failed tasks."""
        with self._database() as database:
            rows = database.execute(
                "SELECT message FROM tasks WHERE state = 'failed' AND job = ? ORDER BY number",
                (job,),
            ).fetchall()
        return [message for (message,) in rows]

    def retry(self, job: str) -> int:
        """Queue a job's failed tasks afresh."""
        return self._change(
            "UPDATE tasks SET state = 'queued', attempts = 0 WHERE state = 'failed' AND job = ?",
            (job,),
        )

    def cancel(self, job: str) -> int:
        """Delete a job's tasks."""
        return self._delete("job = ?", (job,))

    def release(self, worker: str, counted: bool) -> int:
        """End a worker's leases; its tasks are nobody's then, so saying it twice counts once."""
        return self._change(
            "UPDATE tasks SET state = iif(attempts >= ? AND ?, 'failed', 'queued'), "
            "attempts = attempts - ?, worker = NULL, lease_until = NULL "
            "WHERE state = 'running' AND worker = ?",
            (MAX_ATTEMPTS, counted, 0 if counted else 1, worker),
        )

    def reserve(
        self, worker: str, lease: float, job: str | None, aside: Sequence[str]
    ) -> tuple[str, str, int] | None:
        """Begin one task for `lease` seconds: of `job`, or of any but those `aside`.

        Returns its id, message and the number of this attempt, or None.
        """
        condition, chosen = _job_filter(job, aside)
        values = {
            "worker": worker,
            "now": time.time(),
            "lease": lease,
            "most": MAX_ATTEMPTS,
            **chosen,
        }
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute(EXPIRE_LAST_ATTEMPTS, values)
            row: tuple[str, str, int] | None = database.execute(
                RESERVE.format(filter=condition), values
            ).fetchone()
            database.execute("COMMIT")
        return row

    def delete(self, id: str) -> None:
        """Delete what is no task."""
        self._delete("id = ?", (id,))

    def ack(self, id: str, worker: str) -> None:
        """Delete a finished task."""
        self._delete("id = ? AND worker = ?", (id, worker))

    def record_contributions(
        self, job: str, contributions: Sequence[tuple[str, int, int]]
    ) -> list[str]:
        """Mark contributors, each a (block, number, how many the block has), as committed.

        Returns the blocks that are complete by that, each to one caller only.
        """
        complete = []
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            # A worker that wakes up after its job is done must leave nothing behind.
            known = database.execute("SELECT 1 FROM tasks WHERE job = ? LIMIT 1", (job,)).fetchone()
            for block, member, of in contributions if known else ():
                row = database.execute(
                    "SELECT marks FROM blocks WHERE job = ? AND block = ?", (job, block)
                ).fetchone()
                before = row[0] if row else "0" * of
                if before == COMPLETE:
                    continue
                after = f"{before[:member]}1{before[member + 1 :]}"
                if "0" not in after:
                    after = COMPLETE
                    complete.append(block)
                if after != before:
                    database.execute(RECORD_CONTRIBUTION, (job, block, after))
            database.execute("COMMIT")
        return complete

    def nack(self, id: str, worker: str) -> None:
        """End an attempt without success."""
        self._change(NACK, {"most": MAX_ATTEMPTS, "id": id, "worker": worker})

    def requeue(self, id: str, worker: str) -> None:
        """Put a task back as if it had not been begun."""
        self._change(
            "UPDATE tasks SET state = 'queued', attempts = attempts - 1, lease_until = NULL "
            "WHERE id = ? AND worker = ? AND state = 'running'",
            (id, worker),
        )

    def is_drained(self, job: str | None, aside: Sequence[str]) -> bool:
        """Tell whether nothing is queued or running: of `job`, or of any but those `aside`."""
        condition, chosen = _job_filter(job, aside)
        with self._database() as database:
            row = database.execute(
                f"SELECT 1 FROM tasks WHERE state IN ('queued', 'running') {condition} LIMIT 1",
                chosen,
            ).fetchone()
        return row is None

    def renew(self, worker: str, held: Sequence[str], lease: float) -> None:
        """Put off the end of the leases that a worker knows it holds by `lease` seconds.

        Others of its name are not: the answer to its `take` was lost on the way.
        """
        self._change(
            "UPDATE tasks SET lease_until = ? WHERE state = 'running' AND worker = ? "
            "AND id IN (SELECT value FROM json_each(?))",
            (time.time() + lease, worker, json.dumps(held)),
        )

    def shorten(self, worker: str, lease: float) -> None:
        """Have a worker's leases run out in `lease` seconds, unless they do before."""
        self._change(
            "UPDATE tasks SET lease_until = min(lease_until, ?) WHERE state = 'running' "
            "AND worker = ?",
            (time.time() + lease, worker),
        )

    def close(self) -> None:
        """Close every thread's connection."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._threads = threading.local()

    def _delete(self, condition: str, values: Sequence[object]) -> int:
        """Delete tasks, and what is remembered of the blocks of jobs that have no more of them."""
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            jobs = database.execute(
                f"DELETE FROM tasks WHERE {condition} RETURNING job", values
            ).fetchall()
            database.executemany(FORGET_BLOCKS, [{"job": job} for (job,) in set(jobs)])
            database.execute("COMMIT")
        return len(jobs)

    def _change(self, statement: str, values: Sequence[object] | dict[str, object]) -> int:
        with self._database() as database:
            return database.execute(statement, values).rowcount

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = getattr(self._threads, "connection", None)
            if connection is None:
                connection = table_schema.connect(self.path)
                self._threads.connection = connection
                self._connections.append(connection)
            yield connection
        except sqlite3.Error as error:
            connection = getattr(self._threads, "connection", None)
            if connection is not None and connection.in_transaction:
                connection.rollback()
            raise table_schema.as_queue_error(self.path, error) from error


class TableQueue(LeaseQueue):
    """The queue in a table, wherever that lies."""

    table: TaskTable

    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks in transactions of a thousand, so that workers start at once."""
        queued, stream = 0, iter(tasks)
        while batch := list(islice(stream, BATCH)):
            queued += self.table.submit([(task.id, task.job, task.to_json()) for task in batch])
        return queued

    def counts(self, job: str) -> Counts:
        """Count a job's tasks by state."""
        return Counts(**self.table.counts(job))

    def jobs(self) -> dict[str, Counts]:
        """Count the tasks of every job on the queue."""
        return {job: Counts(**found) for job, found in self.table.jobs().items()}

    def running(self, job: str) -> list[Running]:
        """List a job's tasks whose lease holds."""
        rows = self.table.running(job)
        return [Running(Task.from_json(message), worker, since) for message, worker, since in rows]

    def failed(self, job: str) -> list[Task]:
        """List a job's failed tasks."""
        return [Task.from_json(message) for message in self.table.failed(job)]

    def retry(self, job: str) -> int:
        """Queue a job's failed tasks afresh."""
        return self.table.retry(job)

    def cancel(self, job: str) -> int:
        """Take a job off the queue."""
        return self.table.cancel(job)

    def release(self, worker: str, *, counted: bool = True) -> int:
        """End a worker's leases."""
        return self.table.release(worker, counted)

    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Begin one task, or return None if there is none to begin now."""
        while row := self.table.reserve(
            options.worker, options.settings.lease, options.job, sorted(options.skipped_jobs)
        ):
            id, message, attempts = row
            try:
                return Lease(Task.from_json(message), Attempt(attempts, options.worker))
            except QueueError as error:
                log.error("dropped from the queue: %s", error)
                self.table.delete(id)
        return None

    def ack(self, lease: Lease) -> None:
        """Take a finished task off the queue, unless its lease went to another."""
        self.table.ack(lease.task.id, lease.attempt.worker)

    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an attempt without success."""
        self.table.nack(lease.task.id, lease.attempt.worker)

    def requeue(self, lease: Lease) -> None:
        """Put a task back as if it had not been begun."""
        self.table.requeue(lease.task.id, lease.attempt.worker)

    def record_contributions(
        self, job: str, contributions: Sequence[BlockContribution]
    ) -> list[Task]:
        """Mark a chunk as contributor of blocks; return the finalize tasks of complete ones."""
        rows = [(chunk_name(mark.block), mark.member, mark.of) for mark in contributions]
        found = map(parse_chunk, self.table.record_contributions(job, rows))
        return [Task("finalize", job, block) for block in found if block is not None]

    def is_drained(self, options: WorkerOptions) -> bool:
        """Tell whether what a options works on has neither queued nor running tasks."""
        return self.table.is_drained(options.job, sorted(options.skipped_jobs))

    def renew(self, options: WorkerOptions, held: Sequence[Lease]) -> None:
        """Extend the leases that a worker holds."""
        ids = [lease.task.id for lease in held]
        self.table.renew(options.worker, ids, options.settings.lease)

    def close(self) -> None:
        """Let go of connections."""
        self.table.close()


def _job_filter(job: str | None, aside: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the SQL condition, and its values, for the tasks that may be begun."""
    if job is not None:
        return "AND job = :job", {"job": job}
    named = {f"aside{n}": other for n, other in enumerate(aside)}
    if not named:
        return "", {}
    return f"AND job NOT IN ({', '.join(':' + name for name in named)})", named
