"""Who receives the progress of a predictor: a bar, the caller's function, or nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chunkq.errors import ArgumentError
from chunkq.job.events import Sink, ignore, progress_sink
from chunkq.progress_bar import ProgressDisplay, shows_bar
from chunkq_worker.imported_classes import class_name

Progress = bool | Callable[[int, int], None] | None
"""True shows a bar, or lines where there is no terminal; None shows a bar where somebody sees it.

A function is called with (chunks done, all chunks).
"""


def check_progress(progress: Progress) -> None:
    """Raise ArgumentError unless the argument `progress` is a Progress."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise ArgumentError(
            f"progress: found {class_name(progress)}, expected True, False, None or a function of "
            "(chunks done, all chunks)"
        )


@contextmanager
def progress_of(progress: Progress) -> Iterator[Sink]:
    """Yield the sink for the argument `progress`."""
    if callable(progress):
        yield progress_sink(progress)
    elif progress or (progress is None and shows_bar()):
        with ProgressDisplay() as display:
            yield display
    else:
        yield ignore
