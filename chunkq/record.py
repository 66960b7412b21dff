"""The record of a job, `job.json`: the checked job file and everything that decides its result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from chunkq import __version__, documents
from chunkq.errors import ChunkqError, ErrorCode, JobError, StoreError
from chunkq.job import Job, parse_job
from chunkq.ome import Space
from chunkq.paths import file_hash, without_secret
from chunkq.plan import Plan, Volume
from chunkq.resolve import resolve
from chunkq.stores import Source, input_identity

LAYOUT = 2
"""Version of the job folder's layout; folders of other versions are refused."""
EPOCH_DIGITS = 8
KEYS_WITHOUT_EFFECT = (
    "queue", "output", "cluster", "hardware", "dask_config", "ray_config",
)  # fmt: skip
"""Keys of a job that say where it runs, not what it computes."""


@dataclass(frozen=True)
class JobRecord:
    """The content of `job.json`.

    `epoch` distinguishes the jobs that used one output path one after another; it is empty until
    the job is created. `array` is the name of the output array while the job runs, and `metadata`
    holds the array's metadata documents by their names in the output. `identities` says of each
    source what changes when its array is replaced (`stores.input_identity`).
    """

    job: Job
    sources: tuple[Source, ...]
    file_hashes: dict[str, str]
    identities: tuple[str, ...] = ()
    epoch: str = ""
    array: str = "0"
    metadata: dict[str, str] = field(default_factory=dict)
    version: str = __version__

    @property
    def source(self) -> Source:
        """The first input; all have its shape."""
        return self.sources[0]

    @classmethod
    def create(cls, job: Job, sources: Sequence[Source]) -> JobRecord:
        """Return a job's record; reads the files that the job names once to hash them.

        Raises JobError naming every file that cannot be read, StoreError for an input that is gone.
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
        return cls(job, tuple(sources), hashes, tuple(map(_identity, sources)))

    def on_queue(self, url: str) -> JobRecord:
        """Return the record with its queue's URL.

        A URL with a password, or of a queue in this process, is left out.
        """
        kept = url if without_secret(url) == url and not url.startswith("inprocess:") else None
        return replace(self, job=self.job.model_copy(update={"queue": kept}))

    def new_epoch(self) -> str:
        """Return the epoch of this job if it is created now: 8 hexadecimal digits."""
        text = f"{self.digest} {time.time_ns()}"
        return hashlib.sha256(text.encode()).hexdigest()[:EPOCH_DIGITS]

    def changed_files(self) -> list[str]:
        """Return the keys of the files whose content differs from what was hashed."""
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
        values = {k: v for k, v in self.job.as_dict().items() if k not in KEYS_WITHOUT_EFFECT}
        what = [values, [asdict(source) for source in self.sources], self.file_hashes]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def plan(self) -> Plan:
        """Return the job's plan; does not read the volume."""
        return resolve(self.job, Volume.joined([source.volume for source in self.sources]))

    def to_json(self) -> bytes:
        """Encode."""
        values = {
            "layout": LAYOUT,
            "chunkq_version": self.version,
            "digest": self.digest,
            "epoch": self.epoch,
            "array": self.array,
            "job": self.job.as_dict(),
            "sources": [asdict(source) for source in self.sources],
            "identities": list(self.identities),
            "file_hashes": self.file_hashes,
            "metadata": self.metadata,
        }
        return documents.encode(values, indent=1)

    @classmethod
    def from_json(cls, content: bytes, path: str = "job record") -> JobRecord:
        """Decode the record stored at `path`; raises JobError if it is damaged or another version.

        The digest is computed again, so a record that was edited by hand is damaged, too.
        """
        shown = without_secret(path)
        again = "start again with `chunkq produce --overwrite`"
        values = documents.decode(content)
        if _has_other_layout(content, values):
            raise JobError(
                f"{shown}: unsupported layout, written by another version of chunkq; use that "
                f"version, or {again}",
                code=ErrorCode.JOB_RECORD_UNSUPPORTED,
            )
        try:
            if values is None:
                raise ValueError
            record = cls(
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
                tuple(values["identities"]),
                values["epoch"],
                values["array"],
                values["metadata"],
                values["chunkq_version"],
            )
            if values["digest"] != record.digest or not _stays_in_folders(record):
                raise ValueError
        except (KeyError, TypeError, ValueError, ChunkqError):
            raise JobError(
                f"{shown}: damaged, its checksum or digest does not match its content; restore "
                f"the file, or {again}",
                code=ErrorCode.JOB_RECORD_DAMAGED,
            ) from None
        return record


def _identity(source: Source) -> str:
    identity = input_identity(source.array_path)
    if identity is None:
        raise StoreError(
            f"input: {without_secret(source.array_path)} is gone", code=ErrorCode.INPUT_MISSING
        )
    return identity


def _stays_in_folders(record: JobRecord) -> bool:
    """Return whether the names in a record lie in the output and in the job folder."""
    names = (record.epoch or "-", record.array, *record.metadata)
    parts = [part for name in names for part in name.split("/")]
    return not {"", ".", ".."}.intersection(parts)


def _has_other_layout(content: bytes, values: dict[str, Any] | None) -> bool:
    """Return whether the content is the record of a version of chunkq with another layout."""
    if values is not None:
        return values.get("layout") != LAYOUT
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return False
    # Records had neither a layout nor a checksum at first.
    return isinstance(values, dict) and "chunkq_version" in values and "layout" not in values
