"""Hashes of the files that determine the result of a job, and of the files to which those refer.

Files that the job names have their key path as key. A module beside a Python file and a weight file
beside an ONNX file have the key `KEY: NAME`, where NAME is relative to the folder of the file of
KEY.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping

from chunkq.errors import JobError
from chunkq.job.allowed_paths import AllowedPaths
from chunkq.job.job_file import Job
from chunkq.paths import file_hash, is_url, without_secret

PYTHON_KEYS = frozenset(
    {
        "model_config.class_file",
        "model_config.kwargs_file",
        "model_config.processing_steps",
        "weight_function",
    }
)
"""Keys of files that chunkq runs."""
MODEL_FILE = "model_config.model_file"
SEPARATOR = ": "


def hash_files(job: Job) -> dict[str, str]:
    """Read each file of a job once and return its hash.

    Raises JobError with one line per file that cannot be read.
    """
    hashes, problems = {}, []
    for key, path in [*job.files.items(), *_referenced(job)]:
        try:
            hashes[key] = file_hash(path)
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            reason = "no file" if is_missing else "cannot read"
            problems.append(f"{key}: {reason} {without_secret(path)}; fix the path")
    if problems:
        raise JobError(problems)
    return hashes


def changed_files(job: Job, hashes: Mapping[str, str]) -> list[str]:
    """Return the keys of the files whose content no longer has its hash.

    Files that this worker may not load are not read. Loading them is refused.
    """
    allowed, referenced = AllowedPaths.from_environment(), _referenced_paths(job, hashes)
    if allowed is not None:
        referenced = {k: path for k, path in referenced.items() if allowed.locate(path) is not None}
    paths = job.files | referenced
    return [key for key, path in paths.items() if _hash_or_none(path) != hashes[key]]


def _referenced_paths(job: Job, hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the path of each hashed file that the job does not name itself, by key."""
    paths = {}
    for key in hashes:
        owner, separator, name = key.partition(SEPARATOR)
        if separator and owner in job.files:
            folder = os.path.dirname(job.files[owner])
            paths[key] = os.path.normpath(os.path.join(folder, name))
    return paths


def _hash_or_none(path: str) -> str | None:
    try:
        return file_hash(path)
    except OSError:
        return None


def _referenced(job: Job) -> Iterator[tuple[str, str]]:
    """Yield the keys and paths of the files to which the files of a job refer."""
    for key, path in job.files.items():
        if key in PYTHON_KEYS:
            from chunkq.job.imported_files import imported_files

            files = imported_files(path, key)
        elif key == MODEL_FILE and job.model.runtime == "onnx":
            files = _external_weights(path)
        else:
            continue
        yield from ((f"{key}{SEPARATOR}{name}", file) for name, file in files.items())


def _external_weights(path: str) -> dict[str, str]:
    """Return the weight files beside an ONNX file. Those that are missing fail when it is loaded.

    The same holds for a damaged file, and for one that names files outside its folder.
    """
    from chunkq.job.onnx_external import external_files, is_in_folder

    if is_url(path) or not os.path.isfile(path) or not os.path.getsize(path):
        return {}
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        names = external_files(memoryview(content))
    except ValueError:
        return {}
    paths = {n: os.path.join(os.path.dirname(path), n) for n in names if is_in_folder(n)}
    return {name: file for name, file in paths.items() if os.path.isfile(file)}
