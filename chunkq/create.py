"""Create a job: check it, write its job folder and its output. No queue is involved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkq.errors import ErrorCode, JobError, StoreError
from chunkq.job.exports import ExportedFile, check_exports, exported_files
from chunkq.job.items import find_sources
from chunkq.job.job_file import Job
from chunkq.job.job_folder import RECORD, JobFolder
from chunkq.job.job_path import job_folder_of
from chunkq.job.known_empty import MISSING, EmptyFinder, KnownEmpty
from chunkq.job.mask_source import check_mask_times, find_mask, mask_doubts, nothing_inside
from chunkq.job.pyramids import pyramid_doubts, pyramids_of
from chunkq.job.record import KEYS_WITHOUT_EFFECT, JobRecord
from chunkq.job.stored_images import check_outputs, new_record
from chunkq.job.tasks import JobId
from chunkq.job.user_code import load_blend_weights
from chunkq.paths import is_url, is_web, open_filesystem, without_secret
from chunkq.plan.costs import Costs, total_costs
from chunkq.plan.item_tasks import ItemTasks
from chunkq.plan.plan import Plan
from chunkq.plan.pyramid import Pyramid
from chunkq.storage.formats.precomputed_metadata import INFO
from chunkq.storage.formats.single_file import replaced_text
from chunkq.storage.images import ImageSource
from chunkq.storage.objects import ObjectFolder

if TYPE_CHECKING:
    from chunkq.job.image_rows import ImageRows
    from chunkq.job.job_handle import JobHandle

UPDATED_KEYS = ("queue", "max_errors", "price")
"""Keys that a job which is continued has from its job file."""
NIFTI = "nifti"
"""Name of the format of NIfTI images, for inputs and for outputs."""
ZARR_DOCUMENTS = (".zgroup", "0/.zarray", "zarr.json", "0/zarr.json", ".zarray")
"""Documents of which a Zarr store has some."""


@dataclass(frozen=True)
class CheckedJob:
    """A valid job: its record, the plans of its items, and doubts about its inputs."""

    record: JobRecord
    plans: list[Plan]
    warnings: tuple[str, ...] = ()
    rows: ImageRows | None = None
    """The images of a job over images."""

    @property
    def costs(self) -> Costs:
        """The costs of all items, without chunks that are known to be empty."""
        return total_costs(self.tasks)

    @cached_property
    def tasks(self) -> list[ItemTasks]:
        """The tasks of each item. Raises StoreError and ChunkReadError, see `EmptyFinder`."""
        return [
            ItemTasks(plan, None if known is None else known.counts)
            for plan, known in zip(self.plans, self.known_empty, strict=True)
        ]

    @cached_property
    def known_empty(self) -> list[KnownEmpty | None]:
        """What is known of empty chunks of each item; None if nothing can be."""
        finder = EmptyFinder(self.record)
        return [finder.find(item) for item in self.record.items]

    @cached_property
    def pyramids(self) -> list[tuple[Pyramid, ...]]:
        """The pyramid of each output, for each item; empty if the job has none."""
        return [
            pyramids_of(self.record.job, item.image, tasks)
            for item, tasks in zip(self.record.items, self.tasks, strict=True)
        ]

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """The warnings, and one if no chunk runs. Raises StoreError and ChunkReadError."""
        if self.costs.chunks:
            return self.warnings
        job = self.record.job
        line = nothing_inside(job.fill_value, has_mask=job.mask is not None)
        return (*self.warnings, line)

    @property
    def largest(self) -> Plan:
        """The plan of the item with the most voxels."""
        return max(self.plans, key=lambda plan: prod(plan.volume.shape))


def check_job(
    job: Job, sources: Sequence[ImageSource] | None = None, mask: ImageSource | None = None
) -> CheckedJob:
    """Check a job against its volumes and files without writing anything.

    `sources` and `mask` are those of its inputs and its mask if they are known. Raises JobError or
    StoreError with one line per problem.
    """
    rows = None
    if job.is_image:
        from chunkq.job.image_job import check_package
        from chunkq.job.image_rows import find_rows  # for such jobs only

        check_package(job)
        rows = find_rows(job)
        sources = [rows.source(job.input_paths[0])]
    sources = find_sources(job) if sources is None else sources
    if mask is None and job.mask is not None:
        mask = find_mask(job.mask, allow_empty=job.allow_empty)
    record = JobRecord.create(job, sources, mask)
    plans = record.plans()
    doubts: list[str] = []
    if mask is not None:
        for image in record.images:
            check_mask_times(mask, image.sources[0])
        scale = job.mask.scale if job.mask else None
        for item, plan in zip(record.items, plans, strict=True):
            doubts += mask_doubts(mask, item.image.sources[0], scale, plan.region)
    for view in plans[0].views:
        load_blend_weights(job.weight_function, view)
    if job_folder_of(job.output) == job.output:
        raise JobError(
            f"output: {without_secret(job.output)} ends in .chunkq, which is reserved for job "
            "folders; choose another path"
        )
    if is_web(job.output_path):
        raise JobError(
            f"output: {without_secret(job.output)} is on a web server, which is read-only; use a "
            "local path or a bucket"
        )
    paths = {job.output_path, *(file.path for file in exported_files(record))}
    # An output can be in the folder of the images that it is made of.
    overlap = _are_equal if job.is_image else _overlap
    inputs = job.input_paths if job.is_image else [source.path for source in sources]
    read = [*(("input", path) for path in inputs), *([("mask", mask.path)] if mask else [])]
    for name, path in read:
        if any(overlap(written, path) for written in paths):
            raise JobError(
                f"output: {without_secret(job.output)} would overwrite the {name} "
                f"{without_secret(path)}; choose another output"
            )
    notes = (*check_exports(record), *check_outputs(record), *_lost_positions(record))
    doubts = [*doubts[:1], *pyramid_doubts(job, plans[0]), *notes]
    checked = CheckedJob(record, plans, (*_warnings(sources), *doubts), rows)
    if job.skip_empty == MISSING:
        _ = checked.known_empty  # refused before work starts if storage chunks cannot be listed
    return checked


def _warnings(sources: Sequence[ImageSource]) -> tuple[str, ...]:
    """Return lines about properties of the inputs that can be a mistake."""
    return (
        *_first([line for source in sources for line in source.doubts()]),
        *(line for source in sources for line in source.file_doubts()),
    )


def _first(lines: Sequence[str]) -> tuple[str, ...]:
    """Return the first of some lines of different inputs, with the number of the others."""
    more = f" (the same holds for {len(lines) - 1} more inputs)" if len(lines) > 1 else ""
    return tuple(f"{line}{more}" for line in lines[:1])


def _lost_positions(record: JobRecord) -> tuple[str, ...]:
    """Return a line if the output cannot hold the position of a NIfTI image."""
    if record.file_name is not None and record.file_name.format == NIFTI:
        return ()
    lines = [f"input: {line}" for source in record.sources for line in source.lost_position()]
    return _first(lines)


def check_output(job: CheckedJob, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check that a job can be created or continued at its output path. Write nothing.

    Raises JobError or StoreError if the path holds something else, or if `resume` and there is no
    job.
    """
    output = job.record.job.output_path
    if resume and overwrite:
        raise JobError("--resume: conflicts with --overwrite; use one of them")
    folder = JobFolder(job_folder_of(output))
    if overwrite:
        # The record may be damaged.
        if files := list(exported_files(job.record)):
            _check_overwritable_files(files)
        else:
            is_job = folder.objects.exists(RECORD)
            _check_overwritable(output, is_job=is_job, is_volume=job.record.job.is_precomputed)
        _check_writable(output)
        return
    stored_record = folder.read_record()
    if stored_record is not None:
        _check_same(stored_record, job.record)
        return
    if resume:
        raise JobError(
            f"output: {without_secret(output)} has no job to resume; run `chunkq produce` without "
            "--resume",
            code=ErrorCode.JOB_MISSING,
        )
    _check_writable(output)
    for path in (output, *(file.path for file in exported_files(job.record))):
        filesystem, inner = open_filesystem(path)
        if not filesystem.exists(inner):
            continue
        raise StoreError(
            f"output: {without_secret(path)} exists but does not belong to this job "
            f"(missing {without_secret(folder.path)}); choose another output, or use --overwrite",
            code=ErrorCode.OUTPUT_EXISTS,
        )


def create_job(
    job: CheckedJob, *, queue: str | None = None, resume: bool = False, overwrite: bool = False
) -> JobHandle:
    """Create the job folder and the output of a job, or continue the job; return its handle.

    Creating the same job again is safe. If several processes create different jobs on one output,
    one succeeds and the others raise JobError. The job record contains `queue`, the URL of the
    queue for later commands; None keeps the one of the job file. Raises the errors of
    `check_output`.
    """
    check_output(job, resume=resume, overwrite=overwrite)
    folder = JobFolder(job_folder_of(job.record.job.output))
    record = job.record if queue is None else job.record.with_queue(queue)
    with _storage_errors(folder.path):
        if overwrite:
            _replace(folder, record)
        else:
            _create(folder, record)
    from chunkq.job.job_handle import open_job  # `plan` creates no job

    handle = open_job(folder.path)
    _check_same(handle.record, record)
    _store_known_empty(handle, job)
    _store_rows(handle, job.rows)
    _prepare_output(handle)
    return handle


def stored_job(job_folder: str) -> JobId | None:
    """Return the job in a folder, or None if there is none or its record is damaged."""
    record = stored_record(job_folder)
    return None if record is None else JobId(job_folder, record.epoch)


def stored_record(job_folder: str) -> JobRecord | None:
    """Return the record in a folder, or None if there is none or it is damaged."""
    try:
        return JobFolder(job_folder).read_record()
    except JobError:
        return None


def _check_same(stored: JobRecord, record: JobRecord) -> None:
    """Raise JobError if the stored record is of another job, or an input was replaced."""
    output = without_secret(record.job.output)
    if stored.digest != record.digest:
        raise JobError(
            f"output: {output} belongs to a different job ({_differences(stored, record)}); choose "
            "another output, or use --overwrite",
            code=ErrorCode.OUTPUT_OF_OTHER_JOB,
        )
    pairs = zip(stored.sources, _flat_identities(stored), _flat_identities(record), strict=True)
    problems = [
        f"input: {replaced_text(source.path, f'{output} was produced', before, now)}"
        for source, before, now in pairs
        if before != now
    ]
    if problems:
        raise JobError(problems, code=ErrorCode.INPUT_CHANGED)


def _create(folder: JobFolder, record: JobRecord) -> None:
    """Create the job record. If there is one already, update only keys that change no result."""
    content = folder.objects.get(RECORD)
    if content is None:
        folder.create_record(new_record(record, replaces=False))
        return
    stored = folder.require_record()
    keys = {key: getattr(record.job, key) for key in UPDATED_KEYS}
    if any(getattr(stored.job, key) != value for key, value in keys.items()):
        job = stored.job.model_copy(update=keys)
        folder.replace_record(content, replace(stored, job=job))


def _replace(folder: JobFolder, record: JobRecord) -> None:
    """Replace the job by a new one. The old record may be damaged or missing."""
    old_content = folder.objects.get(RECORD)
    new = new_record(record, replaces=True)

    def clear() -> None:
        # Delete commits first: after an interruption, the old job then starts from its beginning.
        folder.delete_epochs()
        files = [file.path for file in exported_files(record)]
        for path in files:
            ObjectFolder(path.rpartition("/")[0]).delete(path.rpartition("/")[2])
        if not files:
            ObjectFolder(folder.output).clear()

    folder.replace_record(old_content, new, prepare=clear)


def _store_known_empty(handle: JobHandle, job: CheckedJob) -> None:
    """Store what is known of empty chunks, unless it is stored: nobody looks again."""
    if not job.record.job.has_known_empty:
        return
    with _storage_errors(handle.folder.path):
        absent = [item for item in handle.items if not item.ledger.has_skipped()]
        for item in absent:
            known = job.known_empty[item.number]
            if known is not None:
                item.ledger.put_skipped(known.to_arrays())


def _store_rows(handle: JobHandle, rows: ImageRows | None) -> None:
    """Store the images of a job over images, unless they are stored: nobody looks again."""
    if rows is None:
        return
    with _storage_errors(handle.folder.path):
        if not handle.ledger.has_inputs():
            handle.ledger.put_inputs(rows.to_bytes())


def _prepare_output(job: JobHandle) -> None:
    """Create, unseal or seal the output."""
    from chunkq.stages.completion import chunks_of, job_completion  # `plan` creates no job

    remaining = len(job_completion(job).missing())
    done = chunks_of(job) - remaining
    with _storage_errors(job.folder.output):
        job.folder.delete_earlier_epochs(job.record.epoch)
        is_sealed = job.ledger.is_sealed()
        if remaining or not (done or is_sealed):  # a job can have no task at all
            job.ledger.unseal()
            if job.output.has_final_name:
                with job.folder.claim(job.folder.objects.get(RECORD)):
                    job.check_unchanged()
                    job.output.unseal()
            job.output.prepare(anything_done=bool(done), check_unchanged=job.check_unchanged)
        elif is_sealed:
            job.output.seal(check_unchanged=job.check_unchanged)
        else:
            job.output.check_array()


@contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Convert an OSError of the storage into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"output: {without_secret(path)} cannot be written: {error.strerror or error}; fix the "
            "storage, or choose another output"
        ) from error


def _flat_identities(record: JobRecord) -> list[str]:
    return [identity for identities in record.identities for identity in identities]


def _are_equal(output: str, array: str) -> bool:
    """Return whether two paths are equal."""
    first, second = (path if is_url(path) else os.path.realpath(path) for path in (output, array))
    return first == second


def _overlap(output: str, array: str) -> bool:
    """Return whether the paths are equal or one contains the other."""
    paths = [path if is_url(path) else os.path.realpath(path) for path in (output, array)]
    first, second = (path.rstrip("/") + "/" for path in paths)
    return first.startswith(second) or second.startswith(first)


def _check_writable(output: str) -> None:
    """Raise StoreError if a new local output can have no folder, so that no work is in vain."""
    if is_url(output):
        return
    parent = next(path for path in Path(output).parents if os.path.lexists(path))
    if not parent.is_dir():
        problem = f"{parent} is not a folder"
    elif os.access(parent, os.W_OK | os.X_OK):
        return
    else:
        problem = f"the folder {parent} is read-only for this user"
    raise StoreError(
        f"output: {output} cannot be written: {problem}; fix the storage, or choose another output"
    )


def _check_overwritable(output: str, *, is_job: bool, is_volume: bool) -> None:
    """Raise StoreError if the output is neither a store of its format nor part of a job."""
    filesystem, inner = open_filesystem(output)
    documents = (INFO,) if is_volume else ZARR_DOCUMENTS
    objects = ObjectFolder(output)
    if filesystem.exists(inner) and not is_job and not any(map(objects.exists, documents)):
        expected = "precomputed volume" if is_volume else "Zarr store"
        raise StoreError(
            f"output: {without_secret(output)} is not a {expected} and cannot be replaced by "
            "--overwrite; choose another output",
            code=ErrorCode.OUTPUT_EXISTS,
        )


def _check_overwritable_files(files: Sequence[ExportedFile]) -> None:
    """Raise StoreError if a file of a job would replace a folder."""
    for file in files:
        filesystem, inner = open_filesystem(file.path)
        if filesystem.isdir(inner):
            raise StoreError(
                f"output: {without_secret(file.path)} is a folder and cannot be replaced by "
                "--overwrite; choose another output",
                code=ErrorCode.OUTPUT_EXISTS,
            )


def _differences(stored: JobRecord, record: JobRecord) -> str:
    """Return the names of the keys in which two jobs differ."""
    old, new = _flat(stored), _flat(record)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    names = ", ".join(keys[:4])
    return f"different: {names}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _flat(record: JobRecord) -> dict[str, Any]:
    """Return the values that identify a job by their key paths."""
    values = {k: v for k, v in record.job.as_dict().items() if k not in KEYS_WITHOUT_EFFECT}
    model = values.pop("model_config")
    flat = values | {f"model_config.{key}": value for key, value in model.items()}
    flat |= {f"content of {key}": digest for key, digest in record.file_hashes.items()}
    flat["the format of the output"] = record.job.is_precomputed
    name = "the list of images" if record.job.is_image else "the input volume"
    return flat | {name: record.sources}
