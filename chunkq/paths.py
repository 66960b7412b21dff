"""Paths: local files and fsspec URLs behind the same functions."""

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
from urllib.parse import unquote, urlsplit, urlunsplit

from chunkq.access import DEFAULT_ACCESS, S3_SCHEMES, WEB_SCHEMES, Access, s3_filesystem
from chunkq.errors import ErrorCode, StoreError
from chunkq.install_hint import install_command

QUEUE_SCHEMES = frozenset({"redis", "rediss", "unix"})
"""Schemes of queue URLs. In these, `@` always ends the password."""

LOCAL_SCHEMES = frozenset({"file", "local"})
"""Schemes of URLs that are local paths."""
FORMAT_SCHEMES = frozenset({"n5", "precomputed"})
"""Schemes that name the format of the path behind them, as in `n5://s3://bucket/key`."""
MAX_FILES = 10_000
"""Maximum number of files in the folder of a network."""


def is_url(path: str) -> bool:
    """Return whether a path is a URL such as `s3://bucket/key`, not a local path."""
    return "://" in path


def is_web(path: str) -> bool:
    """Return whether a path is a URL of a web server, whose folders cannot be listed reliably."""
    return path.partition("://")[0] in WEB_SCHEMES and is_url(path)


def split_format(path: str) -> tuple[str, str]:
    """Return the format that an input path names, or "", and the path without it."""
    scheme, separator, rest = path.partition("://")
    return (scheme, rest) if separator and scheme in FORMAT_SCHEMES else ("", path)


def absolute(path: str, base: Path) -> str:
    """Return a local path as absolute against `base`, without `..`.

    Convert the scheme of a URL to lower case and remove its trailing slashes. `file://` and
    `local://` in upper or lower case are local paths.
    """
    scheme, separator, rest = path.partition("://")
    if scheme.lower() in LOCAL_SCHEMES:
        path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    elif separator:
        scheme = scheme.lower() if scheme.isalnum() else scheme
        return f"{scheme}://{rest.rstrip('/')}"
    return str(Path(*_resolved_parts((base / os.path.expanduser(path)).absolute())))


def absolute_input(path: str, base: Path) -> str:
    """Return the path of an input as absolute; a scheme of `FORMAT_SCHEMES` stays before it."""
    scheme, separator, rest = path.partition("://")
    if separator and scheme.lower() in FORMAT_SCHEMES:
        return f"{scheme.lower()}://{absolute(rest, base)}"
    return absolute(path, base)


def _resolved_parts(path: Path) -> list[str]:
    parts: list[str] = []
    for part in ("/", *path.parts[1:]):  # pathlib keeps a leading `//`, which POSIX leaves open
        if part == ".." and len(parts) > 1:
            parts.pop()
        elif part != "..":
            parts.append(part)
    return parts


def join(base: str, *parts: str) -> str:
    """Join the parts of a path with single slashes."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def open_filesystem(path: str, access: Access = DEFAULT_ACCESS) -> tuple[Any, str]:
    """Return the fsspec file system of a path and the path inside it.

    Raises StoreError if the scheme is unsupported, its package is missing, or its configuration is
    invalid.
    """
    import fsspec

    if not is_url(path):
        return fsspec.filesystem("file"), path
    scheme = path.partition("://")[0]
    try:
        if scheme in S3_SCHEMES:
            filesystem = s3_filesystem(access)
            return filesystem, filesystem._strip_protocol(path)
        filesystem, inner = fsspec.core.url_to_fs(path, **access.storage_options(scheme))
    except ImportError:
        hint = (
            f"run `{install_command('s3')}`"
            if scheme in S3_SCHEMES
            else "install its fsspec package"
        )
        raise StoreError(
            f"{without_secret(path)}: missing package for {scheme}://; {hint}",
            code=ErrorCode.PACKAGE_MISSING,
        ) from None
    except Exception as error:  # each file system raises different errors
        reason = str(error) or type(error).__name__
        hint = "; fix the AWS configuration" if scheme in S3_SCHEMES else ""
        raise StoreError(f"{without_secret(path)}: {reason}{hint}") from None
    return filesystem, inner


def read_bytes(path: str, access: Access = DEFAULT_ACCESS) -> bytes:
    """Return the content of a file. Raises OSError."""
    if not is_url(path):
        return Path(path).read_bytes()
    filesystem, inner = open_filesystem(path, access)
    content: bytes = filesystem.cat_file(inner)
    return content


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file, a folder or a TensorFlow checkpoint as hexadecimal digits.

    The hash of a file covers its content. The hash of a folder covers the names and contents of
    all files below it; that of a checkpoint prefix covers those of the checkpoint's files.
    Raises OSError.
    """
    if is_url(path):
        return _url_hash(path)
    parts = local_parts(path)
    if parts is None:
        return _content_hash(path)
    return _joint_hash((name, _content_hash(part)) for name, part in parts)


def local_parts(path: str) -> list[tuple[str, str]] | None:
    """Return the files of a folder or of a TensorFlow checkpoint prefix; None for a file.

    Each is (relative name, path). Raises OSError if there are more than `MAX_FILES`.
    """
    if os.path.isdir(path):
        walk = (os.path.join(top, name) for top, _, names in os.walk(path) for name in names)
        files = list(islice(walk, MAX_FILES + 1))
        if len(files) > MAX_FILES:
            raise OSError(errno.EFBIG, f"folder has more than {MAX_FILES} files", path)
        return [(os.path.relpath(file, path), file) for file in files]
    if not os.path.exists(path) and os.path.exists(f"{path}.index"):
        files = [f"{path}.index", *glob(f"{escape(path)}.data-*")]
        return [(os.path.basename(file), file) for file in files]
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
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a device or a pipe may never end
        raise OSError(errno.EINVAL, "not a regular file", path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joint_hash(parts: Iterable[tuple[str, str]]) -> str:
    """Return the hash of (name, hash) pairs. Their order does not affect it."""
    lines = (f"{name}\0{digest}\n" for name, digest in sorted(parts))
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def without_secret(url: str) -> str:
    """Return a URL for messages and logs: passwords are replaced by `***`."""
    if not is_url(url):
        return url
    format_name, inner = split_format(url)
    if format_name:
        return f"{format_name}://{without_secret(inner)}"
    if url.partition("://")[0].lower() in QUEUE_SCHEMES:
        # A password with special characters that are not encoded must not appear in part.
        url = re.sub(r"(?s)^(\w+://)([^:]*):.*@", r"\1\2:***@", url)
        if "@" not in url:  # without a host, the password stands at the position of the port
            url = re.sub(r"^(\w+://[^:/?#\[]*:)(?!\d*(?:[/?#]|$))[^/?#]*", r"\1***", url)
    url = re.sub(r"([?&](?:\w+_)?password=)[^&]*", r"\1***", url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"{url.partition('://')[0]}://***"  # cannot be parsed, so mask all of it
    if parts.password is None or parts.password == "***":
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def mask_secrets(text: str, url: str) -> str:
    """Return a text, such as an error about `url`, without the passwords of the URL."""
    _, url = split_format(url)
    masked = without_secret(url)
    if masked == url:
        return text
    text = text.replace(url, masked)
    authority = re.findall(r"^\w+://[^/]*?:([^/@]+)@", url)
    for password in (*authority, *re.findall(r"[?&](?:\w+_)?password=([^&]+)", url)):
        text = text.replace(unquote(password), "***").replace(password, "***")
    return text
