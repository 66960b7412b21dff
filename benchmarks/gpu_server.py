"""Start and ask the process of gpu_contestant.py."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from chunkq_worker.child_env import child_env

HERE = Path(__file__).parents[1]
RESTART_SECONDS = 60.0
"""Added to the time limit of a request for which the process starts again."""
Figures = dict[str, Any]


class RequestError(Exception):
    """The process failed on a request or exceeded its time limit; the text has the traceback."""


def tree_environment(tree: Path) -> dict[str, str]:
    """Return the environment in which Python imports chunkq from a tree, and benchmarks from here.

    The rest of PYTHONPATH stays.
    """
    parts = [tree, tree / "producer", tree / "worker", HERE, os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(dict.fromkeys(str(part) for part in parts if str(part)))
    return {**os.environ, **child_env(os.cpu_count() or 1), "PYTHONPATH": path}


class Server:
    """A process with the contestants of one tree. It is started again after a failed request."""

    def __init__(self, tree: Path, folder: Path, device: str, *, is_rehearsal: bool) -> None:
        script = Path(__file__).with_name("gpu_contestant.py")
        self._command = [sys.executable, "-W", "ignore", str(script), str(folder), device]
        self._command += ["--rehearse"] if is_rehearsal else []
        self._environment = tree_environment(tree)
        self._start()

    def ask(self, seconds: float, **request: Any) -> Figures:
        """Send a request and return its answer; raise RequestError after `seconds`."""
        if self._process.poll() is not None:
            self._start()
            seconds += RESTART_SECONDS
        line = None
        try:
            with contextlib.suppress(BrokenPipeError):
                self._stdin.write(json.dumps(request) + "\n")
                self._stdin.flush()
                line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise RequestError(f"no answer within {seconds:.0f} s") from None
        if line is None:
            raise RequestError(f"the process ended with exit status {self._process.wait()}")
        answer: Figures = json.loads(line)
        if "error" in answer:
            raise RequestError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a pipe is missing")
        self._stdin, stdout = self._process.stdin, self._process.stdout
        self._lines: queue.Queue[str | None] = queue.Queue()
        lines = self._lines

        def read() -> None:
            for line in stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
