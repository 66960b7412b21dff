"""The files of a job whose output is not Zarr: their paths, and what each of them contains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkq.errors import JobError
from chunkq.job.items import Image
from chunkq.job.job_path import job_folder_of
from chunkq.job.output_name import SLP, table_suffix
from chunkq.job.record import JobRecord
from chunkq.job.stored_images import output_axes
from chunkq.paths import join

if TYPE_CHECKING:
    from chunkq.writers.base import FileWriter

ERRORS = "errors.parquet"
"""Name of the table of errors, in the folder of the job's epoch."""
ERRORS_NUMBER, TABLE_NUMBER = 0, 1
"""Numbers of the files of a job over images; the errors are written first."""
MANY_DATASETS = "hdf5"
"""Format of which one file has all outputs of an image."""


@dataclass(frozen=True)
class ExportedFile:
    """A file that a job writes of one of its images.

    number   its number among the files of the image
    outputs  numbers of the outputs that it contains; none for a table
    """

    path: str
    image: Image
    number: int
    outputs: tuple[int, ...]


def exported_files(record: JobRecord) -> Iterator[ExportedFile]:
    """Yield the files of a job, image by image; none if its output is Zarr.

    The files of several images are in a folder, and have the names of the images. Several outputs
    are a file each, with the name of the output before the suffix, or datasets of an HDF5 file.
    A job over images writes a table, and in its job folder that of the errors.
    """
    if record.job.is_image:
        yield from _tables(record)
        return
    name = record.file_name
    if name is None:
        return
    for image in record.images:
        base = (
            join(name.folder, name.stem, image.name) if image.name else join(name.folder, name.stem)
        )
        specs = record.image_plan(image).outputs
        if name.format == MANY_DATASETS:
            yield ExportedFile(base + name.suffix, image, 0, tuple(range(len(specs))))
            continue
        for number, spec in enumerate(specs):
            label = f".{spec.name}" if spec.name else ""
            yield ExportedFile(f"{base}{label}{name.suffix}", image, number, (number,))


def _tables(record: JobRecord) -> Iterator[ExportedFile]:
    """Yield the table of errors and the table of results; of a new job the second one only."""
    image = record.images[0]
    if record.epoch:
        folder = join(job_folder_of(record.job.output), record.epoch)
        yield ExportedFile(join(folder, ERRORS), image, ERRORS_NUMBER, ())
    yield ExportedFile(record.job.output, image, TABLE_NUMBER, ())


def writers(record: JobRecord, file: ExportedFile) -> list[FileWriter]:
    """Return the writer of each output of a file. Raises StoreError if the format lacks it."""
    name = record.file_name
    if name is None:
        raise ValueError("the output of the job is Zarr")
    from chunkq.writers.base import ImageToWrite, StoredValues, WriterOptions
    from chunkq.writers.file_space import file_space
    from chunkq.writers.registry import FILE_WRITERS

    plan = record.image_plan(file.image)
    file_writers: list[FileWriter] = []
    for number in file.outputs:
        view = plan.of_output(number)
        spec, scale = view.output, plan.outputs[number].scale
        axes = output_axes(file.image, view)
        spatial = [axis for axis in axes if axis.kind == "space"]
        leading, values = (1,) * (len(axes) - len(spatial)), spec.value_range
        image = ImageToWrite(
            axes,
            spec.dtype.name,
            spec.has_labels,
            (*leading, *view.storage_chunks),
            space=file_space(
                file.image.sources[0],
                [axis.size for axis in spatial],
                plan.region.start,
                [float(factor) for factor in scale],
            ),
            values=None if values is None else StoredValues(values.scale, values.offset),
        )
        options = WriterOptions(dataset=spec.name)
        file_writers.append(FILE_WRITERS[name.format](image, file.path, options))
    return file_writers


def check_exports(record: JobRecord) -> tuple[str, ...]:
    """Return notes about what the format of the output does not hold exactly.

    Raises StoreError and JobError if it cannot hold an output of the job.
    """
    if record.file_name is not None and record.job.pyramid is not None:
        raise JobError(
            "pyramid: unsupported for an output that is a file; remove it, or use a Zarr output"
        )
    if record.job.is_image:
        if table_suffix(record.job.output) == SLP:
            from chunkq.images.slp_packages import check_slp_packages  # for such outputs only

            check_slp_packages()
        return ()
    files = tuple(exported_files(record))
    return tuple(
        note for file in files for writer in writers(record, file) for note in writer.notes
    )
