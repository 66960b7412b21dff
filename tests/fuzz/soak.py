"""`python -m tests.fuzz.soak`: small jobs under random kills, suspensions and concurrent commands.

A round has two jobs on one queue. Commands start and are signalled at random for a while. Then all
of them are asked to stop, and `chunkq run` finishes each job. What counts as wrong:
- a traceback, or an exit code other than 0, 1, 2, 3 and 130 of a command that got no signal;
- a command that does not end after SIGTERM, and a process that outlives its command;
- a last `run` that does not complete its job, or one that is on the queue afterwards;
- an output whose files differ from those of an undisturbed run;
- pieces, partial files and locks beside an output, and files in the temporary folder that the last
  `run` leaves;
- file descriptors of a worker that serves all rounds, if their number grows.
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

from chunkq.executors import open_executor
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
"""Probability of a signal at a moment at which no command starts."""
GROWN_UP = 1.0
"""Seconds after which a process may get a signal: most have imported chunkq by then."""
STOP_SECONDS = 60.0
RUN_SECONDS = 180.0
FIRST_ROUNDS = 3
"""Rounds after which the descriptors of the long-lived worker are first counted."""
GROWTH = 24
"""Descriptors that may come and go: connections, files just being written."""
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
    """A command that runs, and the signals that reached it or a process below it."""

    words: tuple[str, ...]
    process: subprocess.Popen[bytes]
    log: Path
    signals: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return f"chunkq {' '.join(self.words)} ({', '.join(self.signals) or 'no signal'})"


@dataclass
class Report:
    """What happened in a soak."""

    rounds: int = 0
    commands: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    descriptors: dict[str, list[int]] = field(default_factory=dict)
    left_by_killed: int = 0
    """Entries of the temporary folder that killed commands left."""
    findings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {k: dict(v) if isinstance(v, Counter) else v for k, v in vars(self).items()}


class Bench:
    """The input, the network, and the files of undisturbed outputs; shared by all rounds."""

    def __init__(self, folder: Path, jobs: int = len(CHANGES)) -> None:
        self.folder = folder
        volume = np.random.default_rng(3).integers(0, 100, (48, 46), dtype=np.uint8)
        write_zarr(folder / "in.zarr", volume, (8, 8))
        (folder / "net.py").write_text(NETWORK)
        self.references = [self._reference(number) for number in range(jobs)]

    def write_job(self, number: int, folder: Path) -> Path:
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
        done = subprocess.run(
            command("run", str(job), "-w", "1"),
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the undisturbed job fails: {done.stderr}")
        return stored_files(folder / f"out{number}.zarr")


def stored_files(output: Path) -> dict[str, bytes]:
    """Return every file of an output, without the name of the job's epoch in its attributes."""
    files = files_below(output)
    values = json.loads(files["zarr.json"])
    values["attributes"]["chunkq"].pop("epoch", None)
    return files | {"zarr.json": json.dumps(values, sort_keys=True).encode()}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "chunkq", *words]


def environment(folder: Path, url: str, token: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS", "CHUNKQ", "NET_"))}
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    paths = [ROOT, f"{ROOT}/producer", f"{ROOT}/worker", os.environ.get("PYTHONPATH", "")]
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TMPDIR": str(temporary),
        "XDG_STATE_HOME": str(folder / "state"),
        "CHUNKQ_QUEUE": url,
        "CHUNKQ_WORKER_SETTINGS": json.dumps(SETTINGS),
        "OMP_NUM_THREADS": "1",
        TOKEN: token,
    }


class Round:
    """One round in a folder of its own."""

    def __init__(self, bench: Bench, folder: Path, url: str, seed: int, report: Report) -> None:
        self.rng = Random(f"round {seed}")
        self.bench, self.folder, self.url, self.report = bench, folder, url, report
        self.token = f"{os.getpid()}-{seed}"
        folder.mkdir()
        self.jobs = [bench.write_job(n, folder) for n in range(len(bench.references))]
        self.env = environment(folder, url, self.token)
        self.running: list[Running] = []
        self.stopped: dict[int, float] = {}
        self.started = 0
        self.title = f"seed {seed}, {url.partition(':')[0]}"

    def run(self, seconds: float) -> None:
        """Disturb, stop, finish, check."""
        try:
            self._disturb(seconds)
            self._stop()
            self._finish()
        finally:
            for process in self._alive():
                self._find(f"process outlives its command: {' '.join(process.cmdline())[-200:]}")
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
            self._wake()
            time.sleep(self.rng.uniform(0.05, 0.6))  # the disturbance itself: nothing is awaited

    def _start(self) -> None:
        words = self.rng.choice(COMMANDS)
        number = self.rng.randrange(len(self.jobs))
        names = {"JOB": str(self.jobs[number]), "OUT": str(self.folder / f"out{number}.zarr")}
        self.started += 1
        log = self.folder / f"log{self.started}"
        sleep = {"NET_SLEEP": str(self.rng.choice((0, 0.01, 0.05)))}
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command(*(names.get(word, word) for word in words)),
                cwd=self.folder,
                env=self.env | sleep,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.running.append(Running(words, process, log))
        self.report.commands[words[0]] += 1

    def _signal(self) -> None:
        """Send a signal to a command or a process below one."""
        if not self.running:
            return
        target = self.rng.choice(self.running)
        number = self.rng.choice(SIGNALS)
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(target.process.pid)
            below = [top, *top.children(recursive=True)]
            old = [p for p in below if time.time() - p.create_time() > GROWN_UP]
            if not old:
                return
            process = self.rng.choice(old)
            process.send_signal(number)
            target.signals.append(number.name)
            self.report.signals[number.name] += 1
            if number == signal.SIGSTOP:
                self.stopped[process.pid] = time.monotonic() + self.rng.choice((0.3, 1.0, 3.0, 5.0))

    def _wake(self, *, all_of_them: bool = False) -> None:
        for pid, until in list(self.stopped.items()):
            if all_of_them or time.monotonic() > until:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                del self.stopped[pid]

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
            self._find(f"traceback of {item.text}: {text[-1500:]}")
        elif code not in CODES and not item.signals:
            self._find(f"exit code {code} of {item.text}: {text[-500:]}")

    def _stop(self) -> None:
        self._wake(all_of_them=True)
        for item in self.running:
            with suppress(ProcessLookupError):
                item.process.terminate()
                item.signals.append("SIGTERM")
        until = time.monotonic() + STOP_SECONDS
        for item in self.running:
            try:
                item.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._find(f"does not end after SIGTERM: {item.text}")
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
                done = subprocess.run(
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
                self._find(f"the last run hangs: {error.stderr!r}")
                continue
            if done.returncode or "Traceback" in done.stderr:
                self._find(f"the last run ends with {done.returncode}: {done.stderr[-1500:]}")
                continue
            self._check_files(number, output)
        left = set(os.listdir(temporary)) - before
        if left:
            self._find(f"the last run leaves in the temporary folder: {sorted(left)}")

    def _check_files(self, number: int, output: Path) -> None:
        stored, expected = stored_files(output), self.bench.references[number]
        strange = sorted(stored.keys() - expected.keys())
        missing = sorted(expected.keys() - stored.keys())
        differing = sorted(n for n in stored.keys() & expected.keys() if stored[n] != expected[n])
        for what, names in {"leaked": strange, "missing": missing, "DIFFERENT": differing}.items():
            if names:
                self._find(f"output files {what}: {len(names)}, such as {names[:3]}")
        folder = Path(f"{output}.chunkq")
        left = [n for n in files_below(folder) if "pieces" in Path(n).parts or ".partial-" in n]
        epochs = [path.name for path in folder.iterdir() if path.is_dir()]
        if left or len(epochs) > 1:
            shown = left[:3] or epochs
            self._find(f"job folder keeps {len(left)} files, {len(epochs)} folders: {shown}")

    def _check_queue(self) -> None:
        executor = open_executor(self.url)
        try:
            left = {
                job: counts for job, counts in executor.jobs().items() if str(self.folder) in job
            }
        finally:
            executor.close()
        if left:
            self._find(f"still on the queue: {left}")

    def _alive(self) -> Iterator[psutil.Process]:
        """Yield the processes of this round that still run, after they had time to end."""
        until = time.monotonic() + 10
        while (found := list(self._own())) and time.monotonic() < until:
            time.sleep(0.05)
        yield from found

    def _own(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                running = process.status() != psutil.STATUS_ZOMBIE
                if running and process.environ().get(TOKEN) == self.token:
                    yield process

    def _find(self, text: str) -> None:
        self.report.findings.append(f"{self.title}: {text}")
        _say(f"  FOUND {self.title}: {text}")


class LongLived:
    """A worker that serves all rounds of a queue, and its file descriptors after each."""

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
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            self.counts.append(sum(p.num_fds() for p in (top, *top.children(recursive=True))))

    def close(self) -> list[str]:
        """Stop it; return what was wrong."""
        found = []
        if self._process.poll() is not None:
            found.append(f"the long-lived worker ended: {self._log.read_text()[-1500:]}")
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            found.append("the long-lived worker does not end after SIGTERM")
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if "Traceback" in self._log.read_text():
            found.append(f"traceback of the long-lived worker: {self._log.read_text()[-1500:]}")
        later = self.counts[FIRST_ROUNDS:]
        if later and later[-1] > later[0] + GROWTH:
            found.append(f"descriptors of the long-lived worker grow: {self.counts}")
        return found


@contextmanager
def queues(folder: Path, backends: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield the URL of a queue of each kind."""
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
    """Run rounds, alternately on each backend, until the time is up; at least one of each."""
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="chunkq-soak-"))
    begun = time.monotonic()
    try:
        bench = Bench(folder, jobs)
        with queues(folder, backends) as urls:
            workers = {name: LongLived(folder / f"worker-{name}", urls[name]) for name in backends}
            try:
                while report.rounds < len(backends) or time.monotonic() - begun < seconds:
                    name = backends[report.rounds % len(backends)]
                    number = seed + report.rounds
                    found = len(report.findings)
                    Round(bench, folder / f"round{number}", urls[name], number, report).run(
                        round_seconds
                    )
                    workers[name].count()
                    report.rounds += 1
                    _say(f"round {report.rounds} ({name}): {len(report.findings) - found} findings")
                    if len(report.findings) == found:
                        shutil.rmtree(folder / f"round{number}")
            finally:
                for name, worker in workers.items():
                    report.findings += [f"{name}: {text}" for text in worker.close()]
                    report.descriptors[name] = worker.counts
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round")
    parser.add_argument("--backend", choices=BACKENDS, help="one queue; both by default")
    parser.add_argument("--json", type=Path, help="where to write the results")
    asked = parser.parse_args()
    backends = (asked.backend,) if asked.backend else BACKENDS
    guardian = SessionGuardian()
    tempfile.tempdir = str(guardian.folder)
    report = soak(asked.minutes * 60, asked.seed, backends)
    report.findings += [f"outlives the soak: {process}" for process in guardian.close()]
    values = {"minutes": asked.minutes, "seed": asked.seed} | report.as_dict()
    _say(json.dumps({k: v for k, v in values.items() if k != "findings"}, indent=1))
    _say(f"{len(report.findings)} findings")
    if asked.json:
        asked.json.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
