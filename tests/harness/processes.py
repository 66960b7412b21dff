"""Commands in processes of their own, and how they end."""

import contextlib
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
    """Exit code and output of a command; `out` is empty where both streams went into one file."""

    code: int
    out: str
    err: str

    @property
    def messages(self) -> list[str]:
        """The lines on stderr that chunkq itself writes."""
        return [line for line in self.err.splitlines() if line.startswith("chunkq: ")]

    def ok(self) -> Self:
        """Assert success."""
        assert self.code == 0, (self.code, self.out, self.err)
        assert "Traceback" not in self.err, self.err
        return self

    def refused(self, code: int, *fragments: str) -> None:
        """Assert an error: exit code, one line per message, and their error codes and texts."""
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
    """A command in a process of its own, with all processes that it starts."""

    process: subprocess.Popen[str]
    log: Path
    known: set[int] = field(default_factory=set)
    """Every process that `children` has ever returned."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[int]:
        """Return the living processes below the command."""
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
        """Wait until all processes ever seen below the command have ended."""
        wait_until(lambda: not any(map(is_alive, self.known)), "its processes are gone")

    def kill(self) -> None:
        """Kill the command and every process below it, from the top."""
        self.children()
        kill_all([self.process.pid, *self.known])
        self.process.wait()


@contextmanager
def running(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[RunningCommand]:
    """Run a command in a folder; kill what is left of it at the end.

    The log is outside of the folder and stays until the test session ends.
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
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_all(pids: Iterable[int]) -> None:
    """Kill processes, but for Python's resource trackers.

    A tracker ends by itself after the others and removes the semaphores that they leave.
    """
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if not any(RESOURCE_TRACKER in part for part in process.cmdline()):
                process.kill()
