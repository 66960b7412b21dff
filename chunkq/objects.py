"""A folder of small objects, local or behind an fsspec URL. Every object appears at once."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from chunkq.paths import is_url, join, open_filesystem

PARTIAL = ".partial-"
"""Prefix of names that a writer killed in the middle may leave behind; never listed."""

REMOVALS = 20
"""How often a folder is emptied again while others fill it."""


class Found(NamedTuple):
    """One listed object: its name inside the folder and when it was last written (s, Unix)."""

    name: str
    modified: float


class ObjectFolder:
    """Objects by name below one path; names may contain `/`. Raises OSError as storage does."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._local = not is_url(path)
        self._filesystem, self._root = open_filesystem(path)

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Write an object: another reader sees all of it or nothing, also after a crash."""
        target = join(self._root, name)
        if not self._local:
            self._filesystem.pipe_file(target, bytes(content))
            return
        folder, base = os.path.split(target)
        temporary = os.path.join(folder, f"{PARTIAL}{uuid.uuid4().hex}-{base}")
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    def get(self, name: str) -> bytes | None:
        """Return an object's content, or None where there is none."""
        try:
            content: bytes = self._filesystem.cat_file(join(self._root, name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content

    def get_many(self, names: list[str]) -> dict[str, bytes]:
        """Return the content of those objects that exist."""
        if self._local or not names:
            found = {name: self.get(name) for name in names}
            return {name: content for name, content in found.items() if content is not None}
        paths = {join(self._root, name): name for name in names}
        contents = self._filesystem.cat(list(paths), on_error="omit")
        if isinstance(contents, bytes):
            return {names[0]: contents}
        stripped = {path.lstrip("/"): name for path, name in paths.items()}
        return {stripped[path.lstrip("/")]: content for path, content in contents.items()}

    def exists(self, name: str) -> bool:
        """Tell whether there is such an object."""
        return bool(self._filesystem.exists(join(self._root, name)))

    def list(self, folder: str) -> Iterator[Found]:
        """Yield the objects directly inside a folder, in no order; none if it is not there."""
        path = join(self._root, folder)
        if self._local:
            yield from _scan(path)
            return
        try:
            entries = self._filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return
        for entry in entries:
            if entry["type"] == "file":
                yield Found(entry["name"].rpartition("/")[2], _modified(entry))

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        try:
            self._filesystem.rm_file(join(self._root, name))
        except FileNotFoundError:
            return

    def delete_folder(self, folder: str = "") -> None:
        """Remove a folder and all it holds; nothing happens if there is none."""
        path = join(self._root, folder) if folder else self._root
        if self._local:
            _remove_tree(path)
            return
        if self._filesystem.exists(path):
            self._filesystem.rm(path, recursive=True)


def _remove_tree(path: str) -> None:
    """Remove a folder, also one that others are still writing to."""
    for left in reversed(range(REMOVALS)):
        try:
            if os.path.exists(path):
                shutil.rmtree(path, onerror=_unless_gone)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not left:
                raise


def _unless_gone(call: object, path: str, info: tuple[type, BaseException, object]) -> None:
    """Let a deletion go on where another was faster; any other failure is raised."""
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


def _scan(path: str) -> Iterator[Found]:
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(PARTIAL) or not entry.is_file():
                    continue
                try:
                    yield Found(entry.name, entry.stat().st_mtime)
                except FileNotFoundError:
                    continue  # removed since it was listed
    except FileNotFoundError:
        return


def _modified(entry: dict[str, Any]) -> float:
    moment: Any = entry.get("LastModified") or entry.get("created") or entry.get("mtime") or 0
    return float(moment.timestamp() if hasattr(moment, "timestamp") else moment)
