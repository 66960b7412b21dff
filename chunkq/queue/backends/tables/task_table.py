"""Tasks in a SQL table: the SQL statements of a queue."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

from chunkq.errors import QueueError
from chunkq.queue.backends.tables import schema as table_schema
from chunkq.queue.backends.tables.contract import Skipped, Table
from chunkq.queue.contract.executor import MAX_ATTEMPTS

GATE_BATCH = 5000
"""Tasks that a gate stops or queues in one transaction."""
COMPLETE = "complete"
JOB = "(SELECT number FROM jobs WHERE path = :path AND epoch = :epoch)"
"""The number of a job, NULL if it has neither tasks nor gates."""
KIND = "substr(tasks.id, 1, instr(tasks.id, '/') - 1)"
STATE_TO_START = (
    f"iif({KIND} IN (SELECT kind FROM gates WHERE gates.job = tasks.job AND is_closed), "
    "'waiting', 'queued')"
)
"""State of a task that may start unless its gate is closed."""
STATE_NOW = f"iif(state = 'running' AND lease_until < :now, {STATE_TO_START}, state)"
LEASED = f"job = {JOB} AND id = :id AND worker = :worker AND state = 'running'"

# An expired lease counts as an attempt; after the last attempt the task is failed.
# A long queue is not sorted: the first query reads expired leases only, the second one the first
# entry of an index for each job. CROSS JOIN keeps the order of the tables.
RESERVE = """
UPDATE tasks SET state = 'running', attempts = attempts + 1, worker = :worker, since = :now,
                 lease_until = :now + :lease
WHERE number = (
    SELECT number FROM (
        SELECT tasks.number FROM tasks CROSS JOIN jobs ON jobs.number = tasks.job
        WHERE state = 'running' AND lease_until < :now AND attempts < :max_attempts AND {selected}
        ORDER BY tasks.number LIMIT 1
    )
    UNION ALL
    SELECT number FROM (
        SELECT tasks.number FROM jobs CROSS JOIN tasks ON tasks.job = jobs.number
        WHERE state = 'queued' AND {selected}
        ORDER BY jobs.number, tasks.number LIMIT 1
    )
    LIMIT 1
)
RETURNING (SELECT path FROM jobs WHERE number = job), (SELECT epoch FROM jobs WHERE number = job),
          id, message, attempts
"""
# A task that starts in the future was leased before the clock was put back.
CLOCK_PUT_BACK = """
UPDATE tasks SET since = :now, lease_until = :now + :lease
WHERE state = 'running' AND lease_until > :now + :lease AND since > :now
"""
EXPIRE = f"""
UPDATE tasks SET state = iif(attempts >= :max_attempts, 'failed', 'waiting'), lease_until = NULL
WHERE state = 'running' AND lease_until < :now
      AND (attempts >= :max_attempts OR {STATE_TO_START} = 'waiting')
"""
# The task goes last: a temporary cause may be over by then.
NACK = f"""
UPDATE tasks SET state = iif(attempts >= :max_attempts, 'failed', {STATE_TO_START}),
                 number = (SELECT max(number) + 1 FROM tasks), lease_until = NULL
WHERE {LEASED}
"""
REQUEUE = f"""
UPDATE tasks SET state = {STATE_TO_START}, attempts = attempts - 1, lease_until = NULL
WHERE {LEASED}
"""
RELEASE = f"""
UPDATE tasks SET state = iif(attempts >= :max_attempts AND :counted, 'failed', {STATE_TO_START}),
                 attempts = attempts - (NOT :counted), worker = NULL, lease_until = NULL
WHERE state = 'running' AND worker = :worker
"""
RENEW = """
UPDATE tasks SET lease_until = :until
WHERE state = 'running' AND worker = :worker AND (job, id) IN (
    SELECT jobs.number, json_extract(value, '$[2]') FROM json_each(:leases) JOIN jobs
    ON jobs.path = json_extract(value, '$[0]') AND epoch = json_extract(value, '$[1]')
)
"""
SUBMIT = """
INSERT INTO tasks (job, id, message, state) VALUES (?, ?, ?, ?)
ON CONFLICT (job, id) DO UPDATE
SET state = excluded.state, attempts = 0, worker = NULL, lease_until = NULL WHERE state = 'failed'
"""
RECORD_CONTRIBUTION = """
INSERT INTO contributions (job, task, marks) VALUES (?, ?, ?)
ON CONFLICT (job, task) DO UPDATE SET marks = excluded.marks
"""
CLOSE_GATE = """
INSERT INTO gates (job, kind) VALUES (:job, :kind)
ON CONFLICT (job, kind) DO UPDATE SET is_closed = TRUE
"""
MOVE_BATCH = f"""
UPDATE tasks SET state = :target WHERE number IN (
    SELECT number FROM tasks WHERE job = :job AND state = :source AND {KIND} = :kind
    ORDER BY number LIMIT :limit
)
"""
# The name of a kind has letters only, so that the ids of its tasks are between `KIND/` and `KIND0`.
WAITING = """
SELECT path, epoch, (
    SELECT kind FROM gates WHERE gates.job = jobs.number AND EXISTS (
        SELECT 1 FROM tasks INDEXED BY tasks_by_id WHERE tasks.job = jobs.number
        AND id > gates.kind || '/' AND id < gates.kind || '0' AND state = 'waiting'
    )
    ORDER BY gates.number LIMIT 1
) AS first_kind
FROM jobs WHERE {selected} AND first_kind IS NOT NULL AND NOT EXISTS (
    SELECT 1 FROM tasks WHERE tasks.job = jobs.number AND state IN ('queued', 'running')
)
ORDER BY jobs.number
"""
DEMAND = """
SELECT count(*) FROM (
    SELECT 1 FROM jobs CROSS JOIN tasks ON tasks.job = jobs.number
    WHERE path = :path AND {condition} LIMIT :limit
)
"""
DELETE_IF_EMPTY = """
DELETE FROM jobs WHERE number = :job AND NOT EXISTS (SELECT 1 FROM tasks WHERE job = :job)
"""


class TaskTable(Table):
    """Tasks with their states and leases in a SQLite database, with one connection per thread.

    For each task that waits for contributions the table stores one digit per contributor, 1 for
    committed ones, or COMPLETE. Contributions and gates of a job are deleted with its last task.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        """Open the table; `clock` returns the time (s, Unix) for its leases."""
        self.path, self._clock = path, clock
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

    @override
    def submit(self, rows: Sequence[tuple[str, str, str, str]]) -> int:
        with self._transaction() as database:
            jobs = dict.fromkeys((path, epoch) for path, epoch, _, _ in rows)  # in their order
            numbers = {job: _create_job(database, *job) for job in jobs}
            closed = set(database.execute("SELECT job, kind FROM gates WHERE is_closed"))
            before = database.total_changes
            database.executemany(SUBMIT, (_new_task(row, numbers, closed) for row in rows))
            return database.total_changes - before

    @override
    def counts(self, path: str, epoch: str) -> dict[str, int]:
        rows = self._read(
            f"SELECT {STATE_NOW} AS current, count(*) FROM tasks WHERE job = {JOB} "
            "GROUP BY current",
            {"now": self._clock(), "path": path, "epoch": epoch},
        )
        return dict(rows)

    @override
    def jobs(self) -> list[tuple[str, str, dict[str, int]]]:
        rows = self._read(
            f"SELECT path, epoch, {STATE_NOW} AS current, count(*) FROM tasks "
            "JOIN jobs ON jobs.number = tasks.job GROUP BY path, epoch, current",
            {"now": self._clock()},
        )
        states: dict[tuple[str, str], dict[str, int]] = {}
        for path, epoch, state, count in rows:
            states.setdefault((path, epoch), {})[state] = count
        return [(*job, counts) for job, counts in states.items()]

    @override
    def running(self, path: str, epoch: str) -> list[tuple[str, str, float]]:
        return self._read(
            f"SELECT message, worker, since FROM tasks WHERE state = 'running' AND job = {JOB} "
            "AND lease_until >= :now ORDER BY number",
            {"now": self._clock(), "path": path, "epoch": epoch},
        )

    @override
    def failed(self, path: str, epoch: str) -> list[str]:
        rows = self._read(
            f"SELECT message FROM tasks WHERE state = 'failed' AND job = {JOB} ORDER BY number",
            {"path": path, "epoch": epoch},
        )
        return [message for (message,) in rows]

    @override
    def retry(self, path: str, epoch: str) -> int:
        return self._change(
            f"UPDATE tasks SET state = {STATE_TO_START}, attempts = 0 "
            f"WHERE state = 'failed' AND job = {JOB}",
            {"path": path, "epoch": epoch},
        )

    @override
    def cancel(self, path: str, epoch: str) -> int:
        with self._transaction() as database:
            job = _job_number(database, path, epoch)
            count = database.execute("DELETE FROM tasks WHERE job = ?", (job,)).rowcount
            _delete_if_empty(database, job)
        return count

    @override
    def close_gate(self, path: str, epoch: str, kind: str) -> int:
        with self._transaction() as database:
            values = {"job": _create_job(database, path, epoch), "kind": kind}
            database.execute(CLOSE_GATE, values)
            return _move_batch(database, values, "queued", "waiting")

    @override
    def open_gate(self, path: str, epoch: str, kind: str) -> int:
        with self._transaction() as database:
            job = _job_number(database, path, epoch)
            values = {"job": job, "kind": kind}
            where = "WHERE job = :job AND kind = :kind"
            database.execute(f"UPDATE gates SET is_closed = FALSE {where}", values)
            moved = _move_batch(database, values, "waiting", "queued")
            if not moved:
                database.execute(f"DELETE FROM gates {where}", values)
                _delete_if_empty(database, job)
        return moved

    @override
    def waiting(self, job: str | None, skipped_jobs: Skipped) -> list[tuple[str, str, str]]:
        selected, values = _selection(job, skipped_jobs)
        return self._read(WAITING.format(selected=selected), values)

    @override
    def release(self, worker: str, counted: bool) -> int:
        return self._change(
            RELEASE, {"max_attempts": MAX_ATTEMPTS, "counted": counted, "worker": worker}
        )

    @override
    def reserve(
        self, worker: str, lease: float, job: str | None, skipped_jobs: Skipped
    ) -> tuple[str, str, str, str, int] | None:
        selected, names = _selection(job, skipped_jobs)
        values = {
            "worker": worker,
            "now": self._clock(),
            "lease": lease,
            "max_attempts": MAX_ATTEMPTS,
            **names,
        }
        with self._transaction() as database:
            database.execute(CLOCK_PUT_BACK, values)
            database.execute(EXPIRE, values)
            row: tuple[str, str, str, str, int] | None = database.execute(
                RESERVE.format(selected=selected), values
            ).fetchone()
        return row

    @override
    def delete(self, path: str, epoch: str, id: str) -> None:
        self._delete(f"job = {JOB} AND id = :id", {"path": path, "epoch": epoch, "id": id})

    @override
    def ack(self, path: str, epoch: str, id: str, worker: str) -> int:
        return self._delete(LEASED, {"path": path, "epoch": epoch, "id": id, "worker": worker})

    @override
    def record_contributions(
        self, path: str, epoch: str, contributions: Sequence[tuple[str, int, int]]
    ) -> list[str]:
        complete = []
        with self._transaction() as database:
            # A worker that was suspended until its job was done must not create rows.
            row = database.execute(
                f"SELECT job FROM tasks WHERE job = {JOB} LIMIT 1", {"path": path, "epoch": epoch}
            ).fetchone()
            for task, number, total in contributions if row else ():
                key = (row[0], task)
                marks = database.execute(
                    "SELECT marks FROM contributions WHERE job = ? AND task = ?", key
                ).fetchone()
                before = marks[0] if marks else "0" * total
                if before == COMPLETE:
                    continue
                after = f"{before[:number]}1{before[number + 1 :]}"
                if "0" not in after:
                    after = COMPLETE
                    complete.append(task)
                if after != before:
                    database.execute(RECORD_CONTRIBUTION, (*key, after))
        return complete

    @override
    def nack(self, path: str, epoch: str, id: str, worker: str) -> None:
        values = {"path": path, "epoch": epoch, "id": id, "worker": worker}
        self._change(NACK, values | {"max_attempts": MAX_ATTEMPTS})

    @override
    def requeue(self, path: str, epoch: str, id: str, worker: str) -> None:
        self._change(REQUEUE, {"path": path, "epoch": epoch, "id": id, "worker": worker})

    @override
    def is_drained(self, job: str | None, skipped_jobs: Skipped) -> bool:
        selected, values = _selection(job, skipped_jobs)
        rows = self._read(
            "SELECT 1 FROM jobs CROSS JOIN tasks ON tasks.job = jobs.number "
            f"WHERE {selected} AND state IN ('queued', 'running') LIMIT 1",
            values,
        )
        return not rows

    @override
    def renew(self, worker: str, leases: Sequence[tuple[str, str, str]], lease: float) -> None:
        values = {"until": self._clock() + lease, "worker": worker, "leases": json.dumps(leases)}
        self._change(RENEW, values)

    @override
    def extend(self, worker: str, seconds: float) -> None:
        self._change(
            "UPDATE tasks SET lease_until = max(lease_until, :until) WHERE state = 'running' "
            "AND worker = :worker",
            {"until": self._clock() + seconds, "worker": worker},
        )

    def has_work(self) -> bool:
        """Return whether any task has not failed."""
        return bool(self._read("SELECT 1 FROM tasks WHERE state != 'failed' LIMIT 1", {}))

    def demand(self, path: str, limit: int) -> tuple[int, int]:
        """Return the numbers of queued and of running tasks of the jobs of a folder.

        Each is counted up to `limit`. Tasks with expired leases are queued.
        """
        values = {"path": path, "limit": limit, "now": self._clock()}
        queued, expired, running = (
            self._read(DEMAND.format(condition=condition), values)[0][0]
            for condition in (
                "state = 'queued'",
                "state = 'running' AND lease_until < :now",
                "state = 'running' AND lease_until >= :now",
            )
        )
        return min(queued + expired, limit), running

    def shorten(self, worker: str, lease: float) -> None:
        """Make the leases of a worker expire in `lease` seconds, unless they expire earlier."""
        self._change(
            "UPDATE tasks SET lease_until = min(lease_until, :until) WHERE state = 'running' "
            "AND worker = :worker",
            {"until": self._clock() + lease, "worker": worker},
        )

    @override
    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._threads = threading.local()

    def _delete(self, condition: str, values: Mapping[str, Any]) -> int:
        """Delete tasks, and jobs that have no tasks left; return how many tasks."""
        with self._transaction() as database:
            jobs = database.execute(
                f"DELETE FROM tasks WHERE {condition} RETURNING job", values
            ).fetchall()
            for (job,) in set(jobs):
                _delete_if_empty(database, job)
        return len(jobs)

    def _change(self, statement: str, values: Mapping[str, Any]) -> int:
        with self._database() as database:
            return database.execute(statement, values).rowcount

    def _read(self, statement: str, values: Mapping[str, Any]) -> list[Any]:
        with self._database() as database:
            return database.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = getattr(self._threads, "connection", None)
            if connection is None:
                connection = table_schema.connect(self.path)
                self._threads.connection = connection
                self._connections.append(connection)
            yield connection
        except BaseException as error:
            connection = getattr(self._threads, "connection", None)
            if connection is not None and connection.in_transaction:
                connection.rollback()
            if isinstance(error, sqlite3.Error):
                raise table_schema.as_queue_error(self.path, error) from error
            raise


def _job_number(database: sqlite3.Connection, path: str, epoch: str) -> int | None:
    row = database.execute(
        "SELECT number FROM jobs WHERE path = ? AND epoch = ?", (path, epoch)
    ).fetchone()
    return row[0] if row else None


def _create_job(database: sqlite3.Connection, path: str, epoch: str) -> int | None:
    database.execute("INSERT OR IGNORE INTO jobs (path, epoch) VALUES (?, ?)", (path, epoch))
    return _job_number(database, path, epoch)


def _delete_if_empty(database: sqlite3.Connection, job: int | None) -> None:
    """Delete a job without tasks, with its gates and contributions."""
    values = {"job": job}
    if database.execute(DELETE_IF_EMPTY, values).rowcount:
        database.execute("DELETE FROM gates WHERE job = :job", values)
        database.execute("DELETE FROM contributions WHERE job = :job", values)


def _new_task(
    row: tuple[str, str, str, str],
    numbers: Mapping[tuple[str, str], int | None],
    closed: set[tuple[int, str]],
) -> tuple[int | None, str, str, str]:
    """Return the values of SUBMIT."""
    path, epoch, id, message = row
    job = numbers[path, epoch]
    state = "waiting" if closed and (job, id.partition("/")[0]) in closed else "queued"
    return job, id, message, state


def _move_batch(
    database: sqlite3.Connection, values: Mapping[str, Any], source: str, target: str
) -> int:
    """Change the state of a batch of tasks of one job and kind; return how many."""
    states = {"source": source, "target": target, "limit": GATE_BATCH}
    return database.execute(MOVE_BATCH, {**values, **states}).rowcount


def _selection(path: str | None, skipped_jobs: Skipped) -> tuple[str, dict[str, str]]:
    """Return a SQL condition for the jobs of a worker, and the values of its names."""
    conditions = ["jobs.path = :selected"] if path is not None else ["TRUE"]
    values = {"selected": path} if path is not None else {}
    for number, (skipped_path, epoch) in enumerate(skipped_jobs):
        conditions.append(f"NOT (jobs.path = :path{number} AND jobs.epoch = :epoch{number})")
        values |= {f"path{number}": skipped_path, f"epoch{number}": epoch}
    return " AND ".join(conditions), values
