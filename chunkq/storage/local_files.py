"""Local files that appear at once, and folders that several processes write and delete."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from typing_extensions import Buffer

from chunkq.paths import join

PARTIAL = ".partial-"
"""Prefix of temporary files, which remain if a writer is killed. They are never listed."""
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors that say that there is no such file."""
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
"""Errors of file systems without hard links."""
MAX_ATTEMPTS = 20
"""Attempts to write into a folder that others delete, or to delete one that others write into."""
MIN_PAUSE, MAX_PAUSE = 0.001, 0.1
"""Seconds before the second attempt, doubled before each later one up to the maximum."""


def write_file(
    root: str,
    target: str,
    parts: Iterable[Buffer],
    move: Callable[[str, str], None],
    *,
    durable: bool = True,
    mode: int = 0o666,
) -> None:
    """Write a temporary file in the folder `root`, then `move` it to its target.

    The file has a mode less the umask. If `durable`, it is flushed to the disk. Tries again if
    another process deletes the target's folder or the temporary file.
    """
    temporary = os.path.join(root, f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        for attempt in range(MAX_ATTEMPTS):
            try:
                _make_folder(os.path.dirname(target))
                if not os.path.exists(temporary):
                    _write(temporary, parts, durable, mode)
                move(temporary, target)
                return
            except FileNotFoundError:
                if attempt + 1 == MAX_ATTEMPTS:
                    raise
                _back_off(attempt)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _write(path: str, parts: Iterable[Buffer], durable: bool, mode: int) -> None:
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.writelines(parts)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def move_new(temporary: str, target: str) -> None:
    """Move a file to its target. Raises FileExistsError if the target exists."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # Until the replacement, readers see an empty file and treat it as damaged.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)


def files_in(path: str) -> Iterator[os.DirEntry[str]]:
    """Yield the files directly inside a folder, none if it does not exist."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith(PARTIAL) and entry.is_file():
                    yield entry
    except NO_FILE:
        return


def discard(root: str, names: Iterable[str]) -> None:
    """Rename files or folders in the folder `root`, then delete them.

    A process that is suspended during the deletion cannot delete files that others have created
    under the same names.
    """
    trash = os.path.join(root, f"{PARTIAL}{uuid.uuid4().hex}")
    for name in names:
        source = join(root, name)
        while os.path.lexists(source):
            os.makedirs(trash, exist_ok=True)
            with suppress(FileNotFoundError):  # another process deleted the partial files
                os.rename(source, join(trash, name))
    remove_tree(trash)


def delete_partial_files(root: str) -> None:
    """Delete temporary files of killed writers. A running writer writes its file again."""
    if os.path.isdir(root):
        for name in os.listdir(root):
            if name.startswith(PARTIAL):
                remove(os.path.join(root, name))


def remove(path: str) -> None:
    """Delete a file or a folder. Do nothing if it does not exist."""
    if os.path.isdir(path) and not os.path.islink(path):
        remove_tree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def remove_tree(path: str) -> None:
    """Delete a folder. Try again while others write to it."""
    for attempt in range(MAX_ATTEMPTS):
        try:
            if os.path.exists(path):
                shutil.rmtree(path, onerror=_ignore_missing)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt + 1 == MAX_ATTEMPTS:
                raise
            _back_off(attempt)


def _make_folder(path: str) -> None:
    """Create a folder unless it exists. Raises FileNotFoundError if others deleted it again."""
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError as error:  # the folder was deleted before makedirs checked its type
        if os.path.exists(path) and not os.path.isdir(path):
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error


def _back_off(attempt: int) -> None:
    """Wait for other processes that use the same folder."""
    time.sleep(min(MIN_PAUSE * 2**attempt, MAX_PAUSE))


def _ignore_missing(call: object, path: str, info: tuple[type, BaseException, object]) -> None:
    """Ignore that another process has deleted a file; raise any other error."""
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]
