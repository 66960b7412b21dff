"""What a job computes and costs: its plan, and the check of its network."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from chunkq.create import CheckedJob, check_job
from chunkq.errors import ModelError
from chunkq.job.events import Sink, ignore
from chunkq.job.job_file import Job
from chunkq.job.output_shapes import unknown_heads
from chunkq.queue.contract.executor import default_depth
from chunkq.summaries import html_table, one_line
from chunkq_producer.engine import is_cpu_only
from chunkq_producer.plan_rows import Trial, cache_bytes, volume_plan_rows, volume_plan_values

if TYPE_CHECKING:
    from chunkq.model_check import ModelCheck


@dataclass(frozen=True, repr=False)
class JobPlan:
    """What `chunkq plan` prints of a job.

    `depth` is the number of chunks in flight in a worker process. `trial` is the check of the
    network of a job over volumes, `check` that of a job over images; None if it was not checked.
    """

    job: CheckedJob
    depth: int
    trial: Trial | None = None
    check: ModelCheck | None = None

    @property
    def chunks(self) -> int:
        """Number of chunks that are computed."""
        return self.job.costs.chunks

    @property
    def patches(self) -> int:
        """Number of patches, or of images, that are computed."""
        return self.job.costs.patches

    @property
    def warnings(self) -> tuple[str, ...]:
        """What can be a mistake, one line each."""
        return self.job.all_warnings

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the command, each with its label."""
        if self.job.record.job.is_image:
            from chunkq_producer.image_plan import image_plan_rows  # for such jobs only

            return image_plan_rows(self.job, self.depth, self.check)
        return volume_plan_rows(self.job, self.depth, self.trial)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values: what `chunkq plan --json` prints."""
        if self.job.record.job.is_image:
            from chunkq_producer.image_plan import image_plan_values  # for such jobs only

            return image_plan_values(self.job, self.depth, self.check)
        return volume_plan_values(self.job, self.depth, self.trial)

    def __repr__(self) -> str:
        unit = "images" if self.job.record.job.is_image else "patches"
        counts = {"chunks": str(self.chunks), unit: str(self.patches)}
        return one_line("JobPlan", counts | {"warnings": str(len(self.warnings))})

    def _repr_html_(self) -> str:
        rows: dict[str, str] = {}
        counts = Counter[str]()
        for label, text in self.rows():
            counts[label] += 1
            rows[label if counts[label] == 1 else f"{label} {counts[label]}"] = text
        return html_table("JobPlan", rows)


def plan_job(job: Job, *, depth: int | None = None, emit: Sink = ignore) -> JobPlan:
    """Check a job and return its plan, with the default `depth` of workers. Write nothing.

    Raises JobError or StoreError if the job is invalid.
    """
    if unknown_heads(job):
        from chunkq_producer.check_model import complete_job  # for such jobs only

        job = complete_job(job, emit)
    checked = check_job(job)
    return JobPlan(checked, depth or default_depth(gpu=not is_cpu_only(checked.record.job)))


def with_model_check(plan: JobPlan, emit: Sink = ignore) -> JobPlan:
    """Return a plan with the check of the network, which runs patches and chunks in a process.

    Raises ModelError if the network cannot be used, and JobError if a dtype cannot hold values.
    """
    if not plan.job.record.job.is_image:
        return replace(plan, trial=_run_trial(plan.job, plan.depth, emit))
    from chunkq_producer.check_model import check_model

    return replace(plan, check=check_model(plan.job.record, depth=plan.depth, emit=emit))


def _run_trial(job: CheckedJob, depth: int, emit: Sink) -> Trial:
    """Run the network on patches, and whole chunks. Raises ModelError."""
    from chunkq_producer.check_model import check_model
    from chunkq_producer.finalizer_memory import measure_finalizer_memory

    check = check_model(job.record, depth=depth, emit=emit)
    if check.patches is None or check.memory is None:
        raise ModelError("model_config: the check of the network ran no patches")
    has_blocks = job.costs.finalized_blocks > 0
    finalizer_bytes = measure_finalizer_memory(job.record) if has_blocks else None
    memory = check.memory
    if memory.worker_bytes is not None:
        memory = replace(memory, worker_bytes=memory.worker_bytes + cache_bytes(job))
    return Trial(replace(check, memory=memory), check.patches, memory, finalizer_bytes)
