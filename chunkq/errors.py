"""One tree of errors; every leaf says whose move it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from enum import StrEnum, auto
from typing import Any

LONGEST_LINE = 1000
"""Characters of one line of a message."""


class ErrorCode(StrEnum):
    """Stable identifiers of errors. Texts may change; a code keeps its meaning once released."""

    FAILED = auto()
    """An error without a code of its own."""
    JOB_INVALID = auto()
    """The job file cannot be run as written."""
    JOB_RECORD_DAMAGED = auto()
    """`job.json` does not match its checksum or digest."""
    JOB_RECORD_UNSUPPORTED = auto()
    """`job.json` was written by a version of chunkq with another layout."""
    JOB_REPLACED = auto()
    """Another job was created on the same output path meanwhile."""
    JOB_MISSING = auto()
    """No job folder exists at the path."""
    OUTPUT_OF_OTHER_JOB = auto()
    """The output path belongs to a different job."""
    OUTPUT_CHANGED = auto()
    """The metadata of the output array are missing or not those that the job created."""
    PATH_INVALID = auto()
    """A path has no canonical form, or is not written in it."""
    PATH_NOT_ALLOWED = auto()
    """A worker with `--allow` does not accept the job or a file that the job names."""
    STORAGE_FAILED = auto()
    """A disk, a bucket or its client reported an error."""
    STORE_UNUSABLE = auto()
    """A path cannot be read or written as the job requires."""
    CODEC_UNSAFE = auto()
    """An array is stored with a codec that can run code."""
    QUEUE_UNAVAILABLE = auto()
    """The queue cannot be reached or refuses the request."""
    QUEUE_UNSUPPORTED = auto()
    """The server or the file is of a kind, or of a version, that cannot hold this queue."""
    QUEUE_READ_ONLY = auto()
    """The queue can be read but not written."""
    QUEUE_FULL = auto()
    """The queue has no memory or disk space left."""
    QUEUE_BUSY = auto()
    """The queue is loading its data, or other processes have locked it for too long."""
    QUEUE_DENIED = auto()
    """The queue refuses this user or password, or another user could control the queue."""
    QUEUE_DAMAGED = auto()
    """The file of the queue is damaged or is no queue."""
    QUEUE_ADDRESS_INVALID = auto()
    """The URL of the queue has an unknown scheme, or an invalid part."""
    QUEUE_LOST = auto()
    """The cluster that held the queue was restarted; the tasks must be queued again."""
    QUEUE_VERSION_MISMATCH = auto()
    """The cluster of the queue and this process run different versions of a package."""
    QUEUE_NO_WORKERS = auto()
    """The cluster of the queue has no free workers, or no GPU, for the job."""
    DEPENDENCY_MISSING = auto()
    """A package or program that the command needs is not installed."""
    MODEL_UNUSABLE = auto()
    """The network cannot be loaded, or does not match its declaration."""
    MODEL_UNTRUSTED = auto()
    """The model file can run code or reach other files, and the job does not trust it."""
    FRAMEWORK_CONFLICT = auto()
    """The worker process already uses another deep-learning framework."""
    REPEATED_FAILURE = auto()
    """Consecutive chunks failed with the same cause."""
    TASK_TIMEOUT = auto()
    """A task exceeded its time limit."""
    PREDICTION_INVALID = auto()
    """The predictions of a chunk cannot be used."""
    INPUT_UNREADABLE = auto()
    """The input of a chunk cannot be read."""
    INPUT_MISSING = auto()
    """An input that existed when the job was produced is gone."""
    INPUT_CHANGED = auto()
    """An input was replaced since the job was produced."""
    PIECE_DAMAGED = auto()
    """A piece is missing or damaged."""
    RESULTS_LOST = auto()
    """Pieces or commit records are missing or damaged; their chunks must be computed again."""
    JOB_INCOMPLETE = auto()
    """Some chunks are not computed."""


class ChunkqError(Exception):
    """Base class of the errors that chunkq reports in one line.

    `code` identifies the error for programs, `exit_code` is the exit status of the command.
    """

    exit_code = 1
    code = ErrorCode.FAILED

    def __init__(self, message: str = "", *, code: ErrorCode | None = None) -> None:
        super().__init__(self._as_shown(message))
        if code is not None:
            self.code = code

    @staticmethod
    def _as_shown(message: str) -> str:
        """Return a message as one printable line."""
        return printable(" ".join(message.splitlines()))


class JobError(ChunkqError):
    """The job cannot be done as written; nothing was started.

    `problems` holds one line per mistake: where, what, and what to do.
    """

    exit_code = 2
    code = ErrorCode.JOB_INVALID

    def __init__(self, problems: str | Sequence[str], *, code: ErrorCode | None = None) -> None:
        several = problems.split("\n") if isinstance(problems, str) else problems
        self.problems = tuple(printable(problem) for problem in several)
        super().__init__("\n".join(self.problems), code=code)

    @staticmethod
    def _as_shown(message: str) -> str:
        """Return a message of several lines, all printable already."""
        return message


class MissingJobError(ChunkqError):
    """There is no job folder where one is looked for."""

    exit_code = 2
    code = ErrorCode.JOB_MISSING


class StoreError(ChunkqError):
    """A path cannot be read or written as asked, found before work starts."""

    exit_code = 2
    code = ErrorCode.STORE_UNUSABLE


class QueueError(ChunkqError):
    """The queue cannot be reached or used."""

    code = ErrorCode.QUEUE_UNAVAILABLE


class ModelError(ChunkqError):
    """The network cannot be loaded or breaks its declaration: every chunk would fail alike."""

    code = ErrorCode.MODEL_UNUSABLE


class FrameworkConflictError(ChunkqError):
    """The job needs another deep-learning framework than this worker process uses."""

    code = ErrorCode.FRAMEWORK_CONFLICT


class SameFailureError(ChunkqError):
    """One chunk after another failed with the same cause; the worker leaves the job alone."""

    code = ErrorCode.REPEATED_FAILURE


class TaskTimeoutError(ChunkqError):
    """Tasks hang; only the end of the process frees what they hold. `leases` lists them."""

    code = ErrorCode.TASK_TIMEOUT

    def __init__(self, message: str, leases: Sequence[Any]) -> None:
        super().__init__(message)
        self.leases = tuple(leases)


class PredictionError(ChunkqError):
    """One chunk's predictions cannot be used, for example because they are not finite."""

    code = ErrorCode.PREDICTION_INVALID


class ChunkReadError(ChunkqError):
    """The input of one chunk cannot be read."""

    code = ErrorCode.INPUT_UNREADABLE


class PieceError(ChunkqError):
    """Pieces that a block needs are gone or damaged; `sources` lists the chunks that left them."""

    code = ErrorCode.PIECE_DAMAGED

    def __init__(self, message: str, sources: Sequence[tuple[int, ...]] = ()) -> None:
        super().__init__(message)
        self.sources = tuple(sources)


class IncompleteError(ChunkqError):
    """The job is not finished; `missing` lists the chunks that stand out."""

    exit_code = 3
    code = ErrorCode.JOB_INCOMPLETE

    def __init__(
        self, message: str, missing: Sequence[tuple[int, ...]], *, code: ErrorCode | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.missing = tuple(missing)


def printable(line: str) -> str:
    """Return one line that any terminal can show: the rest escaped, its middle cut out if long.

    Names from files and paths can hold line breaks, control sequences and half characters.
    """
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


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
