"""Exceptions that chunkq raises, and their stable codes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from enum import StrEnum, auto
from itertools import pairwise
from typing import Any, Self

MAX_LINE_LENGTH = 1000
"""Characters of one line of a message; `printable` shortens longer lines."""
RESUME = "run `chunkq produce --resume`"
"""What queues the remaining chunks again, in messages. A run says how to repeat it instead."""


class ErrorCode(StrEnum):
    """Stable identifiers of errors. Messages may change, codes keep their meaning."""

    FAILED = auto()
    """An error without a more specific code."""
    INTERRUPTED = auto()
    """The user interrupted the command."""
    LIMIT_TOO_SMALL = auto()
    """The job needs more time or memory than a limit allows."""
    JOB_INVALID = auto()
    """The job file cannot be run as written."""
    JOB_FILE_MISSING = auto()
    """The job file does not exist."""
    JOB_FILE_UNREADABLE = auto()
    """The job file is not a readable YAML or JSON mapping."""
    JOB_FILE_CHANGED = auto()
    """The job file was edited after the command read it."""
    JOB_FILE_UNEDITABLE = auto()
    """The text of the job file cannot be edited so that only the intended keys change."""
    JOB_RECORD_DAMAGED = auto()
    """`job.json` does not match its checksum or digest."""
    JOB_RECORD_UNSUPPORTED = auto()
    """`job.json` was written by a version of chunkq with another layout."""
    JOB_STARTED = auto()
    """The job was produced and is not finished, so its settings cannot change."""
    JOB_REPLACED = auto()
    """Another job was created on the same output path in the meantime."""
    JOB_MISSING = auto()
    """No job folder exists at the path."""
    OUTPUT_OF_OTHER_JOB = auto()
    """The output path belongs to a different job."""
    OUTPUT_EXISTS = auto()
    """The path to write exists and was not created by this job."""
    OUTPUT_IN_USE = auto()
    """Workers are computing the job on the output path."""
    OUTPUT_CHANGED = auto()
    """The metadata of the output array are missing or differ from those that the job created."""
    PATH_INVALID = auto()
    """A path is not in canonical form, or has none."""
    PATH_NOT_ALLOWED = auto()
    """A worker with `--allow` does not accept the job or a file that the job names."""
    STORAGE_FAILED = auto()
    """A disk, a bucket or its client reported an error."""
    STORE_UNUSABLE = auto()
    """A path cannot be read or written as the job requires."""
    STORE_MISSING = auto()
    """A path does not exist."""
    STORE_UNSUPPORTED = auto()
    """A path is not an array in a supported format, or names an output of another format."""
    AXES_AMBIGUOUS = auto()
    """The axes of an input can have several meanings; the job must name them."""
    PACKAGE_MISSING = auto()
    """A Python package that the job, the queue or the command needs is not installed."""
    CODEC_UNSAFE = auto()
    """An array is stored with a codec that can run code."""
    QUEUE_UNAVAILABLE = auto()
    """The queue cannot be reached or refuses the request."""
    QUEUE_UNSUPPORTED = auto()
    """The server or the file has an unsupported type or version."""
    QUEUE_READ_ONLY = auto()
    """The queue can be read but not written."""
    QUEUE_FULL = auto()
    """The queue has no memory or disk space left."""
    QUEUE_BUSY = auto()
    """The queue is loading its data, or other processes have locked it for too long."""
    QUEUE_DENIED = auto()
    """The queue refuses this user or password, or another user could control the queue."""
    QUEUE_LOST = auto()
    """The queue lost its tasks; the job must be queued again."""
    QUEUE_DAMAGED = auto()
    """The queue file is damaged or is not a queue file."""
    TASK_INVALID = auto()
    """A message on the queue is not a chunkq task."""
    QUEUE_ADDRESS_INVALID = auto()
    """The URL of the queue has an unknown scheme, or an invalid part."""
    QUEUE_VERSION_MISMATCH = auto()
    """The cluster of the queue and this process run different versions of a package."""
    MODEL_UNUSABLE = auto()
    """The network cannot be loaded, or does not match its declaration."""
    MODEL_UNTRUSTED = auto()
    """The model file can run code or reach other files, and the job does not trust it."""
    HEAD_MISSING = auto()
    """The network returns no array under the name that an output has as `head`."""
    MODEL_RANDOM = auto()
    """The network has random values, or returns different outputs for one batch."""
    OUTPUT_IS_LABELS = auto()
    """The network returns labels that the job would average, or other labels than it declares."""
    EXPORT_DIFFERS = auto()
    """An exported file computes other values than the network."""
    FRAMEWORK_CONFLICT = auto()
    """The worker process already uses another deep-learning framework."""
    STAGE_NOT_READY = auto()
    """A task was started before the stages that it needs were complete."""
    REPEATED_FAILURE = auto()
    """Consecutive chunks failed with the same cause."""
    TASK_TIMEOUT = auto()
    """A task exceeded its time limit."""
    DTYPE_UNSUITABLE = auto()
    """A `dtype` cannot hold the values that are converted to it."""
    PREDICTION_INVALID = auto()
    """The predictions of a chunk cannot be used."""
    INPUT_UNREADABLE = auto()
    """The input of a chunk cannot be read."""
    INPUT_MISSING = auto()
    """An input that existed when the job was produced is missing."""
    INPUT_EMPTY = auto()
    """None of an input's storage chunks exists."""
    INPUT_CHANGED = auto()
    """An input was replaced since the job was produced."""
    IMAGE_MISSING = auto()
    """An image of a list does not exist, or is not a file."""
    IMAGE_DAMAGED = auto()
    """An image of a list cannot be decoded."""
    IMAGE_TOO_LARGE = auto()
    """An image of a list, or its file, is larger than chunkq decodes as a whole."""
    IMAGE_UNSUITABLE = auto()
    """An image of a list does not have the shape that the network needs."""
    IMAGE_LIST_INVALID = auto()
    """A list of images cannot be read, has no column `path`, or names no image."""
    TOO_MANY_ERRORS = auto()
    """More images failed than `max_errors` allows."""
    PIECE_DAMAGED = auto()
    """A piece is missing or damaged."""
    RESULTS_LOST = auto()
    """Pieces or commit records are missing or damaged; their chunks must be computed again."""
    JOB_INCOMPLETE = auto()
    """Some chunks are not computed."""
    BLOCKS_FAILED = auto()
    """Workers could not complete some blocks."""
    WORKER_FAILED = auto()
    """A worker of the run ended with an error."""
    CLUSTER_UNAVAILABLE = auto()
    """The cluster of the run did not start, or ended before the run."""


def describe_code(code: ErrorCode) -> str:
    """Return what an error code means, the text below it in the source of `ErrorCode`."""
    import ast
    import inspect

    [members] = [
        node.body for node in ast.parse(inspect.getsource(ErrorCode)).body
        if isinstance(node, ast.ClassDef)
    ]  # fmt: skip
    for member, text in pairwise(members):
        names = [t.id for t in getattr(member, "targets", ()) if isinstance(t, ast.Name)]
        if names == [code.name] and isinstance(text, ast.Expr):
            return str(ast.literal_eval(text.value))
    raise ValueError(f"{code.name} has no description")


class PredictionWarning(UserWarning):
    """Values or axes of a prediction are probably a mistake of the job."""


class ChunkqError(Exception):
    """Base class of chunkq's errors. The message is one printable line.

    `code` identifies the error for programs. `exit_code` is the exit status of the command.
    """

    exit_code = 1
    code = ErrorCode.FAILED

    def __init__(self, message: str = "", *, code: ErrorCode | None = None) -> None:
        super().__init__(self._to_printable(message))
        if code is not None:
            self.code = code

    def with_notes(self, lines: Iterable[str]) -> Self:
        """Add each line as a note, such as the cause of a failure; return the error."""
        for line in lines:
            self.add_note(line)
        return self

    @staticmethod
    def _to_printable(message: str) -> str:
        """Return the message as one printable line."""
        return printable(" ".join(message.splitlines()))


class JobError(ChunkqError):
    """The job or a request is invalid. Raised before any work starts.

    `problems` has one line per mistake: where, what is wrong, what to do.
    """

    exit_code = 2
    code = ErrorCode.JOB_INVALID

    def __init__(self, problems: str | Sequence[str], *, code: ErrorCode | None = None) -> None:
        lines = problems.split("\n") if isinstance(problems, str) else problems
        self.problems = tuple(printable(line) for line in lines)
        super().__init__("\n".join(self.problems), code=code)

    @staticmethod
    def _to_printable(message: str) -> str:
        """Return the message unchanged: its lines are printable already."""
        return message


class ArgumentError(JobError, TypeError):
    """An argument of a Python function has a type that the function does not accept."""


class MissingJobError(ChunkqError):
    """The path has no job folder, or the job was replaced."""

    exit_code = 2
    code = ErrorCode.JOB_MISSING


class StoreError(ChunkqError):
    """A path cannot be read or written as required. Raised before any work starts."""

    exit_code = 2
    code = ErrorCode.STORE_UNUSABLE


class QueueError(ChunkqError):
    """The queue cannot be reached or used."""

    code = ErrorCode.QUEUE_UNAVAILABLE

    def in_run(self, rerun: str) -> QueueError:
        """Return the error as a run reports it: `rerun` queues the remaining chunks again."""
        return QueueError(str(self).replace(RESUME, rerun), code=self.code)


class ModelError(ChunkqError):
    """The network cannot be loaded or differs from its declaration. Every chunk would fail."""

    code = ErrorCode.MODEL_UNUSABLE


class FrameworkConflictError(ChunkqError):
    """The job needs a different deep-learning framework than this worker process uses."""

    code = ErrorCode.FRAMEWORK_CONFLICT


class GateClosedError(ChunkqError):
    """An earlier stage of the job is incomplete. The task is handed back and waits."""

    code = ErrorCode.STAGE_NOT_READY


class RepeatedFailureError(ChunkqError):
    """Consecutive chunks failed with the same cause. The worker skips the job from now on."""

    code = ErrorCode.REPEATED_FAILURE


class TaskTimeoutError(ChunkqError):
    """Tasks exceeded their time limit. Only the end of the process releases their resources.

    `leases` lists the leases of these tasks.
    """

    code = ErrorCode.TASK_TIMEOUT

    def __init__(self, message: str, leases: Sequence[Any]) -> None:
        super().__init__(message)
        self.leases = tuple(leases)


class PredictionError(ChunkqError):
    """The predictions of a chunk cannot be used, for example because they are not finite."""

    code = ErrorCode.PREDICTION_INVALID


class ChunkReadError(ChunkqError):
    """The input of a chunk cannot be read."""

    code = ErrorCode.INPUT_UNREADABLE


class PieceError(ChunkqError):
    """Pieces of a block are missing or damaged. `sources` lists the chunks that wrote them."""

    code = ErrorCode.PIECE_DAMAGED

    def __init__(self, message: str, sources: Sequence[tuple[int, ...]] = ()) -> None:
        super().__init__(message)
        self.sources = tuple(sources)


class InterruptedCommandError(ChunkqError):
    """A signal ended a command before it was done."""

    exit_code = 130
    code = ErrorCode.INTERRUPTED


class IncompleteError(ChunkqError):
    """The job is not finished. `missing` has the names of the chunks that must be computed."""

    exit_code = 3
    code = ErrorCode.JOB_INCOMPLETE

    def __init__(
        self, message: str, missing: Sequence[str], *, code: ErrorCode | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.missing = tuple(missing)


def printable(line: str) -> str:
    """Return a line with unprintable characters escaped; shorten a long line in its middle.

    Names and paths can contain line breaks, control sequences and surrogates.
    """
    if len(line) > MAX_LINE_LENGTH:
        line = f"{line[: MAX_LINE_LENGTH // 2]} ... {line[-MAX_LINE_LENGTH // 2 :]}"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def failure_key(error: str, message: str) -> tuple[str, str]:
    """Return a key that is equal for errors with the same cause.

    The key is the error's class name and its message with `#` in place of each number, because
    coordinates differ from chunk to chunk.
    """
    return error, re.sub(r"\d+", "#", message)


def suggestion(word: str, legal: Sequence[str]) -> str:
    """Return the hint `; did you mean 'x'?` for the legal name closest to `word`, or ''."""
    match = nearest(word, legal)
    return f"; did you mean {match!r}?" if match else ""


def nearest(word: str, legal: Sequence[str]) -> str:
    """Return the legal name closest to `word`, or ''.

    A name that is equal without `folded` differences comes first, then one that begins with the
    word, contains it, or is its beginning.
    """
    names = {folded(name): name for name in reversed(legal)}
    key = folded(word)
    if key in names:
        return names[key]
    if len(key) > 2:
        in_order = list(reversed(names))
        begins = [name for name in in_order if name.startswith(key)]
        contains = [name for name in in_order if key in name]
        is_begun_by = [name for name in in_order if len(name) > 2 and key.startswith(name)]
        if matches := [*begins, *contains, *sorted(is_begun_by, key=len, reverse=True)]:
            return names[matches[0]]
    matches = get_close_matches(key, list(names), n=1, cutoff=0.6)
    return names[matches[0]] if matches else ""


def folded(word: str) -> str:
    """Return a word in lower case without punctuation: `chunk_size` and `ChunkSize` are equal."""
    return re.sub(r"[^0-9a-z]", "", word.lower())
