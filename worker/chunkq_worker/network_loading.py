"""What holds for every load of a network: its files are those of the job, and it has threads."""

from __future__ import annotations

import os

from chunkq.errors import ModelError
from chunkq.job.job_file import Job
from chunkq.job.record import JobRecord
from chunkq_worker.child_env import THREADS_VARIABLE


def check_files(record: JobRecord) -> None:
    """Raise ModelError if a file of the network has changed since the job was produced."""
    if changed := record.changed_files():
        raise ModelError(
            f"{', '.join(changed)}: the file is missing here or has changed since the job was "
            "produced; restore it, or produce the job again with --overwrite"
        )


def thread_count(job: Job) -> int | None:
    """Return the number of threads of a network: the job's, else this process's share of cores.

    None leaves it to the framework.
    """
    share = os.environ.get(THREADS_VARIABLE, "")
    return job.threads or (int(share) if share.isdecimal() else None)
