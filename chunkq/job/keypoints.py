"""Keypoints of a job over images: their names, and the edges between them."""

from __future__ import annotations

from functools import lru_cache

from chunkq.images.skeleton import Skeleton
from chunkq.job.job_file import Job


def skeleton_of(job: Job) -> Skeleton | None:
    """Return the keypoints of a job: those of its package, or the names or the number in `classes`.

    None if the job names neither. Raises JobError if the package is damaged.
    """
    if job.model.package is not None:
        return _skeleton_of_package(job.model.package)
    if job.classes is None:
        return None
    names = job.classes if isinstance(job.classes, tuple) else map(str, range(job.classes))
    return Skeleton(tuple(names))


@lru_cache(maxsize=8)
def _skeleton_of_package(folders: tuple[str, ...]) -> Skeleton:
    from chunkq.images.sleap_package import read_package  # for such jobs only

    return read_package(folders).skeleton
