"""The job folder beside the output: what is done, what failed, and the pieces in between.

The folder is the truth about a job. A commit record is written after everything it vouches
for, so a chunk without one is simply to be done again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, reduce
from heapq import nlargest
from operator import attrgetter
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from chunkq import __version__
from chunkq.errors import JobError, MissingJobError, PieceError
from chunkq.job import Job, parse_job
from chunkq.objects import ObjectFolder
from chunkq.ome import Space
from chunkq.paths import file_hash, without_secret
from chunkq.plan import Index, Plan, Volume
from chunkq.resolve import resolve
from chunkq.stores import Source
from chunkq.tasks import chunk_name, parse_chunk

SUFFIX = ".chunkq"
CRC_BYTES, ALIGNMENT = 4, 16
SAMPLE = 8192
"""Commit records whose dates `newest` asks for, of a job with more."""
NOT_THE_RESULT = (
    "queue", "output", "cluster", "hardware", "dask_config", "ray_config",
)  # fmt: skip
"""Keys of a job that say where it runs, not what it gives."""


def folder_of(output: str) -> str:
    """Return the job folder's path for an output path; a job folder's path stays as it is."""
    output = output.rstrip("/")
    return output if output.endswith(SUFFIX) else output + SUFFIX


@dataclass(frozen=True)
class JobRecord:
    """What `job.json` holds: the checked job and all that decides its result."""

    job: Job
    sources: tuple[Source, ...]
    file_hashes: dict[str, str]
    version: str = __version__

    @property
    def source(self) -> Source:
        """The first input; all have its shape."""
        return self.sources[0]

    @classmethod
    def of(cls, job: Job, sources: Sequence[Source]) -> JobRecord:
        """Take a job's record, reading the files it names once to hash them.

        Raises JobError naming every file that cannot be read.
        """
        hashes, problems = {}, []
        for key, path in job.files.items():
            try:
                hashes[key] = file_hash(path)
            except OSError as error:
                reason = "no file" if isinstance(error, FileNotFoundError) else "cannot read"
                problems.append(f"{key}: {reason} {without_secret(path)}")
        if problems:
            raise JobError(problems)
        return cls(job, tuple(sources), hashes)

    def on_queue(self, url: str) -> JobRecord:
        """Return the record with its queue's URL.

        A URL with a password, or of a queue in this process, is left out.
        """
        kept = url if without_secret(url) == url and not url.startswith("inprocess:") else None
        return replace(self, job=self.job.model_copy(update={"queue": kept}))

    def changed_files(self) -> list[str]:
        """Return the keys of those files whose content is no longer what was hashed."""
        changed = []
        for key, path in self.job.files.items():
            try:
                same = file_hash(path) == self.file_hashes[key]
            except OSError:
                same = False
            if not same:
                changed.append(key)
        return changed

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that decides the output's bytes, as hexadecimal digits."""
        values = {k: v for k, v in self.job.as_dict().items() if k not in NOT_THE_RESULT}
        what = [values, [asdict(source) for source in self.sources], self.file_hashes]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def plan(self) -> Plan:
        """Return the job's plan; the volume is not looked at again."""
        return resolve(self.job, Volume.joined([source.volume for source in self.sources]))

    def to_json(self) -> bytes:
        """Encode."""
        values = {
            "chunkq_version": self.version,
            "digest": self.digest,
            "job": self.job.as_dict(),
            "sources": [asdict(source) for source in self.sources],
            "file_hashes": self.file_hashes,
        }
        return json.dumps(values, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> JobRecord:
        """Decode."""
        values = json.loads(content)
        return cls(
            parse_job(values["job"]),
            tuple(
                Source(
                    source["array_path"],
                    Volume(tuple(source["volume"]["shape"]), source["volume"]["dtype"]),
                    Space.from_dict(source["space"]),
                )
                for source in values["sources"]
            ),
            values["file_hashes"],
            values["chunkq_version"],
        )


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

    def to_json(self) -> bytes:
        """Encode."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Commit:
        """Decode."""
        values = json.loads(content)
        return cls(**{**values, "chunk": tuple(values["chunk"])})


@dataclass(frozen=True)
class Newest:
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


@dataclass(frozen=True, slots=True)
class Written:
    """A stored piece: its size in bytes and CRC-32C."""

    size: int
    crc32c: int


class JobFolder:
    """Reads and writes one job folder. Every method raises OSError as the storage does."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.objects = ObjectFolder(path)

    @property
    def output(self) -> str:
        """Path of the output the folder belongs to."""
        return self.path.removesuffix(SUFFIX)

    def read_record(self) -> JobRecord | None:
        """Return what `job.json` holds, or None where there is no job."""
        content = self.objects.get("job.json")
        return None if content is None else JobRecord.from_json(content)

    def require_record(self) -> JobRecord:
        """Return what `job.json` holds; raises MissingJobError where there is no job."""
        record = self.read_record()
        if record is None:
            raise MissingJobError(
                f"{without_secret(self.output)}: no job was produced here "
                f"(no {without_secret(self.path)}/job.json); `chunkq produce` makes one"
            )
        return record

    def write_record(self, record: JobRecord) -> None:
        """Write `job.json`."""
        self.objects.put("job.json", record.to_json())

    def commit(self, record: Commit) -> None:
        """Vouch for a finished task, once; an earlier failure of it is forgotten."""
        name = chunk_name(record.chunk)
        self.objects.put_new(f"done/{record.kind}/{name}", record.to_json())
        self.objects.delete(f"failed/{_failure_name(record.kind, record.chunk)}")

    def is_committed(self, kind: str, chunk: Index) -> bool:
        """Tell whether a task is done."""
        return self.objects.exists(f"done/{kind}/{chunk_name(chunk)}")

    def committed(self, kind: str) -> dict[Index, float]:
        """Return the finished chunks of a kind and when each was committed (s, Unix)."""
        found = self.objects.list(f"done/{kind}")
        chunks = ((parse_chunk(entry.name), entry.modified) for entry in found)
        return {chunk: modified for chunk, modified in chunks if chunk is not None}

    def count(self, kind: str) -> int:
        """Count the finished tasks of a kind."""
        return self.newest(kind, 0).total

    def newest(self, kind: str, count: int) -> Newest:
        """Count the finished tasks of a kind and return the newest `count` records of a sample.

        Much cheaper than `committed`: of a large job only a sample is looked at.
        """
        total, step, sampled = self.objects.sample(f"done/{kind}", SAMPLE)
        latest = nlargest(count, sampled, key=attrgetter("modified"))
        found = self.objects.get_many([f"done/{kind}/{entry.name}" for entry in latest])
        return Newest(total, step, tuple(Commit.from_json(content) for content in found.values()))

    def commits(self, kind: str, chunks: Iterable[Index]) -> list[Commit]:
        """Return the commit records of those chunks that have one."""
        names = [f"done/{kind}/{chunk_name(chunk)}" for chunk in chunks]
        return [Commit.from_json(content) for content in self.objects.get_many(names).values()]

    def record_failure(self, failure: Failure) -> None:
        """Keep a task's last error."""
        name = _failure_name(failure.kind, failure.chunk)
        self.objects.put(f"failed/{name}", json.dumps(asdict(failure)).encode())

    def failures(self) -> list[Failure]:
        """Return the last error of every task that failed and has not succeeded since."""
        names = [f"failed/{entry.name}" for entry in self.objects.list("failed")]
        values = [json.loads(content) for content in self.objects.get_many(names).values()]
        return [Failure(**{**v, "chunk": tuple(v["chunk"])}) for v in values]

    def put_piece(self, target: Index, name: str, arrays: Sequence[npt.NDArray[Any]]) -> Written:
        """Store arrays under `pieces/<target>/<name>`: a line of JSON, their bytes, a CRC-32C.

        The line has [dtype, shape] of each array. The form is not `.npy`, whose header is read as
        Python code: in CPython before 3.13, threads that do so at once disturb each other.

        Nobody waits for the disk: most pieces are deleted before they reach it, and one that a
        machine took down with it is found by its CRC, and its chunk loses its commit.
        """
        line = json.dumps([(array.dtype.str, array.shape) for array in arrays]).encode()
        line += b" " * (-(len(line) + 1) % ALIGNMENT) + b"\n"
        parts = [np.frombuffer(line, np.uint8), *(_bytes_of(array) for array in arrays)]
        checksum = reduce(google_crc32c.extend, parts, 0)
        end = checksum.to_bytes(CRC_BYTES, "little")
        path = f"pieces/{chunk_name(target)}/{name}"
        self.objects.put(path, *(part.data for part in parts), end, durable=False)
        return Written(sum(map(len, parts)) + CRC_BYTES, checksum)

    def get_piece(self, target: Index, name: str) -> tuple[list[npt.NDArray[Any]], int]:
        """Return a piece's arrays and its size in bytes; raises PieceError if gone or damaged."""
        path = f"pieces/{chunk_name(target)}/{name}"
        content = self.objects.get_array(path)
        if content is None:
            raise PieceError(f"{without_secret(self.path)}/{path} is gone")
        if not _is_whole(content):
            raise PieceError(f"{without_secret(self.path)}/{path} is damaged")
        ends = range(ALIGNMENT, len(content) + 1, ALIGNMENT)
        offset = next(end for end in ends if content[end - 1] == ord("\n"))
        arrays = []
        for dtype, shape in json.loads(content[:offset].tobytes()):
            array = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape)
            arrays.append(array)
            offset += array.nbytes
        return arrays, len(content)

    def delete_pieces(self, target: Index | None = None) -> None:
        """Remove the pieces of one block, or of all, and what killed workers left of writing."""
        self.objects.delete_folder("pieces" if target is None else f"pieces/{chunk_name(target)}")
        if target is None:
            self.objects.sweep()

    def forget_commits(self) -> None:
        """Take back every commit: nothing is vouched for any more."""
        self.objects.delete_folder("done")
        self.objects.delete("report.json")

    def delete(self) -> None:
        """Remove the whole job folder, `job.json` last."""
        for folder in ("done", "failed", "pieces"):
            self.objects.delete_folder(folder)
        self.objects.delete_folder()

    def unseal(self) -> None:
        """Remove the report of an earlier, incomplete sealing."""
        self.objects.delete("report.json")

    def write_report(self, report: dict[str, Any]) -> None:
        """Write `report.json`."""
        self.objects.put("report.json", json.dumps(report, indent=1).encode())

    def read_report(self) -> dict[str, Any] | None:
        """Return `report.json`, or None before the job is sealed."""
        content = self.objects.get("report.json")
        return None if content is None else json.loads(content)


def _failure_name(kind: str, chunk: Index) -> str:
    prefix = "" if kind == "infer" else f"{kind}-"
    return f"{prefix}{chunk_name(chunk)}.json"


def _bytes_of(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _is_whole(content: npt.NDArray[np.uint8]) -> bool:
    """Tell whether the last bytes are the CRC-32C of those before; of nothing, that would be 0."""
    if len(content) <= CRC_BYTES:
        return False
    body, end = content[:-CRC_BYTES], content[-CRC_BYTES:].tobytes()
    return bool(google_crc32c.value(body) == int.from_bytes(end, "little"))
