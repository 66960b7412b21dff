"""Change values of a job file in place and write a comment at its top.

yaml-edit changes the text of the values only. Comments, blank lines, quotes and indentation of
everything else stay byte-identical. JSON is edited the same way, as YAML in flow style.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq.job import yaml_values
from chunkq_worker.tune.space import Changes

if TYPE_CHECKING:
    from yaml_edit import Document, Mapping, Node

FIRST_LINE, LAST_LINE = "# chunkq tune: ", "# end of chunkq tune"
BACKUP_SUFFIX = ".before-tune"
UNEDITABLE = "values cannot be changed without changing other keys (YAML anchors?)"
BYTE_ORDER_MARK = "\ufeff"
"""Stays the first character of the file."""
NEIGHBORS = ("model_config", "model_input_shape")
"""A new key is inserted before the one of these that its mapping has, else before the first key."""


@dataclass(frozen=True)
class JobFile:
    """A job file and its content when it was read. It is replaced only if it has not changed."""

    path: Path
    content: bytes

    @classmethod
    def read(cls, path: Path) -> JobFile:
        """Read a job file; raise JobError if it cannot be read or replaced."""
        if path.is_symlink():
            raise JobError(
                f"{path}: is a link to {os.path.realpath(path)}; tune that file, or use --dry-run"
            )
        try:
            status = path.stat()
            writable = status.st_mode & 0o222 and os.access(path, os.W_OK)
            if not stat.S_ISREG(status.st_mode):
                raise JobError(f"{path}: is not a regular file; use a regular file, or --dry-run")
            if not writable:
                raise JobError(f"{path}: is read-only; make it writable, or use --dry-run")
            if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
                raise JobError(
                    f"{path}: its folder is read-only; make it writable, or use --dry-run"
                )
            return cls(path, path.read_bytes())
        except OSError as error:
            raise JobError(f"{path}: cannot be read: {error.strerror or error}") from None

    def changed(self, changes: Changes, title: str, table: Sequence[str]) -> bytes:
        """Return the content with changed keys and a table at the top, replacing an earlier table.

        A JSON file has no comments and gets no table. Raise ChunkqError if the text cannot be
        edited so that only the given keys change.
        """
        is_json = self.path.suffix == ".json"
        text = self.content.decode()
        with suppress(ValueError, KeyError):  # then `_check` raises
            text = _with_changes(text, changes, is_json=is_json)
        if not is_json:
            text = _with_comment(text, title, table)
        self._check(text, changes, is_json=is_json)
        return text.encode()

    def replace(self, content: bytes) -> Path:
        """Replace the file atomically; return the path of a backup of the old content.

        Raise ChunkqError if the file has changed since it was read, or cannot be written.
        """
        backup = self.path.with_name(self.path.name + BACKUP_SUFFIX)
        try:
            if self.path.read_bytes() != self.content:
                raise ChunkqError(
                    f"{self.path}: has changed since it was read and is not replaced; run `chunkq "
                    "tune` again",
                    code=ErrorCode.JOB_FILE_CHANGED,
                )
            _write(backup, self.content, self.path)
            _write(self.path, content, self.path)
        except OSError as error:
            raise ChunkqError(
                f"{self.path}: cannot be written: {error.strerror or error}"
            ) from None
        return backup

    def _check(self, text: str, changes: Changes, *, is_json: bool) -> None:
        """Raise ChunkqError unless the new text parses to the old values with the changes."""
        parse = json.loads if is_json else yaml_values.load
        expected = deepcopy(parse(self.content.decode()))
        for (*sections, key), value in changes.items():
            section = expected
            for name in sections:
                section = section[name]
            section[key] = value
        try:
            is_equal = parse(text) == expected
        except (ValueError, yaml.YAMLError):
            is_equal = False
        if not is_equal:
            assignments = "; ".join(
                f"{'.'.join(k)}: {v if isinstance(v, str) else json.dumps(v)}"
                for k, v in changes.items()
            )
            raise ChunkqError(
                f"{self.path}: {UNEDITABLE}; set them by hand: {assignments}",
                code=ErrorCode.JOB_FILE_UNEDITABLE,
            )


def _write(path: Path, content: bytes, template: Path) -> None:
    """Write a file atomically with the permissions of the file `template`."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(template, name)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _with_changes(text: str, changes: Changes, *, is_json: bool) -> str:
    """Return the text with values replaced and new keys inserted. Raise ValueError if it cannot."""
    from yaml_edit import YamlFile  # imported here because only this function edits files

    file = YamlFile.parse(text)
    for (*sections, key), value in changes.items():
        mapping = _mapping(file.document())
        for name in sections:
            mapping = _mapping(mapping[name])
        if key in mapping:
            _replace(mapping, key, value, is_json=is_json)
        else:
            neighbor = next(name for name in (*NEIGHBORS, *mapping) if name in mapping)
            mapping.insert_before(neighbor, key, _node(value, is_json=is_json))
    return str(file)


def _mapping(node: Document | Node | None) -> Mapping:
    """Return a node as a mapping. Raise ValueError for another node, such as a YAML alias."""
    mapping = None if node is None else node.as_mapping()
    if mapping is None:
        raise ValueError("not a mapping")
    return mapping


def _replace(container: Any, key: str | int, value: Any, *, is_json: bool) -> None:
    """Replace the value of a key or an item. Lists are replaced item by item."""
    sequence = container[key].as_sequence()
    if sequence is not None and isinstance(value, list) and len(sequence) == len(value):
        for number, item in enumerate(value):
            _replace(sequence, number, item, is_json=is_json)
    else:
        container[key] = _node(value, is_json=is_json)


def _node(value: Any, *, is_json: bool) -> Any:
    """Return what yaml-edit writes as a value: lists in flow style, strings of JSON in quotes."""
    from yaml_edit import Document

    return Document.parse(json.dumps(value)).root() if is_json or isinstance(value, list) else value


def _with_comment(text: str, title: str, table: Sequence[str]) -> str:
    """Return the text with a table at the top, replacing the table of an earlier run."""
    prefix = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.removeprefix(prefix).split(newline)
    if lines[0].startswith(FIRST_LINE) and LAST_LINE in lines:
        lines = lines[lines.index(LAST_LINE) + 1 :]
    header = [FIRST_LINE + title, *(f"#   {line}".rstrip() for line in table), LAST_LINE]
    return prefix + newline.join([*header, *lines])
