"""Temporary folders on this machine that are also deleted after their process was killed.

A process locks a file in each of its folders. The operating system releases the lock when the
process ends. Before a process creates a folder, it deletes the folders whose lock is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chunkq.system.interrupts import deferred

PREFIX = "chunkq-"
LOCK = ".owner"
_own_folders: set[Path] = set()
"""Folders that this process created."""


@contextmanager
def scratch_folder(kind: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder with mode 0700 in `parent` (default: the system's temporary folder).

    Delete the folders of killed processes first, and the new folder at the end.
    """
    base = parent or Path(tempfile.gettempdir())
    delete_abandoned(base)
    folder = lock = None
    try:
        with deferred():
            folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-", dir=base))
            lock = _lock(folder)
            _own_folders.add(folder)
        yield folder
    finally:
        if folder is not None:
            _remove(folder)
        if lock is not None:
            os.close(lock)


def delete_abandoned(base: Path | None = None) -> None:
    """Delete this user's folders whose process has ended on this machine."""
    for folder in (base or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder not in _own_folders and _is_abandoned(folder):
                _delete(folder)


def delete_own_folders() -> None:
    """Delete the folders of this process, which is about to end without leaving its contexts."""
    for folder in tuple(_own_folders):
        _remove(folder)


def _remove(folder: Path) -> None:
    _own_folders.discard(folder)
    _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a folder, its lock file last, so that another process completes what was cut off."""
    with suppress(OSError):
        for entry in [entry for entry in folder.iterdir() if entry.name != LOCK]:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int:
    """Create the lock file of a folder and return its descriptor.

    The file gets its final name only after it is locked, so no process sees it unlocked.
    """
    lock = os.open(folder / f"{LOCK}-new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(lock, socket.gethostname().encode())
    with suppress(OSError):  # without file locks the folder is never deleted as abandoned
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(folder / f"{LOCK}-new", folder / LOCK)
    return lock


def _is_abandoned(folder: Path) -> bool:
    """Return whether this user's process that created a folder on this machine has ended.

    A lock on a shared file system may not exclude other machines, so folders of other hosts are
    never abandoned. Raises OSError.
    """
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        return False
    lock = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.read(lock, 256) == socket.gethostname().encode()
    finally:
        os.close(lock)
