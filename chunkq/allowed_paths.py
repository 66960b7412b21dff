"""The paths below which a worker runs code: `chunkq work --allow`, or CHUNKQ_ALLOW.

A worker with such paths accepts a job if the job folder, the output and every file that the job
loads (`Job.files`) lie below them, also after symbolic links are resolved. Inputs are data and may
lie anywhere. `docs/security.md` says what this protects against.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from chunkq.errors import ErrorCode, JobError
from chunkq.job import Job
from chunkq.job_path import canonical, check_job_path, output_of, path_problem, printable_path
from chunkq.paths import is_url, local_parts

ALLOW_VARIABLE = "CHUNKQ_ALLOW"
"""Prefixes, one a line. Unset or empty: every path is allowed."""
OPTION = "--allow"
MAX_HINTS = 4


@dataclass(frozen=True)
class AllowedPaths:
    """Prefixes in canonical form, at least one."""

    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, prefixes: Iterable[str], base: Path, source: str = OPTION) -> AllowedPaths:
        """Check prefixes and make them canonical, local ones absolute against `base`.

        Raises JobError, which names `source`, for a prefix that cannot be compared.
        """
        checked = []
        for prefix in prefixes:
            if not prefix.strip():
                raise JobError(f"{source}: a path is empty; use a folder or a URL")
            path = canonical(prefix, base)
            # `memory://` has no host: as a prefix it is all of this process's memory.
            if path != "memory://" and (problem := path_problem(path)):
                raise JobError(
                    f"{source}: {printable_path(path)} {problem}", code=ErrorCode.PATH_INVALID
                )
            checked.append(path)
        return cls(tuple(checked))

    @classmethod
    def from_environment(cls, base: Path | None = None) -> AllowedPaths | None:
        """Return the prefixes in CHUNKQ_ALLOW, or None where all paths are allowed.

        Raises JobError for one that cannot be compared. A relative prefix is one of those unless
        `base` is given: a worker process may have any working directory.
        """
        text = os.environ.get(ALLOW_VARIABLE, "")
        if not text:
            return None
        lines = [line for line in text.splitlines() if line.strip()] or [""]
        for line in lines if base is None else ():
            if not is_url(line) and not line.startswith(("/", "~")):
                raise JobError(
                    f"{ALLOW_VARIABLE}: {printable_path(line)} is relative; "
                    "use an absolute path or a URL",
                    code=ErrorCode.PATH_INVALID,
                )
        return cls.of(lines, base or Path("/"), ALLOW_VARIABLE)

    def to_environment(self) -> None:
        """Set CHUNKQ_ALLOW for this process and those that it starts."""
        os.environ[ALLOW_VARIABLE] = "\n".join(self.prefixes)

    def locate(self, path: str) -> str | None:
        """Return the path under which to open a file, or None unless it lies below a prefix.

        Of a local path both must: its name in its folder and what it leads to, after symbolic
        links are resolved. The returned path has no link in its folder's path, so that only
        somebody who can write below a prefix can make it lead elsewhere afterwards.
        """
        if path_problem(path) is not None:
            return None
        if is_url(path):
            return path if any(_is_below(path, prefix) for prefix in self.prefixes) else None
        return None if self._outside(path) else _entry(path)

    def _outside(self, path: str) -> list[str]:
        """Return where a local path lies and leads to, as far as that is below no prefix."""
        prefixes = [os.path.realpath(prefix) for prefix in self.prefixes if not is_url(prefix)]
        return [
            place
            for place in (_entry(path), os.path.realpath(path))
            if not any(_is_below(place, prefix) for prefix in prefixes)
        ]

    def locate_job(self, job: str) -> str:
        """Return the path under which to open a job folder; raises JobError if not allowed."""
        location = self.locate(job)
        if location is None:
            raise self._refusal(job, {"job folder": [job]})
        if self.locate(output_of(location)) is None:
            raise self._refusal(job, {"output": [output_of(location)]})
        return location

    def locate_files(self, job: Job, folder: str) -> dict[str, str]:
        """Return the path under which to open each of `job.files`, by key.

        Raises JobError in one line that names every file that is not allowed. `folder` is the
        path of the job folder, for that line.
        """
        located, outside = {}, {}
        for key, path in job.files.items():
            parts = [path, *_parts(path)]
            if wrong := [part for part in parts if self.locate(part) is None]:
                outside[key] = wrong
            else:
                located[key] = self.locate(path) or path
        if outside:
            raise self._refusal(folder, outside)
        return located

    def _refusal(self, job: str, outside: Mapping[str, list[str]]) -> JobError:
        """Return the error for paths outside the prefixes, by the key that names them."""
        named = ", ".join(f"{key} {_described(paths[0])}" for key, paths in outside.items())
        prefixes = ", ".join(map(printable_path, self.prefixes))
        paths = [path for group in outside.values() for path in group if not path_problem(path)]
        missing = sorted({self._missing(path) for path in paths})[:MAX_HINTS]
        add = "".join(f" {OPTION} {printable_path(folder)}" for folder in missing)
        hint = f"if you trust it, use{add} too, or set {ALLOW_VARIABLE}"
        return JobError(
            f"{printable_path(output_of(job))}: this worker only runs jobs and code from "
            f"below {prefixes}; found outside: {named}; "
            f"{hint if missing else 'produce the job again'}",
            code=ErrorCode.PATH_NOT_ALLOWED,
        )

    def _missing(self, path: str) -> str:
        """Return the folder to allow so that a path in canonical form is."""
        return os.path.dirname(path if is_url(path) else next(iter(self._outside(path)), path))


def accepted_job(job: str) -> str:
    """Return the path under which a worker opens the job folder that a task names.

    Raises JobError unless `job` is in canonical form and allowed.
    """
    check_job_path(job)
    allowed = AllowedPaths.from_environment()
    return job if allowed is None else allowed.locate_job(job)


def accepted_files(job: Job, folder: str) -> Job:
    """Return the job with each file's path the one to open; raises JobError if one is not allowed.

    `folder` is the path of the job folder.
    """
    allowed = AllowedPaths.from_environment()
    return job if allowed is None else job.with_files(allowed.locate_files(job, folder))


def is_restricted() -> bool:
    """Tell whether this worker accepts only some paths."""
    return AllowedPaths.from_environment() is not None


def _entry(path: str) -> str:
    """Return a local path with its folder's symbolic links resolved, not its own."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _is_below(path: str, prefix: str) -> bool:
    """Tell whether a path is the prefix or lies below it; whole parts count."""
    return f"{path}/".startswith(f"{prefix.rstrip('/')}/")


def _parts(path: str) -> Iterator[str]:
    """Yield the files and folders that a model's path stands for besides itself."""
    if is_url(path):
        return
    if os.path.isdir(path):
        for top, folders, names in os.walk(path):
            yield from (os.path.join(top, name) for name in (*folders, *names))
    else:
        yield from (part for _, part in local_parts(path) or ())


def _described(path: str) -> str:
    """Return a refused path with what is wrong with its form, or what it leads to."""
    if problem := path_problem(path):
        return f"{printable_path(path)} (which {problem})"
    target = path if is_url(path) else os.path.realpath(path)
    return (
        printable_path(path)
        if target == path
        else f"{printable_path(path)} -> {printable_path(target)}"
    )
