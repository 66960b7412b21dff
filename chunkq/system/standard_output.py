"""Keep standard output for the results of a command that runs the user's code.

The user's code, and libraries written in C, can print in this process and in its child processes,
also when they end. After `reserve`, all that goes to standard error.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import click

from chunkq.terminal import columns, wrapped

STDOUT, STDERR = 1, 2
_reserved: list[TextIO] = []
"""The stream of results; empty as long as that is `sys.stdout`."""
_replaced: list[TextIO] = []
"""What the caller of the current command has put in place of `sys.stdout`, if anything."""


def to_standard_error() -> None:
    """Send what this process and its child processes print to standard error, line by line."""
    is_open = sys.__stderr__ is not None
    os.dup2(STDERR if is_open else os.open(os.devnull, os.O_WRONLY), STDOUT)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, write_through=False)


@contextmanager
def results_of_command() -> Iterator[None]:
    """Write results to what `sys.stdout` is now, if the caller of a command has replaced it."""
    before = _replaced[:]
    _replaced[:] = [] if sys.stdout is sys.__stdout__ else [sys.stdout]
    try:
        yield
    finally:
        _replaced[:] = before


def reserve() -> None:
    """Send everything but the results to standard error, from now on.

    Do nothing if standard output is closed, or if the caller of a command has replaced
    `sys.stdout`.
    """
    stdout = sys.stdout
    if _reserved or stdout is not sys.__stdout__ or not isinstance(stdout, io.TextIOWrapper):
        return
    stdout.flush()
    stream = os.fdopen(os.dup(STDOUT), "w", encoding=stdout.encoding, errors=stdout.errors)
    _reserved.append(stream)
    to_standard_error()


def result_stream() -> TextIO:
    """Return the stream to which results are written."""
    return (*_replaced, *_reserved, sys.stdout)[0]


def print_line(text: str) -> None:
    """Write a line, or lines, of the result."""
    click.echo(text, file=result_stream())


def print_text(text: str) -> None:
    """Write text for people. On a terminal, its lines break between words."""
    stream = result_stream()
    click.echo(wrapped(text, columns(stream)), file=stream)


def discard_results() -> None:
    """Discard what is not written yet, because the reader of the results has ended."""
    # Without this, the interpreter prints an error at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), result_stream().fileno())
