"""Run commands in separate processes and check how they end."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from chunkq.errors import ErrorCode
from tests.harness.guardian import RESOURCE_TRACKER
from tests.harness.waiting import TIMEOUT, wait_until


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command; `out` is empty if both streams went into one file."""

    code: int
    out: str
    err: str

    @property
    def messages(self) -> list[str]:
        """The lines on stderr that chunkq writes."""
        return [line for line in self.err.splitlines() if line.startswith("chunkq: ")]

    def ok(self) -> Self:
        """Assert exit code 0 and no traceback; return self."""
        assert self.code == 0, (self.code, self.out, self.err)
        assert "Traceback" not in self.err, self.err
        return self

    def refused(self, code: int, *fragments: str) -> None:
        """Assert a failure: its exit code, only `chunkq: ` lines on stderr, and their content.

        A fragment is an `ErrorCode` that a line must end with, or a text that must occur.
        """
        assert self.code == code, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert lines, "nothing on stderr"
        assert all(line.startswith("chunkq: ") for line in lines), self.err
        assert "Traceback" not in self.err
        for fragment in fragments:
            expected = f" [{fragment}]\n" if isinstance(fragment, ErrorCode) else fragment
            assert expected in self.err, (expected, self.err)


@dataclass
class RunningCommand:
    """A command in a separate process, with all processes that it starts."""

    process: subprocess.Popen[str]
    log: Path
    known: set[int] = field(default_factory=set)
    """Every process that `children` has returned so far."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[int]:
        """Return the ids of the running descendants of the command."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self.known |= {child.pid for child in children}
        return [child.pid for child in children]

    def output(self) -> str:
        """Return what the command has written to stdout and stderr."""
        return self.log.read_text()

    def wait(self, timeout: float = TIMEOUT) -> CommandResult:
        """Wait until the command ends; its processes may still run."""
        code = self.process.wait(timeout)
        return CommandResult(code, "", self.output())

    def wait_for_children(self) -> None:
        """Wait until all descendants that `children` has returned have ended."""
        wait_until(lambda: not any(map(is_alive, self.known)), "its processes have ended")

    def kill(self) -> None:
        """Kill the command and all its descendants, from the top."""
        self.children()
        kill_all([self.process.pid, *self.known])
        self.process.wait()


@contextmanager
def running(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[RunningCommand]:
    """Run a command in a folder; at the end, kill it and its descendants.

    The log is outside the folder and is kept until the test session ends.
    """
    number, name = tempfile.mkstemp(prefix="log-")
    with open(number, "w") as stream:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            text=True,
        )
    running_command = RunningCommand(process, Path(name))
    try:
        yield running_command
    except AssertionError as error:
        error.add_note(f"output of {command}: {running_command.output()[-4000:]}")
        raise
    finally:
        running_command.kill()


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_all(pids: Iterable[int]) -> None:
    """Kill processes, except Python's resource trackers.

    A tracker ends by itself after the others and removes the semaphores that they leave behind.
    """
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if not any(RESOURCE_TRACKER in part for part in process.cmdline()):
                process.kill()


MISSING_PACKAGES = """
import sys

class MissingFinder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, MissingFinder())
"""
"""Code that hides the packages with these names from a process."""


def startup_hook(folder: Path, code: str) -> str:
    """Write code that Python processes run at their start; return their PYTHONPATH."""
    hooks = folder / f"hooks-{len(list(folder.glob('hooks-*')))}"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(code)
    return os.pathsep.join(filter(None, [str(hooks), os.environ.get("PYTHONPATH")]))
