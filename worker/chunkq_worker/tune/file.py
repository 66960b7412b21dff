"""Change values of a job file in place and write a comment at its top.

Values are replaced in the text at the positions that PyYAML's parser reports. All comments, blank
lines and quotes are preserved, unlike when the parsed file is serialized again.
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
from typing import Any

import yaml

from chunkq.errors import ChunkqError, ErrorCode, JobError
from chunkq_worker.tune.space import Changes

FIRST_LINE, LAST_LINE = "# chunkq tune: ", "# end of chunkq tune"
BACKUP_SUFFIX = ".before-tune"
UNEDITABLE = "values cannot be changed without changing other keys (YAML anchors?)"
BYTE_ORDER_MARK = "\ufeff"
"""Stays the first character of the file."""


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
        text = _apply_edits(text, changes, is_json=is_json)
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
        parse = json.loads if is_json else yaml.safe_load
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
                f"{'.'.join(k)}: {_to_flow_style(v)}" for k, v in changes.items()
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


def _apply_edits(text: str, changes: Changes, *, is_json: bool) -> str:
    """Return the text with values replaced and new keys inserted."""
    # PyYAML rejects tabs between the tokens of JSON; a space has the same length.
    readable = text.replace("\t", " ") if is_json else text
    newline = "\r\n" if "\r\n" in text else "\n"
    edits: list[tuple[int, int, str]] = []
    for (*sections, key), value in changes.items():
        node = yaml.compose(readable, Loader=yaml.SafeLoader)
        for name in sections:
            node = _mapping_entries(node)[name][1]
        entries = _mapping_entries(node)
        if key in entries:
            edits += _replacement_edits(entries[key][1], value, is_json=is_json)
        else:
            edits.append(_insertion_edit(node, key, value, newline, is_json=is_json))
    for start, stop, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[stop:]
    return text


def _mapping_entries(node: Any) -> dict[str, tuple[Any, Any]]:
    """Return key -> (node of the key, node of the value)."""
    return {key.value: (key, value) for key, value in node.value}


def _replacement_edits(node: Any, value: Any, *, is_json: bool) -> list[tuple[int, int, str]]:
    """Return edits (start, stop, text) that replace a value; lists are edited item by item."""
    if isinstance(node, yaml.SequenceNode) and len(node.value) == len(value):
        pairs = zip(node.value, value, strict=True)
        nested = [_replacement_edits(item, new, is_json=is_json) for item, new in pairs]
        return [edit for edits in nested for edit in edits]
    return [(node.start_mark.index, node.end_mark.index, _to_flow_style(value, quoted=is_json))]


def _insertion_edit(
    node: Any, key: str, value: Any, newline: str, *, is_json: bool
) -> tuple[int, int, str]:
    """Return the edit that inserts a key before `model_config`, `model_input_shape`, or the first.

    These keys are at the top level and in `model_config`.
    """
    entries = _mapping_entries(node)
    neighbor = entries.get("model_config") or entries.get("model_input_shape")
    position = (neighbor or next(iter(entries.values())))[0].start_mark
    entry = f"{_to_flow_style(key, quoted=is_json)}: {_to_flow_style(value, quoted=is_json)}"
    gap = ", " if node.flow_style else newline + " " * position.column
    return position.index, position.index, entry + gap


def _to_flow_style(value: Any, *, quoted: bool = False) -> str:
    """Return a value on one line in YAML's flow style; with `quoted`, strings are valid JSON."""
    return value if isinstance(value, str) and not quoted else json.dumps(value)


def _with_comment(text: str, title: str, table: Sequence[str]) -> str:
    """Return the text with a table at the top, replacing the table of an earlier run."""
    prefix = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.removeprefix(prefix).split(newline)
    if lines[0].startswith(FIRST_LINE) and LAST_LINE in lines:
        lines = lines[lines.index(LAST_LINE) + 1 :]
    header = [FIRST_LINE + title, *(f"#   {line}".rstrip() for line in table), LAST_LINE]
    return prefix + newline.join([*header, *lines])
