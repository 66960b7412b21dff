"""Run trials in separate processes, and watch their time, their memory and their end."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from typing_extensions import override

from chunkq import json_values
from chunkq.system.python_process import python_module
from chunkq_worker.tune.accuracy import Accuracy, compare
from chunkq_worker.tune.search import Measurement, Setting, Stage
from chunkq_worker.tune.space import SearchSpace
from chunkq_worker.tune.trial import TrialOptions, Turn
from chunkq_worker.tune.turns import Runner

TRIAL_MODULE = "chunkq_worker.tune.trial"
POLL_SECONDS = 0.05


class TrialProcess(Runner):
    """A process that has one setting loaded. Its temporary files are in `folder`.

    A process whose resident memory exceeds `memory` bytes is killed.
    """

    def __init__(
        self, options: TrialOptions, folder: Path, env: Mapping[str, str], memory: int | None
    ) -> None:
        self._folder, self._memory, self._peak = folder, memory, 0
        self._stderr_file = (folder / "err").open("a+b")  # the process writes at its end
        self._process = subprocess.Popen(
            python_module(TRIAL_MODULE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr_file,
            env=dict(env),
            start_new_session=True,
        )
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, name="answers", daemon=True).start()
        self._send(options)
        self.loaded = Measurement("no time")

    def load(self, limit: float) -> None:
        """Wait for at most `limit` seconds until the network is loaded, and set `loaded`."""
        self.loaded = self._answer(limit)

    @override
    def turn(self, seconds: float, limit: float) -> Measurement:
        self._send(Turn(min(seconds, max(limit, 0.0))))
        return self._answer(limit)

    @override
    def release(self) -> None:
        self._send(Turn(0.0))

    @override
    def close(self) -> None:
        """Kill the process and those that it started, and delete its temporary files."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._stderr_file):
            if file is not None:
                with suppress(BrokenPipeError):
                    file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, message: Any) -> None:
        pipe = self._process.stdin
        if pipe is not None:
            with suppress(BrokenPipeError):  # it has ended, which `_answer` handles
                pipe.write(json_values.encode(message) + b"\n")
                pipe.flush()

    def _read(self) -> None:
        """Forward the lines of the process; an empty one means that it has ended."""
        pipe = self._process.stdout
        with suppress(OSError, ValueError):  # the pipe was closed
            for line in pipe or ():
                self._answers.put(line)
        self._answers.put(b"")

    def _answer(self, limit: float) -> Measurement:
        """Return the next measurement; status `too large` or `no time` if it exceeds a limit."""
        until = time.monotonic() + limit
        while True:
            with suppress(queue.Empty):
                line = self._answers.get(timeout=POLL_SECONDS)
                return json_values.decode(Measurement, line) if line else self._explain_end()
            with suppress(psutil.Error):
                used = psutil.Process(self._process.pid).memory_info().rss
                self._peak = max(self._peak, used)
            if self._memory is not None and self._peak > self._memory:
                note = "exceeded the memory limit"
                return Measurement("too large", peak_bytes=self._peak, note=note)
            if time.monotonic() > until:
                note = "exceeded the time limit"
                return Measurement("no time", peak_bytes=self._peak, note=note)

    def printed(self) -> list[str]:
        """Return the lines that the process has printed until now."""
        self._stderr_file.seek(0)
        return self._stderr_file.read().decode(errors="replace").strip().splitlines()

    def _explain_end(self) -> Measurement:
        code = self._process.wait()
        self._answers.put(b"")  # for the next request
        if code == -signal.SIGKILL:
            return Measurement("too large", note="killed by the system, out of memory")
        lines = self.printed()
        return Measurement("failed", note=lines[-1] if lines else f"ended with code {code}")


class Trials:
    """Load settings, each in a new process, with temporary files in `folder`.

    The outputs of a setting are compared with those of the setting `plain`, which is loaded first.
    If it does not run, they are compared with those of the first setting that does. `show` gets
    each line that the first process prints until its network is loaded; the others repeat them.
    """

    def __init__(
        self,
        space: SearchSpace,
        plain: Setting,
        folder: Path,
        env: Mapping[str, str],
        *,
        memory: int | None,
        show: Callable[[str], None],
    ) -> None:
        self._show = show
        self._space, self._plain, self._folder = space, plain, folder
        self._env, self._memory = env, memory
        self._reference: Path | None = None
        self._count = 0
        self.plain_failure: str | None = None

    def load(self, setting: Setting, stage: Stage, max_seconds: float) -> TrialProcess:
        """Load a setting within `max_seconds`; compare its outputs in stage `network`."""
        until = time.monotonic() + max_seconds
        if stage == "network" and not self._count and setting != self._plain:
            self._load_plain(max_seconds)
        sample = self._folder / f"{self._count}.npz"
        process = self._start(setting, stage, sample)
        try:
            self._load(process, until - time.monotonic())
        except BaseException:
            process.close()
            raise
        if sample.exists() and (accuracy := self._accuracy(sample)):
            process.loaded = replace(
                process.loaded, difference=accuracy.difference, agreement=accuracy.agreement
            )
        return process

    def _load_plain(self, max_seconds: float) -> None:
        """Keep the outputs of the setting `plain`, or note why there are none."""
        sample = self._folder / "plain.npz"
        process = self._start(self._plain, "network", sample)
        try:
            self._load(process, max_seconds)
        finally:
            process.close()
        if process.loaded.status == "ok":
            self._reference = sample
        else:
            self.plain_failure = process.loaded.note or process.loaded.status

    def _load(self, process: TrialProcess, limit: float) -> None:
        process.load(limit)
        if self._count == 1:
            for line in process.printed():
                self._show(line)

    def _start(self, setting: Setting, stage: Stage, sample: Path) -> TrialProcess:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        options = TrialOptions(
            stage=stage,
            record=self._space.record(setting).to_json().decode(),
            depth=setting.depth,
            folder=str(folder),
            sample=str(sample),
        )
        return TrialProcess(options, folder, self._env, self._memory)

    def _accuracy(self, sample: Path) -> Accuracy | None:
        """Compare a sample with the reference and delete it; without one it becomes the reference.

        Return None if they cannot be compared.
        """
        if self._reference is None:
            self._reference = sample
        reference, outputs = read_sample(self._reference), read_sample(sample)
        if sample != self._reference:
            sample.unlink()
        return compare(reference, outputs, self._space.activations)


def read_sample(path: Path) -> list[npt.NDArray[Any]]:
    """Return the raw outputs of each head (n, C, *Q) that a trial has written."""
    with np.load(path) as file:
        return [file[f"arr_{number}"] for number in range(len(file.files))]
