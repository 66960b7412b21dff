"""Run small jobs under random kills, suspensions and concurrent commands.

A round has two jobs on one queue. For a while, commands start and receive signals at random. Then
all commands are stopped, and `chunkq run` finishes each job. A soak fails if
- a command prints a traceback or, without a signal, exits with a code other than 0, 1, 2, 3, 130;
- a command does not end after SIGTERM, or a process outlives its command;
- the last `run` does not complete its job, or the job is still on the queue after it;
- an output's files differ from those of an undisturbed run;
- pieces, partial files or locks remain beside an output;
- the last `run` leaves files in the temporary folder;
- the number of file descriptors of a worker that runs through all rounds grows.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import yaml

from chunkq.queue.registry import open_executor
from tests.fuzz.damaged import CODES
from tests.fuzz.findings import ROOT
from tests.fuzz.stages import JOB
from tests.harness.files import files_below
from tests.harness.guardian import SessionGuardian
from tests.harness.servers.redis import redis_server
from tests.harness.volumes import write_zarr

BACKENDS = ("sqlite", "redis")
MINUTES = 30.0
ROUND_SECONDS = 25.0
AT_ONCE = 4
"""Commands of a round that run at the same time."""
SIGNAL_SHARE = 0.25
"""Probability of a signal in a step that starts no command."""
MIN_AGE = 1.0
"""Seconds after which a process may receive a signal: most have imported chunkq by then."""
STOP_SECONDS = 60.0
RUN_SECONDS = 180.0
WARM_UP_ROUNDS = 3
"""Rounds before the first count of the long-lived worker's descriptors."""
MAX_GROWTH = 24
"""Descriptors that may come and go: connections and files that are being written."""
TOKEN = "CHUNKQ_SOAK_TOKEN"
SETTINGS = {
    "lease": 1.5, "shortest_poll": 0.02, "longest_poll": 0.1, "restart_delay": 0.1,
    "early_death": 0.0, "queue_absence": 20,
}  # fmt: skip
NETWORK = """
import os, time
import numpy as np

def net(batch):
    time.sleep(float(os.environ.get("NET_SLEEP", "0")))
    x = np.asarray(batch, np.float32) / 100
    return np.concatenate([x, 1 - x], axis=1)
"""
CHANGES = ({"chunksize": [12, 12]}, {"chunksize": [24, 12], "combine": "soft", "strides": [6, 4]})
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("run", "JOB", "-w", "2"), ("run", "JOB", "-w", "1"), ("work", "--burst", "--gpus", "none"),
    ("work", "--burst", "--gpus", "none", "-w", "2"), ("produce", "JOB"), ("produce", "JOB"),
    ("produce", "JOB", "--resume"), ("produce", "JOB", "--overwrite"),
    ("run", "JOB", "-w", "1", "--overwrite"), ("finalize", "OUT"), ("finalize", "OUT"),
    ("retry", "OUT"), ("cancel", "OUT"), ("status", "OUT"), ("status", "OUT", "--json"), ("jobs",),
    ("report", "OUT"),
)  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)


@dataclass
class Running:
    """A running command, and the signals that it or its descendants received."""

    arguments: tuple[str, ...]
    process: subprocess.Popen[bytes]
    log: Path
    signals: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return f"chunkq {' '.join(self.arguments)} ({', '.join(self.signals) or 'no signal'})"


@dataclass
class Report:
    """Counts and findings of a soak."""

    rounds: int = 0
    commands: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    descriptors: dict[str, list[int]] = field(default_factory=dict)
    left_by_killed: int = 0
    """Entries that killed commands left in the temporary folder."""
    findings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {k: dict(v) if isinstance(v, Counter) else v for k, v in vars(self).items()}


class Bench:
    """Input, network and expected output files, shared by all rounds."""

    def __init__(self, folder: Path, jobs: int = len(CHANGES)) -> None:
        self.folder = folder
        volume = np.random.default_rng(3).integers(0, 100, (48, 46), dtype=np.uint8)
        write_zarr(folder / "in.zarr", volume, (8, 8))
        (folder / "net.py").write_text(NETWORK)
        self.references = [self._reference(number) for number in range(jobs)]

    def write_job(self, number: int, folder: Path) -> Path:
        """Write job file `number` into a folder; return its path."""
        model = JOB["model_config"] | {"class_file": str(self.folder / "net.py")}
        paths = {"input": str(self.folder / "in.zarr"), "output": f"out{number}.zarr"}
        path = folder / f"job{number}.yaml"
        path.write_text(yaml.safe_dump(JOB | CHANGES[number] | paths | {"model_config": model}))
        return path

    def _reference(self, number: int) -> dict[str, bytes]:
        folder = self.folder / f"reference{number}"
        folder.mkdir()
        env = environment(folder, f"sqlite://{folder}/queue.db", "reference")
        job = self.write_job(number, folder)
        result = subprocess.run(
            command("run", str(job), "-w", "1"),
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise SystemExit(f"the undisturbed job failed: {result.stderr}")
        return stored_files(folder / f"out{number}.zarr")


def stored_files(output: Path) -> dict[str, bytes]:
    """Return every file of an output, without the job's epoch in its attributes."""
    files = files_below(output)
    values = json.loads(files["zarr.json"])
    values["attributes"]["chunkq"].pop("epoch", None)
    return files | {"zarr.json": json.dumps(values, sort_keys=True).encode()}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "chunkq", *arguments]


def environment(folder: Path, url: str, token: str) -> dict[str, str]:
    """Return the environment of a command: no settings of the user, files in `folder`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS", "CHUNKQ", "NET_"))}
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    paths = [ROOT, f"{ROOT}/producer", f"{ROOT}/worker", os.environ.get("PYTHONPATH", "")]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TMPDIR": str(temporary),
        "XDG_STATE_HOME": str(folder / "state"),
        "CHUNKQ_QUEUE": url,
        "CHUNKQ_WORKER_SETTINGS": json.dumps(SETTINGS),
        "OMP_NUM_THREADS": "1",
        TOKEN: token,
    }


class Round:
    """One round in its own folder."""

    def __init__(self, bench: Bench, folder: Path, url: str, seed: int, report: Report) -> None:
        self.rng = Random(f"round {seed}")
        self.bench, self.folder, self.url, self.report = bench, folder, url, report
        self.token = f"{os.getpid()}-{seed}"
        folder.mkdir()
        self.jobs = [bench.write_job(n, folder) for n in range(len(bench.references))]
        self.env = environment(folder, url, self.token)
        self.running: list[Running] = []
        self.suspended: dict[int, float] = {}
        self.started = 0
        self.title = f"seed {seed}, {url.partition(':')[0]}"

    def run(self, seconds: float) -> None:
        """Disturb the jobs, stop the commands, finish the jobs and check the result."""
        try:
            self._disturb(seconds)
            self._stop()
            self._finish()
        finally:
            for process in self._remaining():
                self._report(f"process outlives its command: {' '.join(process.cmdline())[-200:]}")
                process.kill()
        self._check_queue()

    def _disturb(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._reap()
            if len(self.running) < AT_ONCE and self.rng.random() < 0.7:
                self._start()
            elif self.rng.random() < SIGNAL_SHARE:
                self._signal()
            self._resume()
            time.sleep(self.rng.uniform(0.05, 0.6))  # part of the disturbance; no event to wait for

    def _start(self) -> None:
        arguments = self.rng.choice(COMMANDS)
        number = self.rng.randrange(len(self.jobs))
        names = {"JOB": str(self.jobs[number]), "OUT": str(self.folder / f"out{number}.zarr")}
        self.started += 1
        log = self.folder / f"log{self.started}"
        sleep = {"NET_SLEEP": str(self.rng.choice((0, 0.01, 0.05)))}
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command(*(names.get(part, part) for part in arguments)),
                cwd=self.folder,
                env=self.env | sleep,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.running.append(Running(arguments, process, log))
        self.report.commands[arguments[0]] += 1

    def _signal(self) -> None:
        """Send a signal to a random command or one of its descendants."""
        if not self.running:
            return
        target = self.rng.choice(self.running)
        number = self.rng.choice(SIGNALS)
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(target.process.pid)
            processes = [top, *top.children(recursive=True)]
            old = [p for p in processes if time.time() - p.create_time() > MIN_AGE]
            if not old:
                return
            process = self.rng.choice(old)
            process.send_signal(number)
            target.signals.append(number.name)
            self.report.signals[number.name] += 1
            if number == signal.SIGSTOP:
                pause = self.rng.choice((0.3, 1.0, 3.0, 5.0))
                self.suspended[process.pid] = time.monotonic() + pause

    def _resume(self, *, all_processes: bool = False) -> None:
        """Continue the suspended processes whose pause is over, or all of them."""
        for pid, until in list(self.suspended.items()):
            if all_processes or time.monotonic() > until:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                del self.suspended[pid]

    def _reap(self) -> None:
        for item in list(self.running):
            if item.process.poll() is not None:
                self.running.remove(item)
                self._judge(item)

    def _judge(self, item: Running) -> None:
        code = item.process.returncode
        self.report.codes[str(code)] += 1
        text = item.log.read_text(errors="replace")
        interrupted = "SIGINT" in item.signals and "KeyboardInterrupt" in text
        if "Traceback (most recent call last)" in text and not interrupted:
            self._report(f"traceback of {item.text}: {text[-1500:]}")
        elif code not in CODES and not item.signals:
            self._report(f"exit code {code} of {item.text}: {text[-500:]}")

    def _stop(self) -> None:
        self._resume(all_processes=True)
        for item in self.running:
            with suppress(ProcessLookupError):
                item.process.terminate()
                item.signals.append("SIGTERM")
        until = time.monotonic() + STOP_SECONDS
        for item in self.running:
            try:
                item.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._report(f"does not end after SIGTERM: {item.text}")
                item.process.kill()
                item.process.wait()
            self._judge(item)
        self.running.clear()

    def _finish(self) -> None:
        temporary = self.folder / "tmp"
        before = set(os.listdir(temporary))
        self.report.left_by_killed += len(before)
        for number, job in enumerate(self.jobs):
            output = self.folder / f"out{number}.zarr"
            try:
                result = subprocess.run(
                    command("run", str(job), "-w", "2"),
                    cwd=self.folder,
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=RUN_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                self._report(f"the last run hangs: {error.stderr!r}")
                continue
            if result.returncode or "Traceback" in result.stderr:
                self._report(
                    f"the last run exits with {result.returncode}: {result.stderr[-1500:]}"
                )
                continue
            self._check_files(number, output)
        remaining = set(os.listdir(temporary)) - before
        if remaining:
            self._report(f"the last run leaves in the temporary folder: {sorted(remaining)}")

    def _check_files(self, number: int, output: Path) -> None:
        stored, expected = stored_files(output), self.bench.references[number]
        leaked = sorted(stored.keys() - expected.keys())
        missing = sorted(expected.keys() - stored.keys())
        differing = sorted(n for n in stored.keys() & expected.keys() if stored[n] != expected[n])
        for kind, names in {"leaked": leaked, "missing": missing, "DIFFERENT": differing}.items():
            if names:
                self._report(f"output files {kind}: {len(names)}, such as {names[:3]}")
        folder = Path(f"{output}.chunkq")
        leaked = [n for n in files_below(folder) if "pieces" in Path(n).parts or ".partial-" in n]
        epochs = [path.name for path in folder.iterdir() if path.is_dir()]
        if leaked or len(epochs) > 1:
            names = leaked[:3] or epochs
            self._report(f"job folder keeps {len(leaked)} files, {len(epochs)} folders: {names}")

    def _check_queue(self) -> None:
        executor = open_executor(self.url)
        try:
            jobs = {
                job: counts
                for job, counts in executor.jobs().items()
                if str(self.folder) in job.path
            }
        finally:
            executor.close()
        if jobs:
            self._report(f"still on the queue: {jobs}")

    def _remaining(self) -> Iterator[psutil.Process]:
        """Yield the processes of this round that still run after 10 s."""
        until = time.monotonic() + 10
        while (processes := list(self._processes())) and time.monotonic() < until:
            time.sleep(0.05)
        yield from processes

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                running = process.status() != psutil.STATUS_ZOMBIE
                if running and process.environ().get(TOKEN) == self.token:
                    yield process

    def _report(self, text: str) -> None:
        self.report.findings.append(f"{self.title}: {text}")
        _print(f"  FINDING {self.title}: {text}")


class LongLived:
    """A worker that runs through all rounds of a queue; counts its file descriptors."""

    def __init__(self, folder: Path, url: str) -> None:
        folder.mkdir()
        self._log = folder / "log"
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                command("work", "--gpus", "none"),
                cwd=folder,
                env=environment(folder, url, "long-lived"),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.counts: list[int] = []

    def count(self) -> None:
        """Append the current number of descriptors to `counts`."""
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            self.counts.append(sum(p.num_fds() for p in (top, *top.children(recursive=True))))

    def close(self) -> list[str]:
        """Stop the worker; return its findings."""
        findings = []
        if self._process.poll() is not None:
            findings.append(f"the long-lived worker ended: {self._log.read_text()[-1500:]}")
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            findings.append("the long-lived worker does not end after SIGTERM")
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if "Traceback" in self._log.read_text():
            findings.append(f"traceback of the long-lived worker: {self._log.read_text()[-1500:]}")
        later = self.counts[WARM_UP_ROUNDS:]
        if later and later[-1] > later[0] + MAX_GROWTH:
            findings.append(f"descriptors of the long-lived worker grow: {self.counts}")
        return findings


@contextmanager
def queues(folder: Path, backends: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield the URL of one queue for each backend."""
    urls = {"sqlite": f"sqlite://{folder}/queue.db"}
    if "redis" not in backends:
        yield {name: urls[name] for name in backends}
        return
    with redis_server() as server:
        urls["redis"] = server.url
        yield {name: urls[name] for name in backends}


def soak(
    seconds: float,
    seed: int = 0,
    backends: tuple[str, ...] = BACKENDS,
    round_seconds: float = ROUND_SECONDS,
    jobs: int = len(CHANGES),
) -> Report:
    """Run rounds on each backend in turn until `seconds` have passed; at least one round each."""
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="chunkq-soak-"))
    started = time.monotonic()
    try:
        bench = Bench(folder, jobs)
        with queues(folder, backends) as urls:
            workers = {name: LongLived(folder / f"worker-{name}", urls[name]) for name in backends}
            try:
                while report.rounds < len(backends) or time.monotonic() - started < seconds:
                    name = backends[report.rounds % len(backends)]
                    number = seed + report.rounds
                    earlier = len(report.findings)
                    Round(bench, folder / f"round{number}", urls[name], number, report).run(
                        round_seconds
                    )
                    workers[name].count()
                    report.rounds += 1
                    count = len(report.findings) - earlier
                    _print(f"round {report.rounds} ({name}): {count} findings")
                    if not count:
                        shutil.rmtree(folder / f"round{number}")
            finally:
                for name, worker in workers.items():
                    report.findings += [f"{name}: {text}" for text in worker.close()]
                    report.descriptors[name] = worker.counts
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run the soak that the command line describes; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round")
    parser.add_argument("--backend", choices=BACKENDS, help="use one queue; default: both")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    backends = (arguments.backend,) if arguments.backend else BACKENDS
    guardian = SessionGuardian()
    tempfile.tempdir = str(guardian.folder)
    report = soak(arguments.minutes * 60, arguments.seed, backends)
    report.findings += [f"outlives the soak: {process}" for process in guardian.close()]
    values = {"minutes": arguments.minutes, "seed": arguments.seed} | report.as_dict()
    _print(json.dumps({k: v for k, v in values.items() if k != "findings"}, indent=1))
    _print(f"{len(report.findings)} findings")
    if arguments.json:
        arguments.json.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
