"""Paths and URLs: local files and fsspec URLs side by side."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from chunkq.errors import StoreError

SERVERS = frozenset({"redis", "rediss", "unix"})
"""Schemes of queues, in whose URLs `@` only ever ends a password."""

LOCAL_SCHEMES = frozenset({"file", "local"})
"""Schemes of URLs that name local paths."""
MAX_FILES = 10_000
"""Files of a folder that can still be a network."""


def is_url(path: str) -> bool:
    """Tell a URL such as `s3://bucket/key` from a local path."""
    return "://" in path


def absolute(path: str, base: Path) -> str:
    """Return a local path made absolute against `base`, without `..`; a URL as it is.

    `file://` and `local://` in upper or lower case name local paths. A URL's scheme is returned
    in lower case, its trailing slashes are removed.
    """
    scheme, separator, rest = path.partition("://")
    if scheme.lower() in LOCAL_SCHEMES:
        path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    elif separator:
        scheme = scheme.lower() if scheme.isalnum() else scheme
        return f"{scheme}://{rest.rstrip('/')}"
    return str(Path(*_resolved_parts((base / os.path.expanduser(path)).absolute())))


def _resolved_parts(path: Path) -> list[str]:
    parts: list[str] = []
    for part in ("/", *path.parts[1:]):  # POSIX lets `//` at the start mean something else
        if part == ".." and len(parts) > 1:
            parts.pop()
        elif part != "..":
            parts.append(part)
    return parts


def join(base: str, *parts: str) -> str:
    """Join with single slashes."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def open_filesystem(path: str) -> tuple[Any, str]:
    """Return the fsspec file system for a path and the path inside it.

    Raises StoreError where no file system is known, naming the extra to install.
    """
    import fsspec

    if not is_url(path):
        return fsspec.filesystem("file"), path
    scheme = path.partition("://")[0]
    try:
        # A listing kept from before would hide what other machines wrote since.
        filesystem, inner = fsspec.core.url_to_fs(path, use_listings_cache=False)
    except ImportError:
        extra = "chunkq[s3]" if scheme == "s3" else f"the fsspec package for {scheme}://"
        raise StoreError(f"{without_secret(path)}: needs a package; pip install {extra}") from None
    except Exception as error:  # each file system raises errors of its own kind
        reason = str(error) or type(error).__name__
        raise StoreError(f"{without_secret(path)}: {reason}") from None
    return filesystem, inner


def read_bytes(path: str) -> bytes:
    """Return a whole file's content. Raises OSError as the file system does."""
    if not is_url(path):
        return Path(path).read_bytes()
    filesystem, inner = open_filesystem(path)
    content: bytes = filesystem.cat_file(inner)
    return content


def file_hash(path: str) -> str:
    """Return a SHA-256 of what a path names, as hexadecimal digits: of a file, its content.

    Of a directory, the names and contents of all files below it. Of the start that the names of a
    TensorFlow checkpoint's files share, the same of those files. Raises OSError.
    """
    if is_url(path):
        return _url_hash(path)
    parts = local_parts(path)
    if parts is None:
        return _content_hash(path)
    return _joint_hash((name, _content_hash(part)) for name, part in parts)


def local_parts(path: str) -> list[tuple[str, str]] | None:
    """Return the files a local path stands for, as (relative name, path); None for a file."""
    if os.path.isdir(path):
        every = (os.path.join(top, name) for top, _, names in os.walk(path) for name in names)
        found = list(islice(every, MAX_FILES + 1))
        if len(found) > MAX_FILES:
            raise OSError(errno.EFBIG, f"a folder of more than {MAX_FILES} files", path)
        return [(os.path.relpath(part, path), part) for part in found]
    if not os.path.exists(path) and os.path.exists(f"{path}.index"):
        found = [f"{path}.index", *glob(f"{escape(path)}.data-*")]
        return [(os.path.basename(part), part) for part in found]
    return None


def _url_hash(path: str) -> str:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError:
        filesystem, inner = open_filesystem(path)
        if not filesystem.isdir(inner):
            raise
    parts = filesystem.find(inner)
    start = len(str(filesystem._strip_protocol(path)).rstrip("/")) + 1
    return _joint_hash(
        (part[start:], hashlib.sha256(filesystem.cat_file(part)).hexdigest()) for part in parts
    )


def _content_hash(path: str) -> str:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a device or a pipe may never end
        raise OSError(errno.EINVAL, "not a regular file", path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joint_hash(parts: Iterable[tuple[str, str]]) -> str:
    """Return one hash of files, given as name and hash, whatever order they come in."""
    lines = (f"{name}\0{digest}\n" for name, digest in sorted(parts))
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def without_secret(url: str) -> str:
    """Return a URL fit for logs: the password, if any, as three stars."""
    if not is_url(url):
        return url
    if url.partition("://")[0].lower() in SERVERS:
        # Special characters that were not encoded must not make a part of a password show.
        url = re.sub(r"(?s)^(\w+://)([^:]*):.*@", r"\1\2:***@", url)
        if "@" not in url:  # what should be a port may be a password whose host is missing
            url = re.sub(r"^(\w+://[^:/?#\[]*:)(?!\d*(?:[/?#]|$))[^/?#]*", r"\1***", url)
    url = re.sub(r"([?&](?:\w+_)?password=)[^&]*", r"\1***", url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"{url.partition('://')[0]}://***"  # whatever it is, nobody can read it
    if parts.password is None or parts.password == "***":
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))
