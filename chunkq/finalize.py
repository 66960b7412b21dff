"""Finalize a job: run the tasks that follow the network, seal the output, write the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from chunkq import __version__, json_values
from chunkq.errors import (
    ChunkReadError,
    ErrorCode,
    IncompleteError,
    JobError,
    PieceError,
    StoreError,
)
from chunkq.job.events import Sink, StageProgress, ignore
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.job.model_config import STOCHASTIC
from chunkq.job.task_records import Commit
from chunkq.job.tasks import chunk_count
from chunkq.plan.chunk import Index
from chunkq.plan.footprint import largest_footprint
from chunkq.plan.output_text import output_values
from chunkq.queue.contract.executor import Attempt
from chunkq.seams import Seam, measure_seams
from chunkq.stages.base import Stage, TaskKey
from chunkq.stages.completion import JobCompletion, Pending, check_completion, names_of, shortened
from chunkq.stages.registry import stage_of, stages
from chunkq.timing.aggregation import aggregate_timing
from chunkq.timing.diagnosis import advice, conclusion
from chunkq.timing.report import Report

BATCH_SIZE = 1000
"""Number of blocks submitted to the thread pool at a time; bounds memory."""
FINALIZER_BYTES = 2 << 30
"""Memory limit (bytes) for blocks that are finalized concurrently; one block may exceed it."""
FINALIZER_THREADS = 4
"""Maximum number of blocks that are finalized concurrently by default."""
RECORD_DAMAGED = "a commit record is damaged"
Lost = dict[tuple[int, Index], str]
"""Item and chunk of each lost result, with the reason."""
ValidCommits = defaultdict[tuple[int, str], set[Index]]
"""Item and kind of stage -> the chunks with a valid commit record."""


def finalize_job(
    job: JobHandle,
    *,
    worker: str,
    allow_missing: bool = False,
    threads: int | None = None,
    rerun: str | None = None,
    emit: Sink = ignore,
) -> Report:
    """Run every task that can be run without the network, seal the output, return the report.

    With `allow_missing`, blocks that need a missing chunk stay empty and the output is marked as
    incomplete. `threads` blocks are completed concurrently (default: `max_concurrent_blocks`).
    `rerun` is what computes missing chunks, for messages.

    Raises IncompleteError with the missing chunks, unless `allow_missing`. Raises IncompleteError
    with the code RESULTS_LOST if pieces or commit records are damaged: all other blocks are
    complete then, and the chunks to compute again have no commit record. Raises StoreError if an
    input or the metadata of the output were replaced, MissingJobError if the job was replaced.
    Raises JobError for `allow_missing` of a job over images.
    """
    job.check_unchanged()
    if allow_missing and job.record.job.is_image:
        raise JobError(
            "--allow-missing: the table of a job over images is written when all chunks are done; "
            "leave it out, and run `chunkq work` for those that are missing"
        )
    completion = check_completion(job, allow_missing=allow_missing, rerun=rerun)
    missing = completion.missing()
    warnings = _check_inputs(job)
    if job.record.job.model.stochastic:
        warnings.append(STOCHASTIC)
    warnings += job.output.unlisted()
    job.output.check_array()
    lost: Lost = {}
    with ThreadPoolExecutor(threads or max_concurrent_blocks(job)) as pool:

        def run(stage: Stage, tasks: Pending) -> Pending:
            succeeded, lost_here = _run_tasks(pool, stage, tasks, Attempt(1, worker), emit)
            lost.update(lost_here)
            return succeeded

        completion = completion.complete(run)
        with job.check_replaced_on_error():
            _raise_if_lost(job, lost)
            if not missing:
                _raise_if_left(completion)
            return Report(_seal(completion, missing, warnings, run))


def _run_tasks(
    pool: ThreadPoolExecutor, stage: Stage, tasks: Pending, attempt: Attempt, emit: Sink
) -> tuple[Pending, Lost]:
    """Run tasks of a stage in the pool; return those that succeeded, and the damaged results."""
    succeeded: list[tuple[ItemHandle, Index]] = []
    lost: Lost = {}

    def report(label: str, done: int, total: int) -> None:
        emit(StageProgress(label, done, total))

    emit(StageProgress(stage.label, 0, len(tasks)))
    for first in range(0, len(tasks), BATCH_SIZE):
        batch = tasks[first : first + BATCH_SIZE]
        futures = {
            pool.submit(stage.run_with_progress, *task, attempt, report): task for task in batch
        }
        try:
            for done, future in enumerate(as_completed(futures), start=first + 1):
                try:
                    future.result()
                    succeeded.append(futures[future])
                except PieceError as error:
                    item = futures[future][0].number
                    lost |= {(item, source): str(error) for source in error.sources}
                emit(StageProgress(stage.label, done, len(tasks)))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    return succeeded, lost


def _check_inputs(job: JobHandle) -> list[str]:
    """Return a warning for each missing input. Raises StoreError if an input was replaced."""
    try:
        job.check_inputs()
    except ChunkReadError as error:
        if error.code != ErrorCode.INPUT_MISSING:
            raise StoreError(str(error), code=error.code) from None
        return [str(error)]
    except OSError as error:
        return [f"an input could not be compared with the input of the job: {error}"]
    return []


def _raise_if_lost(job: JobHandle, lost: Mapping[tuple[int, Index], str]) -> None:
    """Raise IncompleteError if results were lost."""
    if lost:
        chunks = sorted(lost)
        names = [job.chunk_name(*chunk) for chunk in chunks]
        raise IncompleteError(
            f"results of {chunk_count(len(chunks))} are lost: {shortened(names)} "
            f"({lost[chunks[0]]}); run `chunkq run` again, or `chunkq produce --resume` and a "
            "worker",
            names,
            code=ErrorCode.RESULTS_LOST,
        )


def _raise_if_left(completion: JobCompletion) -> None:
    """Raise IncompleteError if a stage has a task that waits for one that no stage has."""
    for kind, tasks in completion.pending.items():
        if tasks:
            names = names_of(tasks)
            raise IncompleteError(
                f"{len(names)} tasks of the stage {kind!r} wait for tasks that do not exist: "
                f"{shortened(names)}; repair the package that provides the stage",
                names,
            )


def max_concurrent_blocks(job: JobHandle) -> int:
    """Return how many blocks to complete concurrently within `FINALIZER_BYTES` of memory."""
    largest = largest_footprint(item.plan for item in job.items).finalizing
    return max(1, min(FINALIZER_THREADS, FINALIZER_BYTES // max(1, largest)))


def _seal(
    completion: JobCompletion,
    missing: Pending,
    warnings: Sequence[str],
    run: Callable[[Stage, Pending], Pending],
) -> dict[str, Any]:
    """Verify the commit records, seal the output unless chunks are missing, write the report.

    `run` runs tasks whose commit record is damaged, and that can run again by themselves.
    """
    job, valid = completion.job, ValidCommits(set)
    # The store of files is deleted when they are sealed.
    seams = [] if missing or not job.output.arrays else measure_seams(job)
    warnings = [*warnings, *(seam.warning for seam in seams if seam.is_visible)]
    report = _report(job, valid, missing, warnings, seams)
    if again := _check_records(completion, valid):
        for stage, tasks in again:
            run(stage, tasks)
        valid = ValidCommits(set)
        report = _report(job, valid, missing, warnings, seams)
        damaged = [task for _, tasks in _check_records(completion, valid) for task in tasks]
        _raise_if_lost(job, {(i.number, chunk): RECORD_DAMAGED for i, chunk in damaged})
    if missing:
        job.output.mark_incomplete(check_unchanged=job.check_unchanged)
    else:
        job.check_unchanged()
        job.ledger.seal()
        job.output.seal(check_unchanged=job.check_unchanged)
        job.ledger.delete_temporary()
    job.ledger.write_report(report)
    return report


def _check_records(
    completion: JobCompletion, valid: ValidCommits
) -> list[tuple[Stage, list[tuple[ItemHandle, Index]]]]:
    """Delete damaged commit records; return the tasks that must run again by themselves.

    `completion` lists the tasks that have no record. Another task without a valid record must run
    again, and with it those that `Stage.needs_again` names. The commit records of these are
    deleted, too. IncompleteError is raised if a worker must run one of them.
    """
    job, lost = completion.job, Lost()
    again: list[tuple[Stage, list[tuple[ItemHandle, Index]]]] = []
    for stage in stages():
        if stage.is_temporary:
            continue
        tasks: list[tuple[ItemHandle, Index]] = []
        absent = {(item.number, chunk) for item, chunk in completion.pending[stage.kind]}
        for item in job.items:
            for chunk in stage.chunks(item):
                if chunk in valid[item.number, stage.kind] or (item.number, chunk) in absent:
                    continue
                sources = stage.needs_again(item, chunk)
                for key in (TaskKey(stage.kind, chunk), *sources):
                    item.ledger.delete_commits(key.kind, [key.chunk])
                    if stage_of(key.kind).is_queued:
                        lost[item.number, key.chunk] = RECORD_DAMAGED
                if not stage.is_queued and not sources:
                    tasks.append((item, chunk))
        if tasks:
            again.append((stage, tasks))
    _raise_if_lost(job, lost)
    return again


def job_report(job: JobHandle, missing: Pending = ()) -> dict[str, Any]:
    """Aggregate all commit records into the report: timings, bytes moved, conclusion, advice.

    Of a sealed output, borders between blocks are measured again.
    """
    has_arrays = job.ledger.is_sealed() and job.output.arrays
    seams = measure_seams(job) if has_arrays else []
    return _report(job, ValidCommits(set), missing, seams=seams)


def _report(
    job: JobHandle,
    valid: ValidCommits,
    missing: Pending,
    warnings: Sequence[str] = (),
    seams: Sequence[Seam] = (),
) -> dict[str, Any]:
    """Return the report. Add the tasks that have a valid commit record to `valid`."""
    commits = {stage.kind: _read_commits(job, stage.kind, valid) for stage in stages()}
    images: dict[str, Any] = {}
    if job.record.job.is_image:
        from chunkq.image_report import image_values  # for such jobs only

        images = {"images": image_values(job)}
    timing = aggregate_timing(
        [item.plan for item in job.items],
        commits.pop("infer"),
        commits.pop("finalize"),
        job.costs,
        commits.pop("downsample"),
        [level for item in job.items for pyramid in item.pyramids for level in pyramid.costs],
    )
    chunks = [f.storage_chunks for image in job.record.images for f in job.record.fetches(image)]
    if len(chunks) == len(job.record.sources):
        timing = replace(timing, fetching=replace(timing.fetching, storage_chunks=sum(chunks)))
    for others in commits.values():
        for _ in others:
            pass
    return {
        "chunkq_version": __version__,
        "digest": job.record.digest,
        "precision": job.record.job.model.effective_precision,
        "stochastic": job.record.job.model.stochastic,
        "outputs": [output_values(output) for output in job.items[0].plan.outputs],
        "missing": names_of(missing),
        "warnings": list(warnings),
        "seams": [seam.as_dict() for seam in seams],
        "conclusion": conclusion(timing),
        "advice": advice(timing),
        **images,
        **json_values.to_values(timing),
    }


def _read_commits(job: JobHandle, kind: str, valid: ValidCommits) -> Iterator[Commit]:
    """Yield the valid commit records of a stage and add their chunks to `valid`."""
    for item in job.items:
        for commit in item.ledger.read_commits(kind):
            valid[item.number, kind].add(commit.chunk)
            yield commit
