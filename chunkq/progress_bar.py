"""Show events: a bar on a terminal and in a notebook, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from chunkq.job.events import Event, Message, StageProgress
from chunkq.terminal import columns, wrapped
from chunkq.units import duration

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.progress import Progress

T = TypeVar("T")
LINE_INTERVAL_SECONDS = 10.0
BAR_COLUMNS = 40
MIN_SECONDS = 1.0
"""Seconds of a stage after which its speed is known."""


@dataclass(frozen=True)
class Bar:
    """Bar whose full and empty parts differ in their characters, so that it needs no colors.

    `total` is None while it is unknown; the bar is then empty. Its width is at most `columns`.
    """

    done: float
    total: float | None
    columns: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        full, empty = ("#", "-") if options.ascii_only else ("█", "░")
        width = min(self.columns, options.max_width)
        share = 0.0 if self.total is None else self.done / self.total if self.total else 1.0
        count = int(width * min(1.0, share))
        yield Text.assemble((full * count, "green"), empty * (width - count), end="")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(min(4, self.columns), self.columns)


def is_live(console: Console) -> bool:
    """Return whether a display can change on a console: not in a log or with TERM=dumb."""
    # With FORCE_COLOR in the environment, rich takes every file for a terminal.
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


def is_notebook() -> bool:
    """Return whether this process runs the cells of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    # A kernel has one; IPython on a terminal has none.
    return getattr(shell, "kernel", None) is not None


def shows_bar() -> bool:
    """Return whether somebody sees a bar: standard error is a terminal, or this is a notebook."""
    try:
        return is_notebook() or sys.stderr.isatty()
    except (AttributeError, ValueError):  # standard error is missing or closed
        return False


class CellBar:
    """The bar of one stage in the output of a notebook's cell. It disappears at the end."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)

    def update(self, event: StageProgress) -> None:
        """Show how many items are done."""
        from IPython.display import display

        seconds = time.monotonic() - self._started
        text = f"{event.stage}: {event.done}/{event.total}, {seconds:.0f} s"
        bar = f'<progress value="{event.done}" max="{event.total}"></progress> {text}'
        content = {"text/plain": text, "text/html": bar}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


class ProgressDisplay:
    """Sink that shows messages, and the progress of one stage at a time.

    Where no bar can be shown, a stage without items to count is one line at its start.

    Context manager: at its end, the bar disappears.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Progress | None = None
        self._cell_bar: CellBar | None = None
        self._shown = ExitStack()
        self._last_line = self._begun = 0.0
        self._done_before = 0

    @cached_property
    def console(self) -> Console:
        """The console on standard error."""
        from rich.console import Console  # when there is something to show

        return Console(stderr=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shown.close()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Message(line):
                self.print(line)
            case StageProgress(stage):
                if self.begin(stage):
                    self._done_before = event.done
                    self._begin_bar(event)
                self._update(event)

    def print(self, line: str) -> None:
        """Print one line above the bar. On a terminal it breaks between words."""
        text = wrapped(line, columns(sys.stderr))
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, display: AbstractContextManager[T]) -> T:
        """Start a display, such as a bar; it ends with the stage."""
        return self._shown.enter_context(display)

    def begin(self, stage: str) -> bool:
        """Remove the display of another stage; return whether there was one."""
        if stage == self._stage:
            return False
        self._shown.close()
        self._stage, self._bar, self._last_line = stage, None, time.monotonic()
        self._cell_bar, self._begun = None, time.monotonic()
        return True

    def is_line_due(self) -> bool:
        """Return whether the interval between two lines is over; start the next one if so."""
        is_due = time.monotonic() - self._last_line >= LINE_INTERVAL_SECONDS
        if is_due:
            self._last_line = time.monotonic()
        return is_due

    def _begin_bar(self, event: StageProgress) -> None:
        if is_live(self.console):
            self._start(event)
        elif is_notebook():
            self._cell_bar = self.show(CellBar())
        elif event.total is None:  # no other line will say what takes so long
            self.print(f"chunkq: {event.stage}")

    def _start(self, event: StageProgress) -> None:
        if event.total is None:
            self.show(self.console.status(event.stage))
            return
        from rich.progress import (
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )

        class BarColumn(ProgressColumn):
            def render(self, task: Task) -> Bar:
                return Bar(task.completed, task.total, BAR_COLUMNS)

        self._bar = Progress(
            TextColumn(event.stage),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task(event.stage, total=None)
        self.show(self._bar)

    def _update(self, event: StageProgress) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=event.done, total=event.total)
        elif self._cell_bar is not None:
            self._cell_bar.update(event)
        elif not is_live(self.console) and event.total is not None and self.is_line_due():
            self.print(f"{event.stage}: {event.done}/{event.total}{self._time_left(event)}")

    def _time_left(self, event: StageProgress) -> str:
        """Return how long the stage will take at the speed so far, for a line; empty if unknown."""
        seconds, done = time.monotonic() - self._begun, event.done - self._done_before
        left = (event.total or 0) - event.done
        if seconds < MIN_SECONDS or done <= 0 or left <= 0:
            return ""
        return f", about {duration(seconds * left / done)} left"
