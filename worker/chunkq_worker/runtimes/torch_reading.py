"""Read the files of torch networks: contents, formats, and the cause in a message of torch."""

from __future__ import annotations

import re
from types import MappingProxyType

from chunkq.errors import ModelError
from chunkq.paths import read_bytes
from chunkq_worker.runtimes.formats import format_of
from chunkq_worker.runtimes.stand_ins import describe

SAVE_ADVICE = MappingProxyType(
    {
        "torchscript": "create one with torch.jit.script or torch.jit.trace",
        "exported": "create one with torch.export.export and torch.export.save",
    }
)
INTERPRETER = "TorchScript interpreter"
CAUSE = re.compile(r"[\w.]*(?:Error|Exception): ")
"""Start of the line after the traceback."""
HERE = "<--- HERE"
"""End of the line below the code at which TorchScript failed."""


def content_of(path: str, key: str) -> bytes:
    """Return the content of a file or URL, or raise ModelError. `key` is in `model_config`."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise ModelError(f"model_config.{key}: {path} cannot be read: {error}") from error


def check_format(expected: str, content: bytes, key: str, problem: str) -> None:
    """Raise ModelError if the content has another format than `expected`.

    An unknown format is accepted as `torch_save` unless the content is empty.
    """
    if format_of(content) == expected:
        return
    if (description := describe(content)) is not None:
        raise ModelError(f"{key} is {description}")
    if not content:
        raise ModelError(f"{key} is {problem}: the file is empty; copy or save it again")
    if expected != "torch_save":  # old releases wrote other formats
        raise ModelError(f"{key} is {problem}; {SAVE_ADVICE[expected]}")


def reason(error: BaseException) -> str:
    """Return the line of a message that names the cause, without a traceback of TorchScript."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()] or [""]
    if not is_torchscript_error(error):
        return lines[0].strip()[:300]
    failed = max((n for n, line in enumerate(lines) if line.endswith(HERE)), default=0)
    causes = [line for line in lines[failed:] if CAUSE.match(line)] or lines[-1:]
    return causes[0].strip()[:300]


def is_torchscript_error(error: BaseException) -> bool:
    """Return whether the interpreter of TorchScript raised an error."""
    return INTERPRETER in str(error).partition("\n")[0]
