"""Outputs of a job: create, check and seal their arrays and metadata.

On a local disk the array is named `0.<epoch>` while the job runs, and is renamed to `0` when the
job is sealed. A suspended process of an earlier job on the same path therefore cannot write into
the array of a later job. A bucket cannot rename objects. There the first job writes `0`, and a job
that replaces another one writes `0.<epoch>` and keeps this name. The levels of a pyramid have the
names `1`, `2`, …, and are handled alike. So are the scales of a precomputed volume, which are named
by their voxel size (`job.output_layouts`).
"""

from __future__ import annotations

from collections.abc import Callable

from chunkq.job.image_group import ImageGroup
from chunkq.job.image_output import ImageOutput, StoredArray
from chunkq.job.items import Image
from chunkq.job.output_documents import WrittenDocument
from chunkq.job.parent_groups import unlisted_in_groups
from chunkq.job.record import JobRecord
from chunkq.job.stored_images import SEALED_NAME, below, layout_of
from chunkq.paths import is_url


class Output:
    """The output store of a job: one image, or a group of images.

    Several images of the input, and several outputs of each, are groups of images, one in the
    other.

    Methods raise StoreError, and OSError if the storage fails. Methods that change the output call
    `check_unchanged`, which raises if the job was replaced, before each change.
    """

    def __init__(self, path: str, record: JobRecord) -> None:
        self._path, self._record = path, record
        names = list(record.job.output_configs())
        self._by_image = tuple(
            tuple(ImageOutput(path, record, image, n) for n in range(len(names)))
            for image in record.images
        )
        self._images = tuple(output for outputs in self._by_image for output in outputs)
        folders = [image.name for image in record.images if image.name]
        outputs = [name for name in names if name]
        # Inner groups first: the outermost one decides whether the job is sealed.
        groups = [(folder, outputs) for folder in folders if outputs]
        members = [below(folder, name) for folder in folders for name in outputs or [""]]
        members = [name.rstrip("/") for name in members] or outputs
        groups += [("", members)] if members else []
        if not layout_of(record).has_groups:
            groups = []
        self._groups = tuple(ImageGroup(path, record, folder, names) for folder, names in groups)

    def image(self, image: Image, number: int = 0) -> ImageOutput:
        """Return the output of an image, by its number among the outputs of the job."""
        return self._by_image[image.number][number]

    def images_of(self, image: Image) -> tuple[ImageOutput, ...]:
        """Return all outputs of an image."""
        return self._by_image[image.number]

    @property
    def path(self) -> str:
        """Path of the store."""
        return self._path

    @property
    def has_final_name(self) -> bool:
        """Whether an array was renamed to its final name."""
        return any(image.has_final_name for image in self._images)

    def prepare(self, *, anything_done: bool, check_unchanged: Callable[[], None]) -> None:
        """Create the missing parts of the output of a running job; delete those of earlier jobs.

        Works from any interrupted state. Raises StoreError if the metadata of an array changed, or
        if an array is missing although chunks are committed (`anything_done`).
        """
        for group in reversed(self._groups):
            group.prepare(check_unchanged)
        for image in self._images:
            image.prepare(anything_done=anything_done, check_unchanged=check_unchanged)

    def unseal(self) -> None:
        """Rename sealed arrays back to the name that they have while the job runs.

        Only the process that holds the claim on the job's record may call this: the name `0` has
        no epoch, so the array could otherwise belong to a later job.
        """
        for image in self._images:
            image.unseal()

    def check_array(self) -> None:
        """Raise StoreError unless every array, under its current name, is the one created."""
        for image in self._images:
            image.check_array()

    def mark_incomplete(self, *, check_unchanged: Callable[[], None]) -> None:
        """Write the group metadata of an output that will be read before it is complete."""
        for image in self._images:
            image.mark_incomplete(check_unchanged=check_unchanged)
        for group in self._groups:
            group.write("incomplete", check_unchanged)

    def seal(self, *, check_unchanged: Callable[[], None]) -> None:
        """Mark the output as complete; rename local arrays to their final name. Idempotent."""
        for image in self._images:
            image.seal(check_unchanged=check_unchanged)
        for group in self._groups:
            group.write("complete", check_unchanged)

    def unlisted(self) -> list[str]:
        """Return warnings for groups that contain the output and whose readers do not find it."""
        record = self._record
        if not layout_of(record).has_groups:
            return []
        epoch = "" if is_url(self._path) else record.array.removeprefix(SEALED_NAME)
        documents = {name.replace(f"{epoch}/", "/"): text for name, text in record.metadata.items()}
        return unlisted_in_groups(self._path, record.job.zarr_format, documents)

    @property
    def arrays(self) -> list[StoredArray]:
        """The arrays of the output, where they are now."""
        return [array for image in self._images for array in image.arrays]

    def documents(self, state: str) -> list[WrittenDocument]:
        """Return the metadata documents that an output in this state has."""
        documents = [document for image in self._images for document in image.documents(state)]
        return [*documents, *(one for group in self._groups for one in group.documents(state))]

    def is_sealed(self) -> bool:
        """Return whether the group metadata mark this job as complete."""
        if self._groups:
            return self._groups[-1].is_described("complete")
        return all(image.is_sealed() for image in self._images)
