"""Mutation proof: apply faults to chunkq, one at a time, and check that a test fails.

Run: python -m tests.prove.mutations [ID ...] [--json FILE]. The faults are in tests/prove/faults.
Each fault is applied to a copy of the checkout's tracked files, and the tests that it names run
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
from tests.prove.faults import (
    axes,
    blending,
    empty_space,
    exports,
    files,
    finished_outputs,
    geometry,
    images,
    ingest,
    ledger,
    notebook,
    pyramids,
    queues,
    reach,
    records,
    texts,
    tuning,
    volumes,
    workers,
)

ROOT = Path(__file__).resolve().parents[2]
FAULTS: tuple[Fault, ...] = (
    *axes.FAULTS,
    *geometry.FAULTS,
    *images.FAULTS,
    *ingest.FAULTS,
    *blending.FAULTS,
    *empty_space.FAULTS,
    *exports.FAULTS,
    *queues.FAULTS,
    *ledger.FAULTS,
    *notebook.FAULTS,
    *pyramids.FAULTS,
    *reach.FAULTS,
    *files.FAULTS,
    *finished_outputs.FAULTS,
    *records.FAULTS,
    *tuning.FAULTS,
    *volumes.FAULTS,
    *texts.FAULTS,
    *workers.FAULTS,
)
PARALLEL_FAULTS = 2
TEST_SECONDS, RUN_SECONDS = 90, 300
"""Time limits of one test and of one selection of tests. A hang counts as caught."""
PACKAGES = ("chunkq", "chunkq_producer", "chunkq_worker", "tests.reference")
SHOW_ORIGINS = "import importlib\n" + "".join(
    f"print(importlib.import_module({name!r}).__file__)\n" for name in PACKAGES
)
PASSED, FAILED = 0, 1
"""Exit codes of pytest. Any other code means that tests could not run."""


@dataclass(frozen=True)
class Run:
    """One run of pytest."""

    code: int | None
    """None if pytest was killed after RUN_SECONDS."""
    output: str
    seconds: float

    @property
    def first_failure(self) -> str:
        """Name of the first failed test, or an empty string."""
        match = re.search(r"^(?:FAILED|ERROR) (\S+\.py::.+?)(?: - |$)", self.output, re.MULTILINE)
        return match[1] if match else ""

    @property
    def hung(self) -> bool:
        """Whether a test or the run exceeded its time limit."""
        return self.code is None or "from pytest-timeout" in self.output


@dataclass(frozen=True)
class Result:
    """Result of one fault; `outcome` is caught, hung, survived or broken (tests could not run)."""

    id: str
    file: str
    harm: str
    tests: str
    outcome: str
    caught_by: str
    seconds: float


class Checkout:
    """A copy of the tracked files in which pytest runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "chunkq"
        self._scratch = folder / "pytest"
        for name in _tracked():
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        # A compiled file is valid for one mtime in seconds, so each edit needs a new mtime.
        self._times = itertools.count(int(time.time()))
        paths = (self.folder, self.folder / "producer", self.folder / "worker")
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("CHUNKQ", "HYPOTHESIS"))
        }
        self._env = inherited | {"PYTHONPATH": os.pathsep.join(map(str, paths))}

    def check_imports(self) -> None:
        """Raise SystemExit unless child processes import the copy's code."""
        command = [sys.executable, "-c", SHOW_ORIGINS]
        result = subprocess.run(
            command, cwd=self.folder, env=self._env, capture_output=True, text=True, check=True
        )
        others = [path for path in result.stdout.split() if not path.startswith(str(self.folder))]
        if others:
            raise SystemExit(f"{others[0]} is imported instead of the copy in {self.folder}")

    @contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        """Apply a fault to the copy for the duration of the block."""
        path = self.folder / fault.file
        original = path.read_text()
        self._write(path, original.replace(fault.old, fault.new))
        try:
            yield
        finally:
            self._write(path, original)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        mtime = next(self._times)
        os.utime(path, (mtime, mtime))

    def pytest(self, tests: Sequence[str]) -> Run:
        """Run a selection of tests in the copy until the first failure."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        options = [f"--timeout={TEST_SECONDS}", f"--basetemp={self._scratch}"]
        started = time.monotonic()
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
            return Run(None, output, time.monotonic() - started)
        return Run(process.returncode, output, time.monotonic() - started)


def check_faults(faults: Sequence[Fault]) -> list[str]:
    """Return a line for each fault with an ambiguous edit, without an edit or with a used id."""
    lines = []
    ids = Counter(fault.id for fault in faults)
    for fault in faults:
        path = ROOT / fault.file
        times = path.read_text().count(fault.old) if path.is_file() else 0
        if times != 1:
            lines.append(f"{fault.id}: old text found {times} times in {fault.file}, expected once")
        if fault.old == fault.new:
            lines.append(f"{fault.id}: old and new text are equal")
        if ids[fault.id] > 1:
            lines.append(f"{fault.id}: id used {ids[fault.id]} times, expected once")
    return lines


def baselines(faults: Sequence[Fault]) -> list[tuple[str, ...]]:
    """Return one selection for each test file: the union of what the faults select from it."""
    expressions: dict[str, dict[str, None]] = {}
    for file, *options in (fault.tests for fault in faults):
        expressions.setdefault(file, {})[options[1] if options else ""] = None
    return [
        (file,) if "" in of_file else (file, "-k", " or ".join(f"({text})" for text in of_file))
        for file, of_file in expressions.items()
    ]


def prove(faults: Sequence[Fault]) -> tuple[list[Result], list[str]]:
    """Run all faults; return the results, or the selections of tests that fail without a fault."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        idle: SimpleQueue[Checkout] = SimpleQueue()
        for number in range(PARALLEL_FAULTS):
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

        with ThreadPoolExecutor(PARALLEL_FAULTS) as pool:
            selections = baselines(faults)
            _print(f"{len(selections)} test files without a fault")
            runs = zip(selections, pool.map(unmutated, selections), strict=True)
            problems = [
                f"{' '.join(tests)}: {run.first_failure or _last_line(run.output)}"
                for tests, run in runs
                if run.code != PASSED
            ]
            if problems:
                return [], problems
            _print(f"{len(faults)} faults")
            results = []
            for result in pool.map(mutated, faults):
                results.append(result)
                _print(row(result))
        return results, []


def judge(fault: Fault, run: Run) -> Result:
    """Return the result of a fault from the run of its tests."""
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
    """Return a row of the printed table."""
    test = result.caught_by.rpartition("::")[2]
    return (
        f"{result.outcome:<9}{result.seconds:>6.1f} s  {result.id:<36}{result.file:<36}"
        f"{test}\n{'':19}{result.harm}"
    )


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


def _tracked() -> list[str]:
    """Return the names of the tracked files that exist."""
    result = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the faults that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="faults to apply; default: all")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    unknown = set(arguments.ids) - {fault.id for fault in FAULTS}
    selected = [fault for fault in FAULTS if not arguments.ids or fault.id in arguments.ids]
    problems = check_faults(selected) + [f"{name}: unknown id" for name in sorted(unknown)]
    if not problems:
        started = time.monotonic()
        results, problems = prove(selected)
        seconds = time.monotonic() - started
    if problems:
        for line in problems:
            _print(f"error: {line}")
        return 1
    outcomes = Counter(result.outcome for result in results)
    summary = {"faults": len(results), "seconds": round(seconds), "outcomes": dict(outcomes)}
    _print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    if arguments.json:
        values = summary | {"mutations": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return 0 if set(outcomes) <= {"caught", "hung"} else 1


if __name__ == "__main__":
    sys.exit(main())
