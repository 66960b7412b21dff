"""Read-protected files for passwords, keys and URLs that contain a password."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def write_private(path: Path, text: str) -> Path:
    """Write a file with mode 0600 atomically. The file never exists with another mode.

    Raises OSError.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return path


def make_private_folder(path: Path) -> Path:
    """Create a folder with mode 0700. An existing folder keeps its mode. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def is_private(path: Path) -> bool:
    """Return whether the path is a regular file of this user that no other user can open."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and _is_own(status) and not status.st_mode & 0o077


def is_replaceable_by_others(folder: Path) -> bool:
    """Return whether another user can create or replace files in a folder."""
    status = folder.stat()
    return not _is_own(status) or bool(status.st_mode & 0o022)


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid()
