"""Conditional writes of fsspec: which file systems have them, and what their errors mean."""

from __future__ import annotations

import inspect
from typing import Any

SCHEMES = frozenset({"s3", "s3a", "gs", "gcs", "memory"})
"""Schemes whose file systems can create an object only if it does not exist."""


def are_supported(scheme: str, filesystem: Any) -> bool:
    """Return whether the installed release of a file system supports conditional writes."""
    write = getattr(filesystem, "_pipe_file", filesystem.pipe_file)
    return scheme in SCHEMES and "mode" in inspect.signature(write).parameters


def is_precondition_failed(error: BaseException) -> bool:
    """Return whether a conditional write failed because the object exists.

    s3fs raises a plain OSError in this case.
    """
    codes = _response_codes(error)
    return bool(codes & {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})


def is_not_implemented(error: BaseException) -> bool:
    """Return whether an S3 server does not support conditional writes."""
    return bool(_response_codes(error) & {"NotImplemented", "501"})


def _response_codes(error: BaseException | None) -> set[str]:
    """Return the S3 error codes and HTTP statuses of an error and its causes."""
    codes: set[str] = set()
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code")))
            codes.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode")))
        error = error.__cause__ or error.__context__
    return codes
