"""Predicted bytes of what a job stores: of each level of each output, and of each file."""

from __future__ import annotations

import os
from dataclasses import replace

from chunkq.create import CheckedJob
from chunkq.job.exports import ExportedFile, exported_files, writers
from chunkq.job.stored_images import layout_of, stored_image
from chunkq.paths import without_secret
from chunkq.plan.object_sizes import StoredSize
from chunkq.units import si

MAX_FILES = 6
"""Files that are listed one by one."""


def level_sizes(job: CheckedJob, output: int) -> list[StoredSize]:
    """Return the size of each level of an output, by its number, over all items.

    An item can have fewer levels than another one. Levels of a job whose output is a file are those
    of the store in the job folder, which is deleted when the file has appeared. What is empty or
    outside of a mask is the fill value, of which nothing is stored: sizes are not exact then.
    """
    record, layout = job.record, layout_of(job.record)
    images = [stored_image(record, image, output) for image in record.images]
    sizes = [[layout.sizes(i, level) for level in range(len(i.axes))] for i in images]
    by_level: list[list[StoredSize]] = [[] for _ in range(max(map(len, sizes)))]
    for item, tasks in zip(record.items, job.tasks, strict=True):
        first, *above = sizes[item.image.number]
        by_level[0].append(tasks.stored_size(output, first))
        for level, objects in enumerate(above, start=1):
            by_level[level].append(job.pyramids[item.number][output].stored_size(level, objects))
    is_dense = record.job.mask is None and record.job.skip_empty is None
    totals = map(StoredSize.total, by_level)
    return [replace(size, is_exact=size.is_exact and is_dense) for size in totals]


def file_sizes(job: CheckedJob) -> list[tuple[ExportedFile, StoredSize]]:
    """Return the files that a job writes, and the size of each."""
    sizes = []
    for file in exported_files(job.record):
        parts = [writer.size for writer in writers(job.record, file)]
        size = sum(part.bytes for part in parts)
        is_exact = all(part.is_exact for part in parts)
        sizes.append((file, StoredSize.of_file(size, is_exact=is_exact)))
    return sizes


def file_rows(job: CheckedJob) -> list[tuple[str, str]]:
    """Return rows of a plan: the files that a job writes, and the store that they are made of."""
    sizes = file_sizes(job)
    if not sizes:
        return []
    rows = [
        ("file", f"{os.path.basename(without_secret(file.path))}, {size_text(size)}")
        for file, size in sizes[:MAX_FILES]
    ]
    if len(sizes) > MAX_FILES:
        rest = StoredSize.total(size for _, size in sizes[MAX_FILES:])
        rows.append(("file", f"{rest.objects} more, {size_text(rest)}"))
    store = StoredSize.total(level_sizes(job, n)[0] for n in range(len(job.largest.outputs)))
    rows.append(("job folder", f"{size_text(store)} of Zarr until the output is complete"))
    return rows


def size_text(size: StoredSize) -> str:
    """Return bytes as text: `12 MB`, `at most 12 MB`."""
    return si(size.bytes, "B") if size.is_exact else f"at most {si(size.bytes, 'B')}"
