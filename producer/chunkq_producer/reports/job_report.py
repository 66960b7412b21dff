"""Report of a job: the contents of `report.json`, or the figures of an unfinished job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from chunkq import json_values
from chunkq.finalize import job_report
from chunkq.job.job_handle import JobHandle
from chunkq.job.model_config import STOCHASTIC
from chunkq.job.tasks import chunk_count
from chunkq.paths import without_secret
from chunkq.plan.output_text import stored_text
from chunkq.stages.completion import job_completion
from chunkq.summaries import html_table, one_line
from chunkq.timing.timing import Timing, Worker
from chunkq.units import device_cost, duration


@dataclass(frozen=True, repr=False)
class JobReport:
    """Timing and diagnosis of a job. A `sealed` job is over, complete or not."""

    output: str
    sealed: bool
    values: dict[str, Any]
    timing: Timing
    price: float | None = None
    """Price of a device for an hour."""

    @property
    def images(self) -> dict[str, Any] | None:
        """The figures of a job over images, see `image_values`; None for another job."""
        return self.values.get("images")

    @property
    def unit(self) -> str:
        """What patches are: `images` in a job over images."""
        return "patches" if self.images is None else "images"

    @property
    def cost(self) -> float | None:
        """Price of the time of all workers, each with one device; None without a price."""
        seconds = sum(worker.seconds for worker in self.timing.workers.values())
        return device_cost(seconds, self.price)

    @property
    def conclusion(self) -> str:
        """One sentence on device utilization and the largest losses."""
        return str(self.values["conclusion"])

    @property
    def advice(self) -> str | None:
        """How to make such a job faster; None without a clear bottleneck."""
        advice: str | None = self.values["advice"]
        return advice

    @property
    def precision(self) -> str:
        """Precision of the network's arithmetic."""
        return str(self.values["precision"])

    @property
    def outputs(self) -> list[str]:
        """What is stored in each output."""
        return [stored_text(values) for values in self.values["outputs"]]

    @property
    def is_stochastic(self) -> bool:
        """Whether the network is random."""
        return bool(self.values["stochastic"])

    @property
    def warnings(self) -> list[str]:
        """Lines of the finalizer about the output, without the one of `is_stochastic`."""
        return [line for line in self.values.get("warnings", ()) if line != STOCHASTIC]

    @property
    def missing(self) -> int:
        """Number of chunks that are not computed."""
        return len(self.values["missing"])

    @property
    def state(self) -> str:
        """Progress of the job in one line."""
        timing = self.timing
        if self.sealed:
            return (
                "complete"
                if not self.missing
                else f"incomplete, {chunk_count(self.missing)} missing"
            )
        done = f"so far: {timing.chunks} of {timing.planned_chunks} chunks done"
        if self.images is not None:
            return done
        return f"{done}, {timing.finalized_blocks} of {timing.planned_blocks} blocks finalized"

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        cost = {} if self.price is None else {"price": self.price, "cost": self.cost}
        return {"output": self.output, "sealed": self.sealed, **self.values, **cost}

    def __repr__(self) -> str:
        return one_line("JobReport", self._summary())

    def _repr_html_(self) -> str:
        return html_table("JobReport", self._summary())

    def _summary(self) -> dict[str, str]:
        timing = self.timing
        rows = {
            "output": self.output,
            "state": self.state,
            self.unit: str(timing.patches),
            "time": duration(timing.wall_seconds),
            "conclusion": self.conclusion,
        }
        return rows | ({"advice": self.advice} if self.advice else {})

    def labels(self) -> dict[str, str]:
        """Return a label for every worker: host and device, plus a suffix if several share them."""
        short = {name: _worker_label(worker) for name, worker in self.timing.workers.items()}
        counts = Counter(short.values())
        return {
            name: label if counts[label] == 1 else f"{label} {name.rpartition(':')[2][:4]}"
            for name, label in short.items()
        }


def load_job_report(job: JobHandle) -> JobReport:
    """Read the report of a job, or compute it from the commit records if there is none."""
    output, price = without_secret(job.folder.output), job.record.job.price
    report = job.ledger.read_report()
    if report is not None:
        try:
            return JobReport(output, True, report, _timing(report), price)
        except ValueError:  # written by an older version
            missing = report["missing"]
            values = job_report(job) | {"missing": missing}
            return JobReport(output, True, values, _timing(values), price)
    values = job_report(job, job_completion(job).missing())
    sealed = job.ledger.is_sealed() and job.output.is_sealed()  # only the report is damaged
    return JobReport(output, sealed, values, _timing(values), price)


def _timing(report: dict[str, Any]) -> Timing:
    """Return the timing in a report, which has other keys too. Raise ValueError if it has none."""
    names = {field.name for field in fields(Timing)}
    values = {name: value for name, value in report.items() if name in names}
    return json_values.from_values(Timing, values)


def _worker_label(worker: Worker) -> str:
    """Return host and device."""
    device = worker.device if worker.device in ("", "cpu") else f"GPU {worker.device}"
    return f"{worker.host} {device}".strip()
