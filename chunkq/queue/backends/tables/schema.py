"""Schema of the task table: create it, upgrade it, translate the errors of SQLite."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import time

from chunkq.errors import RESUME, ErrorCode, QueueError

VERSION = 2
"""Version of the schema, stored as `user_version`. It is 0 in new files, and in the oldest ones."""
BUSY_SECONDS = 60.0
"""How long a statement waits for other processes."""
MAX_PAUSE = 0.05
MIN_FREE_BYTES = 1 << 20
"""Free bytes below which an I/O error is reported as a full disk."""

STATEMENTS = (
    "DROP TABLE IF EXISTS tasks",
    "DROP TABLE IF EXISTS blocks",
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY,
        path TEXT NOT NULL,
        epoch TEXT NOT NULL,
        UNIQUE (path, epoch)
    )
    """,
    """
    CREATE TABLE tasks (
        number INTEGER PRIMARY KEY,
        job INTEGER NOT NULL,
        id TEXT NOT NULL,
        message TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'queued',
        attempts INTEGER NOT NULL DEFAULT 0,
        worker TEXT,
        since REAL,
        lease_until REAL
    )
    """,
    "CREATE UNIQUE INDEX tasks_by_id ON tasks (job, id)",
    "CREATE INDEX tasks_by_state ON tasks (job, state)",
    "CREATE INDEX leases ON tasks (lease_until) WHERE state = 'running'",
    """
    CREATE TABLE contributions (
        job INTEGER NOT NULL,
        task TEXT NOT NULL,
        marks TEXT NOT NULL,
        PRIMARY KEY (job, task)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE gates (
        number INTEGER PRIMARY KEY,
        job INTEGER NOT NULL,
        kind TEXT NOT NULL,
        is_closed INTEGER NOT NULL DEFAULT TRUE,
        UNIQUE (job, kind)
    )
    """,
)


def connect(path: str) -> sqlite3.Connection:
    """Open a database in autocommit mode; several threads may close it."""
    connection = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def prepare(database: sqlite3.Connection) -> None:
    """Create the tables, unless another process has done it.

    Raises sqlite3.Error, and QueueError if a newer version of chunkq wrote the file, or if an
    older one left tasks in it.
    """
    _switch_to_wal(database)
    if _version(database) == VERSION:
        return
    # IMMEDIATE waits for another writer; a transaction that begins with a read does not.
    database.execute("BEGIN IMMEDIATE")
    try:
        if _version(database) != VERSION:
            _check_replaceable(database)
            for statement in STATEMENTS:
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {VERSION}")
    except QueueError:
        database.rollback()
        raise
    database.execute("COMMIT")


def _version(database: sqlite3.Connection) -> int:
    """Return the version of the schema. Raises QueueError if it is newer than this one."""
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise QueueError(
            f"has schema version {version} of a newer chunkq, expected at most {VERSION}; install "
            "the newer chunkq, or use another file with --queue sqlite:///…",
            code=ErrorCode.QUEUE_UNSUPPORTED,
        )
    return version


def _check_replaceable(database: sqlite3.Connection) -> None:
    """Raise QueueError unless the file has no table of tasks, or an empty one of version 1."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    if "tasks" not in tables:
        return
    if _version(database) == 0 or database.execute("SELECT 1 FROM tasks LIMIT 1").fetchone():
        raise QueueError(
            "has tasks in the schema of another program or of an older chunkq; use another file "
            f"with --queue sqlite:///…, or remove it, then {RESUME}",
            code=ErrorCode.QUEUE_UNSUPPORTED,
        )


def _switch_to_wal(database: sqlite3.Connection) -> None:
    """Set the journal mode, which is stored in the file.

    SQLite does not apply its busy timeout to this statement, because two processes that wait for
    each other's shared lock would deadlock.
    """
    limit = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > limit:
                raise
        time.sleep(random.uniform(0, MAX_PAUSE))


def _is_busy(error: sqlite3.Error) -> bool:
    return _primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _primary_code(error: sqlite3.Error) -> int:
    """Return the low byte of the result code; 0 for errors that Python raises itself."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def as_queue_error(path: str, error: sqlite3.Error) -> QueueError:
    """Translate an error of SQLite: the file, the reason, and what to do."""
    code, advice = _diagnosis(path, _primary_code(error))
    return QueueError(f"queue: {path}: {error}{advice}", code=code)


def _diagnosis(path: str, result: int) -> tuple[ErrorCode, str]:
    folder = os.path.dirname(path) or "."
    unwritable = os.path.isdir(folder) and not os.access(folder, os.W_OK)
    if result == sqlite3.SQLITE_IOERR and _is_full(folder):
        result = sqlite3.SQLITE_FULL
    if result == sqlite3.SQLITE_CANTOPEN and (unwritable or not _is_writable(path)):
        result = sqlite3.SQLITE_READONLY
    return _DIAGNOSES.get(result, (ErrorCode.QUEUE_UNAVAILABLE, ""))


_DIAGNOSES = {
    sqlite3.SQLITE_FULL: (
        ErrorCode.QUEUE_FULL,
        "; free disk space, then run the command again",
    ),
    sqlite3.SQLITE_READONLY: (
        ErrorCode.QUEUE_READ_ONLY,
        "; make the file and its folder writable, or use another file with --queue sqlite:///…",
    ),
    sqlite3.SQLITE_BUSY: (
        ErrorCode.QUEUE_BUSY,
        f" for {BUSY_SECONDS:.0f} s by another process; end that process, or use another file",
    ),
    sqlite3.SQLITE_NOTADB: (
        ErrorCode.QUEUE_DAMAGED,
        "; use another file with --queue sqlite:///…",
    ),
    sqlite3.SQLITE_CORRUPT: (
        ErrorCode.QUEUE_DAMAGED,
        f"; remove the file, then {RESUME} to queue what is not done",
    ),
}


def _is_full(folder: str) -> bool:
    try:
        return shutil.disk_usage(folder).free < MIN_FREE_BYTES
    except OSError:
        return False


def _is_writable(path: str) -> bool:
    return not os.path.exists(path) or os.access(path, os.W_OK)
