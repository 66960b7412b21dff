"""Run the commands `run` and `tune` for gpu.py: durations, and bytes after a worker's death."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks import gpu_cases
from benchmarks.gpu_cases import Case
from benchmarks.gpu_server import HERE, tree_environment

Figures = dict[str, Any]
COMMITS_BEFORE_KILL = 4
POLL_SECONDS = 0.005


def write_job(
    case: Case, volume: str, folder: Path, device: str, name: str, **keys: Any
) -> tuple[Path, Path]:
    """Write a job file; return its path and the output's."""
    source, output = gpu_cases.volume_path(case, volume, folder), folder / f"{name}.zarr"
    values = gpu_cases.job(case, folder, device, **keys)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"input": str(source), "output": str(output), **values}))
    return path, output


def timed(case: Case, volume: str, folder: Path, device: str, seconds: float) -> Figures:
    """Run one job as a command; return its seconds and those from its first to its last chunk."""
    job, output = write_job(case, volume, folder, device, f"command-{case.name}-{volume}")
    started = time.perf_counter()
    _run(job, 1, seconds)
    total = time.perf_counter() - started
    report = next(iter(Path(f"{output}.chunkq").rglob("report.json")))
    values = json.loads(report.read_text())
    return {
        "seconds": total,
        "work_seconds": values["work_seconds"],
        "patches": values["patches"],
        "workers": values["workers"],
    }


def tuned(case: Case, volume: str, folder: Path, device: str, seconds: float) -> Figures:
    """Run `chunkq tune` for at most about `seconds`; return its lines and the keys that it set.

    Only options of the network are tried.
    """
    job, _ = write_job(case, volume, folder, device, f"tune-{case.name}-{volume}")
    before = yaml.safe_load(job.read_text())
    command = [sys.executable, "-W", "ignore", "-m", "chunkq", "tune", str(job)]
    command += ["--keep", "batch,depth,chunksize", "--all-options"]
    started = time.perf_counter()
    result = subprocess.run(
        [*command, "--max-time", f"{seconds:.0f}"],
        env=tree_environment(HERE) | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    total = time.perf_counter() - started
    if result.returncode:
        raise RuntimeError(f"chunkq tune ended with {result.returncode}: {result.stderr[-3000:]}")
    after = yaml.safe_load(job.read_text())
    return {
        "seconds": total,
        "lines": result.stdout.splitlines(),
        "set": {
            key: value
            for section in ("model_config", None)
            for key, value in (after[section] if section else after).items()
            if key != "model_config" and value != (before[section] if section else before).get(key)
        },
    }


def same_bytes(case: Case, volume: str, folder: Path, device: str, seconds: float) -> Figures:
    """Compare the bytes of one worker, of two, and of one that is killed in the middle.

    The three jobs run at the same time.
    """
    chunksize = [case.patch] * 3
    names = ("one", "two", "killed")
    jobs = {
        name: write_job(case, volume, folder, device, f"bytes-{name}", chunksize=chunksize)
        for name in names
    }
    with ThreadPoolExecutor(len(names)) as pool:
        futures = [
            pool.submit(_run, jobs["one"][0], 1, seconds),
            pool.submit(_run, jobs["two"][0], 2, seconds),
            pool.submit(_run_and_kill, *jobs["killed"], seconds),
        ]
        *_, killed = [future.result() for future in futures]
    digests = {name: digest(output) for name, (_, output) in jobs.items()}
    chunks = len(_commits(jobs["one"][1]))
    return {
        "equal": len(set(digests.values())) == 1,
        "killed_in_the_middle": 0 < killed["commits_at_kill"] < chunks,
        "chunks": chunks,
        **killed,
    }


def digest(output: Path) -> str:
    """Return a hash of the names and contents of all storage chunks of an output."""
    result = hashlib.sha256()
    metadata = "zarr.json"
    for path in sorted(p for p in output.rglob("*") if p.is_file() and p.name != metadata):
        result.update(str(path.relative_to(output)).encode() + b"\0" + path.read_bytes())
    return result.hexdigest()


def _command(job: Path, workers: int) -> list[str]:
    queue = f"sqlite://{job.with_suffix('.db')}"
    command = [sys.executable, "-W", "ignore", "-m", "chunkq", "run", str(job)]
    return [*command, "-w", str(workers), "--queue", queue]


def _run(job: Path, workers: int, seconds: float) -> Figures:
    result = subprocess.run(
        _command(job, workers),
        env=tree_environment(HERE),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"chunkq run ended with {result.returncode}: {result.stderr[-3000:]}")
    return {}


def _run_and_kill(job: Path, output: Path, seconds: float) -> Figures:
    """Run a job, kill its worker process after some commits, and run it again if it failed."""
    process = subprocess.Popen(
        _command(job, 1),
        env=tree_environment(HERE),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline, commits, killed = time.monotonic() + seconds, 0, 0
        while process.poll() is None and time.monotonic() < deadline:
            commits = len(_commits(output))
            if commits >= COMMITS_BEFORE_KILL:
                killed = _kill_workers(process.pid)
                break
            time.sleep(POLL_SECONDS)
        exit_status = process.wait(max(1.0, deadline - time.monotonic()))
    finally:
        process.kill()
        process.wait()
    if exit_status:
        _run(job, 1, seconds)
    return {"commits_at_kill": commits, "processes_killed": killed, "exit_status": exit_status}


def _commits(output: Path) -> list[Path]:
    folder = Path(f"{output}.chunkq")
    return [path for done in folder.glob("*/done/infer/*") for path in done.iterdir()]


def _kill_workers(pid: int) -> int:
    killed = 0
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "chunkq_worker.worker_process" in child.cmdline():
                    child.kill()
                    killed += 1
    return killed
