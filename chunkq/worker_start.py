"""Lines that a run sends to workers that start before its job exists.

The run starts `chunkq work` at once, so that the workers load their libraries and the network while
the job is read and checked. It writes these lines to the standard input of that process. The first
one has the arguments of the command. The others are passed on to each worker process. The first
worker process checks the network and writes a `CheckReport` to a pipe of its own, because a user's
network may print.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum, auto

EARLY_WORK = "chunkq_worker.early_work"
"""The module that a run starts before it has read the job file."""


class Step(StrEnum):
    """What a worker process does when it reads a line."""

    IMPORT = auto()
    """Import the libraries of a runtime; the argument is its name."""
    CHECK = auto()
    """Load the network and run a batch; the argument is the job record, as JSON."""
    WORK = auto()
    """Connect to the queue and run tasks. The lines end. The argument is the time (s, monotonic)
    until which signals to the processes were those of the run, which has acted on them."""


def encode_line(step: Step, argument: str = "") -> bytes:
    """Return a line with a step."""
    return json.dumps([step, argument]).encode() + b"\n"


def work_line() -> bytes:
    """Return the line with which the work begins."""
    return encode_line(Step.WORK, str(time.monotonic()))


def decode_line(line: bytes) -> tuple[Step, str]:
    """Return the step of a line, and its argument."""
    step, argument = json.loads(line)
    return Step(step), argument


def encode_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> bytes:
    """Return the line with the arguments of `chunkq work`, and variables of its environment."""
    return json.dumps([list(arguments), dict(environment)]).encode() + b"\n"


def decode_arguments(line: bytes) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the variables of a line."""
    arguments, environment = json.loads(line)
    return arguments, environment
