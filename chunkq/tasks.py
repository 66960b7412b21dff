"""The message a queue carries, and the only code it can lead to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from chunkq.errors import QueueError

ENTRY_POINTS: MappingProxyType[str, str] = MappingProxyType(
    {"infer": "chunkq_worker.infer:infer_chunk", "finalize": "chunkq.finalize:finalize_block"}
)
"""Every kind of task and what runs it. Nothing on a queue can name anything else."""
CHUNK_NAME = re.compile(r"(0|[1-9][0-9]{0,17})(\.(0|[1-9][0-9]{0,17}))*")
WORKER_MAIN = "chunkq_worker.worker_main:serve"
"""What a process that another engine started runs to become a worker."""


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of queued work: a kind, a job folder's URI and a chunk index."""

    kind: str
    job: str
    chunk: tuple[int, ...]

    @property
    def id(self) -> str:
        """The same for the same task, always; letters, digits, `-` and `_` only."""
        return f"{job_key(self.job)}-{self.kind}-{'_'.join(map(str, self.chunk))}"

    def as_dict(self) -> dict[str, Any]:
        """Return the message's values."""
        return {"kind": self.kind, "job": self.job, "chunk": list(self.chunk)}

    def to_json(self) -> str:
        """Encode as a message."""
        return json.dumps(self.as_dict())

    @classmethod
    def from_json(cls, message: str) -> Task:
        """Decode a message; raises QueueError if it is none of ours."""
        try:
            values = json.loads(message)
        except (ValueError, TypeError, RecursionError):
            raise QueueError(f"not a chunkq task: {message[:200]!r}") from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Any) -> Task:
        """Return the task of a decoded message; raises QueueError if it is none of ours."""
        try:
            kind, job, chunk = values["kind"], values["job"], values["chunk"]
            if (
                kind in ENTRY_POINTS
                and isinstance(job, str)
                and isinstance(chunk, list)
                and all(type(i) is int and i >= 0 for i in chunk)  # a bool is an int, too
                and job.encode()
            ):
                return cls(kind, job, tuple(chunk))
        except (KeyError, TypeError, UnicodeEncodeError):
            pass
        raise QueueError(f"not a chunkq task: {str(values)[:200]!r}")


def job_key(job: str) -> str:
    """Return a short stable name for a job folder's URI."""
    return hashlib.blake2b(job.encode(), digest_size=8).hexdigest()


def entry_point(kind: str) -> Callable[..., Any]:
    """Import and return what runs tasks of this kind."""
    return _imported(ENTRY_POINTS[kind])


def run_worker(queue: Any, shift: Any) -> Any:
    """Work off a queue in this process; see the worker's side."""
    return _imported(WORKER_MAIN)(queue, shift)


def _imported(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def chunk_name(index: tuple[int, ...]) -> str:
    """Return the name of a chunk in file names and messages."""
    return ".".join(map(str, index))


def parse_chunk(name: str) -> tuple[int, ...] | None:
    """Return the index of which `name` is the `chunk_name`, or None if there is none."""
    return tuple(map(int, name.split("."))) if CHUNK_NAME.fullmatch(name) else None
