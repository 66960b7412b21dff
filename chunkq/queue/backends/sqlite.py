"""Embedded queue in a SQLite file in WAL mode, without a server."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from chunkq.errors import ErrorCode, QueueError
from chunkq.queue.backends.tables.queue import TableQueue
from chunkq.queue.backends.tables.task_table import TaskTable

MOUNTS = Path("/proc/self/mounts")
"""Linux's table of mounts."""
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


class SqliteExecutor(TableQueue):
    """Queue `sqlite:///absolute/path/queue.db`, shared by processes on one machine."""

    def __init__(self, url: str) -> None:
        self.url = url
        path = Path(url.removeprefix("sqlite://"))
        _require_local_disk(path)
        _create(path)
        self.table = TaskTable(str(path))


def _create(path: Path) -> None:
    """Create the file and its folders unless they exist. Only the owner can open a new file.

    SQLite creates the `-wal` and `-shm` files with the same mode. Raises QueueError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QueueError(
            f"queue: {path.parent}: cannot create the folder: {error.strerror or error}; use "
            "another file with --queue sqlite:///…",
            code=_code_of(error),
        ) from None
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass  # SQLite opens it, or reports why not
    except OSError as error:
        raise QueueError(
            f"queue: {path}: cannot create the file: {error.strerror or error}; use another file "
            "with --queue sqlite:///…",
            code=_code_of(error),
        ) from None


def _code_of(error: OSError) -> ErrorCode:
    return {
        errno.EROFS: ErrorCode.QUEUE_READ_ONLY,
        errno.EACCES: ErrorCode.QUEUE_READ_ONLY,
        errno.EPERM: ErrorCode.QUEUE_READ_ONLY,
        errno.ENOSPC: ErrorCode.QUEUE_FULL,
        errno.EDQUOT: ErrorCode.QUEUE_FULL,
    }.get(error.errno or 0, ErrorCode.QUEUE_UNAVAILABLE)


def _require_local_disk(
    path: Path, partitions: Callable[[], list[tuple[str, str]]] | None = None
) -> None:
    """Raise QueueError if the path is on a network file system. WAL works on one host only."""
    mounts = partitions() if partitions else _mounts()
    target = Path(os.path.realpath(path))  # resolve() raises for a link to itself
    mount = max(
        # Of several mounts on one point, the last one is visible.
        ((Path(point), kind) for point, kind in reversed(mounts) if target.is_relative_to(point)),
        key=lambda point_and_kind: len(point_and_kind[0].parts),
        default=None,
    )
    if mount and mount[1] in NETWORK_FILESYSTEMS:
        raise QueueError(
            f"queue: {path}: unsupported network file system {mount[1]}; use a file on a local "
            "disk with --queue sqlite:///…, or a Redis queue",
            code=ErrorCode.QUEUE_UNSUPPORTED,
        )


def _unescaped(path: str) -> str:
    """Return a path of the table of mounts, in which white space is octal, such as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _mounts() -> list[tuple[str, str]]:
    """Return the path and the type of each file system, in the order in which they were mounted."""
    if MOUNTS.exists():
        lines = os.fsdecode(MOUNTS.read_bytes()).splitlines()
        return [(_unescaped(line.split(" ")[1]), line.split(" ")[2]) for line in lines]
    import psutil  # not on Linux: it takes a twentieth of `chunkq status` to import

    return [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
