"""Waiting tasks, as a worker sees them: when to look into a job folder, when to open a gate."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from chunkq.errors import JobError, MissingJobError
from chunkq.job.job_path import printable_path
from chunkq.job.tasks import JobId
from chunkq.queue.contract.executor import Executor, GateState, WorkerOptions

log = logging.getLogger("chunkq.queue")

Gate = tuple[JobId, str]
"""The job and the kind of task behind a gate."""


@dataclass
class _Check:
    """The last look into a job folder: its result, and when (s, monotonic) the next one is due."""

    state: GateState
    next: float
    pause: float


class GateWatch:
    """The gates that one worker watches, with growing pauses between looks into a job folder.

    `waiting` are the states of the gates at the last call of `open_ready`.
    """

    def __init__(self, queue: Executor, options: WorkerOptions) -> None:
        self._queue, self._options = queue, options
        self._checks: dict[Gate, _Check] = {}
        self._next = 0.0
        self.waiting: dict[Gate, GateState] = {}

    @property
    def blocked(self) -> list[Gate]:
        """Gates that cannot open."""
        return [gate for gate, state in self.waiting.items() if state is GateState.BLOCKED]

    @property
    def is_opening(self) -> bool:
        """Whether a gate that was opened has been closed again by a task."""
        return GateState.OPEN in self.waiting.values()

    def reset(self, job: JobId) -> None:
        """Look at once when no task can be reserved: a stage of the job may be complete.

        Other threads may call this during `open_ready`.
        """
        self._next = 0.0
        for gate in list(self._checks):
            if gate[0] == job:
                self._checks.pop(gate, None)

    def open_ready(self, *, at_once: bool) -> bool:
        """Open the gates that may open; return whether any was opened.

        Without `at_once`, do nothing until the next look for waiting tasks is due.
        """
        now, opened = time.monotonic(), False
        if not at_once and now < self._next:
            return False
        self._next = now + self._options.settings.waiting_poll
        self.waiting = {}
        for gate in self._queue.waiting(self._options):
            check = self._checks.get(gate)
            if check is None or now >= check.next:
                check = self._look(gate, check)
                if check.state is GateState.OPEN:
                    self._queue.open_gate(*gate)
                    opened = True
            self.waiting[gate] = check.state
        return opened

    def _look(self, gate: Gate, last: _Check | None) -> _Check:
        """Look into the job folder of a gate, and store the result."""
        settings, (job, kind) = self._options.settings, gate
        try:
            state = self._options.check_gate(job, kind)
        except (MissingJobError, JobError) as error:
            log.warning("%s; skipping its waiting tasks (epoch %s)", error, job.epoch)
            self._options.skipped_jobs.add(job)
            state = GateState.CLOSED
        except OSError as error:
            log.warning("%s: cannot be read: %s", printable_path(job.path), error)
            state = GateState.BLOCKED
        pause = settings.waiting_poll if last is None else 2 * last.pause
        pause = min(pause, settings.longest_gate_pause)
        check = self._checks[gate] = _Check(state, time.monotonic() + pause, pause)
        return check
