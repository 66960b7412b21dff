"""Names of classes from a file with one name per line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkq.errors import JobError
from chunkq.paths import absolute, is_url, read_bytes, without_secret

KEY = "classes"
MAX_BYTES = 16 << 20
"""Maximum size of a file of names. A larger file is something else."""


def with_class_names(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return the keys of a job with the names of classes in place of files that contain them.

    Relative paths are relative to `base`. Values of a wrong type, and paths that cannot be read,
    stay unchanged. Raises JobError for a file without names.
    """
    result = dict(values)
    if isinstance(path := values.get(KEY), str):
        result[KEY] = _names(path, base, KEY)
    outputs = values.get("outputs")
    if isinstance(outputs, Mapping):
        result["outputs"] = {
            name: _with_names(one, base, f"outputs.{name}.{KEY}") for name, one in outputs.items()
        }
    return result


def _with_names(output: object, base: Path, key: str) -> object:
    if isinstance(output, Mapping) and isinstance(path := output.get(KEY), str):
        return {**output, KEY: _names(path, base, key)}
    return output


def _names(path: str, base: Path, key: str) -> list[str] | str:
    """Return the lines of a file that are not blank, or its path if it cannot be read."""
    location = absolute(path, base)
    try:
        if is_url(location):
            content = read_bytes(location)
        else:
            with open(location, "rb") as file:
                content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError):  # ValueError: an invalid path
        return path
    printed = without_secret(location)
    if len(content) > MAX_BYTES:
        raise JobError(f"{key}: {printed} is larger than {MAX_BYTES >> 20} MiB; fix the path")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise JobError(f"{key}: {printed} is not text in UTF-8; save it as UTF-8") from None
    return [name for line in lines if (name := line.strip())]
