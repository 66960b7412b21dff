"""Finalize a job: add up the pieces of each shared block, write the block, seal the output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from chunkq import __version__
from chunkq.blend import OwnBlock, finalize_sums
from chunkq.diagnosis import advice, conclusion
from chunkq.errors import ChunkReadError, ErrorCode, IncompleteError, PieceError, StoreError
from chunkq.executors.base import Attempt
from chunkq.footprint import footprint
from chunkq.job_handle import JobHandle, open_job
from chunkq.ledger import Commit
from chunkq.memory import peak_bytes
from chunkq.plan import Chunk, Index, Piece, Plan
from chunkq.tasks import Task, chunk_count, chunk_name
from chunkq.timing_aggregation import aggregate_timing

OWN_PIECE = "own"
"""Name of the piece that a chunk stores for its own block."""
BATCH_SIZE = 1000
"""Number of blocks submitted to the thread pool at a time; bounds memory."""
FINALIZER_BYTES = 2 << 30
"""Memory limit (bytes) for blocks that are finalized concurrently; one block may exceed it."""
FINALIZER_THREADS = 4
"""Maximum number of blocks that are finalized concurrently by default."""


def finalize_block(task: Task, attempt: Attempt) -> None:
    """Complete the block of a chunk unless it is already complete.

    Raises IncompleteError if a contributor is not committed, and the errors of `complete_block`.
    """
    job = open_job(task.job)
    ledger = job.ledger
    if ledger.is_committed("finalize", task.chunk):
        return
    missing = [c for c in job.plan.contributors(task.chunk) if not ledger.is_committed("infer", c)]
    if missing:
        raise IncompleteError(
            f"block {chunk_name(task.chunk)}: chunks {_names(missing)} are not computed yet",
            missing,
        )
    complete_block(job, task.chunk, attempt)


def complete_block(job: JobHandle, index: Index, attempt: Attempt) -> None:
    """Add up the pieces of a block, write its voxels, commit it and delete the pieces.

    All contributors must be committed. Raises PieceError if pieces are missing or damaged; this
    deletes the commit records of their chunks, which must be computed again. Raises
    MissingJobError if the job was replaced.
    """
    with job.check_replaced_on_error():
        _complete_block(job, index, attempt)


def _complete_block(job: JobHandle, index: Index, attempt: Attempt) -> None:
    started = time.time()
    chunk = job.plan.chunk(index)
    try:
        own_block, pieces, bytes_read = _gather(job, chunk)
        read_end = time.time()
        job.check_unchanged()
        bytes_written = sum(
            job.write(box, values)
            for box, values in finalize_sums(job.plan, chunk, own_block, pieces)
        )
        finished = time.time()
        job.check_unchanged()
    except (PieceError, OSError):
        # Another finalizer may have completed the block and deleted its pieces.
        if job.ledger.is_committed("finalize", index):
            return
        raise
    job.ledger.commit(
        Commit(
            kind="finalize",
            chunk=index,
            attempt=attempt.number,
            worker=attempt.worker,
            started=started,
            finished=finished,
            seconds={"read": read_end - started, "write": finished - read_end},
            moved={"pieces_read": bytes_read, "output": bytes_written},
            peak_rss=peak_bytes(),
        )
    )
    job.ledger.delete_pieces(index)


@dataclass(frozen=True)
class JobCompletion:
    """Progress of a job.

    `unfinished` lists the chunks without a commit record, `to_finalize` the incomplete blocks.
    """

    unfinished: tuple[Index, ...]
    to_finalize: tuple[Index, ...]


def job_completion(job: JobHandle) -> JobCompletion:
    """Compare the plan with the ledger. Makes two listings, independent of the job's size."""
    inferred = job.ledger.committed("infer")
    finalized = job.ledger.committed("finalize")
    return JobCompletion(
        tuple(index for index in job.plan.indices() if index not in inferred),
        tuple(index for index in job.plan.to_finalize() if index not in finalized),
    )


def check_completion(job: JobHandle, *, allow_missing: bool = False) -> JobCompletion:
    """Return the progress of a job before its blocks are completed.

    Raises IncompleteError with the missing chunks, unless `allow_missing`.
    """
    completion = job_completion(job)
    if completion.unfinished and not allow_missing:
        raise IncompleteError(_not_computed(completion.unfinished), completion.unfinished)
    return completion


def ready_blocks(job: JobHandle, completion: JobCompletion) -> list[Index]:
    """Return the incomplete blocks of which all contributors are committed."""
    missing = set(completion.unfinished)
    if not missing:
        return list(completion.to_finalize)
    return [i for i in completion.to_finalize if not missing.intersection(job.plan.contributors(i))]


def finalize_job(
    job: JobHandle,
    *,
    worker: str,
    allow_missing: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Complete every block that is ready, seal the output, and return the report.

    With `allow_missing`, blocks that need a missing chunk stay empty and the output is marked as
    incomplete. `progress` is called with the number of complete blocks and their total. `threads`
    blocks are completed concurrently (default: `max_concurrent_blocks`).

    Raises IncompleteError with the missing chunks, unless `allow_missing`. Raises IncompleteError
    with the code RESULTS_LOST if pieces or commit records are damaged: all other blocks are
    complete then, and the chunks to compute again have no commit record. Raises StoreError if an
    input or the metadata of the output were replaced, MissingJobError if the job was replaced.
    """
    job.check_unchanged()
    completion = check_completion(job, allow_missing=allow_missing)
    warnings = _check_inputs(job)
    job.output.check_array()
    ready = ready_blocks(job, completion)
    attempt, done = Attempt(1, worker), 0
    lost: dict[Index, str] = {}
    progress(done, len(ready))
    with ThreadPoolExecutor(threads or max_concurrent_blocks(job.plan)) as pool:
        for first in range(0, len(ready), BATCH_SIZE):
            batch = ready[first : first + BATCH_SIZE]
            futures = [pool.submit(complete_block, job, index, attempt) for index in batch]
            try:
                for future in as_completed(futures):
                    try:
                        future.result()
                    except PieceError as error:
                        lost |= dict.fromkeys(error.sources, str(error))
                    done += 1
                    progress(done, len(ready))
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
    with job.check_replaced_on_error():
        _raise_if_lost(lost)
        return _seal(job, completion.unfinished, warnings)


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


def _raise_if_lost(lost: Mapping[Index, str]) -> None:
    """Raise IncompleteError if results were lost. `lost` maps each chunk to the reason."""
    if lost:
        chunks = sorted(lost)
        raise IncompleteError(
            f"results of {chunk_count(len(chunks))} are lost: {_names(chunks)} "
            f"({lost[chunks[0]]}); run `chunkq run` again, or `chunkq produce --resume` and a "
            "worker",
            chunks,
            code=ErrorCode.RESULTS_LOST,
        )


def max_concurrent_blocks(plan: Plan) -> int:
    """Return how many blocks to complete concurrently within `FINALIZER_BYTES` of memory."""
    max_blocks = FINALIZER_BYTES // max(1, footprint(plan).finalizing)
    return max(1, min(FINALIZER_THREADS, max_blocks))


def _gather(job: JobHandle, chunk: Chunk) -> tuple[OwnBlock | None, dict[Piece, Any], int]:
    """Read the pieces of a block; return its own piece, the others, and their size (bytes).

    Raises PieceError if some are missing or damaged, after deleting the commit records of the
    chunks that wrote them.
    """
    ledger, total, own_block = job.ledger, 0, None
    pieces: dict[Piece, Any] = {}
    problems: dict[Index, PieceError] = {}
    if chunk.is_active:
        try:
            arrays, total = ledger.get_piece(chunk.index, OWN_PIECE)
            bands = len(chunk.band_boxes)
            own_block = OwnBlock(tuple(arrays[:bands]), tuple(arrays[bands:]))
        except PieceError as error:
            problems[chunk.index] = error
    for piece in job.plan.incoming_pieces(chunk):
        try:
            arrays, size = ledger.get_piece(chunk.index, piece.name)
            pieces[piece], total = arrays[0], total + size
        except PieceError as error:
            problems[piece.source] = error
    if problems:
        if not ledger.is_committed("finalize", chunk.index):
            ledger.delete_commits("infer", problems)
        names = ", ".join(map(chunk_name, problems))
        raise PieceError(
            f"{next(iter(problems.values()))}; chunk {names} must be computed again",
            tuple(problems),
        )
    return own_block, pieces, total


def _seal(job: JobHandle, missing: tuple[Index, ...], warnings: Sequence[str]) -> dict[str, Any]:
    """Verify the commit records, seal the output unless chunks are missing, write the report."""
    report, inferred, finalized = _report(job, missing, warnings)
    _check_records(job, inferred, finalized, missing)
    if missing:
        job.output.mark_incomplete(check_unchanged=job.check_unchanged)
    else:
        job.check_unchanged()
        job.ledger.seal()
        job.output.seal(check_unchanged=job.check_unchanged)
        job.ledger.delete_pieces()
    job.ledger.write_report(report)
    return report


def _check_records(
    job: JobHandle, inferred: set[Index], finalized: set[Index], missing: Sequence[Index]
) -> None:
    """Delete damaged commit records and raise IncompleteError if there are any.

    A block without a valid record must be completed again, which needs the pieces of all its
    contributors. The commit records of these are deleted, too.
    """
    absent = set(missing)
    blocks = {
        block
        for block in job.plan.to_finalize()
        if block not in finalized and not absent.intersection(job.plan.contributors(block))
    }
    lost = {index for index in job.plan.indices() if index not in inferred} - absent
    lost.update(*(job.plan.contributors(block) for block in blocks))
    job.ledger.delete_commits("finalize", blocks)
    job.ledger.delete_commits("infer", lost)
    _raise_if_lost(dict.fromkeys(lost, "a commit record is damaged"))


def job_report(job: JobHandle, missing: Iterable[Index] = ()) -> dict[str, Any]:
    """Aggregate all commit records into the report: timings, bytes moved, conclusion, advice."""
    return _report(job, missing)[0]


def _report(
    job: JobHandle, missing: Iterable[Index], warnings: Sequence[str] = ()
) -> tuple[dict[str, Any], set[Index], set[Index]]:
    """Return the report, and the chunks and blocks that have a valid commit record."""
    inferred: set[Index] = set()
    finalized: set[Index] = set()
    timing = aggregate_timing(
        job.plan,
        _collect(job.ledger.read_commits("infer"), inferred),
        _collect(job.ledger.read_commits("finalize"), finalized),
    )
    report = {
        "chunkq_version": __version__,
        "digest": job.record.digest,
        "missing": [chunk_name(index) for index in missing],
        "warnings": list(warnings),
        "conclusion": conclusion(timing),
        "advice": advice(timing),
        **timing.as_dict(),
    }
    return report, inferred, finalized


def _collect(commits: Iterable[Commit], chunks: set[Index]) -> Iterator[Commit]:
    """Yield the commit records and add their chunks to the set."""
    for commit in commits:
        chunks.add(commit.chunk)
        yield commit


def _not_computed(missing: Sequence[Index]) -> str:
    verb = "is" if len(missing) == 1 else "are"
    return f"{chunk_count(len(missing))} {verb} not computed yet: {_names(missing)}; run a worker"


def _names(chunks: Sequence[Index]) -> str:
    names = ", ".join(chunk_name(index) for index in chunks[:20])
    return names + (f" and {len(chunks) - 20} more" if len(chunks) > 20 else "")
