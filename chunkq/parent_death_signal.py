"""Start child processes that receive a signal when their parent ends.

As a script, `python -I -S parent_death_signal.py PARENT SIGNAL PROGRAM [ARGUMENT…]` requests the
signal from the kernel (`PR_SET_PDEATHSIG`) and replaces itself with PROGRAM. On systems other than
Linux the program runs without the signal.
"""

import os
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


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
