"""Command lines of the Python processes that chunkq starts."""

from __future__ import annotations

import sys


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this interpreter.

    The current folder is not on `sys.path`: files of the user beside the job file can be named like
    the modules that the process imports.
    """
    return [sys.executable, "-P", "-m", module, *arguments]
