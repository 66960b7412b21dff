"""Paths from which a worker may run code: `chunkq work --allow`, or CHUNKQ_ALLOW.

A worker with allowed paths accepts a job only if the job folder, the output and every file that
the job loads (`Job.files`) are below one of them, also after resolving symbolic links. It imports
an installed package for a job only if `--allow-package` or CHUNKQ_ALLOW_PACKAGES names it. Inputs
are data and may be anywhere. `docs/security.md` describes what this protects against.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from chunkq.errors import ErrorCode, JobError
from chunkq.job.job_path import canonical, check_job_path, output_of, path_problem, printable_path
from chunkq.paths import is_url, local_parts

if TYPE_CHECKING:
    from chunkq.job.job_file import Job

ALLOW_VARIABLE = "CHUNKQ_ALLOW"
"""Environment variable with one allowed prefix per line. If unset or empty, all are allowed."""
PACKAGES_VARIABLE = "CHUNKQ_ALLOW_PACKAGES"
"""Environment variable with one allowed package per line; used with allowed paths only."""
OPTION = "--allow"
PACKAGES_OPTION = "--allow-package"
MAX_HINTS = 4


@dataclass(frozen=True)
class AllowedPaths:
    """Allowed path prefixes in canonical form, at least one, and allowed top-level packages."""

    prefixes: tuple[str, ...]
    packages: tuple[str, ...] = ()

    @classmethod
    def parse(cls, prefixes: Iterable[str], base: Path, source: str = OPTION) -> AllowedPaths:
        """Convert prefixes to canonical form; make local ones absolute against `base`.

        `source` is the option or variable to name in errors. Raises JobError if a prefix has no
        canonical form.
        """
        canonical_prefixes = []
        for prefix in prefixes:
            if not prefix.strip():
                raise JobError(
                    f"{source}: found an empty path; use a folder or a URL",
                    code=ErrorCode.PATH_INVALID,
                )
            path = canonical(prefix, base)
            # `memory://` has no host; as a prefix it allows all of this process's memory.
            if path != "memory://" and (problem := path_problem(path)):
                raise JobError(
                    f"{source}: {printable_path(path)} {problem}", code=ErrorCode.PATH_INVALID
                )
            canonical_prefixes.append(path)
        return cls(tuple(canonical_prefixes))

    @classmethod
    def from_environment(cls, base: Path | None = None) -> AllowedPaths | None:
        """Return the values of both variables, or None if all paths are allowed.

        Relative prefixes are resolved against `base`. Without `base` they raise JobError, because
        worker processes have different working directories. Raises JobError for a prefix without
        canonical form, and for an invalid name of a package.
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
        return cls.parse(lines, base or Path("/"), ALLOW_VARIABLE)._with_environment_packages()

    @classmethod
    def from_options(
        cls, prefixes: Sequence[str], packages: Sequence[str], base: Path
    ) -> AllowedPaths | None:
        """Return the values of both options; the variable replaces an option that is not used.

        The result is None if all paths are allowed. Raises JobError for invalid values, and for
        packages without prefixes.
        """
        if prefixes:
            allowed: AllowedPaths | None = cls.parse(prefixes, base)._with_environment_packages()
        else:
            allowed = cls.from_environment(base)
        if not packages:
            return allowed
        if allowed is None:
            raise JobError(
                f"{PACKAGES_OPTION}: {packages[0]}, but without {OPTION} this worker imports every "
                f"package that a job names; use {OPTION} too, or remove {PACKAGES_OPTION}",
            )
        return allowed.with_packages(packages, PACKAGES_OPTION)

    def with_packages(self, names: Sequence[str], source: str) -> AllowedPaths:
        """Return a copy with these packages. `source` is the option or variable of the names.

        Raises JobError for a name that is no top-level package.
        """
        for name in names:
            if not name.isidentifier():
                raise JobError(
                    f"{source}: {printable_path(name)} is no name of a top-level package; use a "
                    "name such as monai"
                )
        return replace(self, packages=tuple(names))

    def _with_environment_packages(self) -> AllowedPaths:
        names = os.environ.get(PACKAGES_VARIABLE, "").split()
        return self.with_packages(names, PACKAGES_VARIABLE)

    def to_environment(self) -> None:
        """Set both variables for this process and its child processes."""
        os.environ[ALLOW_VARIABLE] = "\n".join(self.prefixes)
        os.environ[PACKAGES_VARIABLE] = "\n".join(self.packages)

    def locate(self, path: str) -> str | None:
        """Return the path at which to open a file, or None if it is not allowed.

        For a local path, both the path with its folder resolved and the target of its symbolic
        links must be below a prefix. The returned path has no symbolic link in its folder, so that
        only users who can write below a prefix can redirect it later.
        """
        if path_problem(path) is not None:
            return None
        if is_url(path):
            return path if any(_is_below(path, prefix) for prefix in self.prefixes) else None
        return None if self._outside(path) else _with_resolved_folder(path)

    def _outside(self, path: str) -> list[str]:
        """Return those of a local path and its target that are not below a prefix."""
        prefixes = [os.path.realpath(prefix) for prefix in self.prefixes if not is_url(prefix)]
        return [
            location
            for location in (_with_resolved_folder(path), os.path.realpath(path))
            if not any(_is_below(location, prefix) for prefix in prefixes)
        ]

    def locate_job(self, job: str) -> str:
        """Return the path at which to open a job folder. Raises JobError if it is not allowed."""
        location = self.locate(job)
        if location is None:
            raise self._not_allowed(job, {"job folder": [job]})
        if self.locate(output_of(location)) is None:
            raise self._not_allowed(job, {"output": [output_of(location)]})
        return location

    def locate_files(self, job: Job, folder: str) -> dict[str, str]:
        """Return the path at which to open each of `job.files`, by key.

        Raises JobError with all files that are not allowed. `folder` is the path of the job
        folder, for the message.
        """
        locations, outside = {}, {}
        for key, path in job.files.items():
            parts = [path, *_parts(path)]
            if rejected := [part for part in parts if self.locate(part) is None]:
                outside[key] = rejected
            else:
                locations[key] = self.locate(path) or path
        if outside:
            raise self._not_allowed(folder, outside)
        return locations

    def check_package(self, job: Job, folder: str) -> None:
        """Raise JobError if the job imports a package that is not allowed.

        `folder` is the path of the job folder, for the message.
        """
        package = job.model.class_package
        if package is None or package in self.packages:
            return
        names = ", ".join(self.packages) or "no package"
        raise JobError(
            f"{printable_path(output_of(folder))}: this worker imports {names} for jobs; found "
            f"model_config.class_name {printable_path(job.model.class_name or '')}; if you trust "
            f"it, use {PACKAGES_OPTION} {package} too, or set {PACKAGES_VARIABLE}",
            code=ErrorCode.PATH_NOT_ALLOWED,
        )

    def _not_allowed(self, job: str, outside: Mapping[str, list[str]]) -> JobError:
        """Return the error for a job with paths outside the prefixes. `outside` is by key."""
        keys = ", ".join(f"{key} {_describe(paths[0])}" for key, paths in outside.items())
        prefixes = ", ".join(map(printable_path, self.prefixes))
        paths = [path for group in outside.values() for path in group if not path_problem(path)]
        folders = sorted({self._folder_to_allow(path) for path in paths})[:MAX_HINTS]
        options = "".join(f" {OPTION} {printable_path(folder)}" for folder in folders)
        hint = f"if you trust it, use{options} too, or set {ALLOW_VARIABLE}"
        return JobError(
            f"{printable_path(output_of(job))}: this worker only runs jobs and code from "
            f"below {prefixes}; found outside: {keys}; "
            f"{hint if folders else 'produce the job again'}",
            code=ErrorCode.PATH_NOT_ALLOWED,
        )

    def _folder_to_allow(self, path: str) -> str:
        """Return the folder that must be allowed for a path in canonical form."""
        return os.path.dirname(path if is_url(path) else next(iter(self._outside(path)), path))


def allowed_job_path(job: str) -> str:
    """Return the path at which a worker opens the job folder of a task.

    Raises JobError unless `job` is in canonical form and allowed.
    """
    check_job_path(job)
    allowed = AllowedPaths.from_environment()
    return job if allowed is None else allowed.locate_job(job)


def with_allowed_files(job: Job, folder: str) -> Job:
    """Return the job with each file's path replaced by the path at which to open it.

    `folder` is the path of the job folder. Raises JobError if a file, or a package that the job
    imports, is not allowed.
    """
    allowed = AllowedPaths.from_environment()
    if allowed is None:
        return job
    allowed.check_package(job, folder)
    return job.with_files(allowed.locate_files(job, folder))


def is_restricted() -> bool:
    """Return whether this worker accepts only some paths."""
    return AllowedPaths.from_environment() is not None


def _with_resolved_folder(path: str) -> str:
    """Resolve the symbolic links in the folder of a local path, but not the path itself."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _is_below(path: str, prefix: str) -> bool:
    """Return whether a path is the prefix or is below it. Compares whole path components."""
    return f"{path}/".startswith(f"{prefix.rstrip('/')}/")


def _parts(path: str) -> Iterator[str]:
    """Yield the files and folders below a folder, or the files of a checkpoint prefix."""
    if is_url(path):
        return
    if os.path.isdir(path):
        for top, folders, names in os.walk(path):
            yield from (os.path.join(top, name) for name in (*folders, *names))
    else:
        yield from (part for _, part in local_parts(path) or ())


def _describe(path: str) -> str:
    """Return a path for a message, with the problem of its form or the target of its links."""
    if problem := path_problem(path):
        return f"{printable_path(path)} (which {problem})"
    target = path if is_url(path) else os.path.realpath(path)
    return (
        printable_path(path)
        if target == path
        else f"{printable_path(path)} -> {printable_path(target)}"
    )
