"""Job record, `job.json`: the validated job file and everything that determines its result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from chunkq import __version__, json_values
from chunkq.errors import ChunkqError, ErrorCode, JobError, StoreError
from chunkq.geometry.levels import Level
from chunkq.job.file_hashes import changed_files, hash_files
from chunkq.job.items import Image, Item, images_of, items_of, largest_image
from chunkq.job.job_file import Job
from chunkq.job.job_parsing import parse_job
from chunkq.job.job_path import PRECOMPUTED
from chunkq.job.output_name import FileName
from chunkq.job.pyramids import levels_of, pyramid_problems
from chunkq.job.resolve import resolve
from chunkq.job.row_plan import row_plan
from chunkq.job.tasks import EPOCH_DIGITS
from chunkq.paths import without_secret
from chunkq.plan.fetches import Fetches
from chunkq.plan.plan import Plan
from chunkq.storage import documents
from chunkq.storage.images import ImageSource

LAYOUT = 5
"""Version of the job folder's layout. Folders of other versions are unsupported."""
KEYS_WITHOUT_EFFECT = (
    "queue", "output", "cluster", "hardware", "dask_config", "ray_config", "allow_empty",
    "max_errors", "price",
)  # fmt: skip
"""Keys of a job that do not affect its result."""


@dataclass(frozen=True)
class JobRecord:
    """Content of `job.json`.

    `images` are the images that the job reads and writes. `epoch` distinguishes successive jobs on
    one output path. It is empty until the job is created. `array` is the name of each output array
    while the job runs.
    `metadata` maps the names of the arrays' metadata documents in the output to their content.
    `identities` has for each image the `ImageSource.identity` of its sources; it changes when the
    array is replaced. `mask` is the source of the job's mask, with its identity.
    """

    job: Job
    images: tuple[Image, ...]
    file_hashes: dict[str, str]
    identities: tuple[tuple[str, ...], ...] = ()
    epoch: str = ""
    array: str = "0"
    metadata: dict[str, str] = field(default_factory=dict)
    version: str = __version__
    mask: ImageSource | None = None
    mask_identity: str = ""

    @cached_property
    def file_name(self) -> FileName | None:
        """Name of the output of a job that writes files of images; None for others."""
        return None if self.job.is_precomputed else FileName.parse(self.job.output)

    @property
    def has_files(self) -> bool:
        """Whether the output is files, which the stage `export` writes."""
        return self.job.is_image or self.file_name is not None

    @property
    def sources(self) -> tuple[ImageSource, ...]:
        """The sources of all images, in order."""
        return tuple(source for image in self.images for source in image.sources)

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """What the job computes one by one: the images, or each position of those in series."""
        return items_of(self.images)

    @property
    def largest_item(self) -> Item:
        """The first of the items with the most voxels, which stands for all."""
        largest = largest_image(self.images)
        return next(item for item in self.items if item.image is largest)

    @classmethod
    def create(
        cls, job: Job, sources: Sequence[ImageSource], mask: ImageSource | None = None
    ) -> JobRecord:
        """Create the record of a job. Read and hash each of its files once, see `hash_files`.

        Raises JobError with one line per file that cannot be read, and StoreError if an input is
        missing.
        """
        hashes, images = hash_files(job), images_of(job, sources)
        identities = (tuple(map(_identity, image.sources)) for image in images)
        mask_identity = "" if mask is None else _identity(mask, "mask")
        return cls(job, images, hashes, tuple(identities), mask=mask, mask_identity=mask_identity)

    def with_queue(self, url: str) -> JobRecord:
        """Return the record with the URL of its queue.

        The record stores no URL that contains a password or is a queue inside this process.
        """
        is_storable = without_secret(url) == url and not url.startswith("inprocess:")
        queue = url if is_storable else None
        return replace(self, job=self.job.model_copy(update={"queue": queue}))

    def new_epoch(self) -> str:
        """Return a new epoch for this job, from its digest and the time: 8 hexadecimal digits."""
        text = f"{self.digest} {time.time_ns()}"
        return hashlib.sha256(text.encode()).hexdigest()[:EPOCH_DIGITS]

    def changed_files(self) -> list[str]:
        """Return the keys of the files whose content no longer has the recorded hash."""
        return changed_files(self.job, self.file_hashes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines the output's bytes, as hexadecimal digits."""
        values = {k: v for k, v in self.job.as_dict().items() if k not in KEYS_WITHOUT_EFFECT}
        images = [json_values.to_values(image) for image in self.images]
        content: list[Any] = [values, images, self.file_hashes]
        if self.job.is_precomputed:
            content.append(PRECOMPUTED)
        if self.mask is not None:
            content.append(json_values.to_values(self.mask))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def plan(self, item: Item | None = None) -> Plan:
        """Return the plan of an item, by default of the largest one. Raises JobError."""
        return self.image_plan(largest_image(self.images) if item is None else item.image)

    def image_plan(self, image: Image) -> Plan:
        """Return the plan of every item of an image, always the same object. Raises JobError."""
        if image.number not in self._plans:
            paths = self.job.input_paths
            self._plans[image.number] = (
                row_plan(self.job, image.volume)
                if self.job.is_image
                else resolve(
                    self.job,
                    image.volume,
                    paths if image.is_alone else [paths[image.number]],
                    by_channel=image.is_channel_series,
                )
            )
        return self._plans[image.number]

    @cached_property
    def _plans(self) -> dict[int, Plan]:
        return {}

    def fetches(self, image: Image) -> list[Fetches]:
        """Return how often the storage chunks of each source of an image are fetched.

        Sources without storage chunks are left out.
        """
        by_channel = any(axis.kind == "channel" for axis in image.series_axes)
        axes = self.image_plan(image).axes
        along = [source.fetches(axes, by_channel=by_channel) for source in image.sources]
        return [fetches for fetches in along if fetches is not None]

    @property
    def cacheable_bytes(self) -> int:
        """Bytes of the storage chunks that are read by several blocks, and so kept in a cache."""
        return sum(f.useful_bytes for image in self.images for f in self.fetches(image))

    def image_plans(self) -> list[Plan]:
        """Return a plan for each image. Raises JobError with the problems of all images."""
        plans: list[Plan] = []
        problems: list[str] = []
        for image in self.images:
            try:
                plan = self.image_plan(image)
                plans.append(plan)
                errors = pyramid_problems(self.job, image, plan)
            except JobError as error:
                errors = list(error.problems)
            problems += [line for line in errors if line not in problems]
        if problems:
            raise JobError(problems)
        return plans

    def levels(self, image: Image, output: int = 0) -> tuple[Level, ...]:
        """Return the levels above level 0 of an output of an image."""
        return levels_of(self.job, image, self.image_plan(image), output)

    def plans(self) -> list[Plan]:
        """Return the plans of all items. Raises JobError with the problems of all images."""
        self.image_plans()
        return [self.plan(item) for item in self.items]

    def to_json(self) -> bytes:
        """Encode the record as a document with a checksum."""
        values = {
            "layout": LAYOUT,
            "chunkq_version": self.version,
            "digest": self.digest,
            "epoch": self.epoch,
            "array": self.array,
            "job": self.job.as_dict(),
            "images": [json_values.to_values(image) for image in self.images],
            "identities": list(self.identities),
            "mask": None if self.mask is None else json_values.to_values(self.mask),
            "mask_identity": self.mask_identity,
            "file_hashes": self.file_hashes,
            "metadata": self.metadata,
        }
        return documents.encode(values, indent=1)

    @classmethod
    def from_json(cls, content: bytes, path: str = "job record") -> JobRecord:
        """Decode the record stored at `path`.

        Raises JobError if the record has another layout or is damaged. The stored digest must
        equal the computed one, so a manually edited record counts as damaged.
        """
        printed_path = without_secret(path)
        hint = "run `chunkq produce --overwrite` to start again"
        values = documents.decode(content)
        if _has_other_layout(content, values):
            raise JobError(
                f"{printed_path}: unsupported layout, expected {LAYOUT}; use the version of chunkq "
                f"that created the job, or {hint}",
                code=ErrorCode.JOB_RECORD_UNSUPPORTED,
            )
        try:
            if values is None:
                raise ValueError
            mask = values.get("mask")
            record = cls(
                parse_job(values["job"]),
                tuple(json_values.from_values(Image, image) for image in values["images"]),
                values["file_hashes"],
                tuple(map(tuple, values["identities"])),
                values["epoch"],
                values["array"],
                values["metadata"],
                values["chunkq_version"],
                None if mask is None else json_values.from_values(ImageSource, mask),
                values.get("mask_identity", ""),
            )
            if values["digest"] != record.digest or not _stays_in_folders(record):
                raise ValueError
        except (KeyError, TypeError, ValueError, ChunkqError):
            raise JobError(
                f"{printed_path}: damaged, the checksum or digest does not match the content; "
                f"restore the file, or {hint}",
                code=ErrorCode.JOB_RECORD_DAMAGED,
            ) from None
        return record


def _identity(source: ImageSource, key: str = "input") -> str:
    identity = source.identity()
    if identity is None:
        raise StoreError(
            f"{key}: {without_secret(source.path)} is missing; restore it or fix the path",
            code=ErrorCode.INPUT_MISSING,
        )
    return identity


def _stays_in_folders(record: JobRecord) -> bool:
    """Return whether the names in a record stay inside the output and the job folder."""
    images = [image.name for image in record.images if not image.is_alone]
    names = (record.epoch or "-", record.array, *record.metadata, *images)
    parts = [part for name in names for part in name.split("/")]
    return not {"", ".", ".."}.intersection(parts)


def _has_other_layout(content: bytes, values: dict[str, Any] | None) -> bool:
    """Return whether the content is a record that has another layout."""
    if values is not None:
        return values.get("layout") != LAYOUT
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return False
    # The first versions wrote records without a layout and without a checksum.
    return isinstance(values, dict) and "chunkq_version" in values and "layout" not in values
