"""The ledger of a job: commit records, failure records and pieces.

A commit record is written after all other results of its task, so a chunk without a valid commit
record is computed again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer
from zlib_ng import zlib_ng

from chunkq import json_values
from chunkq.errors import PieceError
from chunkq.job.task_records import Commit, Failure, RecentCommits
from chunkq.job.tasks import chunk_name, parse_chunk
from chunkq.paths import without_secret
from chunkq.plan.chunk import Index
from chunkq.storage import documents
from chunkq.storage.objects import PART_BYTES, ObjectFolder
from chunkq.system import buffers

STORE, EXPORTS = "output.zarr", "export"
"""Folders of the store from which files are assembled, and of files that are being written."""
STAGED = "ingest"
"""Folder of the staged inputs, and kind of the tasks that write them."""
INPUTS = "inputs.parquet"
"""Table of the images of a job over images."""
CRC_BYTES, ALIGNMENT = 4, 16
CRC_RESIDUE = 0x2144DF1C
"""CRC-32 of any bytes followed by their own CRC-32 in little-endian order."""
SAMPLE_SIZE = 8192
"""Maximum number of commit records whose times `recent_commits` reads."""
BATCH_SIZE = 1000
"""Commit records that are read at once."""


@dataclass(frozen=True, slots=True)
class PieceInfo:
    """Size (bytes) and CRC-32 of a stored piece."""

    size: int
    crc32: int


class Ledger:
    """Progress of one epoch of a job: the ledgers of its items, the report and the seal.

    Every method raises OSError if the storage fails.
    """

    def __init__(self, job_folder: str, epoch: str) -> None:
        self.epoch = epoch
        self.path = f"{job_folder}/{epoch}"
        self.objects = ObjectFolder(self.path)

    def item(self, number: int) -> ItemLedger:
        """Return the ledger of an item."""
        return ItemLedger(self.objects, self.epoch, number)

    @property
    def staged(self) -> ObjectFolder:
        """The folder of the staged inputs."""
        return ObjectFolder(f"{self.path}/{STAGED}")

    @property
    def store(self) -> str:
        """Path of the Zarr store of a job whose output is files."""
        return f"{self.path}/{STORE}"

    @property
    def exports(self) -> str:
        """Path of the folder in which files are written before they appear."""
        return f"{self.path}/{EXPORTS}"

    def delete_store(self) -> None:
        """Delete the store from which files are assembled, and files that are not complete."""
        self.objects.discard(STORE, EXPORTS)

    def delete_temporary(self) -> None:
        """Delete the pieces of all items, the staged inputs, and partial files.

        The commit records of staged inputs are deleted first: no record is without its input.
        """
        self.objects.delete_folder("pieces")
        self.objects.delete_folder(f"done/{STAGED}")
        self.objects.delete_folder(STAGED)
        self.objects.delete_partial_files()

    def put_inputs(self, content: bytes) -> None:
        """Store the table of the images of a job, unless it is stored."""
        self.objects.put_new(INPUTS, content)

    def open_inputs(self) -> IO[bytes] | None:
        """Open the table of the images of a job; return None if it is missing."""
        return self.objects.open(INPUTS)

    def has_inputs(self) -> bool:
        """Return whether `put_inputs` was called."""
        return self.objects.exists(INPUTS)

    def write_report(self, report: dict[str, Any]) -> None:
        """Write `report.json`."""
        self.objects.put("report.json", documents.encode(report, indent=1))

    def read_report(self) -> dict[str, Any] | None:
        """Return `report.json`, or None if the job is not sealed or the report is damaged."""
        return self._document("report.json")

    def seal(self) -> None:
        """Write `sealed.json`, which marks that every block is complete."""
        self.objects.put("sealed.json", documents.encode({"epoch": self.epoch}))

    def is_sealed(self) -> bool:
        """Return whether sealing has started; `Output.is_sealed` returns whether it has ended."""
        return (self._document("sealed.json") or {}).get("epoch") == self.epoch

    def unseal(self) -> None:
        """Delete the seal and the report."""
        self.objects.delete("sealed.json")
        self.objects.delete("report.json")

    def _document(self, name: str) -> dict[str, Any] | None:
        content = self.objects.get(name)
        return None if content is None else documents.decode(content)


class ItemLedger:
    """Progress of one item of a job: commit records, failure records and pieces.

    Objects with other names are ignored, and so are damaged ones: a task with a damaged commit
    record is not done. Every method raises OSError if the storage fails.
    """

    def __init__(self, objects: ObjectFolder, epoch: str, item: int) -> None:
        self.objects, self.epoch, self.item = objects, epoch, item

    def commit(self, record: Commit) -> None:
        """Store a commit record unless the task has a valid one; delete its failure record."""
        name = self._done(record.kind, record.chunk)
        content = record.to_json(self.epoch)
        if not self.objects.put_new(name, content) and not self.is_committed(
            record.kind, record.chunk
        ):
            self.objects.put(name, content)  # the existing record is damaged
        self.objects.delete(self._failed(record.kind, record.chunk))

    def is_committed(self, kind: str, chunk: Index) -> bool:
        """Return whether a task is done."""
        content = self.objects.get(self._done(kind, chunk))
        return content is not None and self._commit(content, kind, chunk) is not None

    def committed(self, kind: str) -> dict[Index, float]:
        """Return the finished chunks of a kind, and when each was committed (Unix time, s).

        Lists the names of the records only. `read_commits` skips the damaged ones.
        """
        entries = ((parse_chunk(e.name), e) for e in self.objects.list(self._done(kind)) if e.size)
        return {chunk: entry.modified for chunk, entry in entries if chunk is not None}

    def count(self, kind: str) -> int:
        """Count the finished tasks of a kind."""
        return self.recent_commits(kind, 0).total

    def recent_commits(self, kind: str, count: int) -> RecentCommits:
        """Count the finished tasks of a kind and return the newest `count` records of a sample.

        Much cheaper than `committed`, because it reads the times of a sample only.
        """
        total, step, entries = self.objects.sample(self._done(kind), SAMPLE_SIZE, _is_chunk)
        if not count:
            return RecentCommits(total, step, ())
        newest = sorted(entries, key=attrgetter("modified"), reverse=True)
        chunks = [chunk for e in newest if (chunk := parse_chunk(e.name)) is not None]
        return RecentCommits(total, step, tuple(self.commits(kind, chunks[:count])), tuple(chunks))

    def commits(self, kind: str, chunks: Iterable[Index]) -> list[Commit]:
        """Return the valid commit records of these chunks."""
        names = {self._done(kind, chunk): chunk for chunk in chunks}
        contents = self.objects.get_many(list(names))
        commits = (self._commit(content, kind, names[name]) for name, content in contents.items())
        return [commit for commit in commits if commit is not None]

    def read_commits(self, kind: str) -> Iterator[Commit]:
        """Yield all valid commit records of a kind; read them in batches."""
        chunks = iter(self.committed(kind))
        while batch := list(islice(chunks, BATCH_SIZE)):
            yield from self.commits(kind, batch)

    def delete_commits(self, kind: str, chunks: Iterable[Index]) -> None:
        """Delete the commit records of these chunks, so that their tasks run again."""
        for chunk in chunks:
            self.objects.delete(self._done(kind, chunk))

    def record_failure(self, failure: Failure) -> None:
        """Store the last error of a task."""
        name = self._failed(failure.kind, failure.chunk)
        self.objects.put(name, documents.encode(json_values.to_values(failure)))

    def failures(self, kinds: Iterable[str]) -> list[Failure]:
        """Return the last error of every task of these kinds that failed and is not done."""
        names = [
            f"{folder}/{entry.name}"
            for kind in kinds
            for folder in [f"failed/{kind}/{self.item}"]
            for entry in self.objects.list(folder)
        ]
        failures = map(Failure.from_json, self.objects.get_many(names).values())
        return [failure for failure in failures if failure is not None]

    def put_piece(self, target: Index, name: str, arrays: Sequence[npt.NDArray[Any]]) -> PieceInfo:
        """Store arrays as a piece of a block: a JSON header line, their bytes, a CRC-32.

        The header has the epoch and the name of the piece, and [dtype, shape] of each array.

        The format is not `.npy`: NumPy parses its header as Python code, which is not thread-safe
        in CPython before 3.13. The write is not synchronized with the disk, because most pieces
        are deleted before they reach it. A piece that a crash of the machine damages fails its
        CRC, and its chunk is computed again.
        """
        return self._put_arrays(self._piece(target, name), arrays, durable=False)

    def _put_arrays(
        self, path: str, arrays: Sequence[npt.NDArray[Any]], *, durable: bool
    ) -> PieceInfo:
        shapes = [(array.dtype.str, array.shape) for array in arrays]
        header = json.dumps([self.epoch, path, shapes]).encode()
        header += b" " * (-(len(header) + 1) % ALIGNMENT) + b"\n"
        content = _Checksummed([np.frombuffer(header, np.uint8), *arrays])
        self.objects.put_parts(path, content, durable=durable)
        return PieceInfo(content.size, content.crc32)

    def get_piece(self, target: Index, name: str) -> tuple[list[npt.NDArray[Any]], int]:
        """Return the arrays of a piece and its size (bytes).

        Raises PieceError if it is missing or damaged.
        """
        return self._get_arrays(self._piece(target, name))

    def put_skipped(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Store what is known beforehand of empty chunks, in the format of a piece."""
        self._put_arrays(self._skipped, arrays, durable=True)

    def get_skipped(self) -> list[npt.NDArray[Any]]:
        """Return what `put_skipped` has stored. Raises PieceError if it is missing or damaged."""
        return self._get_arrays(self._skipped)[0]

    def has_skipped(self) -> bool:
        """Return whether `put_skipped` was called."""
        return self.objects.exists(self._skipped)

    @property
    def _skipped(self) -> str:
        return f"skipped/{self.item}.bin"

    def _get_arrays(self, path: str) -> tuple[list[npt.NDArray[Any]], int]:
        crc32 = 0

        def update(part: npt.NDArray[np.uint8]) -> None:
            nonlocal crc32
            crc32 = zlib_ng.crc32(part, crc32)

        content = self.objects.get_array(path, update)
        if content is None:
            raise PieceError(f"{without_secret(self.objects.path)}/{path} is missing")
        damaged = PieceError(f"{without_secret(self.objects.path)}/{path} is damaged")
        # The CRC-32 of no bytes is 0, so four zeros would be valid.
        if len(content) <= CRC_BYTES or crc32 != CRC_RESIDUE:
            raise damaged
        ends = range(ALIGNMENT, len(content) + 1, ALIGNMENT)
        offset = next(end for end in ends if content[end - 1] == ord("\n"))
        epoch, stored_path, shapes = json.loads(content[:offset].tobytes())
        if (epoch, stored_path) != (self.epoch, path):  # a copy of another piece
            raise damaged
        arrays = []
        for dtype, shape in shapes:
            array = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape)
            arrays.append(array)
            offset += array.nbytes
        return arrays, len(content)

    def delete_pieces(self, target: Index) -> None:
        """Delete the pieces of a block."""
        self.objects.delete_folder(f"pieces/{self.item}/{chunk_name(target)}")

    def _done(self, kind: str, chunk: Index | None = None) -> str:
        folder = f"done/{kind}/{self.item}"
        return folder if chunk is None else f"{folder}/{chunk_name(chunk)}"

    def _failed(self, kind: str, chunk: Index) -> str:
        return f"failed/{kind}/{self.item}/{chunk_name(chunk)}.json"

    def _piece(self, block: Index, name: str) -> str:
        return f"pieces/{self.item}/{chunk_name(block)}/{name}"

    def _commit(self, content: bytes, kind: str, chunk: Index) -> Commit | None:
        """Decode a record. Return None if it is damaged or belongs to another task."""
        commit = Commit.from_json(content, self.epoch)
        is_same_task = commit is not None and (commit.kind, commit.item, commit.chunk) == (
            kind,
            self.item,
            chunk,
        )
        return commit if is_same_task else None


def _is_chunk(entry_name: str) -> bool:
    return parse_chunk(entry_name) is not None


class _Checksummed:
    """The bytes of arrays in parts, then their CRC-32.

    Checksum and write alternate, so each part is in the CPU's cache for both. Both release the
    GIL. `crc32` is valid after an iteration.
    """

    def __init__(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        self._arrays, self.crc32 = arrays, 0
        self.size = sum(array.nbytes for array in arrays) + CRC_BYTES

    def __iter__(self) -> Iterator[Buffer]:
        self.crc32 = 0
        for array in self._arrays:
            content = buffers.contiguous(array).reshape(-1).view(np.uint8)
            for start in range(0, len(content), PART_BYTES):
                part = content[start : start + PART_BYTES]
                self.crc32 = zlib_ng.crc32(part, self.crc32)
                yield part.data
        yield self.crc32.to_bytes(CRC_BYTES, "little")
