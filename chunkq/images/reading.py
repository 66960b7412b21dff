"""Read the bytes of one image, local or at a URL."""

from __future__ import annotations

import errno
import os
import stat

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.images.image_error import ImageError
from chunkq.paths import is_url, open_filesystem

MAX_BYTES = 1 << 30
"""Largest file that is read as one image."""
OF_PATHS = frozenset(
    {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO,
     errno.ENODEV, errno.EOPNOTSUPP}
)  # fmt: skip
"""Errors of a path that no file has, or that is none of a file. Others are those of a storage."""


def read_image(path: str, access: Access = DEFAULT_ACCESS) -> bytes:
    """Return the content of a file. Raises ImageError if it is missing, unreadable or too large.

    A local path must be a regular file: a device or a pipe could be read forever. Raises OSError
    if the storage fails, such as a server that does not answer, and StoreError if a package is
    missing: no image is the cause.
    """
    if not path:
        raise ImageError("list", "the row has no path; fill it", code=ErrorCode.IMAGE_MISSING)
    try:
        return _remote(path, access) if is_url(path) else _local(path)
    except ImageError:
        raise
    except FileNotFoundError as error:
        if _is_unreachable(error):
            raise
        raise ImageError("read", "missing; fix the path", code=ErrorCode.IMAGE_MISSING) from error
    except StoreError as error:
        if error.code is ErrorCode.PACKAGE_MISSING:
            raise
        raise ImageError("read", str(error), code=error.code) from error
    except PermissionError as error:
        if is_url(path) and "token" in f"{error}".lower():  # credentials that have expired
            raise
        raise ImageError(
            "read",
            "not readable by this user; change its permissions",
            code=ErrorCode.IMAGE_MISSING,
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in a path
        if isinstance(error, OSError) and error.errno not in OF_PATHS:
            raise
        raise ImageError(
            "read", f"not readable: {error}; fix the path", code=ErrorCode.IMAGE_MISSING
        ) from error


def _is_unreachable(error: FileNotFoundError) -> bool:
    """Return whether fsspec reports a web server that did not answer as a missing file."""
    cause = error.__cause__
    is_of_client = type(cause).__module__.startswith("aiohttp")
    return is_of_client and getattr(cause, "status", None) is None


def _local(path: str) -> bytes:
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(
                "read", "not a regular file; fix the path", code=ErrorCode.IMAGE_MISSING
            )
        _check_size(status.st_size)
        return file.read(MAX_BYTES)


def _remote(path: str, access: Access) -> bytes:
    filesystem, inner = open_filesystem(path, access)
    _check_size(filesystem.size(inner) or 0)
    content: bytes = filesystem.cat_file(inner)
    return content


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(
            "read",
            f"{size} bytes are more than the {MAX_BYTES} of one image; use a volume job",
            code=ErrorCode.IMAGE_TOO_LARGE,
        )
