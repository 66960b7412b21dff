"""One tree of errors; every leaf says whose move it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any


class ChunkqError(Exception):
    """Anything chunkq reports in one line; `exit_code` is what the command ends with."""

    exit_code = 1


class JobError(ChunkqError):
    """The job cannot be done as written; nothing was started.

    `problems` holds one line per mistake: where, what, and what to do.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class MissingJobError(ChunkqError):
    """There is no job folder where one is looked for."""

    exit_code = 2


class StoreError(ChunkqError):
    """A path cannot be read or written as asked, found before work starts."""

    exit_code = 2


class QueueError(ChunkqError):
    """The queue cannot be reached or used."""


class ModelError(ChunkqError):
    """The network cannot be loaded or breaks its declaration: every chunk would fail alike."""


class FrameworkConflictError(ChunkqError):
    """The job needs another deep-learning framework than this worker process uses."""


class SameFailureError(ChunkqError):
    """One chunk after another failed with the same cause; the worker leaves the job alone."""


class OverrunError(ChunkqError):
    """Tasks hang; only the end of the process frees what they hold. `leases` lists them."""

    def __init__(self, message: str, leases: Sequence[Any]) -> None:
        super().__init__(message)
        self.leases = tuple(leases)


class PredictionError(ChunkqError):
    """One chunk's predictions cannot be used, for example because they are not finite."""


class ChunkReadError(ChunkqError):
    """The input of one chunk cannot be read."""


class PieceError(ChunkqError):
    """A piece that a block needs is gone or damaged."""


class IncompleteError(ChunkqError):
    """The job is not finished; `missing` lists the chunks that stand out."""

    exit_code = 3

    def __init__(self, message: str, missing: Sequence[tuple[int, ...]]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


def cause(error: str, message: str) -> tuple[str, str]:
    """Return what an error of this class has in common with others of the same cause.

    Coordinates differ from chunk to chunk; the cause is what stands around the numbers.
    """
    return error, re.sub(r"\d+", "#", message)


def nearest(word: str, legal: Sequence[str]) -> str:
    """Return a hint `; did you mean 'x'?` for the legal name most like `word`, or ''."""
    longer = [name for name in legal if len(word) > 2 and name.startswith(word)]
    close = longer or get_close_matches(word, legal, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
