"""Errors that a network or a step of the user raises, shown with the user's own code."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from chunkq.errors import ChunkqError, ModelError
from chunkq_worker.steps import CheckedStep

OWN = ("chunkq", "chunkq_worker")
"""Packages whose frames precede those of the user."""
CALLERS = ("chunkq_worker.runtimes.", "chunkq_worker.steps")
"""Modules that call the code of the user."""
FRAMEWORKS = ("torch", "keras", "tensorflow", "tf_keras", "numpy", "contextlib")
"""Packages whose frames lie between those of chunkq and of the user."""
NETWORK = "the network"


def source_of(error: BaseException) -> str:
    """Return which code of the user raised an error: `the network`, or the name of a step."""
    for trace in _frames(error.__traceback__):
        caller = trace.tb_frame.f_locals.get("self")
        if isinstance(caller, CheckedStep):
            return caller.source
    return NETWORK


class UserErrors:
    """Context manager that raises errors of the user's code as ModelError.

    The cause is the error, whose traceback begins in the user's code. Errors of chunkq keep their
    class, and their causes get the same traceback.
    """

    def __enter__(self) -> None:
        pass

    # Not a generator: contextlib would restore the long traceback.
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, ChunkqError):
            cause = error.__cause__
            begin = None if cause is None else _user_traceback(cause)
            if cause is not None and begin is not None:
                cause.__context__ = None
                raise error.with_traceback(None) from cause.with_traceback(begin)
        elif isinstance(error, Exception) and (begin := _user_traceback(error)) is not None:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{source_of(error)} raised {type(error).__name__}{f': {reason}' if reason else ''}"
            ) from error.with_traceback(begin)


def _user_traceback(error: BaseException) -> TracebackType | None:
    """Return the part of a traceback that begins in the user's code, None if there is none.

    It begins in a framework if no later frame is the user's.
    """
    frames = list(_frames(error.__traceback__))
    own = [n for n, trace in enumerate(frames) if _module(trace).partition(".")[0] in OWN]
    if not own or not _module(frames[own[-1]]).startswith(CALLERS):
        return None
    outside = frames[own[-1] + 1 :]
    users = [t for t in outside if _module(t).partition(".")[0] not in FRAMEWORKS]
    return users[0] if users else outside[0] if outside else None


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _module(trace: TracebackType) -> str:
    return str(trace.tb_frame.f_globals.get("__name__", ""))
