"""The job folder beside the output: the job's record, what is done, what failed, the pieces.

The folder is the truth about a job. A commit record is written after everything that it stands
for, so a chunk without a valid one is computed again.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import reduce
from heapq import nlargest
from itertools import islice
from operator import attrgetter
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from chunkq import documents
from chunkq.errors import ErrorCode, JobError, MissingJobError, PieceError
from chunkq.job_path import SUFFIX
from chunkq.objects import ObjectFolder
from chunkq.paths import without_secret
from chunkq.plan import Index
from chunkq.record import EPOCH_DIGITS, JobRecord
from chunkq.tasks import ENTRY_POINTS, chunk_name, parse_chunk

log = logging.getLogger("chunkq.job")

RECORD = "job.json"
EPOCH = re.compile(f"[0-9a-f]{{{EPOCH_DIGITS}}}")
ITEM = "0"
"""The item of a job of one volume, in the names of stored objects."""
CRC_BYTES, ALIGNMENT = 4, 16
SAMPLE = 8192
"""Commit records whose dates `newest` asks for, of a job with more."""
BATCH = 1000
"""Commit records that are read at once."""


def folder_of(output: str) -> str:
    """Return the job folder's path for an output path; a job folder's path stays as it is."""
    output = output.rstrip("/")
    return output if output.endswith(SUFFIX) else output + SUFFIX


@dataclass(frozen=True)
class Commit:
    """One finished task: who did it, how long each stage took (s), what was moved (bytes)."""

    kind: str
    chunk: Index
    attempt: int
    worker: str
    started: float
    finished: float
    seconds: dict[str, float] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    patches: int = 0
    peak_rss: int = 0

    def to_json(self, epoch: str) -> bytes:
        """Encode as the record of a job's epoch."""
        return documents.encode({"epoch": epoch, "item": int(ITEM), **asdict(self)})

    @classmethod
    def from_json(cls, content: bytes, epoch: str) -> Commit | None:
        """Decode; return None for a record that is damaged or of another epoch."""
        values = documents.decode(content)
        try:
            if values is None or values.pop("epoch") != epoch or values.pop("item") != int(ITEM):
                return None
            return cls(**{**values, "chunk": tuple(values["chunk"])})
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True)
class RecentCommits:
    """How many tasks are finished, and the newest records among every `step`-th of them."""

    total: int
    step: int
    records: tuple[Commit, ...]


@dataclass(frozen=True)
class Failure:
    """The last error of one task."""

    kind: str
    chunk: Index
    attempt: int
    worker: str
    error: str
    message: str
    traceback: str
    when: float = field(default_factory=time.time)

    @classmethod
    def from_json(cls, content: bytes) -> Failure | None:
        """Decode; return None for a damaged record."""
        values = documents.decode(content)
        try:
            return None if values is None else cls(**{**values, "chunk": tuple(values["chunk"])})
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class PieceInfo:
    """A stored piece: its size in bytes and CRC-32C."""

    size: int
    crc32c: int


class JobFolder:
    """One job folder: the record of its job, and the ledgers of its epochs.

    Every method raises OSError as the storage does.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.objects = ObjectFolder(path)

    @property
    def output(self) -> str:
        """Path of the output the folder belongs to."""
        return self.path.removesuffix(SUFFIX)

    def read_record(self) -> JobRecord | None:
        """Return what `job.json` holds, or None where there is no job.

        Raises JobError if it is damaged.
        """
        content = self.objects.get(RECORD)
        return None if content is None else self._decoded(content)

    def require_record(self) -> JobRecord:
        """Return what `job.json` holds; raises MissingJobError where there is no job."""
        record = self.read_record()
        if record is None:
            raise MissingJobError(
                f"{without_secret(self.output)}: no job was produced here "
                f"(no {without_secret(self.path)}/job.json); `chunkq produce` makes one"
            )
        return record

    def create_record(self, record: JobRecord) -> JobRecord:
        """Write `job.json` unless there is one; return the record that is stored.

        Of several processes that create a job at once, one succeeds.
        """
        content = record.to_json()
        if not self.objects.put_new(RECORD, content):
            return self.require_record()
        if not self.objects.is_exclusive:
            log.warning(
                "output: %s: this storage cannot create an object exclusively; let only one "
                "process at a time create a job here",
                without_secret(self.output),
            )
        # Then another process may have been later.
        stored = self.objects.get(RECORD)
        return self.require_record() if stored is None else self._decoded(stored)

    def replace_record(
        self,
        before: bytes | None,
        record: JobRecord,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Replace `job.json`, whose content was `before`; first calls `meanwhile`.

        Raises JobError if another process replaces it.
        """
        with self.claim(before):
            meanwhile()
            if not self.objects.replace(RECORD, before, record.to_json()):
                raise self._replaced()

    @contextmanager
    def claim(self, content: bytes | None) -> Iterator[None]:
        """Hold the right to replace the job, whose record has this content.

        Raises JobError if another process has it, or if the record has another content.
        """
        with self.objects.claim(RECORD, content) as claimed:
            if not claimed:
                raise self._replaced()
            yield

    def _replaced(self) -> JobError:
        return JobError(
            f"output: {without_secret(self.output)}: another process creates or changes the job "
            "here; wait until it has ended, or for a minute if it was killed, then run the command "
            "again",
            code=ErrorCode.JOB_REPLACED,
        )

    def ledger(self, epoch: str) -> Ledger:
        """Return the ledger of one epoch."""
        return Ledger(self.path, epoch)

    def delete_earlier_epochs(self, epoch: str) -> None:
        """Remove the ledgers of earlier jobs, if the job here is of this epoch.

        They are listed before `job.json` is read: a later job has no ledger before its record.
        """
        names = self._epochs()
        record = self.read_record()
        if record is not None and record.epoch == epoch:
            for name in names:
                if name != epoch:
                    self.objects.delete_folder(name)
            self.objects.delete_partial_files()

    def delete_epochs(self) -> None:
        """Remove the ledgers of all jobs that were here so far."""
        for name in self._epochs():
            self.objects.delete_folder(name)

    def _epochs(self) -> list[str]:
        return [name for name in self.objects.folders() if EPOCH.fullmatch(name)]

    def _decoded(self, content: bytes) -> JobRecord:
        return JobRecord.from_json(content, f"{self.path}/{RECORD}")


class Ledger:
    """What one epoch's job has done, and the pieces in between.

    Objects of other names are ignored, and so are damaged ones: a damaged commit record means
    that the task is not done. Every method raises OSError as the storage does.
    """

    def __init__(self, job_folder: str, epoch: str) -> None:
        self.epoch = epoch
        self.path = f"{job_folder}/{epoch}"
        self.objects = ObjectFolder(self.path)

    def commit(self, record: Commit) -> None:
        """Record that a task is finished, once; deletes the record of an earlier failure."""
        name = _done(record.kind, record.chunk)
        content = record.to_json(self.epoch)
        if not self.objects.put_new(name, content) and not self.is_committed(
            record.kind, record.chunk
        ):
            self.objects.put(name, content)  # what lies there is damaged
        self.objects.delete(_failed(record.kind, record.chunk))

    def is_committed(self, kind: str, chunk: Index) -> bool:
        """Return whether a task is done."""
        content = self.objects.get(_done(kind, chunk))
        return content is not None and self._commit(content, kind, chunk) is not None

    def committed(self, kind: str) -> dict[Index, float]:
        """Return the finished chunks of a kind and when each was committed (s, Unix).

        Goes by the names of the records; `read_commits` finds those that are damaged.
        """
        chunks = ((parse_chunk(e.name), e) for e in self.objects.list(_done(kind)) if e.size)
        return {chunk: entry.modified for chunk, entry in chunks if chunk is not None}

    def count(self, kind: str) -> int:
        """Count the finished tasks of a kind."""
        return self.recent_commits(kind, 0).total

    def recent_commits(self, kind: str, count: int) -> RecentCommits:
        """Count the finished tasks of a kind and return the newest `count` records of a sample.

        Much cheaper than `committed`: of a large job only a sample is looked at.
        """
        total, step, sampled = self.objects.sample(_done(kind), SAMPLE, _is_chunk)
        latest = nlargest(count, sampled, key=attrgetter("modified"))
        chunks = [chunk for e in latest if (chunk := parse_chunk(e.name)) is not None]
        return RecentCommits(total, step, tuple(self.commits(kind, chunks)))

    def commits(self, kind: str, chunks: Iterable[Index]) -> list[Commit]:
        """Return the commit records of those chunks that have a valid one."""
        names = {_done(kind, chunk): chunk for chunk in chunks}
        contents = self.objects.get_many(list(names))
        found = (self._commit(content, kind, names[name]) for name, content in contents.items())
        return [commit for commit in found if commit is not None]

    def read_commits(self, kind: str) -> Iterator[Commit]:
        """Yield all valid commit records of a kind, read a batch at a time."""
        chunks = iter(self.committed(kind))
        while batch := list(islice(chunks, BATCH)):
            yield from self.commits(kind, batch)

    def delete_commits(self, kind: str, chunks: Iterable[Index]) -> None:
        """Delete commit records: these tasks are to be done again."""
        for chunk in chunks:
            self.objects.delete(_done(kind, chunk))

    def record_failure(self, failure: Failure) -> None:
        """Keep a task's last error."""
        name = _failed(failure.kind, failure.chunk)
        self.objects.put(name, documents.encode(asdict(failure)))

    def failures(self) -> list[Failure]:
        """Return the last error of every task that failed and has not succeeded since."""
        names = [
            f"failed/{kind}/{ITEM}/{entry.name}"
            for kind in ENTRY_POINTS
            for entry in self.objects.list(f"failed/{kind}/{ITEM}")
        ]
        found = map(Failure.from_json, self.objects.get_many(names).values())
        return [failure for failure in found if failure is not None]

    def put_piece(self, target: Index, name: str, arrays: Sequence[npt.NDArray[Any]]) -> PieceInfo:
        """Store arrays as a block's piece: a line of JSON, their bytes, a CRC-32C.

        The line has the piece's epoch and name, and [dtype, shape] of each array. The form is not
        `.npy`, whose header is read as Python code: in CPython before 3.13, threads that do so at
        once disturb each other.

        Nobody waits for the disk: most pieces are deleted before they reach it, and one that a
        machine took down with it is found by its CRC, and its chunk loses its commit.
        """
        path = _piece(target, name)
        shapes = [(array.dtype.str, array.shape) for array in arrays]
        line = json.dumps([self.epoch, path, shapes]).encode()
        line += b" " * (-(len(line) + 1) % ALIGNMENT) + b"\n"
        parts = [np.frombuffer(line, np.uint8), *(_bytes_of(array) for array in arrays)]
        checksum = reduce(google_crc32c.extend, parts, 0)
        end = checksum.to_bytes(CRC_BYTES, "little")
        self.objects.put(path, *(part.data for part in parts), end, durable=False)
        return PieceInfo(sum(map(len, parts)) + CRC_BYTES, checksum)

    def get_piece(self, target: Index, name: str) -> tuple[list[npt.NDArray[Any]], int]:
        """Return a piece's arrays and its size in bytes; raises PieceError if gone or damaged."""
        path = _piece(target, name)
        content = self.objects.get_array(path)
        if content is None:
            raise PieceError(f"{without_secret(self.path)}/{path} is gone")
        damaged = PieceError(f"{without_secret(self.path)}/{path} is damaged")
        if not _has_valid_checksum(content):
            raise damaged
        ends = range(ALIGNMENT, len(content) + 1, ALIGNMENT)
        offset = next(end for end in ends if content[end - 1] == ord("\n"))
        epoch, stored_path, shapes = json.loads(content[:offset].tobytes())
        if (epoch, stored_path) != (self.epoch, path):  # another piece in its place
            raise damaged
        arrays = []
        for dtype, shape in shapes:
            array = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape)
            arrays.append(array)
            offset += array.nbytes
        return arrays, len(content)

    def delete_pieces(self, target: Index | None = None) -> None:
        """Remove the pieces of one block, or of all, and what killed workers left of writing."""
        folder = "pieces" if target is None else f"pieces/{ITEM}/{chunk_name(target)}"
        self.objects.delete_folder(folder)
        if target is None:
            self.objects.delete_partial_files()

    def write_report(self, report: dict[str, Any]) -> None:
        """Write `report.json`."""
        self.objects.put("report.json", documents.encode(report, indent=1))

    def read_report(self) -> dict[str, Any] | None:
        """Return `report.json`; None before the job is sealed, and if it is damaged."""
        return self._document("report.json")

    def seal(self) -> None:
        """Write `sealed.json`: every block is complete."""
        self.objects.put("sealed.json", documents.encode({"epoch": self.epoch}))

    def is_sealed(self) -> bool:
        """Return whether sealing has begun; the output's metadata say whether it has ended."""
        return (self._document("sealed.json") or {}).get("epoch") == self.epoch

    def unseal(self) -> None:
        """Remove the seal and the report."""
        self.objects.delete("sealed.json")
        self.objects.delete("report.json")

    def _document(self, name: str) -> dict[str, Any] | None:
        content = self.objects.get(name)
        return None if content is None else documents.decode(content)

    def _commit(self, content: bytes, kind: str, chunk: Index) -> Commit | None:
        """Return the record of exactly this task."""
        commit = Commit.from_json(content, self.epoch)
        fits = commit is not None and (commit.kind, commit.chunk) == (kind, chunk)
        return commit if fits else None


def _done(kind: str, chunk: Index | None = None) -> str:
    folder = f"done/{kind}/{ITEM}"
    return folder if chunk is None else f"{folder}/{chunk_name(chunk)}"


def _failed(kind: str, chunk: Index) -> str:
    return f"failed/{kind}/{ITEM}/{chunk_name(chunk)}.json"


def _piece(block: Index, name: str) -> str:
    return f"pieces/{ITEM}/{chunk_name(block)}/{name}"


def _is_chunk(entry_name: str) -> bool:
    return parse_chunk(entry_name) is not None


def _bytes_of(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _has_valid_checksum(content: npt.NDArray[np.uint8]) -> bool:
    """Tell whether the last bytes are the CRC-32C of those before; of nothing, that would be 0."""
    if len(content) <= CRC_BYTES:
        return False
    body, end = content[:-CRC_BYTES], content[-CRC_BYTES:].tobytes()
    return bool(google_crc32c.value(body) == int.from_bytes(end, "little"))
