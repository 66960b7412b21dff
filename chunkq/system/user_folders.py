"""The folders of this user for state and caches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import platformdirs

from chunkq.errors import JobError


def home_folder() -> Path:
    """Return the home folder. Raises JobError if this user has none."""
    try:
        return Path.home()
    except RuntimeError:
        raise _homeless("HOME to a folder that you can write to") from None


def state_folder() -> Path:
    """Return the folder for state, which may not exist. Raises JobError if this user has none."""
    return _folder(platformdirs.user_state_path, "XDG_STATE_HOME")


def data_folder() -> Path:
    """Return the folder for data, which may not exist. Raises JobError if this user has none."""
    return _folder(platformdirs.user_data_path, "XDG_DATA_HOME")


def cache_folder() -> Path:
    """Return the folder for caches, which may not exist. Raises JobError if this user has none."""
    return _folder(platformdirs.user_cache_path, "XDG_CACHE_HOME")


def _folder(find: Callable[[str], Path], variable: str) -> Path:
    """Return a folder of platformdirs; some versions raise for a missing home, others keep `~`."""
    try:
        path = find("chunkq")
    except RuntimeError:
        path = Path("~")
    if path.is_absolute():
        return path
    raise _homeless(f"HOME or {variable} to a folder that you can write to")


def _homeless(advice: str) -> JobError:
    return JobError(
        f"HOME: not set, and user {os.getuid()} has no home folder in passwd; set {advice}"
    )
