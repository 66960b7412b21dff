"""Trials in processes of their own, watched from outside: time, memory and how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from chunkq_worker.tune.search import Measurement, Setting, Stage
from chunkq_worker.tune.space import SearchSpace
from chunkq_worker.tune.trial import TrialOptions

MODULE = "chunkq_worker.tune.trial"
POLL_SECONDS = 0.05


class Trials:
    """Measures settings, each in a fresh process, in a temporary folder.

    `memory` is the most that a process may hold, in bytes; beyond it, it is ended at once.
    `seconds` is how long each one measures, loading and the first batches not counted.
    """

    def __init__(
        self,
        space: SearchSpace,
        folder: Path,
        environment: Mapping[str, str],
        *,
        memory: int | None,
        seconds: float,
    ) -> None:
        self._space, self._folder, self._environment = space, folder, dict(environment)
        self._memory, self._seconds = memory, seconds
        self._first: Path | None = None
        self._count = 0

    def __call__(self, setting: Setting, stage: Stage, most_seconds: float) -> Measurement:
        """Run a setting for at most so many seconds; nothing of it is left running."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        sample = self._folder / f"{self._count}.npy"
        orders = TrialOptions(
            stage=stage,
            record=self._space.record(setting).to_json().decode(),
            depth=setting.depth,
            seconds=min(self._seconds, most_seconds),
            folder=str(folder),
            sample=str(sample),
        )
        try:
            found = self._run(orders, folder, most_seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        difference = None
        if sample.exists():
            if self._first is None:
                self._first = sample
            difference = _difference(self._first, sample)
            if sample != self._first:
                sample.unlink()
        return found if difference is None else _with(found, difference=difference)

    def _run(self, orders: TrialOptions, folder: Path, most_seconds: float) -> Measurement:
        limit = time.monotonic() + most_seconds
        with (folder / "out").open("w+b") as out, (folder / "err").open("w+b") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=self._environment,
                start_new_session=True,
            )
            try:
                pipe = process.stdin
                if pipe is not None:
                    with suppress(BrokenPipeError):  # it has died, which is seen below
                        pipe.write(json.dumps(asdict(orders)).encode() + b"\n")
                        pipe.flush()
                ended = self._watch(process, limit)
            finally:
                _end(process)
            said, complaint = _last_line(out), _last_line(err)
        if ended is not None:
            return ended
        with suppress(ValueError, TypeError):
            return Measurement(**json.loads(said))
        if process.returncode == -signal.SIGKILL:
            return Measurement("too large", note="the system ended it for want of memory")
        return Measurement("failed", note=complaint or f"ended with {process.returncode}")

    def _watch(self, process: subprocess.Popen[bytes], limit: float) -> Measurement | None:
        """Wait for its end; returns why it has to be ended before that, else None."""
        peak = 0
        while process.poll() is None:
            with suppress(psutil.Error):
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            if self._memory is not None and peak > self._memory:
                return Measurement("too large", peak_bytes=peak, note="more memory than allowed")
            if time.monotonic() > limit:
                return Measurement("no time", peak_bytes=peak, note="the time was up")
            time.sleep(POLL_SECONDS)
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a trial and whatever it has started."""
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


def _with(found: Measurement, **more: Any) -> Measurement:
    return Measurement(**asdict(found) | more)


def _difference(one: Path, other: Path) -> float | None:
    """Return the largest difference of two samples as a share of the first one's range.

    None where their shapes differ: those are of other patches. Infinite where one is finite and
    the other is not.
    """
    first, second = np.load(one), np.load(other)
    if first.shape != second.shape:
        return None
    finite = np.isfinite(first)
    if not np.array_equal(finite, np.isfinite(second)):
        return float("inf")
    if not finite.any():
        return 0.0
    values, others = first[finite].astype(np.float64), second[finite].astype(np.float64)
    spread = float(np.ptp(values)) or float(np.abs(values).max()) or 1.0
    return float(np.abs(values - others).max()) / spread
