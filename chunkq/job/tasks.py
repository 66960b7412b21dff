"""Queue messages: a unit of work, and the job that it belongs to."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from chunkq.errors import ErrorCode, QueueError

CHUNK_NAME = re.compile(r"(0|[1-9][0-9]{0,17})(\.(0|[1-9][0-9]{0,17}))*")
KIND = re.compile(r"[a-z]+")
EPOCH_DIGITS = 8
EPOCH = re.compile(f"[0-9a-f]{{{EPOCH_DIGITS}}}")
encode_message = json.JSONEncoder(separators=(",", ":")).encode
"""Encode a message as compact JSON. `json.dumps` creates an encoder for each message."""


class JobId(NamedTuple):
    """One job: the URI of its folder, and its epoch (see `JobRecord`)."""

    path: str
    epoch: str


@dataclass(frozen=True, slots=True)
class Task:
    """A unit of queued work: one chunk of one item in a stage (`kind`) of a job.

    `job` and `epoch` are the fields of a `JobId`. The stage defines the meaning of `chunk`.
    """

    kind: str
    job: str
    epoch: str
    item: int
    chunk: tuple[int, ...]

    @property
    def job_id(self) -> JobId:
        """The job of the task."""
        return JobId(self.job, self.epoch)

    @property
    def id(self) -> str:
        """`KIND/ITEM/CHUNK`, unique in its job; contains only letters, digits, `/` and `.`."""
        return f"{self.kind}/{self.item}/{chunk_name(self.chunk)}"

    def as_dict(self) -> dict[str, Any]:
        """Return the task as a mapping of JSON values."""
        return {
            "kind": self.kind,
            "job": self.job,
            "epoch": self.epoch,
            "item": self.item,
            "chunk": list(self.chunk),
        }

    def to_json(self) -> str:
        """Encode the task as a message."""
        return encode_message(self.as_dict())

    @classmethod
    def from_json(cls, message: str) -> Task:
        """Decode a message. Raises QueueError if it is not a chunkq task."""
        try:
            values = json.loads(message)
        except (ValueError, TypeError, RecursionError):
            raise _not_a_task(message) from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Any) -> Task:
        """Return the task of a decoded message. Raises QueueError if it is not a chunkq task."""
        try:
            kind, job, epoch = values["kind"], values["job"], values["epoch"]
            item, chunk = values["item"], values["chunk"]
            if (
                KIND.fullmatch(kind)
                and EPOCH.fullmatch(epoch)
                and isinstance(job, str)
                and isinstance(chunk, list)
                and chunk
                and all(type(i) is int and i >= 0 for i in (item, *chunk))  # excludes bool
                and job.encode()
            ):
                return cls(kind, job, epoch, item, tuple(chunk))
        except (KeyError, TypeError, UnicodeEncodeError):
            pass
        raise _not_a_task(str(values))


def _not_a_task(message: str) -> QueueError:
    return QueueError(
        f"not a chunkq task: {message[:200]!r}; use a queue that only chunkq writes to",
        code=ErrorCode.TASK_INVALID,
    )


@lru_cache(maxsize=64)
def path_key(path: str) -> str:
    """Return a short stable key for a job folder's URI: 16 hexadecimal digits."""
    return hashlib.blake2b(path.encode(), digest_size=8).hexdigest()


def chunk_name(index: tuple[int, ...]) -> str:
    """Return the name of a chunk in file names and messages, such as `0.3.1`."""
    return ".".join(map(str, index))


def chunk_count(count: int) -> str:
    """Return a number of chunks for a message: `1 chunk`, `3 chunks`."""
    return f"{count} {'chunk' if count == 1 else 'chunks'}"


def parse_chunk(name: str) -> tuple[int, ...] | None:
    """Return the index of a `chunk_name`, or None if `name` is not one."""
    return tuple(map(int, name.split("."))) if CHUNK_NAME.fullmatch(name) else None
