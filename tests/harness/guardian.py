"""Kill every process and remove every file of a test session when its pytest process ends.

`SessionGuardian` runs in pytest. It starts this file as a separate process, which keeps running
when pytest is killed with SIGKILL. A process belongs to the session if the path of the session's
folder occurs in its environment, command line, working directory or open files, or if its parent
belongs to the session. On systems other than Linux the guardian only removes the folder.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2
SWEEP_SECONDS = 20.0
"""Time limit for killing the processes and removing the folder."""
MAX_TEMPORARY_LENGTH = 12
"""Longest temporary folder, in characters, for which Ray's socket paths fit into 107 bytes."""
TEST = b"PYTEST_CURRENT_TEST="
RESOURCE_TRACKER = "multiprocessing.resource_tracker"
"""Python's helper process. It ends after the processes that it watches, so it is not a leak."""
TRACKER_SECONDS = 3.0
"""Time limit for resource trackers to end by themselves."""


class SessionGuardian:
    """Temporary folder of a test session, and the process that removes it."""

    def __init__(self) -> None:
        default = tempfile.gettempdir()
        base = default if len(default) <= MAX_TEMPORARY_LENGTH else "/tmp"
        self.folder = Path(tempfile.mkdtemp(prefix="ct-", dir=base)).resolve()
        # Isolated and without site-packages: it starts fast and runs no test's hook.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env={"FOLDER": str(self.folder), "PYTEST": str(os.getpid())},
            start_new_session=True,
            text=True,
        )

    def close(self) -> list[str]:
        """Kill the processes that still run; return the command line and the test of each.

        The folder is removed after pytest has ended, because exit handlers may use it.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("bye\n")
        self._process.stdin.flush()
        leaked: list[str] = json.loads(self._process.stdout.readline())
        return leaked


def main() -> None:
    """Wait until pytest calls `close` or ends; kill the remaining processes, remove the folder."""
    folder, pytest, excluded = os.environ["FOLDER"], int(os.environ["PYTEST"]), {os.getpid()}
    if is_alive(pytest, until_readable=True) and sys.stdin.readline():
        leaked = kill_members(folder, excluded | _ancestors(pytest))
        sys.stdout.write(json.dumps(leaked) + "\n")
        sys.stdout.flush()
        is_alive(pytest, until_readable=False)
    limit = time.monotonic() + SWEEP_SECONDS
    while os.path.exists(folder) and time.monotonic() < limit:
        kill_members(folder, excluded)
        end_trackers(folder, excluded)
        shutil.rmtree(folder, onerror=_make_writable)


def is_alive(parent: int, *, until_readable: bool) -> bool:
    """Wait until the parent process ends or writes; return whether it is still alive."""
    # End of file is not enough: a forked child process can keep the pipe open.
    while os.getppid() == parent:
        readable = select.select([sys.stdin] if until_readable else [], [], [], POLL_SECONDS)[0]
        if readable:
            return True
    return False


def kill_members(folder: str, excluded: set[int]) -> list[str]:
    """Kill every process of the session except resource trackers; return their descriptions."""
    killed: dict[int, str] = {}
    limit = time.monotonic() + SWEEP_SECONDS
    while time.monotonic() < limit:
        lines = {pid: _describe(pid) for pid in members(folder, excluded)}
        running = {pid: line for pid, line in lines.items() if RESOURCE_TRACKER not in line}
        if not running:
            break
        for pid, line in running.items():
            killed.setdefault(pid, line)
            _kill(pid)
        time.sleep(0.02)
    return list(killed.values())


def end_trackers(folder: str, excluded: set[int]) -> None:
    """Wait until resource trackers have cleaned /dev/shm and ended; kill those that remain."""
    limit = time.monotonic() + TRACKER_SECONDS
    while (trackers := members(folder, excluded)) and time.monotonic() < limit:
        time.sleep(0.02)
    for pid in trackers:
        _kill(pid)


def members(folder: str, excluded: set[int]) -> set[int]:
    """Return the ids of the running processes that belong to the session."""
    parents = {pid: _parent(pid) for pid in _pids()}
    running = {
        pid: parent
        for pid, parent in parents.items()
        if parent is not None and not _is_guardian(pid)
    }
    pids = {pid for pid in running if pid not in excluded and _is_marked(pid, folder.encode())}
    size = -1
    while size < len(pids):
        size = len(pids)
        pids |= {pid for pid, parent in running.items() if parent in pids and pid not in excluded}
    return pids


def _is_guardian(pid: int) -> bool:
    """Return whether a process is the guardian of a session that a test started."""
    try:
        return os.fsencode(__file__) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _is_marked(pid: int, folder: bytes) -> bool:
    """Return whether the folder's path occurs in what /proc lists of a process."""
    process = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        if any(folder in (process / name).read_bytes() for name in ("environ", "cmdline")):
            return True
    with contextlib.suppress(OSError):
        if folder in os.fsencode(os.readlink(process / "cwd")):
            return True
    with contextlib.suppress(OSError):
        for number in os.listdir(process / "fd"):
            with contextlib.suppress(OSError):
                if folder in os.fsencode(os.readlink(process / "fd" / number)):
                    return True
    return False


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return []


def _parent(pid: int) -> int | None:
    """Return the parent's id, or None if the process has ended."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The process name, which ends at the last bracket, can contain anything.
    state, parent = line.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else int(parent)


def _ancestors(pid: int) -> set[int]:
    """Return the ids of a process and its ancestors."""
    pids: set[int] = set()
    parent: int | None = pid
    while parent:
        pids.add(parent)
        parent = _parent(parent)
    return pids


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _describe(pid: int) -> str:
    """Return the command line of a process and the test that started it."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return f"process {pid}"
    tests = [line[len(TEST) :] for line in environment if line.startswith(TEST)]
    line = command.strip()[:300] + b", started by " + (tests or [b"an unknown test"])[0]
    return line.decode(errors="replace")


def _make_writable(_function: Any, path: str, _error: Any) -> None:
    """Restore write permission on a folder, so that the next attempt can empty it."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.chmod(path, stat.S_IRWXU)
        os.chmod(os.path.dirname(path), stat.S_IRWXU)


if __name__ == "__main__":
    main()
