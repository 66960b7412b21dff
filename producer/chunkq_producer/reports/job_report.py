"""A job's report as it stands: what `report.json` holds, or the same figures so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkq.finalize import job_completion, job_report
from chunkq.job_handle import JobHandle
from chunkq.paths import without_secret
from chunkq.timing import Timing, Worker


@dataclass(frozen=True)
class JobReport:
    """A job's figures and what they come to. `sealed` jobs are over, complete or not."""

    output: str
    sealed: bool
    values: dict[str, Any]
    times: Timing

    @property
    def conclusion(self) -> str:
        """What the devices did, in one sentence."""
        return str(self.values["conclusion"])

    @property
    def advice(self) -> str | None:
        """What would make such a job faster, if the figures say so."""
        found: str | None = self.values["advice"]
        return found

    @property
    def missing(self) -> int:
        """How many chunks are not computed."""
        return len(self.values["missing"])

    @property
    def state(self) -> str:
        """How far the job is."""
        times = self.times
        if self.sealed:
            return "complete" if not self.missing else f"sealed WITHOUT {self.missing} chunks"
        blocks = f"{times.finalized_blocks} of {times.planned_blocks} blocks finalized"
        return f"so far: {times.chunks} of {times.planned_chunks} chunks done, {blocks}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"output": self.output, "sealed": self.sealed, **self.values}

    def labels(self) -> dict[str, str]:
        """Return a short label for every worker: host and device, its own part where needed."""
        short = {name: _worker_label(worker) for name, worker in self.times.workers.items()}
        counts: dict[str, int] = {}
        for label in short.values():
            counts[label] = counts.get(label, 0) + 1
        return {
            name: label if counts[label] == 1 else f"{label} {name.rpartition(':')[2][:4]}"
            for name, label in short.items()
        }


def load_job_report(job: JobHandle) -> JobReport:
    """Take a job's figures from its report, or from its commit records where that has none."""
    output = without_secret(job.folder.output)
    report = job.ledger.read_report()
    if report is not None:
        try:
            return JobReport(output, True, report, Timing.from_dict(report))
        except (KeyError, TypeError):  # written by an older chunkq
            missing = report["missing"]
            values = job_report(job) | {"missing": missing}
            return JobReport(output, True, values, Timing.from_dict(values))
    values = job_report(job, job_completion(job).unfinished)
    sealed = job.ledger.is_sealed() and job.output.is_sealed()  # the report alone is damaged
    return JobReport(output, sealed, values, Timing.from_dict(values))


def _worker_label(worker: Worker) -> str:
    device = worker.device if worker.device in ("", "cpu") else f"GPU {worker.device}"
    return f"{worker.host} {device}".strip()
