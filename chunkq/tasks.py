"""Queue messages, and the functions that a message can run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from chunkq.errors import ErrorCode, QueueError

ENTRY_POINTS: MappingProxyType[str, str] = MappingProxyType(
    {"infer": "chunkq_worker.infer:infer_chunk", "finalize": "chunkq.finalize:finalize_block"}
)
"""Kind of task -> the function that runs it. A message cannot run any other code."""
CHUNK_NAME = re.compile(r"(0|[1-9][0-9]{0,17})(\.(0|[1-9][0-9]{0,17}))*")
WORKER_MAIN = "chunkq_worker.worker_main:serve"
"""Function that runs a worker in a process started by Dask, Ray or another engine."""


@dataclass(frozen=True, slots=True)
class Task:
    """A unit of queued work: the kind, the job folder's URI and the chunk index."""

    kind: str
    job: str
    chunk: tuple[int, ...]

    @property
    def id(self) -> str:
        """Stable identifier of the task; contains only letters, digits, `-` and `_`."""
        return f"{job_key(self.job)}-{self.kind}-{'_'.join(map(str, self.chunk))}"

    def as_dict(self) -> dict[str, Any]:
        """Return the task as a mapping of JSON values."""
        return {"kind": self.kind, "job": self.job, "chunk": list(self.chunk)}

    def to_json(self) -> str:
        """Encode the task as a message."""
        return json.dumps(self.as_dict())

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
            kind, job, chunk = values["kind"], values["job"], values["chunk"]
            if (
                kind in ENTRY_POINTS
                and isinstance(job, str)
                and isinstance(chunk, list)
                and all(type(i) is int and i >= 0 for i in chunk)  # not isinstance: excludes bool
                and job.encode()
            ):
                return cls(kind, job, tuple(chunk))
        except (KeyError, TypeError, UnicodeEncodeError):
            pass
        raise _not_a_task(str(values))


def _not_a_task(message: str) -> QueueError:
    return QueueError(
        f"not a chunkq task: {message[:200]!r}; use a queue that only chunkq writes to",
        code=ErrorCode.TASK_INVALID,
    )


def job_key(job: str) -> str:
    """Return a short stable key for a job folder's URI: 16 hexadecimal digits."""
    return hashlib.blake2b(job.encode(), digest_size=8).hexdigest()


def entry_point(kind: str) -> Callable[..., Any]:
    """Import and return the function that runs tasks of this kind."""
    return _import_function(ENTRY_POINTS[kind])


def run_worker(executor: Any, options: Any) -> Any:
    """Run a worker on an executor in this process; return its `ExitStatus`."""
    return _import_function(WORKER_MAIN)(executor, options)


def _import_function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def chunk_name(index: tuple[int, ...]) -> str:
    """Return the name of a chunk in file names and messages, such as `0.3.1`."""
    return ".".join(map(str, index))


def chunk_count(count: int) -> str:
    """Return a number of chunks for a message: `1 chunk`, `3 chunks`."""
    return f"{count} {'chunk' if count == 1 else 'chunks'}"


def parse_chunk(name: str) -> tuple[int, ...] | None:
    """Return the index of a `chunk_name`, or None if `name` is not one."""
    return tuple(map(int, name.split("."))) if CHUNK_NAME.fullmatch(name) else None
