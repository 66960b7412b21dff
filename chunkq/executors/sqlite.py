"""The embedded queue: one SQLite table in WAL mode, leases with a heartbeat, no server."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from chunkq.errors import ErrorCode, QueueError
from chunkq.executors.tables import TableQueue, TaskTable

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
    """Many processes on one machine, through one file. `sqlite:///absolute/path/queue.db`."""

    def __init__(self, url: str) -> None:
        self.url = url
        path = Path(url.removeprefix("sqlite://"))
        _refuse_network(path)
        _create(path)
        self.table = TaskTable(str(path))


def _create(path: Path) -> None:
    """Create the file and its folders unless they exist; only the owner can open a new file.

    SQLite gives its `-wal` and `-shm` files the mode of this one. Raises QueueError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QueueError(
            f"queue: {path.parent} cannot be made: {error}", code=_code_of(error)
        ) from None
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass  # whatever it is, SQLite opens it or reports why not
    except OSError as error:
        raise QueueError(
            f"queue: {path} cannot be created: {error.strerror or error}; use another file with "
            "--queue sqlite:///…",
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


def _refuse_network(
    path: Path, partitions: Callable[[], list[tuple[str, str]]] | None = None
) -> None:
    """Raise QueueError if the file would lie on a network file system: WAL is for one host."""
    mounts = partitions() if partitions else _mounts()
    target = Path(os.path.realpath(path))  # resolve() raises where a link leads to itself
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
