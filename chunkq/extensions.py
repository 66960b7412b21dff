"""Extensions: classes that other installed packages add to chunkq by entry points."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

from chunkq.errors import ChunkqError, ErrorCode

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = re.compile(r"\[(chunkq\.[^]\n]+)]")
"""The line of a file of entry points that begins a group of chunkq."""
Interface = TypeVar("Interface")


@dataclass(frozen=True)
class ExtensionPoint(Generic[Interface]):
    """A group of entry points. The name of each is unique, its value a subclass of `interface`.

    `label` begins the messages of errors, which are of the type `error`. The names in `built_in`
    are those of chunkq itself.
    """

    group: str
    interface: type[Interface]
    label: str
    error: type[ChunkqError]
    built_in: frozenset[str] = frozenset()

    def find(self) -> dict[str, EntryPoint]:
        """Return the entry points by name, in alphabetical order, without loading them.

        Raises `error` if a name is not unique, because job records contain only the name.
        """
        entry_points: dict[str, EntryPoint] = {}
        for entry_point in sorted(_installed(self.group, tuple(sys.path)), key=_order):
            name = entry_point.name
            if name in self.built_in or name in entry_points:
                other = _package(entry_points[name]) if name in entry_points else "chunkq"
                raise self.error(
                    f"{self._named(entry_point)} has the same name as one of {other}; uninstall "
                    "one of the packages",
                )
            entry_points[name] = entry_point
        return entry_points

    def load(self, entry_point: EntryPoint) -> type[Interface]:
        """Return the class of an entry point.

        Raises `error` with the code PACKAGE_MISSING if it cannot be imported or is no subclass of
        `interface`.
        """
        loaded: type[Interface] = _load(self, entry_point)
        return loaded

    def create(self, entry_point: EntryPoint) -> Interface:
        """Return an instance of an extension, which is created without arguments.

        Raises `error` as `load` does, also if the class cannot be instantiated.
        """
        created: Interface = _create(self, entry_point)
        return created

    def unusable(self, entry_point: EntryPoint, reason: str) -> ChunkqError:
        """Return the error for an extension that cannot be used."""
        return self.error(
            f"{self._named(entry_point)} cannot be used: {' '.join(reason.split())}; repair or "
            "uninstall the package",
            code=ErrorCode.PACKAGE_MISSING,
        )

    def _named(self, entry_point: EntryPoint) -> str:
        return f"{self.label} {entry_point.name!r} of the package {_package(entry_point)}"


@cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group of all packages on a path."""
    if group not in _groups(path):
        return ()
    from importlib.metadata import entry_points

    return tuple(entry_points(group=group))


@cache
def _groups(path: tuple[str, ...]) -> frozenset[str]:
    """Return the names of groups of chunkq that packages on a path have.

    Parsing the files of all packages takes twice as long as reading them, and few have one.
    """
    from importlib.metadata import distributions  # imports zipfile and email

    texts = (package.read_text("entry_points.txt") or "" for package in distributions())
    return frozenset(group for text in texts for group in GROUP.findall(text))


@cache
def _load(point: ExtensionPoint[Interface], entry_point: EntryPoint) -> type[Interface]:
    try:
        loaded = entry_point.load()
    except Exception as error:
        raise point.unusable(entry_point, f"{type(error).__name__}: {error}") from error
    expected = point.interface
    if not (isinstance(loaded, type) and issubclass(loaded, expected)):
        raise point.unusable(
            entry_point, f"{entry_point.value} is not a subclass of {expected.__qualname__}"
        )
    return loaded


@cache
def _create(point: ExtensionPoint[Interface], entry_point: EntryPoint) -> Interface:
    loaded: type[Interface] = _load(point, entry_point)
    try:
        return loaded()
    except Exception as error:
        raise point.unusable(entry_point, f"{type(error).__name__}: {error}") from error


def _package(entry_point: EntryPoint) -> str:
    """Return the name of the package that registers an entry point."""
    return entry_point.dist.name if entry_point.dist else entry_point.module


def _order(entry_point: EntryPoint) -> tuple[str, str, str]:
    return entry_point.name, entry_point.value, _package(entry_point)
