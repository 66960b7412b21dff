"""Mutation check: put hand-made faults into chunkq, one at a time, and see that a test fails.

Run: python -m tests.prove.mutations [ID ...] [--json FILE]. tests/prove/faults has the faults.
Each fault is put into a copy of the checkout's tracked files, and the tests that it names run
there, two faults at a time. Before that, the same tests run without a fault and must pass. The
exit code is 1 if a fault survives, if a fault's old text does not occur exactly once in its file,
or if tests cannot run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.prove.fault import Fault
from tests.prove.faults import blending, geometry, ledger, queues, records, workers

ROOT = Path(__file__).resolve().parents[2]
FAULTS: tuple[Fault, ...] = (
    *geometry.FAULTS,
    *blending.FAULTS,
    *queues.FAULTS,
    *ledger.FAULTS,
    *records.FAULTS,
    *workers.FAULTS,
)
AT_ONCE = 2
TEST_SECONDS, RUN_SECONDS = 90, 300
"""How long one test, and one selection of tests, may take. A hang counts as caught."""
PACKAGES = ("chunkq", "chunkq_producer", "chunkq_worker", "tests.reference")
SHOW_ORIGINS = "import importlib\n" + "".join(
    f"print(importlib.import_module({name!r}).__file__)\n" for name in PACKAGES
)
PASSED, FAILED = 0, 1
"""Exit codes of pytest; every other one means that tests could not run."""


@dataclass(frozen=True)
class Run:
    """One run of pytest."""

    code: int | None
    """None if it was killed at RUN_SECONDS."""
    output: str
    seconds: float

    @property
    def first_failure(self) -> str:
        """Name of the first test that failed, or an empty string."""
        found = re.search(r"^(?:FAILED|ERROR) (\S+\.py::.+?)(?: - |$)", self.output, re.MULTILINE)
        return found[1] if found else ""

    @property
    def hung(self) -> bool:
        return self.code is None or "from pytest-timeout" in self.output


@dataclass(frozen=True)
class Result:
    """What became of one fault: `outcome` is caught, hung, survived or broken."""

    id: str
    file: str
    harm: str
    tests: str
    outcome: str
    caught_by: str
    seconds: float


class Checkout:
    """A copy of the tracked files, and pytest over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "chunkq"
        self._scratch = folder / "pytest"
        for name in _tracked():
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        # Compiled files are reused by the source's time, in seconds: each edit needs its own.
        self._times = itertools.count(int(time.time()))
        places = (self.folder, self.folder / "producer", self.folder / "worker")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CHUNKQ", "HYPOTHESIS"))}
        self._env = kept | {"PYTHONPATH": os.pathsep.join(map(str, places))}

    def check_imports(self) -> None:
        """Raise SystemExit unless child processes import the copy's code."""
        command = [sys.executable, "-c", SHOW_ORIGINS]
        done = subprocess.run(
            command, cwd=self.folder, env=self._env, capture_output=True, text=True, check=True
        )
        strangers = [path for path in done.stdout.split() if not path.startswith(str(self.folder))]
        if strangers:
            raise SystemExit(f"{strangers[0]} is imported instead of the copy in {self.folder}")

    @contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        path = self.folder / fault.file
        whole = path.read_text()
        self._write(path, whole.replace(fault.old, fault.new))
        try:
            yield
        finally:
            self._write(path, whole)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        moment = next(self._times)
        os.utime(path, (moment, moment))

    def pytest(self, tests: Sequence[str]) -> Run:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        options = [f"--timeout={TEST_SECONDS}", f"--basetemp={self._scratch}"]
        begun = time.monotonic()
        process = subprocess.Popen(
            [*command, *options, *tests],
            cwd=self.folder,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return Run(None, output, time.monotonic() - begun)
        return Run(process.returncode, output, time.monotonic() - begun)


def refusals(faults: Sequence[Fault]) -> list[str]:
    """One line for each fault that would test nothing, or something else than it says."""
    lines = []
    ids = Counter(fault.id for fault in faults)
    for fault in faults:
        path = ROOT / fault.file
        times = path.read_text().count(fault.old) if path.is_file() else 0
        if times != 1:
            lines.append(f"{fault.id}: {fault.file} has the old text {times} times, expected once")
        if fault.old == fault.new:
            lines.append(f"{fault.id}: the new text is the old one")
        if ids[fault.id] > 1:
            lines.append(f"{fault.id}: the id is used {ids[fault.id]} times")
    return lines


def baselines(faults: Sequence[Fault]) -> list[tuple[str, ...]]:
    """Return one selection for each file of tests: all that the faults select of it."""
    words: dict[str, dict[str, None]] = {}
    for file, *chosen in (fault.tests for fault in faults):
        words.setdefault(file, {})[chosen[1] if chosen else ""] = None
    return [
        (file,) if "" in of_file else (file, "-k", " or ".join(f"({word})" for word in of_file))
        for file, of_file in words.items()
    ]


def prove(faults: Sequence[Fault]) -> tuple[list[Result], list[str]]:
    """Run all faults; returns the results, or the selections of tests that fail without a fault."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        idle: SimpleQueue[Checkout] = SimpleQueue()
        for number in range(AT_ONCE):
            checkout = Checkout(Path(folder, str(number)))
            checkout.check_imports()
            idle.put(checkout)

        def unmutated(tests: tuple[str, ...]) -> Run:
            checkout = idle.get()
            try:
                return checkout.pytest(tests)
            finally:
                idle.put(checkout)

        def mutated(fault: Fault) -> Result:
            checkout = idle.get()
            try:
                with checkout.with_fault(fault):
                    return judge(fault, checkout.pytest(fault.tests))
            finally:
                idle.put(checkout)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            selections = baselines(faults)
            _say(f"{len(selections)} files of tests without a fault")
            runs = zip(selections, pool.map(unmutated, selections), strict=True)
            problems = [
                f"{' '.join(tests)}: {run.first_failure or _last_line(run.output)}"
                for tests, run in runs
                if run.code != PASSED
            ]
            if problems:
                return [], problems
            _say(f"{len(faults)} faults")
            results = []
            for result in pool.map(mutated, faults):
                results.append(result)
                _say(row(result))
        return results, []


def judge(fault: Fault, run: Run) -> Result:
    """Say what became of a fault."""
    outcome = {PASSED: "survived", FAILED: "caught"}.get(run.code or PASSED, "broken")
    if run.hung:
        outcome = "hung"
    caught_by = run.first_failure if outcome in ("caught", "hung") else ""
    if outcome == "broken":
        caught_by = _last_line(run.output)
    return Result(
        fault.id,
        fault.file,
        fault.harm,
        " ".join(fault.tests),
        outcome,
        caught_by,
        round(run.seconds, 1),
    )


def row(result: Result) -> str:
    """One line of the table."""
    test = result.caught_by.rpartition("::")[2]
    return (
        f"{result.outcome:<9}{result.seconds:>6.1f} s  {result.id:<36}{result.file:<36}"
        f"{test}\n{'':19}{result.harm}"
    )


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


def _tracked() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="faults to put in; all by default")
    parser.add_argument("--json", type=Path, help="where to write the results")
    asked = parser.parse_args()
    unknown = set(asked.ids) - {fault.id for fault in FAULTS}
    chosen = [fault for fault in FAULTS if not asked.ids or fault.id in asked.ids]
    problems = refusals(chosen) + [f"{name}: no fault has this id" for name in sorted(unknown)]
    if not problems:
        begun = time.monotonic()
        results, problems = prove(chosen)
        seconds = time.monotonic() - begun
    if problems:
        for line in problems:
            _say(f"refused: {line}")
        return 1
    outcomes = Counter(result.outcome for result in results)
    summary = {"faults": len(results), "seconds": round(seconds), "outcomes": dict(outcomes)}
    _say(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    if asked.json:
        values = summary | {"mutations": [asdict(result) for result in results]}
        asked.json.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return 0 if set(outcomes) <= {"caught", "hung"} else 1


if __name__ == "__main__":
    sys.exit(main())
