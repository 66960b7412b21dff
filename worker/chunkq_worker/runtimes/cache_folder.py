"""Folders in the user's cache for what frameworks compile, so that the next process reuses it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from chunkq.errors import JobError
from chunkq.system import user_folders

COMPILER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch.compile stores what it has compiled; triton's files go there, too."""
log = logging.getLogger("chunkq.worker")


def cache_folder(*names: str) -> Path | None:
    """Create a folder below the user's cache folder, for this user only, and return it.

    Return None, and log the reason, if it cannot be created.
    """
    folder = Path("~/.cache")
    try:
        folder = user_folders.cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.joinpath(*names)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, JobError) as error:
        log.warning(
            "%s: cannot be created (%s); every process compiles the network again; set "
            "XDG_CACHE_HOME to a folder that you can write to",
            folder,
            getattr(error, "strerror", None) or error,
        )
        return None
    return folder


def use_compiler_cache() -> None:
    """Let torch.compile store its results in the user's cache, unless a folder is set.

    torch's default, which it sets when its compiler is imported, is in the temporary folder.
    """
    if COMPILER_VARIABLE not in os.environ and (folder := cache_folder("torch")):
        os.environ[COMPILER_VARIABLE] = str(folder)
