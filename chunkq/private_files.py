"""Files that only their owner can read: passwords, keys, addresses with a password."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def write_private(path: Path, text: str) -> Path:
    """Write a file with mode 0600. It appears whole, and never with another mode.

    Raises OSError.
    """
    number, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return path


def make_private_folder(path: Path) -> Path:
    """Create a folder with mode 0700; one that exists keeps its mode. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def is_private(path: Path) -> bool:
    """Return whether a regular file belongs to this user and no other user can open it."""
    state = path.lstat()
    return stat.S_ISREG(state.st_mode) and _is_own(state) and not state.st_mode & 0o077


def is_replaceable_by_others(folder: Path) -> bool:
    """Return whether another user could put files of their own into a folder."""
    state = folder.stat()
    return not _is_own(state) or bool(state.st_mode & 0o022)


def _is_own(state: os.stat_result) -> bool:
    return state.st_uid == os.geteuid()
