"""Events: what a job reports while it is created, computed and finalized, and who receives it.

A function that takes long has one parameter `emit`, a sink. Progress bars, log lines and the
callbacks of the Python API are sinks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from chunkq.job.tasks import Task, chunk_name

run_log = logging.getLogger("chunkq.run")
worker_log = logging.getLogger("chunkq.worker")


@dataclass(frozen=True, slots=True)
class Event:
    """Base class of all events."""


Sink = Callable[[Event], None]
"""Receive an event. A sink ignores the kinds of events that it does not use."""


@dataclass(frozen=True, slots=True)
class Message(Event):
    """One line for the user: a warning, or an error line of a worker."""

    line: str


@dataclass(frozen=True, slots=True)
class StageProgress(Event):
    """In a stage, such as `queueing chunks`, `done` of `total` items are done.

    `total` is None if the stage has no items to count.
    """

    stage: str
    done: int = 0
    total: int | None = None


@dataclass(frozen=True, slots=True)
class TaskEnded(Event):
    """A worker has run a task for `seconds`. `name` is that of its chunk in messages."""

    task: Task
    seconds: float
    name: str = ""


@dataclass(frozen=True, slots=True)
class TaskFailed(Event):
    """Attempt number `attempt` at a task has failed with an error."""

    task: Task
    attempt: int
    message: str
    name: str = ""


def ignore(event: Event) -> None:
    """Drop an event."""


def write_log(event: Event) -> None:
    """Write an event to the log of chunkq, unless it is progress."""
    match event:
        case Message(line):
            run_log.warning("%s", line)
        case TaskEnded(task, seconds, name):
            name = name or chunk_name(task.chunk)
            worker_log.info("%s chunk %s done in %.1f s", task.kind, name, seconds)
        case TaskFailed(task, attempt, message, name):
            name = name or chunk_name(task.chunk)
            worker_log.error("%s chunk %s, attempt %d: %s", task.kind, name, attempt, message)


def fan_out(*sinks: Sink) -> Sink:
    """Return a sink that passes each event to all sinks, in their order."""

    def emit(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return emit


def with_replaced_text(sink: Sink, old: str, new: str) -> Sink:
    """Return a sink that passes each event to `sink`, with a text in its messages replaced."""

    def emit(event: Event) -> None:
        if isinstance(event, Message):
            event = Message(event.line.replace(old, new))
        sink(event)

    return emit


def progress_sink(function: Callable[[int, int], None]) -> Sink:
    """Return a sink that calls a user's function with (items done, all items) of each stage."""

    def emit(event: Event) -> None:
        if isinstance(event, StageProgress) and event.total is not None:
            function(event.done, event.total)

    return emit
