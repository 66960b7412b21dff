"""The pyramid that a job names, for each output of an image."""

from __future__ import annotations

from collections.abc import Sequence

from chunkq.geometry.axis_units import voxel_sizes
from chunkq.geometry.levels import Level, pyramid_levels
from chunkq.job.items import Image
from chunkq.job.job_file import Job
from chunkq.plan.item_tasks import ItemTasks
from chunkq.plan.outputs import OutputSpec
from chunkq.plan.plan import Plan
from chunkq.plan.pyramid import Method, Pyramid

IMAGE_RANKS = (2, 3)
"""Numbers of spatial axes of images in OME-Zarr."""


def levels_of(job: Job, image: Image, plan: Plan, output: int) -> tuple[Level, ...]:
    """Return the levels above level 0 of an output of an image, whose items have this plan."""
    if job.pyramid is None:
        return ()
    view, scale = plan.of_output(output), plan.outputs[output].scale
    sizes: Sequence[float] = voxel_sizes(image.spatial_axes)
    if scale:
        sizes = [size * float(factor) for size, factor in zip(sizes, scale, strict=True)]
    count = None if job.pyramid.levels == "auto" else job.pyramid.levels
    return pyramid_levels(
        view.region.shape, sizes, view.storage_chunks, view.grid.written, view.chunksize, count
    )


def method_of(job: Job, output: OutputSpec) -> Method:
    """Return how the levels of an output are made."""
    method = None if job.pyramid is None else job.pyramid.method
    return method or ("mean" if output.is_average else "mode")


def pyramids_of(job: Job, image: Image, tasks: ItemTasks) -> tuple[Pyramid, ...]:
    """Return the pyramid of each output of an item with these tasks; empty if the job has none."""
    if job.pyramid is None:
        return ()
    plan = tasks.plan
    return tuple(
        Pyramid(plan.of_output(n), tasks, levels_of(job, image, plan, n), method_of(job, output))
        for n, output in enumerate(plan.outputs)
    )


def pyramid_doubts(job: Job, plan: Plan) -> list[str]:
    """Return a line for a method that does not suit an output."""
    method = None if job.pyramid is None else job.pyramid.method
    if method == "mean" and not all(output.is_average for output in plan.outputs):
        return [
            "pyramid.method: mean of labels gives classes that are not there; use mode or nearest, "
            "or leave it out"
        ]
    if method == "mode" and any(output.is_average for output in plan.outputs):
        return [
            "pyramid.method: mode of averages is mostly the smallest of different values; use "
            "mean, or leave it out"
        ]
    return []


def pyramid_problems(job: Job, image: Image, plan: Plan) -> list[str]:
    """Return a line for each reason why the pyramids of an image are impossible."""
    if job.pyramid is None:
        return []
    if plan.rank not in IMAGE_RANKS:
        return [
            "pyramid: OME-Zarr has images of two or three spatial axes, and the output has "
            f"{plan.rank}; remove it"
        ]
    wanted = job.pyramid.levels
    fewest = min(1 + len(levels_of(job, image, plan, n)) for n in range(len(plan.outputs)))
    if wanted == "auto" or wanted <= fewest:
        return []
    return [
        f"pyramid.levels: {wanted}, but level {fewest - 1} has one voxel; use at most {fewest}, or "
        "auto"
    ]
