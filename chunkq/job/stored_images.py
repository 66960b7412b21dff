"""Images of an output as a job stores them: their folders, axes, arrays and metadata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from chunkq.geometry.axes import Axis, channel_axis, cropped, reduced, scaled, with_unique_names
from chunkq.job.items import Image
from chunkq.job.output_layouts import (
    OutputLayout,
    PrecomputedLayout,
    StoredImage,
    ZarrLayout,
    check_volume,
)
from chunkq.job.record import JobRecord
from chunkq.paths import is_url
from chunkq.plan.plan import Plan

SEALED_NAME = "0"
"""Name of the array of level 0 of a sealed OME-Zarr image on a local disk."""


def new_record(record: JobRecord, *, replaces: bool) -> JobRecord:
    """Return the record of a new job, with an epoch and the metadata of its arrays.

    Set `replaces` if the output path may have content of an earlier job or program.
    """
    epoch = record.new_epoch()
    has_final_name = is_url(record.job.output_path) and not replaces
    name = SEALED_NAME if has_final_name else f"{SEALED_NAME}.{epoch}"
    record = replace(record, epoch=epoch, array=name)
    layout, metadata = layout_of(record), dict[str, str]()
    for image, plan in zip(record.images, record.image_plans(), strict=True):
        for number, view in enumerate(plan.views):
            folder = image_folder(image, view.output.name)
            stored = stored_image(record, image, number)
            for level, array in enumerate(running_names(record, layout.names(stored))):
                documents = layout.array_documents(stored, level, array)
                metadata |= {below(folder, path): text for path, text in documents.items()}
    return replace(record, metadata=metadata)


def layout_of(record: JobRecord) -> OutputLayout:
    """Return how the output of a job is laid out."""
    if record.job.is_precomputed:
        return PrecomputedLayout()
    return ZarrLayout(record.job.zarr_format)


def stored_image(record: JobRecord, image: Image, output: int) -> StoredImage:
    """Return an output of an image as it is stored."""
    plan = record.image_plan(image).of_output(output)
    scale = plan.grid.scale or (1,) * plan.rank
    return StoredImage(
        record.job,
        plan,
        tuple(level_axes(record, image, output)),
        record.levels(image, output),
        tuple(map(float, scale)),
    )


def running_names(record: JobRecord, finals: Sequence[str]) -> tuple[str, ...]:
    """Return the names of arrays while the job runs; `finals` are those on a sealed local disk."""
    suffix = record.array.removeprefix(SEALED_NAME)
    return tuple(f"{final}{suffix}" for final in finals)


def check_outputs(record: JobRecord) -> tuple[str, ...]:
    """Return notes about what a precomputed output does not hold exactly.

    Raises StoreError and JobError if it cannot hold an output of the job.
    """
    if not record.job.is_precomputed:
        return ()
    return tuple(
        note
        for image in record.images
        for number in range(len(record.image_plan(image).outputs))
        for note in check_volume(stored_image(record, image, number), record.job.output)
    )


def level_axes(record: JobRecord, image: Image, output: int) -> Iterator[tuple[Axis, ...]]:
    """Yield the axes of the array of an output of an image, and of each level above it."""
    axes = output_axes(image, record.image_plan(image).of_output(output))
    yield axes
    for level in record.levels(image, output):
        spatial = iter(zip(level.shape, level.total, strict=True))
        yield tuple(reduced(a, *next(spatial)) if a.kind == "space" else a for a in axes)


def image_folder(image: Image, output: str) -> str:
    """Return the name in the output of the OME-Zarr image of an image and one of its outputs.

    It is empty if the output of the job is this image.
    """
    return "/".join(filter(None, (image.name, output)))


def output_axes(image: Image, plan: Plan) -> tuple[Axis, ...]:
    """Return the axes of the array of an output of an image, whose items have this plan.

    `plan` is that of the output (`Plan.of_output`). The axes are the series axes of the image, the
    channels of the network if they are stored, and the spatial axes, which begin and end with the
    region of the job.
    """
    channels = [channel_axis(plan.channels)] if plan.channel_axis else []
    region, spatial_axes = plan.region, image.spatial_axes
    if plan.grid.scale is not None:
        spatial_axes = tuple(map(scaled, spatial_axes, plan.grid.scale))
    spatial = map(cropped, spatial_axes, region.start, region.stop)
    return with_unique_names([*image.series_axes, *channels, *spatial])


def below(folder: str, name: str) -> str:
    """Return the name in the output of an object in a folder of it."""
    return f"{folder}/{name}" if folder else name
