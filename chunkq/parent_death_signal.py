"""Processes that end when the one that starts them does, however it ends.

As a script, `python -I -S tether.py PARENT SIGNAL PROGRAM [ARGUMENT…]` asks the kernel to send
SIGNAL when the process PARENT has ended, then becomes PROGRAM. Linux only: elsewhere the program
just runs.
"""

import os
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def with_parent_death_signal(command: Sequence[str], number: int) -> list[str]:
    """Return a command for a child of the current thread that gets a signal when this one ends."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(number)), *command]


def main(parent: int, number: int, command: list[str]) -> None:
    """Run a command in this process."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the request
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
