"""Read the bytes of one image, local or at a URL."""

from __future__ import annotations

import os
import stat

from chunkq.access import DEFAULT_ACCESS, Access
from chunkq.errors import ErrorCode, StoreError
from chunkq.images.image_error import ImageError
from chunkq.paths import is_url, open_filesystem

MAX_BYTES = 1 << 30
"""Largest file that is read as one image."""


def read_image(path: str, access: Access = DEFAULT_ACCESS) -> bytes:
    """Return the content of a file. Raises ImageError if it is missing, unreadable or too large.

    A local path must be a regular file: a device or a pipe could be read forever.
    """
    if not path:
        raise ImageError("list", "the row has no path; fill it", code=ErrorCode.IMAGE_MISSING)
    try:
        return _remote(path, access) if is_url(path) else _local(path)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("read", "missing; fix the path", code=ErrorCode.IMAGE_MISSING) from error
    except StoreError as error:
        raise ImageError("read", str(error), code=error.code) from error
    except PermissionError as error:
        raise ImageError(
            "read",
            "not readable by this user; change its permissions",
            code=ErrorCode.IMAGE_MISSING,
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in a path
        raise ImageError(
            "read", f"not readable: {error}; fix the path", code=ErrorCode.IMAGE_MISSING
        ) from error


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
