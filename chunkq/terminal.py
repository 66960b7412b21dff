"""Text on a terminal: lines that break between words, and rows of a label and a value.

Elsewhere, as in a log or a pipe, a message stays one line.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import TextIO

DEFAULT_COLUMNS = 80
COLORS = re.compile(r"\x1b\[[0-9;]*m")
_UNIT = re.compile(r"(?:`[^`]*`|[^\s`]|`(?![^`]*`))+")
"""A word, or code in backticks with the characters around it."""


def columns(stream: TextIO | None) -> int | None:
    """Return the columns of the terminal of a stream, None if it is no terminal.

    The variable COLUMNS comes first.
    """
    if stream is None or not stream.isatty():
        return None
    variable = os.environ.get("COLUMNS", "")
    if variable.isdecimal() and int(variable):
        return int(variable)
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS
    except (OSError, ValueError):
        return DEFAULT_COLUMNS


def without_colors(text: str) -> str:
    """Return a text of another program without the codes for colors."""
    return COLORS.sub("", text)


def argument(text: str) -> str:
    """Return text as one argument of a command to copy, quoted if it has spaces or the like."""
    from shlex import quote  # few messages need it

    return quote(text)


def print_error(text: str) -> None:
    """Write text to standard error. On a terminal, its lines break between words."""
    import click  # worker processes need only `wrapped`

    click.echo(wrapped(text, columns(sys.stderr)), err=True)


def wrapped(text: str, width: int | None) -> str:
    """Return text whose lines are broken between words where they exceed `width` columns."""
    return "\n".join(line for part in text.split("\n") for line in wrap(part, width))


def wrap(line: str, width: int | None, *, indent: str = "") -> list[str]:
    """Break a line between words; further lines start with its own indent and `indent`.

    Words, and code in backticks that fits a line, are not split: a longer word exceeds `width`.
    """
    if width is None or len(line) <= width:
        return [line]
    start = line[: len(line) - len(line.lstrip())]
    lines, current = [], start
    for word in _words(line, width - len(start + indent)):
        joined = f"{current} {word}" if current.strip() else f"{current}{word}"
        if len(joined) > width and current.strip():
            lines.append(current)
            joined = f"{start}{indent}{word}"
        current = joined
    return [*lines, current]


def rows(pairs: Iterable[tuple[str, str]], width: int | None, *, label: int | None) -> list[str]:
    """Return lines of labels and values. Values start at column `label`.

    With label None, behind long labels, and on a terminal that is too narrow for a word of a value,
    the value is below its label.
    """
    lines = []
    for name, value in pairs:
        if label is None:
            lines += [name, *wrap(f"  {value}", width)]
            continue
        text = f"{name:<{label - 1}} {value}"
        if width is None or len(text) <= width:
            lines.append(text)
            continue
        longest = max(map(len, _words(value, 0)), default=0)
        column = label if len(name) < label and label + longest <= width else 2
        first, *rest = wrap(" " * column + value, width)
        lines += [f"{name:<{label}}{first.lstrip()}"] if column == label else [name, first]
        lines += rest
    return lines


def _words(text: str, width: int) -> list[str]:
    """Return the words of a text; code in backticks of up to `width` columns is one word."""
    return [
        word
        for unit in _UNIT.findall(text)
        for word in ([unit] if len(unit) <= width else unit.split())
    ]
