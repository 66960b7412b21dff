"""The canonical form of an output's path and of its job folder's: one job, one path, one key."""

from __future__ import annotations

import re
from pathlib import Path

from chunkq.errors import ErrorCode, JobError
from chunkq.paths import LOCAL_SCHEMES, absolute, is_url, without_secret

SUFFIX = ".chunkq"
"""What follows an output's path in the path of its job folder."""
MAX_PATH_LENGTH = 4096
MAX_PRINTED_LENGTH = 300
HOST_SCHEMES = frozenset({"http", "https"})
"""Schemes whose hosts are the same in upper and lower case."""
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
ENCODED = re.compile(r"%(?:25)*(?:2e|2f|5c|00)", re.IGNORECASE)
"""A dot, a slash, a backslash or NUL that a server may decode."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def canonical(path: str, base: Path) -> str:
    """Return a path in canonical form, as far as it has one; `path_problem` says what is left.

    A local path is absolute against `base`; see `absolute`. A URL has its scheme (and the host of
    `https://`) in lower case, single slashes, and no `.`, `..` or trailing slash.
    """
    path = absolute(path, base)
    scheme, separator, rest = path.partition("://")
    if not separator or "::" in path:
        return path
    if scheme == "memory":  # has no host: both `memory://a` and `memory:///a` name /a
        return f"memory://{'/'.join(_without_dots(rest))}"
    host, _, inner = rest.partition("/")
    if scheme in HOST_SCHEMES:
        user, at, name = host.rpartition("@")
        host = f"{user}{at}{name.lower()}"
    return f"{scheme}://{'/'.join([host, *_without_dots(inner)])}"


def _without_dots(path: str) -> list[str]:
    """Return the parts of a path; a `..` that leads out of it stays."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return parts


def path_problem(path: str) -> str | None:
    """Return why a path is not in canonical form, in words that follow it; None if it is."""
    if len(path) > MAX_PATH_LENGTH:
        return f"has {len(path)} characters; use at most {MAX_PATH_LENGTH}"
    if CONTROL.search(path):
        return "contains a control character; use printable characters"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode; use a path in UTF-8"
    if is_url(path):
        return _url_problem(path) or _unlike(path)
    if not path.startswith("/"):
        return "is not absolute; use an absolute path or a URL"
    return _unlike(path)


def _url_problem(url: str) -> str | None:
    scheme, _, rest = url.partition("://")
    climbs = ".." in rest.split("/")
    problems = (
        ("::" in url, "chains file systems; use a plain URL"),
        (not SCHEME.fullmatch(scheme), "has an invalid scheme; use a URL such as s3://bucket/key"),
        ("\\" in rest, "contains a backslash; use slashes"),
        ("?" in rest or "#" in rest, "has a query or a fragment; use a URL without `?` and `#`"),
        (ENCODED.search(rest), "contains an encoded dot, slash or NUL; use plain characters"),
        (climbs and canonical(url, Path("/")) == url, "leads out of its bucket or host; omit `..`"),
        (not rest.partition("/")[0], "names no bucket or host"),
    )
    if scheme.lower() in LOCAL_SCHEMES:
        return None  # a local path in another form
    return next((words for wrong, words in problems if wrong), None)


def _unlike(path: str) -> str | None:
    form = canonical(path, Path("/"))
    return None if form == path else f"is not in canonical form; use {without_secret(form)}"


def output_path(output: str, base: Path) -> str:
    """Return an output's path in canonical form. Raises JobError if it has none."""
    path = canonical(output, base)
    if problem := path_problem(path):
        raise JobError(f"output: {printable_path(path)} {problem}", code=ErrorCode.PATH_INVALID)
    return path


def output_of(job: str) -> str:
    """Return the output's path for a job folder's path."""
    return job.removesuffix(SUFFIX)


def check_job_path(job: str) -> None:
    """Raise JobError unless this is a job folder's path in canonical form."""
    problem = path_problem(job)
    if problem is None and (not job.endswith(SUFFIX) or output_of(job).endswith(("/", "://"))):
        problem = f"is not the path of a job folder; expected OUTPUT{SUFFIX}"
    if problem is not None:
        raise JobError(f"job: {printable_path(job)} {problem}", code=ErrorCode.PATH_INVALID)


def printable_path(path: str) -> str:
    """Return a path fit for one line of a message: no password, no control characters, not long."""
    text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", without_secret(path))
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_PRINTED_LENGTH else f"{text[:MAX_PRINTED_LENGTH]}…"
