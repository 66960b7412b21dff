"""Queue in a SQL table: the SQL statements, and the executor that uses them.

The table is in a local file, or in the memory of a cluster's head process, which is called over the
network. Therefore the arguments and results of `TaskTable` are JSON values.
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
    RunningTask,
    TaskCounts,
    WorkerOptions,
)
from chunkq.executors.leases import Lease, LeaseQueue
from chunkq.tasks import Task, chunk_name, parse_chunk

log = logging.getLogger("chunkq.queue")

BATCH = 1000

COMPLETE = "complete"
STATE_NOW = "iif(state = 'running' AND lease_until < ?, 'queued', state)"

# An expired lease counts as an attempt; after the last attempt the task is failed.
# With the two inner queries each {filter} uses an index, so a long queue is not sorted.
RESERVE = """
UPDATE tasks SET state = 'running', attempts = attempts + 1, worker = :worker, since = :now,
                 lease_until = :now + :lease
WHERE number = (
    SELECT number FROM (
        SELECT number FROM tasks WHERE state = 'running' AND lease_until < :now
               AND attempts < :max_attempts {filter}
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
WHERE state = 'running' AND lease_until < :now AND attempts >= :max_attempts
"""
# The task goes last: a temporary cause may be over by then.
NACK = """
UPDATE tasks SET state = CASE WHEN attempts >= :max_attempts THEN 'failed' ELSE 'queued' END,
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
DELETE_BLOCKS = """
DELETE FROM blocks WHERE job = :job AND NOT EXISTS (SELECT 1 FROM tasks WHERE job = :job)
"""


class TaskTable:
    """Tasks with their states and leases in a SQLite database, with one connection per thread.

    For each block with a committed contributor the table stores one digit per contributor, 1 for
    committed ones. A complete block is stored as COMPLETE. The blocks of a job are deleted with
    its last task.

    `id`, `job` and `message` of a task are text. Times are Unix times (s). Ending a lease has no
    effect if the task is now leased to another worker.
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
            has_path = str(error).startswith("queue: ")
            message = str(error) if has_path else f"queue: {path}: {error}"
            raise QueueError(message, code=error.code) from error.__cause__

    def submit(self, rows: Sequence[tuple[str, str, str]]) -> int:
        """Queue (id, job, message) rows in one transaction; return how many are newly queued."""
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            before = database.total_changes
            database.executemany(SUBMIT, rows)
            queued = database.total_changes - before
            database.execute("COMMIT")
        return queued

    def counts(self, job: str) -> dict[str, int]:
        """Return the numbers of tasks of a job by state; a task with an expired lease is queued."""
        with self._database() as database:
            rows = database.execute(
                f"SELECT {STATE_NOW} AS current, count(*) FROM tasks WHERE job = ? "
                "GROUP BY current",
                (time.time(), job),
            ).fetchall()
        return dict(rows)

    def jobs(self) -> dict[str, dict[str, int]]:
        """Return the numbers of tasks of every job by state; an expired lease counts as queued."""
        with self._database() as database:
            rows = database.execute(
                f"SELECT job, {STATE_NOW} AS current, count(*) FROM tasks GROUP BY job, current",
                (time.time(),),
            ).fetchall()
        states: dict[str, dict[str, int]] = {}
        for job, state, count in rows:
            states.setdefault(job, {})[state] = count
        return states

    def running(self, job: str) -> list[tuple[str, str, float]]:
        """Return message, worker and start time of the tasks of a job with unexpired leases."""
        with self._database() as database:
            return database.execute(
                "SELECT message, worker, since FROM tasks WHERE state = 'running' AND job = ? "
                "AND lease_until >= ? ORDER BY number",
                (job, time.time()),
            ).fetchall()

    def failed(self, job: str) -> list[str]:
        """Return the messages of the failed tasks of a job."""
        with self._database() as database:
            rows = database.execute(
                "SELECT message FROM tasks WHERE state = 'failed' AND job = ? ORDER BY number",
                (job,),
            ).fetchall()
        return [message for (message,) in rows]

    def retry(self, job: str) -> int:
        """Queue the failed tasks of a job with all their attempts."""
        return self._change(
            "UPDATE tasks SET state = 'queued', attempts = 0 WHERE state = 'failed' AND job = ?",
            (job,),
        )

    def cancel(self, job: str) -> int:
        """Delete the tasks of a job."""
        return self._delete("job = ?", (job,))

    def release(self, worker: str, counted: bool) -> int:
        """End the leases of a worker. A second call has no effect."""
        return self._change(
            "UPDATE tasks SET state = iif(attempts >= ? AND ?, 'failed', 'queued'), "
            "attempts = attempts - ?, worker = NULL, lease_until = NULL "
            "WHERE state = 'running' AND worker = ?",
            (MAX_ATTEMPTS, counted, 0 if counted else 1, worker),
        )

    def reserve(
        self, worker: str, lease: float, job: str | None, skipped_jobs: Sequence[str]
    ) -> tuple[str, str, int] | None:
        """Lease one task for `lease` seconds: of `job`, or of any job but `skipped_jobs`.

        Return its id, message and the number of this attempt, or None.
        """
        condition, names = _job_filter(job, skipped_jobs)
        values = {
            "worker": worker,
            "now": time.time(),
            "lease": lease,
            "max_attempts": MAX_ATTEMPTS,
            **names,
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
        """Delete a message that is not a task."""
        self._delete("id = ?", (id,))

    def ack(self, id: str, worker: str) -> None:
        """Delete a finished task."""
        self._delete("id = ? AND worker = ?", (id, worker))

    def record_contributions(
        self, job: str, contributions: Sequence[tuple[str, int, int]]
    ) -> list[str]:
        """Record committed contributors, each as (block, number, total number for the block).

        Return the blocks that this completes; each is returned to one caller only.
        """
        complete = []
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            # A worker that was suspended until its job was done must not create rows.
            exists = database.execute(
                "SELECT 1 FROM tasks WHERE job = ? LIMIT 1", (job,)
            ).fetchone()
            for block, member, of in contributions if exists else ():
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
        """End an unsuccessful attempt."""
        self._change(NACK, {"max_attempts": MAX_ATTEMPTS, "id": id, "worker": worker})

    def requeue(self, id: str, worker: str) -> None:
        """Queue a task without counting the attempt."""
        self._change(
            "UPDATE tasks SET state = 'queued', attempts = attempts - 1, lease_until = NULL "
            "WHERE id = ? AND worker = ? AND state = 'running'",
            (id, worker),
        )

    def is_drained(self, job: str | None, skipped_jobs: Sequence[str]) -> bool:
        """Return whether `job`, or every job but `skipped_jobs`, has no queued or running tasks."""
        condition, names = _job_filter(job, skipped_jobs)
        with self._database() as database:
            row = database.execute(
                f"SELECT 1 FROM tasks WHERE state IN ('queued', 'running') {condition} LIMIT 1",
                names,
            ).fetchone()
        return row is None

    def renew(self, worker: str, ids: Sequence[str], lease: float) -> None:
        """Extend the leases of tasks that a worker runs to `lease` seconds from now.

        A lease with the name of the worker that is not in `ids` expires: the worker never received
        the response to its `reserve`.
        """
        self._change(
            "UPDATE tasks SET lease_until = ? WHERE state = 'running' AND worker = ? "
            "AND id IN (SELECT value FROM json_each(?))",
            (time.time() + lease, worker, json.dumps(ids)),
        )

    def shorten(self, worker: str, lease: float) -> None:
        """Make the leases of a worker expire in `lease` seconds, unless they expire earlier."""
        self._change(
            "UPDATE tasks SET lease_until = min(lease_until, ?) WHERE state = 'running' "
            "AND worker = ?",
            (time.time() + lease, worker),
        )

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._threads = threading.local()

    def _delete(self, condition: str, values: Sequence[object]) -> int:
        """Delete tasks, and the blocks of jobs that have no tasks left; return how many tasks."""
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            jobs = database.execute(
                f"DELETE FROM tasks WHERE {condition} RETURNING job", values
            ).fetchall()
            database.executemany(DELETE_BLOCKS, [{"job": job} for (job,) in set(jobs)])
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
    """Queue in a `TaskTable` of this process or of another one."""

    table: TaskTable

    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks in transactions of 1000, so that workers can start immediately."""
        queued, stream = 0, iter(tasks)
        while batch := list(islice(stream, BATCH)):
            queued += self.table.submit([(task.id, task.job, task.to_json()) for task in batch])
        return queued

    def counts(self, job: str) -> TaskCounts:
        """Return the numbers of tasks of a job by state."""
        return TaskCounts(**self.table.counts(job))

    def jobs(self) -> dict[str, TaskCounts]:
        """Return the numbers of tasks of every job on the queue."""
        return {job: TaskCounts(**counts) for job, counts in self.table.jobs().items()}

    def running(self, job: str) -> list[RunningTask]:
        """Return the tasks of a job whose leases have not expired."""
        rows = self.table.running(job)
        return [
            RunningTask(Task.from_json(message), worker, since) for message, worker, since in rows
        ]

    def failed(self, job: str) -> list[Task]:
        """Return the failed tasks of a job."""
        return [Task.from_json(message) for message in self.table.failed(job)]

    def retry(self, job: str) -> int:
        """Queue the failed tasks of a job with all their attempts."""
        return self.table.retry(job)

    def cancel(self, job: str) -> int:
        """Remove all tasks of a job."""
        return self.table.cancel(job)

    def release(self, worker: str, *, counted: bool = True) -> int:
        """End the leases of a worker."""
        return self.table.release(worker, counted)

    def reserve(self, options: WorkerOptions) -> Lease | None:
        """Lease one task, or return None if no task is available."""
        while row := self.table.reserve(
            options.worker, options.settings.lease, options.job, sorted(options.skipped_jobs)
        ):
            id, message, attempts = row
            try:
                return Lease(Task.from_json(message), Attempt(attempts, options.worker))
            except QueueError as error:
                log.error("deleted from the queue: %s", error)
                self.table.delete(id)
        return None

    def ack(self, lease: Lease) -> None:
        """Delete a finished task, unless it is now leased to another worker."""
        self.table.ack(lease.task.id, lease.attempt.worker)

    def nack(self, lease: Lease, error: BaseException) -> None:
        """End an unsuccessful attempt."""
        self.table.nack(lease.task.id, lease.attempt.worker)

    def requeue(self, lease: Lease) -> None:
        """Queue a task without counting the attempt."""
        self.table.requeue(lease.task.id, lease.attempt.worker)

    def record_contributions(
        self, job: str, contributions: Sequence[BlockContribution]
    ) -> list[Task]:
        """Record a contributor of blocks; return tasks to finalize the complete ones."""
        rows = [(chunk_name(c.block), c.contributor, c.total) for c in contributions]
        blocks = map(parse_chunk, self.table.record_contributions(job, rows))
        return [Task("finalize", job, block) for block in blocks if block is not None]

    def is_drained(self, options: WorkerOptions) -> bool:
        """Return whether the jobs of a worker have neither queued nor running tasks."""
        return self.table.is_drained(options.job, sorted(options.skipped_jobs))

    def renew(self, options: WorkerOptions, leases: Sequence[Lease]) -> None:
        """Extend leases of a worker."""
        ids = [lease.task.id for lease in leases]
        self.table.renew(options.worker, ids, options.settings.lease)

    def close(self) -> None:
        """Close the connections."""
        self.table.close()


def _job_filter(job: str | None, skipped_jobs: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return a SQL condition for the tasks that may be reserved, and the values of its names."""
    if job is not None:
        return "AND job = :job", {"job": job}
    values = {f"skipped{n}": name for n, name in enumerate(skipped_jobs)}
    if not values:
        return "", {}
    return f"AND job NOT IN ({', '.join(':' + name for name in values)})", values
