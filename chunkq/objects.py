"""A folder of small objects, local or behind an fsspec URL. Every object appears at once."""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from chunkq import buffers
from chunkq.paths import is_url, join, open_filesystem, read_bytes

PARTIAL = ".partial-"
"""Prefix of names that a writer killed in the middle may leave behind; never listed."""

NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
"""What file systems without hard links say."""
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
READERS = 16
"""Files read at once: what a parallel file system is good at."""
REMOVALS = 20
"""How often a folder is emptied again while others fill it, or filled while others empty it."""
PAUSE, LONGEST_PAUSE = 0.001, 0.1
"""Seconds before the second attempt at that; each later one waits twice as long, up to a most."""


CONDITIONAL_WRITES = frozenset({"s3", "s3a", "gs", "gcs", "memory"})
"""Schemes whose file systems can create an object only if there is none."""
CLAIM_SECONDS = 60.0
"""How long a process may take to replace an object before another one takes over."""


class ObjectInfo(NamedTuple):
    """One listed object: its name in the folder, when it was last written (s, Unix), its bytes."""

    name: str
    modified: float
    size: int


class ObjectFolder:
    """Objects by name below one path; names may contain `/`. Raises OSError as storage does."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._local = not is_url(path)
        # Local objects need no fsspec, whose import would be most of a short command's time.
        self._filesystem: Any = None
        self._root = path
        self.is_exclusive = self._local
        """Whether `put_new` is atomic; known for certain after it was called."""
        if not self._local:
            self._filesystem, self._root = open_filesystem(path)
            scheme = path.partition("://")[0]
            self.is_exclusive = scheme in CONDITIONAL_WRITES and _has_mode(self._filesystem)

    def put(self, name: str, *parts: Buffer, durable: bool = True, private: bool = False) -> None:
        """Write an object: another reader sees all of it or nothing.

        If it is `durable` that holds also after the machine went down, and it is on the disk at
        the return; if not, a local file may then be gone, short or damaged. A `private` one can
        only be read by this user; behind a URL, by whoever can read the folder.
        """
        target = join(self._root, name)
        if self._local:
            self._write(target, parts, os.replace, durable, 0o600 if private else 0o666)
        else:
            self._filesystem.pipe_file(target, b"".join(parts))

    def put_new(self, name: str, content: bytes) -> bool:
        """Write an object unless there is one; return whether it was written.

        Of several writers at once the first one's stays. This holds on local disks and where the
        storage has a conditional write (`is_exclusive`); elsewhere the last one's may stay.
        """
        target = join(self._root, name)
        if self._local:
            try:
                self._write(target, (content,), _link)
            except FileExistsError:
                return False
            return True
        if self.exists(name):
            return False
        try:
            self._put_remote(target, content)
        except FileExistsError:
            return False
        return True

    def _put_remote(self, target: str, content: bytes) -> None:
        """Write an object, by a conditional write if there is one; raises FileExistsError."""
        if self.is_exclusive:
            try:
                self._filesystem.pipe_file(target, content, mode="create")
                return
            except OSError as error:
                if _is_precondition_failed(error):
                    raise FileExistsError(target) from error
                if not _is_not_implemented(error):
                    raise
                self.is_exclusive = False
        self._filesystem.pipe_file(target, content)

    @contextmanager
    def claim(self, name: str, content: bytes | None) -> Iterator[bool]:
        """Claim the right to replace an object as long as it has this content; None: is absent.

        Yields whether this process has it. Of several processes that claim the same content at
        once, one has it. The claim is an object of its own, with its owner's name. The claim of a
        process that died is broken at once on its own machine, elsewhere after a minute.
        """
        claim = f"{name}.{hashlib.sha256(content or b'').hexdigest()[:16]}.claim"
        owner = f"{_this_machine()} {os.getpid()} {uuid.uuid4().hex}".encode()
        if not self.put_new(claim, owner) and not self._take_over_claim(claim, owner):
            yield False
            return
        try:
            yield self.get(name) == content
        finally:
            if self.get(claim) == owner:  # else it took too long, and another process has it
                self.delete(claim)

    def replace(self, name: str, before: bytes | None, content: bytes) -> bool:
        """Replace an object whose content is `before`; return False if it is not any more.

        To be called by the process that holds the claim.
        """
        if before is None:
            return self.put_new(name, content)
        if self.get(name) != before:
            return False
        self.put(name, content)
        return True

    def _take_over_claim(self, claim: str, owner: bytes) -> bool:
        """Take over a claim whose owner died; return whether this process has it now."""
        folder, _, last = claim.rpartition("/")
        ages = [time.time() - e.modified for e in self.list(folder) if e.name == last]
        is_young = any(age < CLAIM_SECONDS for age in ages)
        if is_young and not _has_ended(self.get(claim)):
            return False
        self.delete(claim)
        return self.put_new(claim, owner)

    def _write(
        self,
        target: str,
        parts: Sequence[Buffer],
        settle: Callable[[str, str], None],
        durable: bool = True,
        mode: int = 0o666,
    ) -> None:
        """Write a file at the top, then `settle` it in its folder; either may vanish meanwhile."""
        temporary = os.path.join(self._root, f"{PARTIAL}{uuid.uuid4().hex}")
        try:
            for attempt in range(REMOVALS):
                try:
                    _make_folder(os.path.dirname(target))
                    if not os.path.exists(temporary):
                        _write_out(temporary, parts, durable, mode)
                    settle(temporary, target)
                    return
                except FileNotFoundError:
                    if attempt + 1 == REMOVALS:
                        raise
                    _back_off(attempt)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def get(self, name: str) -> bytes | None:
        """Return an object's content, or None where there is none."""
        path = join(self._root, name)
        try:
            return read_bytes(path) if self._local else bytes(self._filesystem.cat_file(path))
        except NO_FILE:
            return None

    def get_array(self, name: str) -> npt.NDArray[np.uint8] | None:
        """Return an object's bytes, read straight into `pages.zeros`; None where there is none."""
        if not self._local:
            content = self.get(name)
            return None if content is None else np.frombuffer(content, np.uint8)
        try:
            with open(join(self._root, name), "rb") as file:
                room = buffers.zeros((os.fstat(file.fileno()).st_size,), np.uint8)
                return room[: file.readinto(room.data)]
        except NO_FILE:
            return None

    def get_many(self, names: list[str]) -> dict[str, bytes]:
        """Return the content of those objects that exist."""
        if self._local or not names:
            found = self._get_local(names)
            return {name: content for name in names if (content := found[name]) is not None}
        paths = {join(self._root, name): name for name in names}
        contents = self._filesystem.cat(list(paths), on_error="omit")
        if isinstance(contents, bytes):
            return {names[0]: contents}
        stripped = {path.lstrip("/"): name for path, name in paths.items()}
        return {stripped[path.lstrip("/")]: content for path, content in contents.items()}

    def _get_local(self, names: Sequence[str]) -> dict[str, bytes | None]:
        if len(names) <= READERS:
            return {name: self.get(name) for name in names}
        shares = [names[start::READERS] for start in range(READERS)]
        with ThreadPoolExecutor(READERS) as pool:
            return dict(
                chain.from_iterable(
                    pool.map(lambda share: [(name, self.get(name)) for name in share], shares)
                )
            )

    def exists(self, name: str) -> bool:
        """Tell whether there is such an object."""
        path = join(self._root, name)
        return os.path.exists(path) if self._local else bool(self._filesystem.exists(path))

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Yield the objects directly inside a folder, in no order; none if it is not there."""
        path = join(self._root, folder)
        if self._local:
            for entry in _scan(path):
                if (found := _object_info(entry)) is not None:
                    yield found
            return
        try:
            entries = self._filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return
        for entry in entries:
            if entry["type"] == "file":
                name = entry["name"].rpartition("/")[2]
                yield ObjectInfo(name, _modified(entry), entry.get("size") or 0)

    def folders(self) -> Sequence[str]:
        """Return the names of the folders directly inside this one; none if it is not there."""
        if self._local:
            try:
                with os.scandir(self._root) as entries:
                    return [e.name for e in entries if e.is_dir(follow_symlinks=False)]
            except NO_FILE:
                return []
        try:
            entries = self._filesystem.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        names = (e["name"].rstrip("/") for e in entries if e["type"] == "directory")
        return [name.rpartition("/")[2] for name in names]

    def sample(
        self, folder: str, most: int, keep: Callable[[str], bool]
    ) -> tuple[int, int, Sequence[ObjectInfo]]:
        """Count a folder's objects whose names to `keep`; return that, a step, and a sample.

        The sample is every step-th object, `most` at most. Asking a local file for its date costs
        more than listing it; only the sample is asked.
        """
        if not self._local:
            listed = [entry for entry in self.list(folder) if keep(entry.name)]
            step = 1 + len(listed) // most
            return len(listed), step, listed[::step]
        entries = [entry for entry in _scan(join(self._root, folder)) if keep(entry.name)]
        step = 1 + len(entries) // most
        found = [entry for e in entries[::step] if (entry := _object_info(e)) is not None]
        return len(entries), step, found

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        path = join(self._root, name)
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._local:
                os.unlink(path)
            else:
                self._filesystem.rm_file(path)

    def delete_partial_files(self) -> None:
        """Remove what killed writers left behind; a writer of this moment writes again."""
        if self._local and os.path.isdir(self._root):
            for name in os.listdir(self._root):
                if name.startswith(PARTIAL):
                    _remove(os.path.join(self._root, name))

    def delete_folder(self, folder: str = "") -> None:
        """Remove a folder and all it holds; nothing happens if there is none."""
        path = join(self._root, folder) if folder else self._root
        if self._local:
            _remove_tree(path)
            return
        if self._filesystem.exists(path):
            self._filesystem.rm(path, recursive=True)

    def discard(self, *names: str) -> None:
        """Remove members of this folder, files or folders, without a trace at once.

        Local ones are moved aside before they are deleted, so that a process that was suspended
        meanwhile cannot delete what others have created under the same names.
        """
        if not self._local:
            for name in names:
                self.delete_folder(name)
            return
        aside = os.path.join(self._root, f"{PARTIAL}{uuid.uuid4().hex}")
        for name in names:
            source = join(self._root, name)
            while os.path.lexists(source):
                os.makedirs(aside, exist_ok=True)
                with suppress(FileNotFoundError):  # another process swept what lies aside
                    os.rename(source, join(aside, name))
        _remove_tree(aside)

    def clear(self) -> None:
        """Discard all members of this folder; nothing happens if there is none."""
        if not self._local:
            self.delete_folder()
        elif os.path.isdir(self._root):
            self.discard(*(n for n in os.listdir(self._root) if not n.startswith(PARTIAL)))
            self.delete_partial_files()
        else:
            _remove(self._root)


def _write_out(path: str, parts: Sequence[Buffer], durable: bool, mode: int) -> None:
    """Write a file with a mode, less the umask; if `durable`, wait until it is on the disk."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.writelines(parts)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _link(temporary: str, target: str) -> None:
    """Put a file in its place if that is free; raises FileExistsError if not."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # A reader that sees the empty file takes it for a damaged one until it is replaced.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)


def _remove(path: str) -> None:
    """Remove a file or a folder; nothing happens if there is none."""
    if os.path.isdir(path) and not os.path.islink(path):
        _remove_tree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _remove_tree(path: str) -> None:
    """Remove a folder, also one that others are still writing to."""
    for attempt in range(REMOVALS):
        try:
            if os.path.exists(path):
                shutil.rmtree(path, onerror=_unless_gone)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt + 1 == REMOVALS:
                raise
            _back_off(attempt)


def _make_folder(path: str) -> None:
    """Make a folder if there is none; raises FileNotFoundError if others removed it meanwhile."""
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError as error:  # said of one that is gone when makedirs looks again
        if os.path.exists(path) and not os.path.isdir(path):
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error


def _back_off(attempt: int) -> None:
    """Wait for those who are at work on the same folder."""
    time.sleep(min(PAUSE * 2**attempt, LONGEST_PAUSE))


def _unless_gone(call: object, path: str, info: tuple[type, BaseException, object]) -> None:
    """Let a deletion go on where another was faster; any other failure is raised."""
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


def _scan(path: str) -> Iterator[os.DirEntry[str]]:
    """Yield the files directly inside a local folder; none if it is not there."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith(PARTIAL) and entry.is_file():
                    yield entry
    except NO_FILE:
        return


def _object_info(entry: os.DirEntry[str]) -> ObjectInfo | None:
    """Return a file's name, date and size; None if it was removed since."""
    try:
        status = entry.stat()
    except FileNotFoundError:
        return None
    return ObjectInfo(entry.name, status.st_mtime, status.st_size)


def _this_machine() -> str:
    """Return a name that processes share which see each other's ids: host and namespace."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()} {namespace}"


def _has_mode(filesystem: Any) -> bool:
    """Return whether a file system's release can write only if an object is absent."""
    write = getattr(filesystem, "_pipe_file", filesystem.pipe_file)
    return "mode" in inspect.signature(write).parameters


def _has_ended(owner: bytes | None) -> bool:
    """Return whether the owner of a claim was a process of this machine that has ended."""
    if owner is None:
        return True
    machine, _, process = owner.decode(errors="replace").rpartition(" ")[0].rpartition(" ")
    return machine == _this_machine() and process.isdecimal() and not _is_running(int(process))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _is_precondition_failed(error: BaseException) -> bool:
    """Return whether a conditional write found an object (s3fs raises a plain OSError)."""
    codes = _response_codes(error)
    return bool(codes & {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})


def _is_not_implemented(error: BaseException) -> bool:
    """Return whether an S3 server has no conditional write."""
    return bool(_response_codes(error) & {"NotImplemented", "501"})


def _response_codes(error: BaseException | None) -> set[str]:
    """Return the S3 error codes and HTTP statuses along a chain of causes."""
    codes: set[str] = set()
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code")))
            codes.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode")))
        error = error.__cause__ or error.__context__
    return codes


def _modified(entry: dict[str, Any]) -> float:
    moment: Any = entry.get("LastModified") or entry.get("created") or entry.get("mtime") or 0
    return float(moment.timestamp() if hasattr(moment, "timestamp") else moment)
