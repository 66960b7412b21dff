"""A job file with some values changed and a comment on top; all else stays as its author left it.

Values are replaced in the text itself, at the places where PyYAML's own parser finds them: every
comment, blank line and quote stays, which writing the parsed file again would not give.
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

from chunkq.errors import ChunkqError, JobError
from chunkq_worker.tune.space import Changes

BEGIN, END = "# chunkq tune: ", "# end of chunkq tune"
BACKUP_SUFFIX = ".before-tune"
FIRST_OF_ALL = "\ufeff"
"""A byte order mark, which has to stay first."""


@dataclass(frozen=True)
class JobFile:
    """A job file as it was read; it is only replaced while it is still that."""

    path: Path
    content: bytes

    @classmethod
    def read(cls, path: Path) -> JobFile:
        """Read a file that is to be rewritten; raises JobError if it cannot be, with the reason."""
        if path.is_symlink():
            raise JobError(
                f"{path}: is a link to {os.path.realpath(path)}; tune that file, or look with "
                "--dry-run"
            )
        try:
            found = path.stat()
            writable = found.st_mode & 0o222 and os.access(path, os.W_OK)
            if not stat.S_ISREG(found.st_mode):
                raise JobError(f"{path}: is no file; the result cannot be written into it")
            if not writable:
                raise JobError(f"{path}: is read-only; make it writable, or look with --dry-run")
            if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
                raise JobError(
                    f"{path}: its folder is read-only, so it cannot be replaced; look with "
                    "--dry-run"
                )
            return cls(path, path.read_bytes())
        except OSError as error:
            raise JobError(f"{path}: cannot be read: {error.strerror or error}") from None

    def changed(self, changes: Changes, title: str, table: Sequence[str]) -> bytes:
        """Return the content with keys changed and a table on top, instead of an earlier one.

        JSON knows no comments, so there the table is left out. Raises ChunkqError if the text
        cannot be changed in place so that only those keys differ.
        """
        is_json = self.path.suffix == ".json"
        text = self.content.decode()
        text = _spliced(text, changes, is_json=is_json)
        if not is_json:
            text = _commented(text, title, table)
        self._check(text, changes, is_json=is_json)
        return text.encode()

    def replace(self, content: bytes) -> Path:
        """Put new content in the file's place at once, keep the old beside it; returns its path.

        Raises ChunkqError if the file is no longer what was read, or cannot be written.
        """
        backup = self.path.with_name(self.path.name + BACKUP_SUFFIX)
        try:
            if self.path.read_bytes() != self.content:
                raise ChunkqError(
                    f"{self.path}: was changed meanwhile, so it is left as it is; tune it again"
                )
            _write(backup, self.content, self.path)
            _write(self.path, content, self.path)
        except OSError as error:
            raise ChunkqError(
                f"{self.path}: cannot be written: {error.strerror or error}"
            ) from None
        return backup

    def _check(self, text: str, changes: Changes, *, is_json: bool) -> None:
        """Compare what the new text means with what it should."""
        parse = json.loads if is_json else yaml.safe_load
        expected = deepcopy(parse(self.content.decode()))
        for (*sections, key), value in changes.items():
            section = expected
            for name in sections:
                section = section[name]
            section[key] = value
        try:
            same = parse(text) == expected
        except (ValueError, yaml.YAMLError):
            same = False
        if not same:
            wanted = "; ".join(f"{'.'.join(k)}: {_flow(v)}" for k, v in changes.items())
            raise ChunkqError(
                f"{self.path}: is written so that these values cannot be changed alone (anchors?); "
                f"set them by hand: {wanted}"
            )


def _write(path: Path, content: bytes, like: Path) -> None:
    """Write a file so that it appears at once, with the permissions of another."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(like, name)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _spliced(text: str, changes: Changes, *, is_json: bool) -> str:
    """Return the text with values replaced; keys that are new come before another of theirs."""
    # PyYAML takes no tabs between the tokens of a JSON file; a blank is as long.
    readable = text.replace("\t", " ") if is_json else text
    newline = "\r\n" if "\r\n" in text else "\n"
    edits: list[tuple[int, int, str]] = []
    for (*sections, key), value in changes.items():
        node = yaml.compose(readable, Loader=yaml.SafeLoader)
        for name in sections:
            node = _entries(node)[name][1]
        entries = _entries(node)
        if key in entries:
            edits += _replacing(entries[key][1], value, is_json=is_json)
        else:
            edits.append(_inserting(node, key, value, newline, is_json=is_json))
    for start, stop, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[stop:]
    return text


def _entries(node: Any) -> dict[str, tuple[Any, Any]]:
    """Return a mapping's keys with their nodes and their values' nodes."""
    return {key.value: (key, value) for key, value in node.value}


def _replacing(node: Any, value: Any, *, is_json: bool) -> list[tuple[int, int, str]]:
    """Return the edits that turn a value into another: of a list, item by item."""
    if isinstance(node, yaml.SequenceNode) and len(node.value) == len(value):
        pairs = zip(node.value, value, strict=True)
        return [e for item, new in pairs for e in _replacing(item, new, is_json=is_json)]
    return [(node.start_mark.index, node.end_mark.index, _flow(value, quoted=is_json))]


def _inserting(
    node: Any, key: str, value: Any, newline: str, *, is_json: bool
) -> tuple[int, int, str]:
    """Return the edit that adds a key before the one that is best known in its section."""
    entries = _entries(node)
    beside = entries.get("model_config") or entries.get("model_input_shape")
    mark = (beside or next(iter(entries.values())))[0].start_mark
    entry = f"{_flow(key, quoted=is_json)}: {_flow(value, quoted=is_json)}"
    gap = ", " if node.flow_style else newline + " " * mark.column
    return mark.index, mark.index, entry + gap


def _flow(value: Any, *, quoted: bool = False) -> str:
    """Return a value on one line, as YAML and JSON both read it; YAML's words without quotes."""
    return value if isinstance(value, str) and not quoted else json.dumps(value)


def _commented(text: str, title: str, table: Sequence[str]) -> str:
    """Return the text with a table on top, without the one of an earlier time."""
    mark = FIRST_OF_ALL if text.startswith(FIRST_OF_ALL) else ""
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.removeprefix(mark).split(newline)
    if lines[0].startswith(BEGIN) and END in lines:
        lines = lines[lines.index(END) + 1 :]
    top = [BEGIN + title, *(f"#   {line}".rstrip() for line in table), END]
    return mark + newline.join([*top, *lines])
