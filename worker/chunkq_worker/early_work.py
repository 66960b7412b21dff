"""Run `chunkq work` for a run that does not know its options yet, and start its processes at once.

`chunkq run` starts `python -m chunkq_worker.early_work REPORT COUNT` before it reads the job file.
COUNT worker processes import their libraries meanwhile, and this process its own. The first line on
standard input has the arguments of `chunkq work`, and environment variables. `REPORT` is the
descriptor for the result of the check of the network.
"""

from __future__ import annotations

import os
import sys

from chunkq.worker_start import decode_arguments
from chunkq_worker import child_process
from chunkq_worker.child_env import child_env
from chunkq_worker.child_process import ChildProcess


def main(report: int, count: int) -> int:
    """Start the processes, read the line and run the command; return its exit code."""
    environment = {**os.environ, **child_env(1)}
    for number in range(count):
        child = ChildProcess.start(environment, report if number == 0 else None)
        child_process.waiting.append(child)
    from chunkq.__main__ import run  # while the processes start
    from chunkq_worker.commands import work  # noqa: F401

    line = _first_line()
    if not line:
        return 1  # the run has ended
    arguments, variables = decode_arguments(line)
    os.environ.update(variables)
    sys.argv = ["chunkq", "work", "--early", str(report), *arguments]
    return run()


def _first_line() -> bytes:
    """Read one line from standard input and no byte beyond; return nothing at its end."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return b""
        line += byte
    return line


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
