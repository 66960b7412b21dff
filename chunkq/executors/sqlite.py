"""The embedded queue: one SQLite table in WAL mode, leases with a heartbeat, no server."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from chunkq.errors import QueueError
from chunkq.executors import leases
from chunkq.executors.base import MAX_ATTEMPTS, Attempt, Counts, Running, Shift
from chunkq.executors.leases import Lease, LeaseQueue
from chunkq.tasks import Task

log = logging.getLogger("chunkq.queue")

BATCH = 1000
NETWORK_FILESYSTEMS = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "glusterfs",
        "fuse.sshfs",
        "fuse.glusterfs",
        "9p",
        "fuse.ceph",
        "orangefs",
        "afs",
    ]
)

SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    job TEXT NOT NULL,
    message TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    attempts INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    since REAL,
    lease_until REAL
);
CREATE INDEX IF NOT EXISTS tasks_by_state ON tasks (state);
CREATE INDEX IF NOT EXISTS tasks_by_job ON tasks (job, state);
"""

SHOWN = "iif(state = 'running' AND lease_until < ?, 'queued', state)"

# A lease that ran out counts as an attempt; past the last one the task is failed, not begun.
# {filter} keeps each inner query on an index that gives rows in order, however long the queue.
TAKE = """
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
GIVE_UP = """
UPDATE tasks SET state = 'failed', lease_until = NULL
WHERE state = 'running' AND lease_until < :now AND attempts >= :most
"""
# Tried again after all others: what was amiss may have passed by then.
FAIL = """
UPDATE tasks SET state = CASE WHEN attempts >= :most THEN 'failed' ELSE 'queued' END,
                 number = (SELECT max(number) + 1 FROM tasks), lease_until = NULL
WHERE id = :id AND worker = :worker AND state = 'running'
"""
SUBMIT = """
INSERT INTO tasks (id, job, message) VALUES (?, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = 'queued', attempts = 0, worker = NULL, lease_until = NULL
WHERE state = 'failed'
"""


class SqliteExecutor(LeaseQueue):
    """Many processes on one machine, through one file. `sqlite:///absolute/path/queue.db`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._path = Path(url.removeprefix("sqlite://"))
        self._threads = threading.local()
        self._connections: list[sqlite3.Connection] = []
        _refuse_network(self._path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QueueError(f"queue: {self._path.parent} cannot be made: {error}") from None
        with self._database() as database:
            # WAL is a property of the file; set once, it stays.
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(SCHEMA)

    def submit(self, tasks: Iterable[Task]) -> int:
        """Queue tasks in transactions of a thousand, so that workers start at once."""
        queued, stream = 0, iter(tasks)
        while batch := list(islice(stream, BATCH)):
            rows = [(task.id, task.job, task.to_json()) for task in batch]
            with self._database() as database:
                database.execute("BEGIN IMMEDIATE")
                before = database.total_changes
                database.executemany(SUBMIT, rows)
                queued += database.total_changes - before
                database.execute("COMMIT")
        return queued

    def counts(self, job: str) -> Counts:
        """Count a job's tasks by state; one whose lease ran out waits again."""
        with self._database() as database:
            rows = database.execute(
                f"SELECT {SHOWN} AS shown, count(*) FROM tasks WHERE job = ? GROUP BY shown",
                (time.time(), job),
            ).fetchall()
        return Counts(**dict(rows))

    def jobs(self) -> dict[str, Counts]:
        """Count the tasks of every job on the queue; one whose lease ran out waits again."""
        with self._database() as database:
            rows = database.execute(
                f"SELECT job, {SHOWN} AS shown, count(*) FROM tasks GROUP BY job, shown",
                (time.time(),),
            ).fetchall()
        states: dict[str, dict[str, int]] = {}
        for job, state, count in rows:
            states.setdefault(job, {})[state] = count
        return {job: Counts(**found) for job, found in states.items()}

    def running(self, job: str) -> list[Running]:
        """List a job's tasks whose lease holds."""
        with self._database() as database:
            rows = database.execute(
                "SELECT message, worker, since FROM tasks WHERE state = 'running' AND job = ? "
                "AND lease_until >= ? ORDER BY number",
                (job, time.time()),
            ).fetchall()
        return [Running(Task.from_json(message), worker, since) for message, worker, since in rows]

    def failed(self, job: str) -> list[Task]:
        """List a job's failed tasks."""
        with self._database() as database:
            rows = database.execute(
                "SELECT message FROM tasks WHERE state = 'failed' AND job = ? ORDER BY number",
                (job,),
            ).fetchall()
        return [Task.from_json(message) for (message,) in rows]

    def retry(self, job: str) -> int:
        """Queue a job's failed tasks afresh."""
        return self._change(
            "UPDATE tasks SET state = 'queued', attempts = 0 WHERE state = 'failed' AND job = ?",
            (job,),
        )

    def cancel(self, job: str) -> int:
        """Take a job off the queue."""
        return self._change("DELETE FROM tasks WHERE job = ?", (job,))

    def release(self, worker: str, *, counted: bool = True) -> int:
        """End a worker's leases; its tasks are nobody's then, so saying it twice counts once."""
        return self._change(
            "UPDATE tasks SET state = iif(attempts >= ? AND ?, 'failed', 'queued'), "
            "attempts = attempts - ?, worker = NULL, lease_until = NULL "
            "WHERE state = 'running' AND worker = ?",
            (MAX_ATTEMPTS, counted, 0 if counted else 1, worker),
        )

    def close(self) -> None:
        """Close every thread's connection."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._threads = threading.local()

    def take(self, shift: Shift) -> Lease | None:
        """Begin one task, or return None if there is none to begin now."""
        condition, chosen = _choice(shift)
        while True:
            values = {
                "worker": shift.worker,
                "now": time.time(),
                "lease": leases.LEASE_SECONDS,
                "most": MAX_ATTEMPTS,
                **chosen,
            }
            with self._database() as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute(GIVE_UP, values)
                row = database.execute(TAKE.format(filter=condition), values).fetchone()
                database.execute("COMMIT")
            if row is None:
                return None
            name, message, attempts = row
            try:
                return Lease(Task.from_json(message), Attempt(attempts, shift.worker))
            except QueueError as error:
                log.error("dropped from the queue: %s", error)
                self._change("DELETE FROM tasks WHERE id = ?", (name,))

    def finish(self, lease: Lease) -> None:
        """Take a finished task off the queue, unless its lease went to another."""
        self._change(
            "DELETE FROM tasks WHERE id = ? AND worker = ?", (lease.task.id, lease.attempt.worker)
        )

    def fail(self, lease: Lease, error: BaseException) -> None:
        """End an attempt without success."""
        values = {"most": MAX_ATTEMPTS, "id": lease.task.id, "worker": lease.attempt.worker}
        with self._database() as database:
            database.execute(FAIL, values)

    def hand_back(self, lease: Lease) -> None:
        """Put a task back as if it had not been begun."""
        self._change(
            "UPDATE tasks SET state = 'queued', attempts = attempts - 1, lease_until = NULL "
            "WHERE id = ? AND worker = ? AND state = 'running'",
            (lease.task.id, lease.attempt.worker),
        )

    def is_drained(self, shift: Shift) -> bool:
        """Tell whether what a shift works on has neither queued nor running tasks."""
        condition, chosen = _choice(shift)
        with self._database() as database:
            row = database.execute(
                f"SELECT 1 FROM tasks WHERE state IN ('queued', 'running') {condition} LIMIT 1",
                chosen,
            ).fetchone()
        return row is None

    def renew(self, worker: str, held: Sequence[Lease]) -> None:
        """Put off the end of a worker's leases."""
        self._change(
            "UPDATE tasks SET lease_until = ? WHERE state = 'running' AND worker = ?",
            (time.time() + leases.LEASE_SECONDS, worker),
        )

    def _change(self, statement: str, values: tuple[object, ...]) -> int:
        with self._database() as database:
            return database.execute(statement, values).rowcount

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = getattr(self._threads, "connection", None)
            if connection is None:
                connection = sqlite3.connect(
                    self._path, timeout=60, isolation_level=None, check_same_thread=False
                )
                connection.execute("PRAGMA synchronous = NORMAL")
                self._threads.connection = connection
                self._connections.append(connection)
            yield connection
        except sqlite3.Error as error:
            connection = getattr(self._threads, "connection", None)
            if connection is not None and connection.in_transaction:
                connection.rollback()
            raise QueueError(f"queue: {self._path}: {error}") from error


def _choice(shift: Shift) -> tuple[str, dict[str, str]]:
    """Return the SQL condition, and its values, for the tasks that a shift may begin."""
    if shift.job is not None:
        return "AND job = :job", {"job": shift.job}
    aside = {f"aside{n}": job for n, job in enumerate(sorted(shift.set_aside))}
    if not aside:
        return "", {}
    return f"AND job NOT IN ({', '.join(':' + name for name in aside)})", aside


def _refuse_network(
    path: Path, partitions: Callable[[], list[tuple[str, str]]] | None = None
) -> None:
    """Raise QueueError if the file would lie on a network file system: WAL is for one host."""
    mounts = partitions() if partitions else _mounts()
    target = path.resolve()
    best = max(
        # Of several mounts on one point, the last is the one that shows.
        ((Path(point), kind) for point, kind in reversed(mounts) if target.is_relative_to(point)),
        key=lambda mount: len(mount[0].parts),
        default=None,
    )
    if best and best[1] in NETWORK_FILESYSTEMS:
        raise QueueError(
            f"queue: {path} lies on {best[1]}, and the embedded queue is for one host's own "
            "disk; name a file on a local disk with --queue sqlite:///…, or use a server queue"
        )


def _mounts() -> list[tuple[str, str]]:
    import psutil

    return [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
