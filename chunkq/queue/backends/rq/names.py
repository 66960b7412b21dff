"""Names of queues and jobs in Redis."""

from __future__ import annotations

import re
from functools import lru_cache

from chunkq.job.tasks import JobId, Task, path_key


@lru_cache(maxsize=64)
def queue_prefix(path: str) -> str:
    """Return the common start of the names of the queues for a job folder's path."""
    output = path.rstrip("/").rpartition("/")[2].removesuffix(".chunkq")
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', output)[:40]}-{path_key(path)}-"


def queue_name(job: JobId) -> str:
    """Return the name of the RQ queue of a job: output name, key of its path, epoch."""
    return f"{queue_prefix(job.path)}{job.epoch}"


def rq_id(task: Task) -> str:
    """Return the id of a task's RQ job, unique in Redis: `PATH_KEY-EPOCH-KIND-ITEM-CHUNK`.

    It contains only letters, digits, `-` and `_`, because RQ rejects other characters.
    """
    chunk = "_".join(map(str, task.chunk))
    return f"{path_key(task.job)}-{task.epoch}-{task.kind}-{task.item}-{chunk}"


def stored_job(job: JobId) -> str:
    """Return a job as the text that Redis stores."""
    return f"{job.epoch} {job.path}"


def job_of(text: str) -> JobId:
    """Return the job of a `stored_job`."""
    epoch, _, path = text.partition(" ")
    return JobId(path, epoch)
