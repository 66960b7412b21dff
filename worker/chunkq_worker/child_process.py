"""A worker process as its parent holds it, which can start before its parent knows its options."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from chunkq.system.python_process import python_module
from chunkq.system.signal_masks import sigterm_blocked


@dataclass
class ChildProcess:
    """A process that waits for its options on its standard input, in a session of its own.

    It reports to the descriptor `loading`, whose other end is `reports`, when it loads a network,
    and to `report`, if that is not None, the result of the check of the network. The numbers of
    both are those in the child.
    """

    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    reports: int
    loading: int
    report: int | None

    @classmethod
    def start(cls, environment: Mapping[str, str], report: int | None = None) -> ChildProcess:
        """Start a process with these environment variables in place of this process's.

        SIGTERM is blocked until the process can handle it.
        """
        reports, loading = os.pipe()
        with sigterm_blocked():
            process = subprocess.Popen(
                python_module("chunkq_worker.worker_process"),
                stdin=subprocess.PIPE,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C reaches only the parent, which forwards it
                pass_fds=(loading,) if report is None else (loading, report),
            )
        os.close(loading)
        return cls(process, environment, reports, loading, report)

    def changes(self, environment: Mapping[str, str]) -> dict[str, str | None]:
        """Return the variables that the process must change; None removes one."""
        names = {*self.environment, *environment}
        return {
            name: environment.get(name)
            for name in names
            if self.environment.get(name) != environment.get(name)
        }

    def kill(self) -> None:
        """Kill the process before it has got options."""
        self.process.kill()
        self.process.wait()
        os.close(self.reports)
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()


waiting: list[ChildProcess] = []
"""Processes of this process without options, which a supervisor takes before it starts others."""
