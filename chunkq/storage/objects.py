"""Folder of small objects, local or at an fsspec URL. Objects are written atomically."""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer
from zlib_ng import zlib_ng

from chunkq.paths import is_url, join, open_filesystem, read_bytes
from chunkq.system import buffers

PARTIAL = ".partial-"
"""Prefix of temporary files, which remain if a writer is killed. They are never listed."""
LOCK = ".__lock"
"""Part of the names of tensorstore's temporary files, which remain if a writer is killed."""

NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
"""Errors of file systems without hard links."""
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
MAX_READERS = 16
"""Files that are read concurrently; parallel file systems need several requests."""
PART_BYTES = 1 << 18
"""Bytes of a large object that are read or written at a time. They fit into the CPU's cache."""
MAX_ATTEMPTS = 20
"""Attempts to write into a folder that others delete, or to delete one that others write into."""
MIN_PAUSE, MAX_PAUSE = 0.001, 0.1
"""Seconds before the second attempt, doubled before each later one up to the maximum."""


CONDITIONAL_WRITES = frozenset({"s3", "s3a", "gs", "gcs", "memory"})
"""Schemes whose file systems can create an object only if it does not exist."""
CLAIM_SECONDS = 60.0
"""Seconds after which another process takes over a claim."""


class ObjectInfo(NamedTuple):
    """A listed object: its name in the folder, time of the last write (Unix, s), size (bytes)."""

    name: str
    modified: float
    size: int


class Fingerprint(NamedTuple):
    """CRC-32 of an object, and its size (bytes)."""

    crc32: int
    size: int


class ObjectFolder:
    """Objects by name below a path. Names may contain `/`.

    Every method raises OSError if the storage fails.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._local = not is_url(path)
        # Local objects need no fsspec: its import takes most of the time of a short command.
        self._filesystem: Any = None
        self._root = path
        self.is_exclusive = self._local
        """Whether `put_new` is atomic. The value is certain only after `put_new` was called."""
        if not self._local:
            self._filesystem, self._root = open_filesystem(path)
            scheme = path.partition("://")[0]
            self.is_exclusive = scheme in CONDITIONAL_WRITES and _has_mode(self._filesystem)

    def put(self, name: str, *parts: Buffer, durable: bool = True, private: bool = False) -> None:
        """Write an object atomically: a reader sees all of it or nothing.

        A `durable` object is on the disk when this returns. After a crash of the machine, a local
        object that is not durable may be missing, short or damaged. Only this user can read a
        `private` local object; `private` has no effect at a URL.
        """
        self.put_parts(name, parts, durable=durable, private=private)

    def put_parts(
        self, name: str, parts: Iterable[Buffer], *, durable: bool = True, private: bool = False
    ) -> None:
        """Write an object like `put`. Iterate over `parts` once for each attempt to write them."""
        target = join(self._root, name)
        if self._local:
            self._write(target, parts, os.replace, durable, 0o600 if private else 0o666)
        else:
            self._filesystem.pipe_file(target, b"".join(parts))

    def put_new(self, name: str, content: bytes) -> bool:
        """Write an object unless it exists; return whether it was written.

        If several processes write at the same time, the first one succeeds. This holds on local
        disks and for storage with conditional writes (`is_exclusive`). On other storage, the last
        write may replace the first.
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
        """Write an object, with a conditional write if supported.

        Raises FileExistsError if a conditional write finds an object.
        """
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
        """Claim an object that has this content (None: does not exist), in order to replace it.

        Yields whether this process holds the claim and the object has the content. At most one
        process holds the claim for the same content. The claim is a separate object that contains
        its owner. Another process takes over the claim of a process that has ended: on the same
        machine immediately, from other machines after `CLAIM_SECONDS`.
        """
        claim = f"{name}.{hashlib.sha256(content or b'').hexdigest()[:16]}.claim"
        owner = f"{_machine_id()} {os.getpid()} {uuid.uuid4().hex}".encode()
        if not self.put_new(claim, owner) and not self._take_over_claim(claim, owner):
            yield False
            return
        try:
            yield self.get(name) == content
        finally:
            if self.get(claim) == owner:  # else another process took it over after CLAIM_SECONDS
                self.delete(claim)

    def replace(self, name: str, before: bytes | None, content: bytes) -> bool:
        """Replace an object whose content is `before`; return False if it has other content.

        Only the process that holds the claim may call this.
        """
        if before is None:
            return self.put_new(name, content)
        if self.get(name) != before:
            return False
        self.put(name, content)
        return True

    def _take_over_claim(self, claim: str, owner: bytes) -> bool:
        """Take over a claim whose owner has ended; return whether this process now holds it."""
        folder, _, file = claim.rpartition("/")
        ages = [time.time() - e.modified for e in self.list(folder) if e.name == file]
        is_recent = any(age < CLAIM_SECONDS for age in ages)
        if is_recent and not _has_ended(self.get(claim)):
            return False
        self.delete(claim)
        return self.put_new(claim, owner)

    def _write(
        self,
        target: str,
        parts: Iterable[Buffer],
        move: Callable[[str, str], None],
        durable: bool = True,
        mode: int = 0o666,
    ) -> None:
        """Write a temporary file in the root folder, then `move` it to its target.

        Try again if another process deletes the target's folder or the temporary file.
        """
        temporary = os.path.join(self._root, f"{PARTIAL}{uuid.uuid4().hex}")
        try:
            for attempt in range(MAX_ATTEMPTS):
                try:
                    _make_folder(os.path.dirname(target))
                    if not os.path.exists(temporary):
                        _write_file(temporary, parts, durable, mode)
                    move(temporary, target)
                    return
                except FileNotFoundError:
                    if attempt + 1 == MAX_ATTEMPTS:
                        raise
                    _back_off(attempt)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def get(self, name: str) -> bytes | None:
        """Return the content of an object, or None if it does not exist."""
        path = join(self._root, name)
        try:
            return read_bytes(path) if self._local else bytes(self._filesystem.cat_file(path))
        except NO_FILE:
            return None

    def open(self, name: str) -> IO[bytes] | None:
        """Open an object of which parts are read; return None if it does not exist."""
        path = join(self._root, name)
        try:
            if self._local:
                return open(path, "rb")
            file: IO[bytes] = self._filesystem.open(path, "rb")
        except NO_FILE:
            return None
        return file

    def get_array(
        self, name: str, receive: Callable[[npt.NDArray[np.uint8]], None] = lambda part: None
    ) -> npt.NDArray[np.uint8] | None:
        """Read an object into a new buffer (`buffers.zeros`); return None if it does not exist.

        `receive` is called with each part in order, while the part is in the CPU's cache.
        """
        if not self._local:
            content = self.get(name)
            if content is None:
                return None
            array = np.frombuffer(content, np.uint8)
            receive(array)
            return array
        try:
            with open(join(self._root, name), "rb", buffering=0) as file:
                buffer = buffers.zeros((os.fstat(file.fileno()).st_size,), np.uint8)
                size = 0
                while count := file.readinto(buffer[size : size + PART_BYTES].data):
                    receive(buffer[size : size + count])
                    size += count
                return buffer[:size]
        except NO_FILE:
            return None

    def get_many(self, names: list[str]) -> dict[str, bytes]:
        """Return the content of those of the objects that exist, by name."""
        if self._local or not names:
            by_name = self._get_local(names)
            return {name: content for name in names if (content := by_name[name]) is not None}
        paths = {join(self._root, name): name for name in names}
        contents = self._filesystem.cat(list(paths), on_error="omit")
        if isinstance(contents, bytes):
            return {names[0]: contents}
        relative = {path.lstrip("/"): name for path, name in paths.items()}
        return {relative[path.lstrip("/")]: content for path, content in contents.items()}

    def _get_local(self, names: Sequence[str]) -> dict[str, bytes | None]:
        if len(names) <= MAX_READERS:
            return {name: self.get(name) for name in names}
        shares = [names[start::MAX_READERS] for start in range(MAX_READERS)]
        with ThreadPoolExecutor(MAX_READERS) as pool:
            return dict(
                chain.from_iterable(
                    pool.map(lambda share: [(name, self.get(name)) for name in share], shares)
                )
            )

    def exists(self, name: str) -> bool:
        """Return whether an object exists."""
        path = join(self._root, name)
        return os.path.exists(path) if self._local else bool(self._filesystem.exists(path))

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Yield the objects directly inside a folder, in any order; none if it does not exist."""
        path = join(self._root, folder)
        if self._local:
            for entry in _scan(path):
                if (info := _object_info(entry)) is not None:
                    yield info
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
        """Return the names of the folders directly inside this one; none if it does not exist."""
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

    def count(self) -> int:
        """Return the number of objects in this folder at any depth, without temporary files."""
        return sum(1 for _ in self.names())

    def names(self) -> Iterator[str]:
        """Yield the names of the objects in this folder at any depth, without temporary files."""
        if self._local:
            start = len(self._root.rstrip("/")) + 1
            paths = (
                os.path.join(top, name)[start:]
                for top, _, files in os.walk(self._root)
                for name in files
            )
        else:
            root = self._root.strip("/") + "/"
            contents = self._filesystem.find(self._root)
            paths = (path.lstrip("/").removeprefix(root) for path in contents)
        for path in paths:
            name = path.rpartition("/")[2]
            if not (name.startswith(PARTIAL) or LOCK in name):
                yield path

    def fingerprint(self, name: str) -> Fingerprint | None:
        """Return the CRC-32 and the size of an object, or None if it does not exist.

        A local file is read in parts. Raises OSError if it cannot be read.
        """
        if not self._local:
            content = self.get(name)
            return None if content is None else Fingerprint(zlib_ng.crc32(content), len(content))
        crc32, size, buffer = 0, 0, memoryview(bytearray(PART_BYTES))
        try:
            with open(join(self._root, name), "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    crc32, size = zlib_ng.crc32(buffer[:count], crc32), size + count
        except NO_FILE:
            return None
        return Fingerprint(crc32, size)

    def sample(
        self, folder: str, max_size: int, keep: Callable[[str], bool]
    ) -> tuple[int, int, Sequence[ObjectInfo]]:
        """Return (count, step, sample) of the objects in a folder whose names satisfy `keep`.

        The sample has every step-th object, and at most `max_size`. Reading the time of a local
        file costs more than listing it, so only those of the sample are read.
        """
        if not self._local:
            listed = [info for info in self.list(folder) if keep(info.name)]
            step = 1 + len(listed) // max_size
            return len(listed), step, listed[::step]
        entries = [entry for entry in _scan(join(self._root, folder)) if keep(entry.name)]
        step = 1 + len(entries) // max_size
        sample = [info for entry in entries[::step] if (info := _object_info(entry)) is not None]
        return len(entries), step, sample

    def delete(self, name: str) -> None:
        """Delete an object. Do nothing if it does not exist."""
        path = join(self._root, name)
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._local:
                os.unlink(path)
            else:
                self._filesystem.rm_file(path)

    def delete_partial_files(self) -> None:
        """Delete temporary files of killed writers. A running writer writes its file again."""
        if self._local and os.path.isdir(self._root):
            for name in os.listdir(self._root):
                if name.startswith(PARTIAL):
                    _remove(os.path.join(self._root, name))

    def delete_folder(self, folder: str = "") -> None:
        """Delete a folder and its content. Do nothing if it does not exist."""
        path = join(self._root, folder) if folder else self._root
        if self._local:
            _remove_tree(path)
            return
        if self._filesystem.exists(path):
            self._filesystem.rm(path, recursive=True)

    def discard(self, *names: str) -> None:
        """Delete files or folders in this folder.

        Rename local ones before deleting them. A process that is suspended during the deletion
        then cannot delete files that others have created under the same names.
        """
        if not self._local:
            for name in names:
                self.delete_folder(name)
            return
        trash = os.path.join(self._root, f"{PARTIAL}{uuid.uuid4().hex}")
        for name in names:
            source = join(self._root, name)
            while os.path.lexists(source):
                os.makedirs(trash, exist_ok=True)
                with suppress(FileNotFoundError):  # another process deleted the partial files
                    os.rename(source, join(trash, name))
        _remove_tree(trash)

    def clear(self) -> None:
        """Discard the content of this folder. Do nothing if it does not exist."""
        if not self._local:
            self.delete_folder()
        elif os.path.isdir(self._root):
            self.discard(*(n for n in os.listdir(self._root) if not n.startswith(PARTIAL)))
            self.delete_partial_files()
        else:
            _remove(self._root)


def _write_file(path: str, parts: Iterable[Buffer], durable: bool, mode: int) -> None:
    """Write a file with a mode less the umask. If `durable`, flush it to the disk."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.writelines(parts)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _link(temporary: str, target: str) -> None:
    """Move a file to its target. Raises FileExistsError if the target exists."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # Until the replacement, readers see an empty file and treat it as damaged.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)


def _remove(path: str) -> None:
    """Delete a file or a folder. Do nothing if it does not exist."""
    if os.path.isdir(path) and not os.path.islink(path):
        _remove_tree(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _remove_tree(path: str) -> None:
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


def _scan(path: str) -> Iterator[os.DirEntry[str]]:
    """Yield the files directly inside a local folder; none if it does not exist."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith(PARTIAL) and entry.is_file():
                    yield entry
    except NO_FILE:
        return


def _object_info(entry: os.DirEntry[str]) -> ObjectInfo | None:
    """Return the name, time and size of a file, or None if it was deleted."""
    try:
        status = entry.stat()
    except FileNotFoundError:
        return None
    return ObjectInfo(entry.name, status.st_mtime, status.st_size)


def _machine_id() -> str:
    """Return the host name and PID namespace: equal for processes that see each other's ids."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()} {namespace}"


def _has_mode(filesystem: Any) -> bool:
    """Return whether the installed release of a file system supports conditional writes."""
    write = getattr(filesystem, "_pipe_file", filesystem.pipe_file)
    return "mode" in inspect.signature(write).parameters


def _has_ended(owner: bytes | None) -> bool:
    """Return whether the owner of a claim is a process of this machine that has ended."""
    if owner is None:
        return True
    machine, _, process = owner.decode(errors="replace").rpartition(" ")[0].rpartition(" ")
    return machine == _machine_id() and process.isdecimal() and not _is_running(int(process))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _is_precondition_failed(error: BaseException) -> bool:
    """Return whether a conditional write failed because the object exists.

    s3fs raises a plain OSError in this case.
    """
    codes = _response_codes(error)
    return bool(codes & {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})


def _is_not_implemented(error: BaseException) -> bool:
    """Return whether an S3 server does not support conditional writes."""
    return bool(_response_codes(error) & {"NotImplemented", "501"})


def _response_codes(error: BaseException | None) -> set[str]:
    """Return the S3 error codes and HTTP statuses of an error and its causes."""
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
