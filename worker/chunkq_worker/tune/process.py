"""Run trials in separate processes, and watch their time, their memory and their end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from chunkq import json_values
from chunkq_worker.tune.search import Measurement, Setting, Stage
from chunkq_worker.tune.space import SearchSpace
from chunkq_worker.tune.trial import TrialOptions

TRIAL_MODULE = "chunkq_worker.tune.trial"
POLL_SECONDS = 0.05


class Trials:
    """Measure settings, each in a new process, with temporary files in `folder`.

    A process whose resident memory exceeds `memory` bytes is killed. Each trial measures for
    `seconds`, in addition to loading and the first batches.
    """

    def __init__(
        self,
        space: SearchSpace,
        folder: Path,
        env: Mapping[str, str],
        *,
        memory: int | None,
        seconds: float,
    ) -> None:
        self._space, self._folder, self._env = space, folder, dict(env)
        self._memory, self._seconds = memory, seconds
        self._baseline: Path | None = None
        self._count = 0

    def __call__(self, setting: Setting, stage: Stage, max_seconds: float) -> Measurement:
        """Run a setting for at most `max_seconds`; kill its processes before returning."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        sample = self._folder / f"{self._count}.npy"
        options = TrialOptions(
            stage=stage,
            record=self._space.record(setting).to_json().decode(),
            depth=setting.depth,
            seconds=min(self._seconds, max_seconds),
            folder=str(folder),
            sample=str(sample),
        )
        try:
            measurement = self._run(options, folder, max_seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        difference = None
        if sample.exists():
            if self._baseline is None:
                self._baseline = sample
            difference = _difference(self._baseline, sample)
            if sample != self._baseline:
                sample.unlink()
        return measurement if difference is None else replace(measurement, difference=difference)

    def _run(self, options: TrialOptions, folder: Path, max_seconds: float) -> Measurement:
        limit = time.monotonic() + max_seconds
        with (
            (folder / "out").open("w+b") as stdout_file,
            (folder / "err").open("w+b") as stderr_file,
        ):
            process = subprocess.Popen(
                [sys.executable, "-m", TRIAL_MODULE],
                stdin=subprocess.PIPE,
                stdout=stdout_file,
                stderr=stderr_file,
                env=self._env,
                start_new_session=True,
            )
            try:
                pipe = process.stdin
                if pipe is not None:
                    with suppress(BrokenPipeError):  # it has ended, which `_watch` handles
                        pipe.write(json_values.encode(options) + b"\n")
                        pipe.flush()
                failure = self._watch(process, limit)
            finally:
                _kill(process)
            answer, error_line = _last_line(stdout_file), _last_line(stderr_file)
        if failure is not None:
            return failure
        with suppress(ValueError):
            return json_values.decode(Measurement, answer)
        if process.returncode == -signal.SIGKILL:
            return Measurement("too large", note="killed by the system, out of memory")
        return Measurement("failed", note=error_line or f"ended with code {process.returncode}")

    def _watch(self, process: subprocess.Popen[bytes], limit: float) -> Measurement | None:
        """Wait until the process ends; return a measurement if it exceeds a limit, else None."""
        peak = 0
        while process.poll() is None:
            with suppress(psutil.Error):
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            if self._memory is not None and peak > self._memory:
                return Measurement("too large", peak_bytes=peak, note="exceeded the memory limit")
            if time.monotonic() > limit:
                return Measurement("no time", peak_bytes=peak, note="exceeded the time limit")
            time.sleep(POLL_SECONDS)
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a trial and the processes that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()


def _last_line(file: Any) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _difference(baseline_path: Path, sample_path: Path) -> float | None:
    """Return the largest difference of two samples divided by the range of the first one.

    Return None if the shapes differ, because the patches do, and infinity if one sample is not
    finite where the other is.
    """
    baseline, sample = np.load(baseline_path), np.load(sample_path)
    if baseline.shape != sample.shape:
        return None
    finite = np.isfinite(baseline)
    if not np.array_equal(finite, np.isfinite(sample)):
        return float("inf")
    if not finite.any():
        return 0.0
    expected, actual = baseline[finite].astype(np.float64), sample[finite].astype(np.float64)
    value_range = float(np.ptp(expected)) or float(np.abs(expected).max()) or 1.0
    return float(np.abs(expected - actual).max()) / value_range
