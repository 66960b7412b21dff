"""From a job to a filled queue: check everything, write the job folder, enqueue what is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from chunkq.errors import ErrorCode, JobError, StoreError
from chunkq.executors.base import Executor
from chunkq.job import Job
from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import RECORD, JobFolder, folder_of
from chunkq.objects import ObjectFolder
from chunkq.output import new_record
from chunkq.paths import is_url, open_filesystem, without_secret
from chunkq.plan import Index, Plan
from chunkq.record import KEYS_WITHOUT_EFFECT, JobRecord
from chunkq.stores import Source, find_source
from chunkq.tasks import Task
from chunkq.user_code import load_blend_weights

METADATA = {2: (".zgroup", "0/.zarray"), 3: ("zarr.json", "0/zarr.json")}
"""By Zarr format, what marks the output's group and its array."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreparedJob:
    """A job that can be done: its record and plan."""

    record: JobRecord
    plan: Plan


@dataclass(frozen=True)
class ProduceResult:
    """What producing came to, in chunks."""

    folder: JobFolder
    chunks: int
    done: int
    queued: int


def prepare(job: Job) -> PreparedJob:
    """Check a job against its volume and files; writes nothing.

    Raises JobError or StoreError with one line per problem.
    """
    sources = [find_source(path) for path in job.input]
    _check_alike(job, sources)
    record = JobRecord.create(job, sources)
    plan = record.plan()
    load_blend_weights(plan)
    if folder_of(job.output) == job.output:
        raise JobError(f"output: {without_secret(job.output)} ends in .chunkq, as job folders do")
    for source in sources:
        if _overlap(job.output, source.array_path):
            raise JobError(
                f"output: {without_secret(job.output)} would overwrite the input "
                f"{without_secret(source.array_path)}; choose another output"
            )
    return PreparedJob(record, plan)


def check_existing_job(
    prepared: PreparedJob, *, resume: bool = False, overwrite: bool = False
) -> bool:
    """Tell whether the job was produced here before; refuses whatever else is in the way.

    Raises JobError or StoreError; writes nothing.
    """
    output = prepared.record.job.output
    if resume and overwrite:
        raise JobError("--resume goes on and --overwrite starts again: give one of them")
    folder = JobFolder(folder_of(output))
    if overwrite:
        known = folder.objects.exists(RECORD)  # it may be damaged
        _check_overwritable(output, known=known)
        return known
    before = folder.read_record()
    if before is not None:
        _check_same(before, prepared.record)
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
    prepared: PreparedJob,
    executor: Executor,
    *,
    resume: bool = False,
    overwrite: bool = False,
    remember: bool = True,
    progress: Progress = lambda done, total: None,
) -> ProduceResult:
    """Create the job and its output, or continue it, then queue every uncommitted chunk.

    The same job again, also after the queue was lost, queues exactly what has no commit record.
    Of several processes that create different jobs on one output at once, one succeeds and the
    others raise JobError. The job is to `remember` its queue, unless that ends with this process.
    """
    check_existing_job(prepared, resume=resume, overwrite=overwrite)
    folder = JobFolder(folder_of(prepared.record.job.output))
    record = prepared.record.on_queue(executor.url) if remember else prepared.record
    with _writing(folder.path):
        if overwrite:
            _replace(folder, record, prepared.plan, executor)
        else:
            _create(folder, record, prepared.plan)
    job = open_job(folder.path)
    _check_same(job.record, record)
    left, done = _prepare_output(job)
    progress(0, len(left))

    def tasks() -> Iterator[Task]:
        for count, index in enumerate(left, start=1):
            yield Task("infer", folder.path, index)
            if count % 1000 == 0 or count == len(left):
                progress(count, len(left))

    return ProduceResult(folder, prepared.plan.costs.chunks, done, executor.submit(tasks()))


def _check_same(before: JobRecord, record: JobRecord) -> None:
    """Raise JobError if the job folder belongs to another job, or an input was replaced."""
    output = without_secret(record.job.output)
    if before.digest != record.digest:
        raise JobError(
            f"output: {output} belongs to a different job ({_differences(before, record)}); choose "
            "another output, or replace it with --overwrite",
            code=ErrorCode.OUTPUT_OF_OTHER_JOB,
        )
    pairs = zip(before.sources, before.identities, record.identities, strict=True)
    problems = [
        f"input: {without_secret(source.array_path)} was replaced since {output} was produced; "
        "restore it, or start again with --overwrite"
        for source, then, now in pairs
        if then != now
    ]
    if problems:
        raise JobError(problems, code=ErrorCode.INPUT_CHANGED)


def _create(folder: JobFolder, record: JobRecord, plan: Plan) -> None:
    """Create the job unless there is one, which stays but for the queue that it names."""
    before = folder.objects.get(RECORD)
    if before is None:
        folder.create_record(new_record(record, plan, replaces=False))
        return
    stored = folder.require_record()
    if stored.job.queue != record.job.queue:
        moved = stored.job.model_copy(update={"queue": record.job.queue})
        folder.replace_record(before, replace(stored, job=moved))


def _replace(folder: JobFolder, record: JobRecord, plan: Plan, executor: Executor) -> None:
    """Replace the job, whose record may be damaged or missing, by a new one."""
    running = executor.running(folder.path)
    if running:
        raise JobError(
            f"output: {without_secret(folder.output)} is being worked on by {running[0].worker}; "
            "stop the workers before --overwrite"
        )
    before = folder.objects.get(RECORD)
    new = new_record(record, plan, replaces=True)

    def clear() -> None:
        # Commits go first: if this is cut off, the old job can be run again from its beginning.
        folder.delete_epochs()
        ObjectFolder(folder.output).clear()

    folder.replace_record(before, new, prepare=clear)
    executor.cancel(folder.path)


def _prepare_output(job: JobHandle) -> tuple[list[Index], int]:
    """Bring the output into its state; return the chunks that are left and the number done."""
    committed = job.ledger.committed("infer")
    left = [index for index in job.plan.indices() if index not in committed]
    done = job.plan.costs.chunks - len(left)
    with _writing(job.folder.output):
        job.folder.delete_earlier_epochs(job.record.epoch)
        if left:
            job.ledger.unseal()
            if job.output.has_final_name:
                with job.folder.claim(job.folder.objects.get(RECORD)):
                    job.check_unchanged()
                    job.output.unseal()
            job.output.prepare(anything_done=bool(done), check_unchanged=job.check_unchanged)
        elif job.ledger.is_sealed():
            job.output.seal(check_unchanged=job.check_unchanged)
        else:
            job.output.check_array()
    return left, done


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """Turn errors of the storage into one line."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"output: {without_secret(path)} cannot be written: {error.strerror or error}"
        ) from error


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


def _differences(before: JobRecord, now: JobRecord) -> str:
    """Name the keys in which two jobs differ."""
    old, new = (_flat(record) for record in (before, now))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    shown = ", ".join(keys[:4])
    return f"different: {shown}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _flat(record: JobRecord) -> dict[str, Any]:
    values = {k: v for k, v in record.job.as_dict().items() if k not in KEYS_WITHOUT_EFFECT}
    model = values.pop("model_config")
    flat = values | {f"model_config.{key}": value for key, value in model.items()}
    flat |= {f"content of {key}": digest for key, digest in record.file_hashes.items()}
    return flat | {"the input volume": record.sources}
