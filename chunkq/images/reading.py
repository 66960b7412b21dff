"""Read the bytes of one image, local or at a URL."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

from chunkq.access import (
    BUCKET_SCHEMES,
    DEFAULT_ACCESS,
    S3_SCHEMES,
    WEB_SCHEMES,
    Access,
    is_forbidden,
)
from chunkq.errors import ErrorCode, StoreError
from chunkq.images.image_error import ImageError
from chunkq.paths import is_url, is_web, mask_secrets, open_filesystem, without_secret

MAX_BYTES = 1 << 30
"""Largest file that is read as one image."""
PART_BYTES = 1 << 20
KNOWN_SCHEMES = BUCKET_SCHEMES | WEB_SCHEMES
"""Schemes whose missing package is no mistake in the list."""
OF_PATHS = frozenset(
    {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV,
     errno.EOPNOTSUPP}
)  # fmt: skip
"""Errors of a path that no file has, or that is none of a file. Others are those of a storage."""

INVALID_NAME = "ParamValidationError"
"""Name of the error of botocore for a bucket or a key that cannot exist."""


def read_image(path: str, access: Access = DEFAULT_ACCESS) -> bytes:
    """Return the content of a file.

    Raises ImageError if the path names no file, or one that is unreadable or too large: the
    messages are the same on each machine. Raises StoreError if the storage fails, such as a server
    that does not answer or a disk with errors, which says nothing about the image.

    A local path must be a regular file: a device or a pipe could be read forever.
    """
    if not path:
        raise ImageError("list", "the row has no path; fill it", code=ErrorCode.IMAGE_MISSING)
    with storage_errors(path):
        return _remote(path, access) if is_url(path) else _local(path)


@contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Raise ImageError or StoreError, as `read_image`, for an error of a storage in the context."""
    try:
        yield
    except (ImageError, StoreError, MemoryError):
        raise
    except FileNotFoundError as error:
        if _is_unreachable(error):
            raise failed(path, error) from error
        raise missing("missing") from error
    except ValueError as error:  # a null character, or a URL without an object
        raise missing("no path of a file") from error
    except OSError as error:
        is_local = not is_url(path)
        if error.errno in OF_PATHS or (is_local and error.errno == errno.EINVAL):
            raise missing(f"not readable: {os.strerror(error.errno or 0)}") from error
        # Credentials that have expired are no property of an image.
        is_denied = isinstance(error, PermissionError) if is_local else is_forbidden(error)
        if is_denied:
            raise ImageError(
                "read",
                "not readable by this user; change its permissions",
                code=ErrorCode.IMAGE_MISSING,
            ) from error
        raise failed(path, error) from error
    except Exception as error:  # each file system raises different errors
        if type(error).__name__ == INVALID_NAME:
            raise missing("no path of a file") from error
        raise failed(path, error) from error


def missing(reason: str) -> ImageError:
    """Return the error of a path that names no file that can be read."""
    return ImageError("read", f"{reason}; fix the path", code=ErrorCode.IMAGE_MISSING)


def failed(path: str, error: Exception) -> StoreError:
    """Return the error of a storage that fails."""
    reason = " ".join(mask_secrets(f"{error}", path).split()) or type(error).__name__
    return StoreError(
        f"{without_secret(path)}: cannot be read: {reason}; fix the storage, and try again"
    )


def _is_unreachable(error: FileNotFoundError) -> bool:
    """Return whether fsspec reports a web server that did not answer as a missing file."""
    cause = error.__cause__
    is_of_client = type(cause).__module__.startswith("aiohttp")
    return is_of_client and getattr(cause, "status", None) is None


def _local(path: str) -> bytes:
    with open_local(path) as file:
        _check_size(os.fstat(file.fileno()).st_size)
        return file.read(MAX_BYTES)


def open_local(path: str) -> BinaryIO:
    """Open a regular file. Raises OSError, ValueError, and ImageError for another kind of file."""
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise missing("not a regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def listed_filesystem(path: str, access: Access) -> tuple[Any, str]:
    """Return the fsspec file system of a URL in a list, and the path inside it.

    Raises ImageError for a URL that a list cannot have, and the errors of `open_filesystem`.
    """
    scheme = path.partition("://")[0]
    if "::" in path and scheme not in S3_SCHEMES:  # fsspec takes it for a chain
        raise _refused("chained URLs are unsupported")
    try:
        return open_filesystem(path, access)
    except StoreError as error:
        if scheme not in KNOWN_SCHEMES and not _is_supported(scheme):
            raise _refused(f"the scheme {scheme} is unsupported") from error
        raise


def _remote(path: str, access: Access) -> bytes:
    filesystem, inner = listed_filesystem(path, access)
    if path.partition("://")[0] in BUCKET_SCHEMES:
        return _object(filesystem, inner)
    size = filesystem.size(inner) or 0
    _check_size(size)
    if is_web(path):
        with filesystem.open(inner, "rb", block_size=0, size=size or 1) as stream:
            return _limited(stream)
    content: bytes = filesystem.cat_file(inner)
    return content


def _limited(stream: IO[bytes]) -> bytes:
    """Return the content of a stream, which can be longer than the server says, or endless."""
    parts, size = list[bytes](), 0
    while part := stream.read(PART_BYTES):
        parts.append(part)
        size += len(part)
        _check_size(size)
    return b"".join(parts)


def _is_supported(scheme: str) -> bool:
    """Return whether fsspec has a file system for a scheme, whose package is installed."""
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        return False
    return True


def _object(filesystem: Any, inner: str) -> bytes:
    """Return an object of a bucket by one request; asking for the size is another one."""
    try:
        content: bytes = filesystem.cat_file(inner, start=0, end=MAX_BYTES + 1)
    except OSError as error:
        if error.errno != errno.EINVAL or filesystem.size(inner) != 0:
            raise
        return b""  # no part of an empty object can be asked for
    _check_size(len(content))
    return content


def _refused(reason: str) -> ImageError:
    return ImageError("read", f"{reason}; fix the path", code=ErrorCode.STORE_UNUSABLE)


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(
            "read",
            f"more than the {MAX_BYTES} bytes of one image; use a volume job",
            code=ErrorCode.IMAGE_TOO_LARGE,
        )
