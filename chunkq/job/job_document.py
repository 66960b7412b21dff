"""Read the mapping in a job file, YAML or JSON, of limited size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from chunkq.errors import ErrorCode, JobError
from chunkq.job.printed_value import printed_value

MAX_FILE_BYTES = 1 << 20
"""Maximum size of a job file. A larger file is something else."""
MAX_VALUES = 100_000
"""Maximum number of values in a job file; each repetition by a YAML alias counts."""


def read_document(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file. Raises JobError in one line."""
    try:
        text = _read_content(path).decode("utf-8-sig")  # editors on Windows write a mark
    except FileNotFoundError:
        raise JobError(
            f"{path}: no such job file; fix the path, or run `chunkq init` to write a job file",
            code=ErrorCode.JOB_FILE_MISSING,
        ) from None
    except UnicodeDecodeError as error:
        problem = f"not text in UTF-8 (byte {error.start}); save a YAML or JSON file as UTF-8"
        raise _unreadable(path, problem) from None
    except (OSError, ValueError) as error:  # ValueError: an invalid path
        reason = getattr(error, "strerror", None) or error
        raise _unreadable(path, f"cannot be read: {reason}; use a YAML or JSON file") from None
    import yaml  # imported here because most commands read no job file

    from chunkq.job import yaml_values

    try:
        values = (
            json.loads(text, object_pairs_hook=yaml_values.unique)
            if path.suffix == ".json"
            else yaml_values.load(text)
        )
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise _unreadable(path, f"not JSON: {error.msg} at {position}; fix the syntax") from None
    except yaml.YAMLError as error:
        raise _unreadable(path, f"not YAML: {_yaml_reason(error)}") from None
    except yaml_values.DuplicateKeyError as error:
        raise _unreadable(path, str(error)) from None
    except RecursionError:
        raise _unreadable(path, "lists or mappings are nested too deeply; remove levels") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML and json raise these for a number of 5000 digits, or `!!timestamp 2001-99-99`.
        reason = " ".join(str(error).split())
        raise _unreadable(path, f"a value cannot be read: {reason}; fix the value") from None
    if not isinstance(values, dict):
        content = "no content" if values is None else printed_value(values)
        advice = "run `chunkq init` to write a job file"
        if isinstance(values, str) and ":" in values:
            advice = "write a space after each colon"
        raise _unreadable(path, f"expected a mapping of keys to values, found {content}; {advice}")
    _check_size(path, values)
    return values


def _yaml_reason(error: Exception) -> str:
    """Return what is wrong with a YAML file, where, and what to do."""
    problem = getattr(error, "problem", None)
    mark = getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return f"{' '.join(str(error).split())}; fix the syntax"
    position = f"line {mark.line + 1}, column {mark.column + 1}"
    if r"'\t'" in problem:
        return f"tab at {position}; use spaces"
    context, begin = getattr(error, "context", None), getattr(error, "context_mark", None)
    if "expected ':'" in problem and begin is not None:
        return f"line {begin.line + 1} has no colon with a space behind its key; add it"
    start = "" if begin is None or begin.line == mark.line else f" of line {begin.line + 1}"
    advice = next((a for text, a in _YAML_ADVICE.items() if text in problem), "fix the syntax")
    return f"{f'{context}{start}: ' if context else ''}{problem} at {position}; {advice}"


_YAML_ADVICE = {
    "cannot start any token": "put the value in quotes",
    "undefined alias": "put a value with * in quotes",
    "alphabetic or numeric": "put a value with * in quotes",
    "unknown escape": "use single quotes, in which a backslash is a character",
    "mapping values are not allowed": "fix the indentation, or put a value with a colon in quotes",
}
"""Part of a message of PyYAML -> what to do."""


def _unreadable(path: Path, problem: str) -> JobError:
    return JobError(f"{path}: {problem}", code=ErrorCode.JOB_FILE_UNREADABLE)


def _read_content(path: Path) -> bytes:
    """Return the content of a job file. Raises OSError if it is too large or not a file."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # reading a device may never end
            raise OSError("not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return content


def _check_size(path: Path, values: Any) -> None:
    """Raise JobError if there are more than `MAX_VALUES` values.

    YAML aliases can expand a few lines into 10^11 values, or into a list that contains itself.
    """
    count, pending = 0, [values]
    while pending:
        value = pending.pop()
        count += 1
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            pending.extend(value)
        if count + len(pending) > MAX_VALUES:
            raise _unreadable(
                path,
                f"contains more than {MAX_VALUES} values, or an alias that contains itself; "
                "remove values or aliases",
            )
