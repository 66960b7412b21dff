"""A job folder: the job record, and one ledger per epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from chunkq.errors import ErrorCode, JobError, MissingJobError
from chunkq.job.job_path import SUFFIX
from chunkq.job.ledger import Ledger
from chunkq.job.record import JobRecord
from chunkq.job.tasks import EPOCH
from chunkq.paths import without_secret
from chunkq.storage.objects import ObjectFolder

log = logging.getLogger("chunkq.job")


RECORD = "job.json"


class JobFolder:
    """A job folder: the job record and one ledger per epoch.

    Every method raises OSError if the storage fails.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.objects = ObjectFolder(path)

    @property
    def output(self) -> str:
        """Path of the output."""
        return self.path.removesuffix(SUFFIX)

    def read_record(self) -> JobRecord | None:
        """Return the record in `job.json`, or None if there is no job.

        Raises JobError if it is damaged.
        """
        content = self.objects.get(RECORD)
        return None if content is None else self._decode(content)

    def require_record(self) -> JobRecord:
        """Return the record in `job.json`. Raises MissingJobError if there is no job."""
        record = self.read_record()
        if record is None:
            raise MissingJobError(
                f"{without_secret(self.output)}: no job at this path, "
                f"{without_secret(self.path)}/job.json is missing; "
                "fix the path, or run `chunkq produce` to create a job"
            )
        return record

    def create_record(self, record: JobRecord) -> JobRecord:
        """Write `job.json` unless it exists, and return the stored record.

        If several processes create a job at the same time, exactly one succeeds.
        """
        content = record.to_json()
        if not self.objects.put_new(RECORD, content):
            return self.require_record()
        if not self.objects.is_exclusive:
            log.warning(
                "output: %s: this storage has no exclusive creation of objects; run only one "
                "process at a time that creates this job",
                without_secret(self.output),
            )
        # Without exclusive creation, another process may have overwritten the record.
        stored = self.objects.get(RECORD)
        return self.require_record() if stored is None else self._decode(stored)

    def replace_record(
        self,
        before: bytes | None,
        record: JobRecord,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Claim `job.json`, whose content is `before`, call `prepare`, and replace the record.

        Raises JobError if another process has claimed or replaced it.
        """
        from chunkq.storage.claims import replace  # of commands that change a job

        with self.claim(before):
            prepare()
            if not replace(self.objects, RECORD, before, record.to_json()):
                raise self._replaced_error()

    @contextmanager
    def claim(self, content: bytes | None) -> Iterator[None]:
        """Hold the claim to replace the job record that has this content.

        Raises JobError if another process holds the claim, or if the record has other content.
        """
        from chunkq.storage.claims import hold_claim

        with hold_claim(self.objects, RECORD, content) as is_claimed:
            if not is_claimed:
                raise self._replaced_error()
            yield

    def _replaced_error(self) -> JobError:
        return JobError(
            f"output: {without_secret(self.output)}: another process is creating or changing this "
            "job; wait until it has ended, or for a minute if it was killed, then run the command "
            "again",
            code=ErrorCode.JOB_REPLACED,
        )

    def ledger(self, epoch: str) -> Ledger:
        """Return the ledger of an epoch."""
        return Ledger(self.path, epoch)

    def delete_earlier_epochs(self, epoch: str) -> None:
        """Delete the ledgers of earlier jobs if the current job has this epoch."""
        # List first: a later job writes its record before its ledger, so none is in this list.
        names = self._epochs()
        record = self.read_record()
        if record is not None and record.epoch == epoch:
            for name in names:
                if name != epoch:
                    self.objects.delete_folder(name)
            self.objects.delete_partial_files()

    def delete_epochs(self) -> None:
        """Delete the ledgers of all jobs."""
        for name in self._epochs():
            self.objects.delete_folder(name)

    def _epochs(self) -> list[str]:
        return [name for name in self.objects.folders() if EPOCH.fullmatch(name)]

    def _decode(self, content: bytes) -> JobRecord:
        return _decoded(content, f"{self.path}/{RECORD}")


@lru_cache(maxsize=2)
def _decoded(content: bytes, path: str) -> JobRecord:
    """Decode a record; every task reads it several times to see whether its job was replaced."""
    return JobRecord.from_json(content, path)
