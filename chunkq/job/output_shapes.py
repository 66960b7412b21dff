"""Shapes of the heads of a network: those that a job declares, and those that one batch shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chunkq.job.job_file import Job
from chunkq.job.model_config import ModelConfig
from chunkq.plan.outputs import HeadName


def head_names(job: Job) -> tuple[HeadName, ...]:
    """Return the distinct heads of a job's outputs, in the order of the outputs."""
    return tuple(dict.fromkeys(config.head for config in job.output_configs().values()))


def declared_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the declared shapes by their key below `model_config`."""
    key, shapes = "model_output_shape", model.model_output_shape
    if isinstance(shapes, dict):
        return {f"{key}.{head}": shape for head, shape in shapes.items()}
    return {} if shapes is None else {key: shapes}


def unknown_heads(job: Job) -> tuple[HeadName, ...]:
    """Return the heads whose shape one batch has to show; none without the key `outputs`."""
    if job.outputs is None:
        return ()
    heads = head_names(job)
    return tuple(head for head in heads if job.model.of_head(head).output_shape is None)


def with_output_shapes(job: Job, shapes: Mapping[HeadName, Sequence[int]]) -> Job:
    """Return a job that declares these shapes too, as the network returns them."""
    if set(shapes) <= {None}:
        only = tuple(shapes[None]) if shapes else job.model.model_output_shape
        return job.with_model(model_output_shape=only)
    declared = job.model.model_output_shape
    by_head = dict(declared) if isinstance(declared, dict) else {}
    by_head |= {str(head): tuple(shape) for head, shape in shapes.items()}
    return job.with_model(model_output_shape=by_head)


def from_complete_job(job: Job, complete: Job, ignored: Sequence[str] = ()) -> Job | None:
    """Return the job with the unknown shapes of a job that is equal apart from these.

    The keys `ignored` may differ. None if others do, or if the shapes are not there.
    """
    shapes = {
        head: shape
        for head in unknown_heads(job)
        if (shape := complete.model.of_head(head).output_shape) is not None
    }
    filled = with_output_shapes(job, shapes)
    first, second = (
        {key: value for key, value in one.as_dict().items() if key not in ignored}
        for one in (filled, complete)
    )
    return filled if not unknown_heads(filled) and first == second else None
