"""Temporary folders of this machine, which also disappear where their owner was killed.

An owner holds a lock on a file in its folder. The lock ends with the owner, so whoever needs a
folder next removes those whose lock is free.
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

PREFIX = "chunkq-"
LOCK = ".owner"
_own_folders: set[Path] = set()
"""Folders of this process."""


@contextmanager
def scratch_folder(kind: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder with mode 0700 in the temporary folder or another; remove it at the end.

    Removes the folders of killed processes first.
    """
    base = parent or Path(tempfile.gettempdir())
    delete_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-", dir=base))
    lock = _lock(folder)
    _own_folders.add(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def delete_abandoned(base: Path | None = None) -> None:
    """Remove the folders of this user whose owner has ended on this machine without doing so."""
    for folder in (base or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder not in _own_folders and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def remove_own() -> None:
    """Remove the folders of this process, which is about to end without leaving its contexts."""
    for folder in tuple(_own_folders):
        _remove(folder)


def _remove(folder: Path) -> None:
    _own_folders.discard(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int:
    """Create the owner's file, locked before it has its name; returns the descriptor."""
    lock = os.open(folder / f"{LOCK}-new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(lock, socket.gethostname().encode())
    with suppress(OSError):  # a file system without locks: its folders are never swept
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(folder / f"{LOCK}-new", folder / LOCK)
    return lock


def _is_abandoned(folder: Path) -> bool:
    """Return whether a folder belongs to this user, and to no living process of this machine.

    Raises OSError. A lock on a shared file system need not hold on other machines.
    """
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        return False
    lock = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.read(lock, 256) == socket.gethostname().encode()
    finally:
        os.close(lock)
