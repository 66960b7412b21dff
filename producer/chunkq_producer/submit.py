"""From a job to a filled queue: check everything, write the job folder, enqueue what is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chunkq.errors import JobError, StoreError
from chunkq.executors.base import Executor
from chunkq.job import Job
from chunkq.ledger import NOT_THE_RESULT, JobFolder, JobRecord, folder_of
from chunkq.objects import ObjectFolder
from chunkq.paths import is_url, open_filesystem, without_secret
from chunkq.plan import Plan
from chunkq.stores import Source, create_output, find_source
from chunkq.tasks import Task
from chunkq.userfile import load_weights

METADATA = {2: (".zgroup", "0/.zarray"), 3: ("zarr.json", "0/zarr.json")}
"""By Zarr format, what marks the output's group and its array."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A job that can be done: its record and plan."""

    record: JobRecord
    plan: Plan


@dataclass(frozen=True)
class Produced:
    """What producing came to, in chunks."""

    folder: JobFolder
    chunks: int
    done: int
    queued: int


def prepare(job: Job) -> Prepared:
    """Check a job against its volume and files; writes nothing.

    Raises JobError or StoreError with one line per problem.
    """
    sources = [find_source(path) for path in job.input]
    _check_alike(job, sources)
    record = JobRecord.of(job, sources)
    plan = record.plan()
    load_weights(plan)
    if folder_of(job.output) == job.output:
        raise JobError(f"output: {without_secret(job.output)} ends in .chunkq, as job folders do")
    for source in sources:
        if _overlap(job.output, source.array_path):
            raise JobError(
                f"output: {without_secret(job.output)} would overwrite the input "
                f"{without_secret(source.array_path)}; choose another output"
            )
    return Prepared(record, plan)


def check_place(prepared: Prepared, *, resume: bool = False, overwrite: bool = False) -> bool:
    """Tell whether the job was produced here before; refuses whatever else is in the way.

    Raises JobError or StoreError; writes nothing.
    """
    output = prepared.record.job.output
    if resume and overwrite:
        raise JobError("--resume goes on and --overwrite starts again: give one of them")
    folder = JobFolder(folder_of(output))
    before = folder.read_record()
    if overwrite:
        _check_overwritable(output, known=before is not None)
        return False
    if before is not None:
        if before.digest != prepared.record.digest:
            raise JobError(
                f"output: {without_secret(output)} belongs to a different job "
                f"({_differences(before, prepared.record)}); choose another output, or replace it "
                "with --overwrite"
            )
        return True
    if resume:
        raise JobError(
            f"output: {without_secret(output)} has no job to resume; run produce without --resume"
        )
    filesystem, inner = open_filesystem(output)
    if filesystem.exists(inner):
        raise StoreError(
            f"output: {without_secret(output)} exists and is not of this job (there is no "
            f"{without_secret(folder.path)}); choose another, or replace it with --overwrite"
        )
    return False


def produce(
    prepared: Prepared,
    executor: Executor,
    *,
    resume: bool = False,
    overwrite: bool = False,
    remember: bool = True,
    progress: Progress = lambda done, total: None,
) -> Produced:
    """Write the job folder and the output's metadata, then queue every uncommitted chunk.

    The same job again, also after the queue was lost, queues exactly what has no commit record.
    The job is to `remember` its queue, unless that ends with this process.
    """
    known = check_place(prepared, resume=resume, overwrite=overwrite)
    job, plan = prepared.record.job, prepared.plan
    folder = JobFolder(folder_of(job.output))
    if overwrite:
        _remove_old(folder, executor)
    here = prepared.record.on_queue(executor.url) if remember else prepared.record
    if not known or folder.require_record().job.queue != here.job.queue:
        _write_record(folder, here)
    done = folder.committed("infer")
    _ensure_output(prepared, anything_done=bool(done))
    left = plan.costs.chunks - len(done)
    if left:
        folder.unseal()
    progress(0, left)

    def tasks() -> Iterator[Task]:
        for count, index in enumerate((i for i in plan.indices() if i not in done), start=1):
            yield Task("infer", folder.path, index)
            if count % 1000 == 0 or count == left:
                progress(count, left)

    return Produced(folder, plan.costs.chunks, len(done), executor.submit(tasks()))


def _check_alike(job: Job, sources: Sequence[Source]) -> None:
    """Refuse several inputs that do not lie voxel on voxel."""
    first = sources[0].volume.shape
    problems = [
        f"input.{n}: {without_secret(job.input[n])} has shape {list(source.volume.shape)}, the "
        f"first input {list(first)}; several inputs must have one shape"
        for n, source in enumerate(sources)
        if source.volume.shape != first
    ]
    if problems:
        raise JobError(problems)


def _overlap(output: str, array: str) -> bool:
    """Tell whether one path lies in the other, or both are the same."""
    places = [path if is_url(path) else os.path.realpath(path) for path in (output, array)]
    one, other = (place.rstrip("/") + "/" for place in places)
    return one.startswith(other) or other.startswith(one)


def _write_record(folder: JobFolder, record: JobRecord) -> None:
    try:
        folder.write_record(record)
    except OSError as error:
        raise StoreError(
            f"output: {without_secret(folder.path)} cannot be written: {error.strerror or error}"
        ) from error


def _ensure_output(prepared: Prepared, *, anything_done: bool) -> None:
    job, plan = prepared.record.job, prepared.plan
    group, array = METADATA[job.zarr_format]
    objects = ObjectFolder(job.output)
    if objects.exists(group) and objects.exists(array):
        return
    if anything_done:
        raise StoreError(
            f"output: {without_secret(job.output)} is damaged: it has no {array}, though chunks "
            "are committed; start again with --overwrite"
        )
    create_output(
        job.output,
        shape=plan.output_shape,
        chunks=((1,) if plan.channel_axis else ())
        + tuple(min(u, v) for u, v in zip(plan.storage_chunks, plan.volume.shape, strict=True)),
        dtype=plan.output_dtype,
        zarr_format=job.zarr_format,
        source=prepared.record.source,
        attributes={"chunkq": {"state": "incomplete", "digest": prepared.record.digest}},
    )


def _check_overwritable(output: str, *, known: bool) -> None:
    """Refuse to delete anything that is neither a Zarr store nor ours."""
    filesystem, inner = open_filesystem(output)
    marks = {mark for marks in METADATA.values() for mark in marks} | {".zarray"}
    objects = ObjectFolder(output)
    if filesystem.exists(inner) and not known and not any(objects.exists(m) for m in marks):
        raise StoreError(
            f"output: {without_secret(output)} is no Zarr store, so --overwrite leaves it alone; "
            "choose another output"
        )


def _remove_old(folder: JobFolder, executor: Executor) -> None:
    running = executor.running(folder.path)
    if running:
        raise JobError(
            f"output: {without_secret(folder.output)} is being worked on by {running[0].worker}; "
            "stop the workers before --overwrite"
        )
    executor.cancel(folder.path)
    # Commits go first: cut off here, nothing may vouch for an output that is half gone.
    folder.forget_commits()
    ObjectFolder(folder.output).delete_folder()
    folder.delete()


def _differences(before: JobRecord, now: JobRecord) -> str:
    """Name the keys in which two jobs differ."""
    old, new = (_flat(record) for record in (before, now))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    shown = ", ".join(keys[:4])
    return f"different: {shown}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _flat(record: JobRecord) -> dict[str, Any]:
    values = {k: v for k, v in record.job.as_dict().items() if k not in NOT_THE_RESULT}
    model = values.pop("model_config")
    flat = values | {f"model_config.{key}": value for key, value in model.items()}
    flat |= {f"content of {key}": digest for key, digest in record.file_hashes.items()}
    return flat | {"the input volume": record.sources}
