"""Trying the network in a process of its own, so that this one stays free of its libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from chunkq.ledger import JobRecord

PROBE_MODULE = "chunkq_worker.probe"


@dataclass(frozen=True, slots=True)
class Probe:
    """What one batch of zeros showed: an error in one line, or seconds and patches per batch."""

    error: str | None
    seconds: float | None = None
    batch: int | None = None


def probe(record: JobRecord) -> Probe:
    """Load a job's network here and run one batch of zeros."""
    done = subprocess.run(
        [sys.executable, "-m", PROBE_MODULE],
        input=record.to_json(),
        capture_output=True,
        check=False,
    )
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return Probe(f"the network cannot be tried here: {' '.join(last) or 'no answer'}")
    return Probe(**json.loads(lines[-1]))
