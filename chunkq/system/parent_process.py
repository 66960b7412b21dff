"""End child processes with their parent, also if the parent is killed.

A process of this package watches its standard input: its parent holds the other end of the pipe,
which closes when the parent ends. Any other program gets a signal from the kernel.

As a script, `python -I -S parent_process.py PARENT SIGNAL PROGRAM [ARGUMENT…]` requests the signal
(`PR_SET_PDEATHSIG`) and replaces itself with PROGRAM. On systems other than Linux the program runs
without the signal.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

PR_SET_PDEATHSIG = 1
READ_BYTES = 1 << 20
RELEASE_SECONDS = 5.0
CHECK_SECONDS = 0.01


def _ignore(line: bytes) -> None:
    pass


def when_parent_ends(
    end: Callable[[], object], receive: Callable[[bytes], object] = _ignore
) -> None:
    """Call a function, which ends this process, in a new thread once standard input is closed.

    The parent starts this process with `stdin=PIPE` and keeps the pipe open. Each line that it
    writes is passed to `receive` in the new thread.
    """

    def wait() -> None:
        rest = b""
        # A daemon thread that waits in `sys.stdin` would abort the interpreter at its end.
        while data := os.read(0, READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                receive(line + b"\n")
        end()

    threading.Thread(target=wait, name="parent", daemon=True).start()


def after_parent_ended(end: Callable[[], object]) -> Callable[[], None]:
    """Return `end`, called only once the parent has released its file locks.

    The kernel may close the pipe of an ending process before it releases the locks, but it does
    both before the child gets another parent. A parent that closed the pipe and runs on is awaited
    for `RELEASE_SECONDS`.
    """
    parent = os.getppid()

    def wait() -> None:
        deadline = time.monotonic() + RELEASE_SECONDS
        while os.getppid() == parent and time.monotonic() < deadline:
            time.sleep(CHECK_SECONDS)
        end()

    return wait


def with_parent_death_signal(command: Sequence[str], number: int) -> list[str]:
    """Wrap a command so that the child gets signal `number` when the calling thread ends."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(number)), *command]


def main(parent: int, number: int, command: list[str]) -> None:
    """Request the signal and replace this process with the command.

    Exit with status 1 if the process `parent` has already ended.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before the request
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
