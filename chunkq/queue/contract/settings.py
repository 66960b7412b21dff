"""Lease, poll and restart times of a worker and its supervisor."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from typing import Self

from chunkq.errors import JobError
from chunkq.system.interrupts import SAME_SIGNAL_SECONDS

SETTINGS_VARIABLE = "CHUNKQ_WORKER_SETTINGS"
"""A JSON object that overrides settings by name; worker processes inherit it."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Settings of one worker and of its supervisor; times are in seconds.

    - A worker that does not renew its leases for `lease` loses its tasks.
    - An idle worker polls the queue every `shortest_poll`, later every `longest_poll`.
    - An idle worker looks for waiting tasks every `waiting_poll`, and into the folder of a job
      whose tasks wait at the same interval, later every `longest_gate_pause`.
    - The first task of a job in a process, which also loads the network, may take
      `first_time_limit`. Later tasks may take `time_limit_factor` times the longest one so far,
      but not less than `least_time_limit`.
    - A worker skips a job after `same_failures_at_first` consecutive chunks failed with one cause.
      After the first success of the job it takes `same_failures_later`, because the cause may be
      limited to one region of the volume.
    - A job that needs a new worker process waits for at most `longest_replacement_delay` while
      this process has other tasks.
    - A worker waits `server_answer` for each response of a queue server.
    - A process that ends within `early_death` of its start counts as an early death. After
      `early_deaths` of them the supervisor gives up. It waits `restart_delay` before a restart,
      twice as long after each death, at most `longest_restart_delay`.
    - The supervisor restarts processes for `queue_absence` while the queue cannot be reached.
    - Two signals within `same_signal` count as one, because a process group receives each twice.
    """

    lease: float = 20.0
    shortest_poll: float = 0.1
    longest_poll: float = 0.5
    waiting_poll: float = 2.0
    longest_gate_pause: float = 30.0
    first_time_limit: float = 3600.0
    least_time_limit: float = 600.0
    time_limit_factor: float = 10.0
    same_failures_at_first: int = 5
    same_failures_later: int = 25
    longest_replacement_delay: float = 600.0
    server_answer: float = 30.0
    early_death: float = 10.0
    early_deaths: int = 5
    restart_delay: float = 0.5
    longest_restart_delay: float = 30.0
    queue_absence: float = 600.0
    same_signal: float = SAME_SIGNAL_SECONDS

    @classmethod
    def from_environment(cls) -> Self:
        """Return the settings with the overrides of the environment.

        Raises JobError for an unknown name, or a value that is not a number of at least 0.
        """
        text = os.environ.get(SETTINGS_VARIABLE, "")
        if not text:
            return cls()
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise JobError(f'{SETTINGS_VARIABLE}: expected a JSON object such as {{"lease": 5}}')
        names = [field.name for field in fields(cls)]
        for name, value in values.items():
            if name not in names:
                raise JobError(
                    f"{SETTINGS_VARIABLE}: unknown setting {name!r}; use one of {', '.join(names)}"
                )
            if type(value) not in (int, float) or not value >= 0:
                raise JobError(
                    f"{SETTINGS_VARIABLE}: {name}: expected a number of at least 0, found {value!r}"
                )
        return cls(**values)


def override_settings(**values: float) -> None:
    """Set settings in the environment of this process and of the processes that it starts."""
    current = json.loads(os.environ.get(SETTINGS_VARIABLE) or "{}")
    os.environ[SETTINGS_VARIABLE] = json.dumps(current | values)
