"""Run commands on damaged jobs: none may raise, hang or seal wrong data.

A command fails the check if
- an exception reaches the user, or a traceback or a Python warning is on stderr;
- its exit code is not 0, 1, 2, 3 or 130, or is not 0 without a line on stderr;
- it has `--json`, exits with 0 and prints anything but one JSON value on stdout;
- an output with the state `complete` cannot be read or differs from the reference.

Damaged voxels of the output do not count, because no command reads back the voxels of a committed
chunk. After such damage the voxels are compared only if the job restarts with --overwrite. Damaged
metadata of a sealed output counts for the commands that seal.

After every command, `run` of the same job must complete it or report what is wrong. If it does not
complete the job, `run --overwrite` must complete it or name the path that prevents this.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from unittest import mock

import numpy as np
from chunkq_worker.worker_main import serve

import chunkq.job.job_handle
from chunkq.cli import main
from chunkq.errors import ChunkqError
from chunkq.queue.contract.executor import WorkerOptions
from chunkq.queue.registry import open_executor
from tests.fuzz.damages import Damage, damage, files_of, folders_of
from tests.fuzz.findings import Finding, of_error, of_text
from tests.fuzz.stages import OUTPUT, QUEUE, STAGES, Stages
from tests.harness.volumes import read_output

CODES = frozenset({0, 1, 2, 3, 130})
SECONDS = 30
"""Wall-clock seconds after which a command in this process counts as a hang."""
PROCESS_SECONDS = 80
METADATA = frozenset({"zarr.json", ".zgroup", ".zattrs", ".zarray", ".zmetadata"})
PROCESS_INTERVAL = 25
"""Every such case runs its command in a separate process."""

COMMANDS: dict[str, tuple[str, ...]] = {
    "status": ("status", "OUT"),
    "status --json": ("status", "OUT", "--json"),
    "report": ("report", "OUT"),
    "report --json": ("report", "OUT", "--json"),
    "jobs": ("jobs",),
    "jobs --json": ("jobs", "--json"),
    "retry": ("retry", "OUT"),
    "cancel": ("cancel", "OUT"),
    "finalize": ("finalize", "OUT"),
    "produce": ("produce", "JOB"),
    "produce --resume": ("produce", "JOB", "--resume"),
    "produce --overwrite": ("produce", "JOB", "--overwrite"),
    "run": ("run", "JOB", "--queue", "inprocess://fuzz"),
    "work --burst": ("work", "--burst", "--gpus", "none", "--depth", "1"),
    "work and finalize": ("work", "finalize"),
}
SEALS = frozenset({"finalize", "work and finalize", "run", "run --overwrite"})
"""Commands that verify a complete output. Others need not detect damage to a sealed one."""
COMMON = ("work and finalize", "work and finalize", "finalize", "run")
PROCESSES: dict[str, tuple[str, ...]] = {
    "run": ("run", "JOB", "-w", "1", "--gpus", "none", "--depth", "1"),
    "work --burst": COMMANDS["work --burst"],
    "run --overwrite": ("run", "JOB", "-w", "1", "--gpus", "none", "--overwrite"),
}


class HangError(BaseException):
    """A command took longer than its time limit."""


@dataclass(frozen=True)
class DamagedJob:
    """A case: a damaged job below `work` and the command to run on it."""

    seed: int
    stage: str
    damages: tuple[Damage, ...]
    command: str
    as_process: bool

    @property
    def text(self) -> str:
        damages = "; ".join(damage.text for damage in self.damages)
        mode = " as processes" if self.as_process else ""
        return f"{self.stage}; {damages}; chunkq {self.command}{mode}"

    @property
    def is_voxel_damage(self) -> bool:
        """Whether stored voxels of the output were changed."""
        paths = [path for damage in self.damages if damage.changes_content for path in damage.paths]
        return any(
            path.startswith(f"{OUTPUT}/") and Path(path).name not in METADATA for path in paths
        )

    @property
    def is_output_damage(self) -> bool:
        """Whether a file or folder of the output was damaged."""
        return any(path.startswith(OUTPUT) and not path.startswith(f"{OUTPUT}.")
                   for damage in self.damages for path in damage.paths)  # fmt: skip


def create_case(seed: int, stages: Stages) -> DamagedJob:
    """Restore the seed's stage and damage it."""
    rng = Random(f"damage {seed}")
    stage = rng.choice(STAGES)
    as_process = seed % PROCESS_INTERVAL == 0
    command = rng.choice(list(PROCESSES if as_process else (*COMMANDS, *COMMON)))
    stages.restore(stage)
    damages = []
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        targets, folders = _targets(rng, stages.work)
        damages.append(damage(rng, stages.work, targets, folders))
    return DamagedJob(seed, stage, tuple(damages), command, as_process)


def _targets(rng: Random, work: Path) -> tuple[list[str], list[str]]:
    """Return the files of one part of the job, and its folders; most files store voxels."""
    files = [
        name for name in files_of(work) if not name.startswith(("in.zarr", "net.py", "job.yaml"))
    ]
    voxels = [n for n in files if n.startswith(f"{OUTPUT}/") and Path(n).name not in METADATA]
    metadata = [n for n in files if n.startswith(f"{OUTPUT}/") and Path(n).name in METADATA]
    queue = [n for n in files if n.startswith(QUEUE)]
    ledger = [n for n in files if n.startswith(f"{OUTPUT}.")]
    parts: dict[str, list[str]] = {}
    for name in ledger:  # groups by the path below the job folder, for any layout
        parts.setdefault("/".join(Path(name).parts[1:3])[:12], []).append(name)
    parts |= {"voxels": voxels, "metadata": metadata, "queue": queue, "queue again": queue}
    selected = rng.choice([names for names in parts.values() if names] or [files])
    folders = [n for n in folders_of(work) if not n.startswith("in.zarr")]
    return selected, [name for name in folders if rng.random() < 0.7] or folders


def judge(case: DamagedJob, stages: Stages) -> Finding | None:
    """Run a case's command and the commands after it; return the first finding."""
    finding = _judge_one(case, stages, case.command, as_process=case.as_process)
    return finding or _judge_following(case, stages)


def _judge_following(case: DamagedJob, stages: Stages) -> Finding | None:
    """Judge `run` after the case's command, and `run --overwrite` if the job is incomplete."""
    finding = _judge_one(case, stages, "run")
    if finding is not None or (_last.code == 0 and is_complete(stages.output)):
        return finding
    finding = _judge_one(case, stages, "run", "--overwrite")
    if finding is not None or is_complete(stages.output) or str(stages.work) in _last.err:
        return finding
    return of_text("run --overwrite does not complete", _last.err)


@dataclass
class Result:
    """How a command ended."""

    code: int = 0
    out: str = ""
    err: str = ""


_last = Result()


def _judge_one(
    case: DamagedJob,
    stages: Stages,
    command: str,
    *options: str,
    as_process: bool = False,
) -> Finding | None:
    text = " ".join((command, *options))
    try:
        result = (run_process if as_process else call)(stages, command, *options)
    except subprocess.TimeoutExpired as error:
        return of_text(f"hang of {text}", str(error.stderr or error))
    except BaseException as error:
        return of_error(error)
    _last.__dict__.update(result.__dict__)
    finding = judge_result(result, text)
    if finding is None and is_complete(stages.output):
        overwrites = "--overwrite" in text
        only_reads = command not in SEALS and case.stage == "sealed"
        reports_damage = result.code != 0 and not overwrites
        is_excused = (case.is_voxel_damage and not overwrites) or (
            case.is_output_damage and (only_reads or reports_damage)
        )
        finding = None if is_excused else judge_output(stages, text)
    if finding is None and command == "run" and result.code == 0 and not is_complete(stages.output):
        finding = Finding(f"{text}: exit code 0 without a complete output", result.err)
    return finding


def judge_result(result: Result, command: str) -> Finding | None:
    """Return the finding for the exit code and the output of a command."""
    text = result.out + result.err
    # `status` prints the tracebacks of failed chunks on stdout.
    if "Traceback (most recent call last)" in result.err or "Warning: " in result.err:
        return of_text("traceback", result.err)
    if result.code not in CODES:
        return of_text(f"{command}: exit code {result.code}", text)
    if result.code and not result.err.strip():
        return Finding(f"{command}: exit code {result.code} without a line", text)
    if "--json" in command and result.code == 0:
        try:
            json.loads(result.out)
        except ValueError:
            return Finding(f"{command}: stdout is not JSON", text)
    return None


def judge_output(stages: Stages, command: str) -> Finding | None:
    """Compare an output whose state is `complete` with the reference."""
    try:
        voxels = read_output(stages.output)
    except Exception as error:
        return Finding(f"complete after {command}, unreadable: {type(error).__name__}", str(error))
    if voxels.dtype != stages.reference.dtype or not np.array_equal(voxels, stages.reference):
        return Finding(f"complete after {command}, WRONG VOXELS", f"{voxels.shape} {voxels.dtype}")
    return None


def is_complete(output: Path) -> bool:
    """Return whether the attributes of an output have the state `complete`."""
    try:
        values = json.loads((output / "zarr.json").read_bytes())
        return bool(values["attributes"]["chunkq"]["state"] == "complete")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


# ------------------------------------------------------------------------------- commands


def call(stages: Stages, command: str, *options: str) -> Result:
    """Run a command in this process."""
    chunkq.job.job_handle._cache.clear()  # a new process has no open job
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"CHUNKQ_QUEUE": stages.queue_url}),
        mock.patch("chunkq_producer.worker_command.WorkerCommand.check"),
        contextlib.chdir(stages.folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        limited(SECONDS),
    ):
        if command in ("work --burst", "work and finalize"):
            code = _work(stages.queue_url)
            if command == "work and finalize":
                code = _main(["finalize", str(stages.output)])
        else:
            code = _main(_arguments(stages, COMMANDS[command], options))
    return Result(code, out.getvalue(), err.getvalue())


def _main(arguments: list[str]) -> int:
    with mock.patch.object(sys, "argv", ["chunkq", *arguments]):
        try:
            return main()
        except SystemExit as error:
            return int(error.code or 0)


def _work(url: str) -> int:
    """Run the tasks of the queue as a worker process does."""
    try:
        executor = open_executor(url)
        try:
            status = executor.run_worker(serve, WorkerOptions("fuzz-host:3", burst=True))
        finally:
            executor.close()
    except ChunkqError as error:
        sys.stderr.write(f"chunkq: {error}\n")
        return error.exit_code
    sys.stderr.writelines(f"chunkq: {line}\n" for line in status.lines)
    return 1 if status.code else 0


def run_process(stages: Stages, command: str, *options: str) -> Result:
    """Run a command in a separate process; raise TimeoutExpired after PROCESS_SECONDS."""
    arguments = _arguments(stages, PROCESSES.get(command, COMMANDS.get(command, ())), options)
    process = subprocess.Popen(
        [sys.executable, "-m", "chunkq", *arguments],
        cwd=stages.folder,
        env={**os.environ, "CHUNKQ_QUEUE": stages.queue_url},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=PROCESS_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.send_signal(signal.SIGTERM)
        try:
            _, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            _, err = process.communicate()
        error.stderr = err.encode()
        raise
    return Result(process.returncode, out, err)


def _arguments(stages: Stages, command: tuple[str, ...], options: tuple[str, ...]) -> list[str]:
    """Return the command's arguments with the paths of the output and the job file."""
    paths = {"OUT": str(stages.output), "JOB": str(stages.work / "job.yaml")}
    return [paths.get(part, part) for part in (*command, *options)]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise HangError in a block that exceeds its time limit."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise HangError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
