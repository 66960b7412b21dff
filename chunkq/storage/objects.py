"""Folder of small objects, local or at an fsspec URL. Objects are written atomically."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer
from zlib_ng import zlib_ng

from chunkq.paths import is_url, join, open_filesystem, read_bytes
from chunkq.storage.local_files import (
    NO_FILE,
    PARTIAL,
    delete_partial_files,
    discard,
    files_in,
    move_new,
    remove,
    remove_tree,
    write_file,
)
from chunkq.system import buffers

LOCK = ".__lock"
"""Part of the names of tensorstore's temporary files, which remain if a writer is killed."""
MAX_READERS = 16
"""Files that are read concurrently; parallel file systems need several requests."""
PART_BYTES = 1 << 18
"""Bytes of a large object that are read or written at a time. They fit into the CPU's cache."""


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
            from chunkq.storage.conditional_writes import are_supported  # at URLs only

            self.is_exclusive = are_supported(path.partition("://")[0], self._filesystem)

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
            mode = 0o600 if private else 0o666
            write_file(self._root, target, parts, os.replace, durable=durable, mode=mode)
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
                write_file(self._root, target, (content,), move_new)
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
            from chunkq.storage.conditional_writes import is_not_implemented, is_precondition_failed

            try:
                self._filesystem.pipe_file(target, content, mode="create")
                return
            except OSError as error:
                if is_precondition_failed(error):
                    raise FileExistsError(target) from error
                if not is_not_implemented(error):
                    raise
                self.is_exclusive = False
        self._filesystem.pipe_file(target, content)

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
            for entry in files_in(path):
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
        entries = [entry for entry in files_in(join(self._root, folder)) if keep(entry.name)]
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
        if self._local:
            delete_partial_files(self._root)

    def delete_folder(self, folder: str = "") -> None:
        """Delete a folder and its content. Do nothing if it does not exist."""
        path = join(self._root, folder) if folder else self._root
        if self._local:
            remove_tree(path)
            return
        if self._filesystem.exists(path):
            self._filesystem.rm(path, recursive=True)

    def discard(self, *names: str) -> None:
        """Delete files or folders in this folder.

        Rename local ones before deleting them. A process that is suspended during the deletion
        then cannot delete files that others have created under the same names.
        """
        if self._local:
            discard(self._root, names)
        else:
            for name in names:
                self.delete_folder(name)

    def clear(self) -> None:
        """Discard the content of this folder. Do nothing if it does not exist."""
        if not self._local:
            self.delete_folder()
        elif os.path.isdir(self._root):
            self.discard(*(n for n in os.listdir(self._root) if not n.startswith(PARTIAL)))
            self.delete_partial_files()
        else:
            remove(self._root)


def _object_info(entry: os.DirEntry[str]) -> ObjectInfo | None:
    """Return the name, time and size of a file, or None if it was deleted."""
    try:
        status = entry.stat()
    except FileNotFoundError:
        return None
    return ObjectInfo(entry.name, status.st_mtime, status.st_size)


def _modified(entry: dict[str, Any]) -> float:
    moment: Any = entry.get("LastModified") or entry.get("created") or entry.get("mtime") or 0
    return float(moment.timestamp() if hasattr(moment, "timestamp") else moment)
