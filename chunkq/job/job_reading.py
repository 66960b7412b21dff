"""Jobs as commands and functions receive them: a job file, or a mapping of its keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkq.errors import ArgumentError, JobError
from chunkq.job.absolute_paths import make_absolute
from chunkq.job.class_names import with_class_names
from chunkq.job.image_job import is_over_images
from chunkq.job.job_file import Job
from chunkq.job.job_parsing import parse_job
from chunkq.job.job_path import canonical
from chunkq.job.output_name import check_new_output
from chunkq.paths import absolute_input


def select_job_file(job: Path | None, config: Path | None) -> Path:
    """Return the job file of a command: its argument JOB, or the value of its option -c.

    Raises JobError unless exactly one of them is given.
    """
    if job is not None and config is not None:
        raise JobError(f"-c: found {config} beside the job file {job}; use one of them")
    path = job or config
    if path is None:
        raise JobError("JOB: missing; name a YAML or JSON job file, `chunkq init` writes one")
    return path


def load_job(
    source: str | Path | Mapping[str, Any],
    *,
    input: str | None = None,
    output: str | None = None,
) -> Job:
    """Read a job from a YAML file, a JSON file or a mapping, and make its paths absolute.

    Paths in a file are relative to the file's folder. Paths in a mapping, and the arguments
    `input` and `output`, which replace those of the job, are relative to the working directory.
    Raises JobError with one line per mistake.
    """
    values = job_values(source)
    if input is not None:
        volume = absolute_input(input, Path.cwd()) if input else ""
        mapping = values.get("input")
        values["input"] = {**mapping, "path": volume} if isinstance(mapping, dict) else volume
    if output is not None:
        values["output"] = canonical(output, Path.cwd()) if output else ""
    return _parse_with_output(values)


def job_values(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a job file or a mapping, with absolute paths and not validated.

    Raises ArgumentError for a source of another type, and JobError for an unreadable file.
    """
    if isinstance(source, Mapping):
        values, base = dict(source), Path.cwd()
    elif isinstance(source, (str, os.PathLike)):
        from chunkq.job.job_document import read_document  # a mapping needs no YAML

        path = Path(os.path.expanduser(source))
        values, base = read_document(path), path.absolute().parent
    else:
        raise ArgumentError(
            "job: expected the path of a job file or a dict of its keys, found "
            f"{type(source).__name__}"
        )
    make_absolute(values, base)
    return with_class_names(values, base)


def _parse_with_output(values: Mapping[str, Any]) -> Job:
    """Validate a mapping, including the canonical form of its output path.

    Raises JobError with one line per mistake.
    """
    output, problem = values.get("output"), None
    if isinstance(output, str) and output:
        try:
            check_new_output(output, Path("/"), is_table=is_over_images(values))
        except JobError as error:
            problem = error
    try:
        job = parse_job(values)
    except JobError as error:
        if problem is None or any(line.startswith("output: ") for line in error.problems):
            raise
        raise JobError([*error.problems, *problem.problems], code=error.code) from None
    if problem is not None:
        raise problem
    return job
