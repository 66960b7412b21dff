"""Keep log lines and deprecation warnings of deep-learning frameworks out of the terminal.

The frameworks write them when they are imported, by chunkq or by the user's code, and later. What
Python code prints, other warnings, and errors are not changed.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import FrameType, MappingProxyType, ModuleType
from typing import Any


def _nothing(module: Any) -> None:
    pass


def _log_errors_only(module: Any) -> None:
    module.set_default_logger_severity(3)


@dataclass(frozen=True)
class Framework:
    """A package that writes log lines.

    `level` is its environment variable for the log level, with the value `quiet`. `lines` matches
    lines that it writes when it is imported, regardless of the level. `loggers` are Python loggers
    of which only errors are shown. `configure` is called with the imported module.
    """

    level: str = ""
    quiet: str = ""
    lines: re.Pattern[bytes] | None = None
    loggers: Sequence[str] = ()
    configure: Callable[[Any], None] = _nothing

    @property
    def is_shown(self) -> bool:
        """Whether the user has set a log level, so that all lines are shown."""
        return bool(self.level) and os.environ.get(self.level, self.quiet) != self.quiet


FRAMEWORKS: MappingProxyType[str, Framework] = MappingProxyType(
    {
        "tensorflow": Framework(
            level="TF_CPP_MIN_LOG_LEVEL",
            quiet="3",
            lines=re.compile(
                rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: )?[IWE](\d{4} \d\d:| tensorflow/)|"
                rb"WARNING: All log messages before absl::InitializeLog"
            ),
            loggers=("tensorflow", "absl"),
        ),
        "torch": Framework(level="TORCH_CPP_LOG_LEVEL", quiet="ERROR"),
        "onnxruntime": Framework(
            lines=re.compile(rb"(\x1b\[[\d;]*m)?\d{4}-\d\d-\d\d [\d:.]+ \[[VIW]:onnxruntime"),
            configure=_log_errors_only,
        ),
    }
)
"""Import name -> framework."""
DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
SOURCES = frozenset({*FRAMEWORKS, "h5py", "keras", "onnx", "onnxscript", "tf_keras", "torchvision"})
"""Packages whose deprecation warnings are not shown."""
IN_PLACE_OF_OTHERS = frozenset({"numpy", "typing_extensions", "warnings"})
"""Packages that warn about their callers, or by a decorator for another package's function."""


def hide_framework_logs() -> None:
    """Hide the lines of all frameworks in this process and in those that it starts.

    Call it before a framework is imported. Log levels and warning filters that the user has set
    have priority.
    """
    for framework in FRAMEWORKS.values():
        if framework.level:
            os.environ.setdefault(framework.level, framework.quiet)
    if not any(isinstance(finder, _QuietImports) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuietImports())
        if not sys.warnoptions:
            warnings.showwarning = partial(_show_warning, warnings.showwarning)


@contextmanager
def without_log_lines(name: str) -> Iterator[None]:
    """Remove the log lines of a framework from standard error inside a `with` block.

    Nothing is removed if the user has set a log level.
    """
    lines = None if FRAMEWORKS[name].is_shown else FRAMEWORKS[name].lines
    try:
        stderr_copy = -1 if lines is None else os.dup(2)
    except OSError:  # standard error is closed
        stderr_copy = -1
    if lines is None or stderr_copy < 0:
        yield
        return
    import tempfile  # takes long to import

    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            with suppress(AttributeError, OSError, ValueError):  # sys.stderr is None or closed
                sys.stderr.flush()
            os.dup2(stderr_copy, 2)
            os.close(stderr_copy)
            captured.seek(0)
            # Other threads may have written to standard error meanwhile.
            os.write(2, b"".join(x for x in captured if not lines.match(x)))


def set_log_levels(name: str, module: ModuleType) -> None:
    """Let an imported framework log errors only, unless the user has set a log level."""
    framework = FRAMEWORKS[name]
    if framework.is_shown:
        return
    for logger in framework.loggers:
        logging.getLogger(logger).setLevel(logging.ERROR)
    framework.configure(module)


class _QuietImports(MetaPathFinder):
    """Import hook that removes the log lines that a framework writes while it is imported."""

    def __init__(self) -> None:
        self._local = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that other finders return, with a loader that removes the lines."""
        if fullname not in FRAMEWORKS or getattr(self._local, "is_searching", False):
            return None
        self._local.is_searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self._local.is_searching = False
        execute = getattr(spec and spec.loader, "exec_module", None)
        if spec is not None and execute is not None:
            spec.loader.exec_module = partial(_exec_quietly, execute)  # type: ignore[union-attr,method-assign]
        return spec


def _exec_quietly(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    with without_log_lines(module.__name__):
        execute(module)
    set_log_levels(module.__name__, module)


def _show_warning(
    show: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    *more: Any,
) -> None:
    """Show a warning unless it is a framework's deprecation warning."""
    if not (issubclass(category, DEPRECATIONS) and _is_from_framework(sys._getframe(1))):
        show(message, category, filename, lineno, *more)


def _is_from_framework(frame: FrameType | None) -> bool:
    """Return whether a warning is from a framework; `frame` is that of the code which shows it."""
    while frame is not None and _package(frame.f_globals.get("__name__")) in IN_PLACE_OF_OTHERS:
        decorated = frame.f_locals.get("arg")  # of the decorator `deprecated`
        if _package(getattr(decorated, "__module__", None)) in SOURCES:
            return True
        frame = frame.f_back
    return frame is not None and _package(frame.f_globals.get("__name__")) in SOURCES


def _package(module: Any) -> str:
    return str(module).partition(".")[0]
