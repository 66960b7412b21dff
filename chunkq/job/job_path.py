"""Canonical paths of outputs and job folders. Every job has exactly one path, and so one key."""

from __future__ import annotations

import re
from pathlib import Path

from chunkq.errors import ErrorCode, JobError
from chunkq.paths import LOCAL_SCHEMES, absolute, is_url, without_secret

PRECOMPUTED = "precomputed"
"""Scheme before the path of an output that is a Neuroglancer precomputed volume."""
SUFFIX = ".chunkq"
"""Suffix of a job folder: the job folder of `OUTPUT` is `OUTPUT.chunkq`."""
MAX_PATH_LENGTH = 4096
MAX_PRINTED_LENGTH = 300
HOST_SCHEMES = frozenset({"http", "https"})
"""Schemes whose host names are case-insensitive."""
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
ENCODED = re.compile(r"%(?:25)*(?:2e|2f|5c|00)", re.IGNORECASE)
"""Percent-encoded dots, slashes, backslashes and NUL, which a server may decode."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def canonical(path: str, base: Path) -> str:
    """Return the canonical form of a path. The result is invalid if `path_problem` is not None.

    Make a local path absolute against `base` (see `absolute`). Of a URL, convert the scheme (and
    the host of `https://`) to lower case and remove repeated slashes, `.`, `..` and trailing
    slashes. `precomputed://` stays before the path of a volume.
    """
    if path.lower().startswith(f"{PRECOMPUTED}://"):
        inner = path[len(PRECOMPUTED) + 3 :]
        return f"{PRECOMPUTED}://{canonical(inner, base) if inner else ''}"
    path = absolute(path, base)
    scheme, separator, rest = path.partition("://")
    if not separator or "::" in path:
        return path
    if scheme == "memory":  # no host: `memory://a` and `memory:///a` are the same path
        return f"memory://{'/'.join(_resolve_dots(rest))}"
    host, _, inner = rest.partition("/")
    if scheme in HOST_SCHEMES:
        user, at, name = host.rpartition("@")
        host = f"{user}{at}{name.lower()}"
    return f"{scheme}://{'/'.join([host, *_resolve_dots(inner)])}"


def job_folder_of(output: str) -> str:
    """Return the job folder of an output path. The path of a job folder stays unchanged."""
    output = without_format(output).rstrip("/")
    return output if output.endswith(SUFFIX) else output + SUFFIX


def without_format(output: str) -> str:
    """Return the path of an output without `precomputed://` before it."""
    return output.removeprefix(f"{PRECOMPUTED}://")


def _resolve_dots(path: str) -> list[str]:
    """Return the parts of a path without `.` and `..`. A `..` that leaves the path stays."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return parts


def path_problem(path: str) -> str | None:
    """Return why a path is not in canonical form, or None if it is.

    The text continues a sentence that begins with the path: "is not absolute; use …".
    """
    if len(path) > MAX_PATH_LENGTH:
        return f"has {len(path)} characters; use at most {MAX_PATH_LENGTH}"
    if CONTROL.search(path):
        return "contains a control character; use printable characters"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode; use a path in UTF-8"
    if is_url(path):
        return _url_problem(path) or _difference_from_canonical(path)
    if not path.startswith("/"):
        return "is not absolute; use an absolute path or a URL"
    return _difference_from_canonical(path)


def _url_problem(url: str) -> str | None:
    scheme, _, rest = url.partition("://")
    has_dots = ".." in rest.split("/")
    checks = (
        ("::" in url, "chains file systems; use a plain URL"),
        (not SCHEME.fullmatch(scheme), "has an invalid scheme; use a URL such as s3://bucket/key"),
        ("\\" in rest, "contains a backslash; use slashes"),
        ("?" in rest or "#" in rest, "has a query or a fragment; use a URL without `?` and `#`"),
        (ENCODED.search(rest), "contains an encoded dot, slash or NUL; use plain characters"),
        (
            has_dots and canonical(url, Path("/")) == url,
            "leaves its bucket or host; remove the leading `..`",
        ),
        (
            not rest.partition("/")[0],
            "has no bucket or host; use a URL such as s3://bucket/key",
        ),
    )
    if scheme.lower() in LOCAL_SCHEMES:
        return None  # a local path in another form
    return next((text for is_wrong, text in checks if is_wrong), None)


def _difference_from_canonical(path: str) -> str | None:
    form = canonical(path, Path("/"))
    return None if form == path else f"is not in canonical form; use {without_secret(form)}"


def output_problem(path: str) -> str | None:
    """Return why a path cannot be that of an output, like `path_problem`."""
    return path_problem(path) or _root_problem(path)


def _root_problem(path: str) -> str | None:
    scheme, _, rest = path.partition("://")
    if not is_url(path) or scheme == "memory" or "/" in rest.strip("/"):
        return None
    return (
        "is a whole bucket or host, which has no place for the job folder beside it; use a path in "
        f"it, such as {without_secret(path.rstrip('/'))}/out.zarr"
    )


def output_path(output: str, base: Path) -> str:
    """Return the canonical path of an output, without `precomputed://` before it.

    Raises JobError if it has none.
    """
    path = without_format(canonical(output, base))
    if problem := output_problem(path):
        raise JobError(f"output: {printable_path(path)} {problem}", code=ErrorCode.PATH_INVALID)
    return path


def output_of(job: str) -> str:
    """Return the output path of a job folder's path."""
    return job.removesuffix(SUFFIX)


def check_job_path(job: str) -> None:
    """Raise JobError unless `job` is the canonical path of a job folder."""
    problem = path_problem(job) or _root_problem(job)
    if problem is None and (not job.endswith(SUFFIX) or output_of(job).endswith(("/", "://"))):
        problem = f"is not the path of a job folder; expected OUTPUT{SUFFIX}"
    if problem is not None:
        raise JobError(f"job: {printable_path(job)} {problem}", code=ErrorCode.PATH_INVALID)


def printable_path(path: str) -> str:
    """Return a path for a message: passwords masked, control characters escaped, shortened."""
    text = CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", without_secret(path))
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_PRINTED_LENGTH else f"{text[:MAX_PRINTED_LENGTH]}…"
