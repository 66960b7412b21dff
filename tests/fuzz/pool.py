"""Run cases in a few child processes; replace a child process that hangs or ends."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from tests.fuzz.child import parse_answer
from tests.fuzz.findings import ROOT, Case, Finding, of_text

SECONDS = 90.0
"""Wall-clock seconds after which a case counts as a hang."""
START_SECONDS = 60.0
CASES_PER_CHILD = 400
"""Cases after which a child process is replaced, so that leaks do not accumulate."""


class Child:
    """One child process with its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._log = folder / "log"
        self._cases = 0

    def run(self, part: str, seed: int) -> Case | None:
        """Run one case; return it if it fails."""
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        self._cases += 1
        seconds = SECONDS + (START_SECONDS if self._cases == 1 else 0)
        try:
            process.stdin.write(json.dumps([part, seed]) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
        except BrokenPipeError:
            ready = [process.stdout]
        line = process.stdout.readline() if ready else ""
        if line:
            text, finding = parse_answer(line)
        else:
            text, finding = f"{part} {seed}", self._failure(hangs=not ready)
        if not line or self._cases >= CASES_PER_CHILD:
            self.close()
        return None if finding is None else Case(part, seed, text, finding)

    def close(self) -> None:
        """Kill the child process and its descendants."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None
            self._cases = 0

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [*unprivileged(), sys.executable, "-m", "tests.fuzz.child", str(self.folder)],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=child_env(self.folder),
                    text=True,
                    start_new_session=True,
                )
        return self._process

    def _failure(self, *, hangs: bool) -> Finding:
        """Return the finding for a child process that did not answer."""
        assert self._process is not None
        if hangs:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(1)  # the interpreter writes its stacks meanwhile
            return of_stacks(self._log.read_text(errors="replace")[-6000:])
        code = self._process.wait()
        return of_text(f"process ended with {code}", self._log.read_text(errors="replace"))


def unprivileged() -> list[str]:
    """Return the prefix of a command that makes file permissions apply to root, too."""
    if os.geteuid() or not (program := shutil.which("setpriv")):
        return []
    return [program, "--bounding-set=-dac_override,-dac_read_search"]


def of_stacks(text: str) -> Finding:
    """Return the finding for a hang, named after the main thread's innermost product line."""
    main = text.rpartition("Current thread")[2]
    lines = [line for line in main.splitlines() if "/chunkq" in line and "/tests/" not in line]
    location = lines[0].strip().replace(ROOT + "/", "") if lines else "unknown"
    return Finding(f"hang: {location}", text[-3000:])


def child_env(folder: Path) -> dict[str, str]:
    """Return the environment of a child process: no settings of the user, files in `folder`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS", "CHUNKQ", "NET_"))}
    folders = (ROOT, f"{ROOT}/producer", f"{ROOT}/worker")
    paths = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return inherited | {
        "PYTHONPATH": paths,
        "TMPDIR": str(folder),
        "XDG_STATE_HOME": str(folder / "state"),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "CHUNKQ_WORKER_SETTINGS": '{"lease": 1, "shortest_poll": 0.01, "longest_poll": 0.05}',
        "COLUMNS": "200",
    }


class Pool:
    """A few child processes that share the cases."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._idle: SimpleQueue[Child] = SimpleQueue()
        for number in range(size):
            self._idle.put(Child(folder / f"child-{number}"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _ in range(self._size):
            self._idle.get().close()

    def run(
        self, part: str, seeds: Iterable[int], progress: Callable[[int], None] = lambda done: None
    ) -> Iterator[Case]:
        """Run the cases of the seeds; yield those that fail."""

        def run_case(seed: int) -> Case | None:
            child = self._idle.get()
            try:
                return child.run(part, seed)
            finally:
                self._idle.put(child)

        threads = ThreadPoolExecutor(self._size)
        try:
            for done, case in enumerate(threads.map(run_case, seeds), start=1):
                progress(done)
                if case is not None:
                    yield case
        finally:  # after an interrupt, drop the cases that have not started
            threads.shutdown(cancel_futures=True)
