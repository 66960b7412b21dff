"""An output that is being written: it appears at its path at once, when it is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from chunkq.errors import ErrorCode, StoreError
from chunkq.paths import is_url, join, open_filesystem, without_secret
from chunkq.storage import documents
from chunkq.storage.objects import ObjectFolder
from chunkq.system.scratch import scratch_folder

SUFFIX = ".partial"
"""Suffix of the folder beside an output in which it is written."""
LOCK = "lock"
PROGRESS = "progress.json"
CONTENT = "content"


@dataclass(frozen=True)
class Partial:
    """A place for an output that is not complete.

    path     where the output is written
    staged   folder for copies of inputs
    objects  folder of the progress
    """

    path: str
    staged: str
    objects: ObjectFolder

    def steps(self, identity: str) -> int:
        """Return the number of finished steps of a process that wrote the same output."""
        content = self.objects.get(PROGRESS)
        values = documents.decode(content) if content is not None else None
        return int(values["steps"]) if values and values.get("identity") == identity else 0

    def record(self, identity: str, steps: int) -> None:
        """Record that steps are finished. A lost record costs time only."""
        content = documents.encode({"identity": identity, "steps": steps})
        self.objects.put(PROGRESS, content, durable=False)

    def clear(self) -> None:
        """Delete what another process has written."""
        self.objects.delete(PROGRESS)
        if is_url(self.path) or os.path.isdir(self.path):
            ObjectFolder(self.path).delete_folder()
        else:
            with suppress(FileNotFoundError):
                os.unlink(self.path)


@contextmanager
def partial_output(target: str, *, is_file: bool, overwrite: bool) -> Iterator[Partial]:
    """Yield a place for an output, which is moved to `target` at the end.

    A local output is written beside its target, in `TARGET.partial`, and renamed. That folder stays
    if the process ends early, so that another one continues. A file at a URL is written to a
    temporary folder and uploaded. A folder at a URL is written where it will be; its metadata come
    last. Raises StoreError if another process writes to the target.
    """
    check_target(target, is_file=is_file, overwrite=overwrite)
    if not is_url(target):
        with _beside(target, overwrite=overwrite) as partial:
            yield partial
        return
    objects = ObjectFolder(target + SUFFIX)
    if not is_file:
        yield Partial(target, join(objects.path, "staged"), objects)
    else:
        with scratch_folder("convert") as folder:
            path = str(folder / CONTENT)
            yield Partial(path, str(folder / "staged"), ObjectFolder(str(folder)))
            filesystem, inner = open_filesystem(target)
            filesystem.put_file(path, inner)
    objects.delete_folder()


@contextmanager
def _beside(target: str, *, overwrite: bool) -> Iterator[Partial]:
    folder = Path(target + SUFFIX)
    lock = _locked(folder, target)
    try:
        path = folder / CONTENT
        yield Partial(str(path), str(folder / "staged"), ObjectFolder(str(folder)))
        _flush(path)
        _move(path, Path(target), overwrite=overwrite)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(folder: Path, target: str) -> int:
    """Create the folder and lock it; return the descriptor that holds the lock.

    Raises StoreError if another process holds it.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has completed the output and deletes the folder
            continue
        except OSError as error:
            raise StoreError(
                f"output: {target} cannot be written: {error.strerror or error}; choose another "
                "output"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StoreError(
                f"output: {target}: another process writes to it; wait until it has ended",
                code=ErrorCode.OUTPUT_IN_USE,
            ) from None
        except OSError:  # a file system without locks
            return lock
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(folder / LOCK), os.fstat(lock)):
                return lock
        os.close(lock)


def _flush(path: Path) -> None:
    """Write a file to the disk. The objects of a folder are there already."""
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _move(path: Path, target: Path, *, overwrite: bool) -> None:
    if path.is_file() and not target.is_dir():
        if overwrite:
            os.replace(path, target)
        else:
            _link(path, target)
        return
    if overwrite and os.path.lexists(target):
        old = path.with_name("replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    try:
        os.rename(path, target)
    except OSError:  # not an empty folder
        raise _exists_error(str(target)) from None


def _link(path: Path, target: Path) -> None:
    """Rename a file unless the target exists."""
    try:
        os.link(path, target)
    except FileExistsError:
        raise _exists_error(str(target)) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise _exists_error(str(target)) from None
        os.rename(path, target)
        return
    with suppress(FileNotFoundError):
        os.unlink(path)


def _exists_error(target: str) -> StoreError:
    return StoreError(
        f"output: {target} exists; choose another output, or use --overwrite",
        code=ErrorCode.OUTPUT_EXISTS,
    )


def check_target(target: str, *, is_file: bool, overwrite: bool) -> None:
    """Raise StoreError if an output exists and may not be replaced.

    A folder at a URL that another process has begun to write does not count.
    """
    filesystem, inner = open_filesystem(target)
    if overwrite or not filesystem.exists(inner):
        return
    is_begun = is_url(target) and ObjectFolder(target + SUFFIX).exists(PROGRESS)
    if is_file or not is_begun:
        raise _exists_error(without_secret(target))
