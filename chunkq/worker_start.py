"""Lines that a run sends to workers that start before its job exists.

The run starts `chunkq work` at once, so that the workers load their libraries and the network while
the job is checked. It writes these lines to the standard input of that process, which passes them
on to each worker process. The first worker process checks the network and writes a `CheckReport` to
a pipe of its own, because a user's network may print.
"""

from __future__ import annotations

import json
from enum import StrEnum, auto


class Step(StrEnum):
    """What a worker process does when it reads a line."""

    IMPORT = auto()
    """Import the libraries of a runtime; the argument is its name."""
    CHECK = auto()
    """Load the network and run a batch; the argument is the job record, as JSON."""
    WORK = auto()
    """Connect to the queue and run tasks. The lines end."""


def encode_line(step: Step, argument: str = "") -> bytes:
    """Return a line with a step."""
    return json.dumps([step, argument]).encode() + b"\n"


def decode_line(line: bytes) -> tuple[Step, str]:
    """Return the step of a line, and its argument."""
    step, argument = json.loads(line)
    return Step(step), argument
