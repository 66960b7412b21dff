"""Records of finished and of failed tasks, as the ledger stores them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from operator import attrgetter
from typing import Any, TypeVar

from chunkq import json_values
from chunkq.plan.chunk import Index
from chunkq.storage import documents

T = TypeVar("T")
EXPORT = "export"
"""Kind of the tasks that write files."""
FILE_SIZE = "file"
"""What a commit record calls the size of a file."""


@dataclass(frozen=True)
class Commit:
    """Record of a finished task of an item.

    `seconds` maps each stage to its duration (s), `moved` each kind of data to its size (bytes),
    and `checksums` each piece to its CRC-32. `requests` counts what the process fetched of inputs
    since its last record. `started` and `finished` are Unix times (s). `patches` were run,
    `skipped` were found to be empty. `empty` says that the network ran for none of a chunk, which
    then has no pieces. `stored` has the checksums of the objects in the output that the task wrote
    (`encode_checksums`), in the order of `Stage.stored_objects`; None if an earlier version of
    chunkq wrote the record. `errors` counts the images of a chunk that have no result.
    """

    kind: str
    item: int
    chunk: Index
    attempt: int
    worker: str
    started: float
    finished: float
    seconds: dict[str, float] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    patches: int = 0
    requests: int = 0
    peak_rss: int = 0
    skipped: int = 0
    empty: bool = False
    stored: str | None = None
    errors: int = 0

    def to_json(self, epoch: str) -> bytes:
        """Encode the record for an epoch of the job."""
        return documents.encode({"epoch": epoch, **json_values.to_values(self)})

    @classmethod
    def from_json(cls, content: bytes, epoch: str) -> Commit | None:
        """Decode a record. Return None if it is damaged or belongs to another epoch."""
        values = documents.decode(content)
        if values is None or values.pop("epoch", None) != epoch:
            return None
        return _decoded(cls, values)


@dataclass(frozen=True)
class RecentCommits:
    """Number of finished tasks, and the newest records of a sample of every `step`-th task.

    `chunks` are all chunks of the sample; empty if no records were asked for.
    """

    total: int
    step: int
    records: tuple[Commit, ...]
    chunks: tuple[Index, ...] = ()

    @classmethod
    def merged(cls, items: Sequence[RecentCommits], count: int) -> RecentCommits:
        """Return the sum over the items of a job, with the newest `count` records."""
        records = [commit for recent in items for commit in recent.records]
        return cls(
            sum(recent.total for recent in items),
            max(recent.step for recent in items),
            tuple(nlargest(count, records, key=attrgetter("finished"))),
        )


@dataclass(frozen=True)
class Failure:
    """The last error of a task of an item."""

    kind: str
    item: int
    chunk: Index
    attempt: int
    worker: str
    error: str
    message: str
    traceback: str
    when: float = field(default_factory=time.time)

    @classmethod
    def from_json(cls, content: bytes) -> Failure | None:
        """Decode a record. Return None if it is damaged."""
        values = documents.decode(content)
        return None if values is None else _decoded(cls, values)


def _decoded(cls: type[T], values: dict[str, Any]) -> T | None:
    """Return a record of decoded values, or None if they do not match it."""
    try:
        return json_values.from_values(cls, values)
    except ValueError:
        return None
