"""Completing blocks: add the pieces of all contributors, decide, write, commit, seal."""

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
from chunkq.tasks import Task, chunk_name
from chunkq.timing_aggregation import aggregate_timing

OWN_PIECE = "own"
"""Name of the piece a chunk leaves for its own block."""
BATCH = 1000
"""Blocks given to the pool at a time; bounds memory."""
FINALIZER_BYTES = 2 << 30
FINALIZER_THREADS = 2
"""Memory that blocks being finalized at once stay below, as far as one of them does."""


def finalize_block(task: Task, attempt: Attempt) -> None:
    """Complete the block of one chunk, unless that is done already.

    Raises IncompleteError while a contributor is not committed, and what `complete_block` raises.
    """
    job = open_job(task.job)
    ledger = job.ledger
    if ledger.is_committed("finalize", task.chunk):
        return
    waits = [c for c in job.plan.contributors(task.chunk) if not ledger.is_committed("infer", c)]
    if waits:
        raise IncompleteError(f"block {chunk_name(task.chunk)} waits for others", waits)
    complete_block(job, task.chunk, attempt)


def complete_block(job: JobHandle, index: Index, attempt: Attempt) -> None:
    """Add up a block whose contributors are all committed, write, commit, delete its pieces.

    Raises PieceError if pieces are gone or damaged: then their contributors lose their commits
    and must be computed again. Raises MissingJobError if the job was replaced.
    """
    with job.unless_replaced():
        _complete_block(job, index, attempt)


def _complete_block(job: JobHandle, index: Index, attempt: Attempt) -> None:
    started = time.time()
    chunk = job.plan.chunk(index)
    try:
        own, pieces, read_bytes = _gather(job, chunk)
        read = time.time()
        job.check_unchanged()
        written = sum(job.write(box, v) for box, v in finalize_sums(job.plan, chunk, own, pieces))
        finished = time.time()
        job.check_unchanged()
    except (PieceError, OSError):
        # Another finalizer may have completed the block, and tidied up, in between.
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
            seconds={"read": read - started, "write": finished - read},
            moved={"pieces_read": read_bytes, "output": written},
            peak_rss=peak_bytes(),
        )
    )
    job.ledger.delete_pieces(index)


@dataclass(frozen=True)
class JobCompletion:
    """What of a job is done. `unfinished` are the chunks without a commit record."""

    unfinished: tuple[Index, ...]
    to_finalize: tuple[Index, ...]


def job_completion(job: JobHandle) -> JobCompletion:
    """Compare the plan with the ledger: two listings, whatever the job's size."""
    inferred = job.ledger.committed("infer")
    finalized = job.ledger.committed("finalize")
    return JobCompletion(
        tuple(index for index in job.plan.indices() if index not in inferred),
        tuple(index for index in job.plan.to_finalize() if index not in finalized),
    )


def check_completion(job: JobHandle, *, allow_missing: bool = False) -> JobCompletion:
    """Compare the plan with the ledger before blocks are completed.

    Raises IncompleteError with the list of chunks if some are not computed, unless `allow_missing`.
    """
    now = job_completion(job)
    if now.unfinished and not allow_missing:
        raise IncompleteError(_count_chunks(now.unfinished), now.unfinished)
    return now


def ready_blocks(job: JobHandle, now: JobCompletion) -> list[Index]:
    """Return the blocks that can be completed: all but those that a missing chunk touches."""
    missing = set(now.unfinished)
    if not missing:
        return list(now.to_finalize)
    return [i for i in now.to_finalize if not missing.intersection(job.plan.contributors(i))]


def finalize_job(
    job: JobHandle,
    *,
    worker: str,
    allow_missing: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Complete every block that can be, then seal the output; returns the report.

    Raises IncompleteError with the list of chunks if some are not computed, unless
    `allow_missing`: then the blocks they touch stay empty, and the output says so. Its code is
    RESULTS_LOST if results were lost: then all the blocks that could be completed are, and the
    chunks that must be computed again have no commit any more. Raises StoreError if an input or
    the output's metadata were replaced, MissingJobError if the job was. `threads` blocks are
    completed at once, by default as many as `blocks_at_once` says.
    """
    job.check_unchanged()
    before = check_completion(job, allow_missing=allow_missing)
    warnings = _check_inputs(job)
    job.output.check_array()
    ready = ready_blocks(job, before)
    attempt, done = Attempt(1, worker), 0
    lost: dict[Index, str] = {}
    progress(done, len(ready))
    with ThreadPoolExecutor(threads or blocks_at_once(job.plan)) as pool:
        for first in range(0, len(ready), BATCH):
            batch = ready[first : first + BATCH]
            waiting = [pool.submit(complete_block, job, index, attempt) for index in batch]
            try:
                for future in as_completed(waiting):
                    try:
                        future.result()
                    except PieceError as error:
                        lost |= dict.fromkeys(error.sources, str(error))
                    done += 1
                    progress(done, len(ready))
            except BaseException:
                for future in waiting:
                    future.cancel()
                raise
    with job.unless_replaced():
        _raise_if_lost(lost)
        return _seal(job, before.unfinished, warnings)


def _check_inputs(job: JobHandle) -> list[str]:
    """Return a warning for an input that is gone; raises StoreError for one that was replaced."""
    try:
        job.check_inputs()
    except ChunkReadError as error:
        if error.code != ErrorCode.INPUT_MISSING:
            raise StoreError(str(error), code=error.code) from None
        return [str(error)]
    except OSError as error:
        return [f"an input could not be compared with the one that was read: {error}"]
    return []


def _raise_if_lost(lost: Mapping[Index, str]) -> None:
    """Raise IncompleteError if results of chunks were lost; `lost` has the reason for each."""
    if lost:
        chunks = sorted(lost)
        raise IncompleteError(
            f"results of {len(chunks)} chunks are lost: {_names(chunks)} ({lost[chunks[0]]}); "
            "next: `chunkq run` again, or `chunkq produce --resume` and a worker",
            chunks,
            code=ErrorCode.RESULTS_LOST,
        )


def blocks_at_once(plan: Plan) -> int:
    """Return how many blocks a finalizer completes at once, so that 2 GiB hold them."""
    fitting = FINALIZER_BYTES // max(1, footprint(plan).completing)
    return max(1, min(FINALIZER_THREADS, fitting))


def _gather(job: JobHandle, chunk: Chunk) -> tuple[OwnBlock | None, dict[Piece, Any], int]:
    """Read what the contributors left; contributors of missing pieces lose their commits."""
    ledger, total, own = job.ledger, 0, None
    pieces: dict[Piece, Any] = {}
    problems: dict[Index, PieceError] = {}
    if chunk.is_active:
        try:
            arrays, total = ledger.get_piece(chunk.index, OWN_PIECE)
            bands = len(chunk.band_boxes)
            own = OwnBlock(tuple(arrays[:bands]), tuple(arrays[bands:]))
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
    return own, pieces, total


def _seal(job: JobHandle, missing: tuple[Index, ...], warnings: Sequence[str]) -> dict[str, Any]:
    """Write the report; of a complete job, verify that every task has a valid record, and seal."""
    report, inferred, finalized = _report(job, missing, warnings)
    _check_records(job, inferred, finalized, missing)
    if missing:
        job.output.describe_incomplete(allowed=job.check_unchanged)
    else:
        job.check_unchanged()
        job.ledger.seal()
        job.output.seal(allowed=job.check_unchanged)
        job.ledger.delete_pieces()
    job.ledger.write_report(report)
    return report


def _check_records(
    job: JobHandle, inferred: set[Index], finalized: set[Index], missing: Sequence[Index]
) -> None:
    """Withdraw the damaged commit records, and raise IncompleteError if there are any.

    A block without a valid record is completed again, and needs the pieces of all contributors.
    """
    absent = set(missing)
    blocks = {
        block
        for block in job.plan.to_finalize()
        if block not in finalized and not absent.intersection(job.plan.contributors(block))
    }
    again = {index for index in job.plan.indices() if index not in inferred} - absent
    again.update(*(job.plan.contributors(block) for block in blocks))
    job.ledger.delete_commits("finalize", blocks)
    job.ledger.delete_commits("infer", again)
    _raise_if_lost(dict.fromkeys(again, "a commit record is damaged"))


def job_report(job: JobHandle, missing: Iterable[Index] = ()) -> dict[str, Any]:
    """Sum up all commit records: what was done, what was moved, and where the time went."""
    return _report(job, missing)[0]


def _report(
    job: JobHandle, missing: Iterable[Index], warnings: Sequence[str] = ()
) -> tuple[dict[str, Any], set[Index], set[Index]]:
    """Return the report, and the chunks and blocks that have a valid commit record."""
    inferred: set[Index] = set()
    finalized: set[Index] = set()
    times = aggregate_timing(
        job.plan,
        _collect(job.ledger.read_commits("infer"), inferred),
        _collect(job.ledger.read_commits("finalize"), finalized),
    )
    report = {
        "chunkq_version": __version__,
        "digest": job.record.digest,
        "missing": [chunk_name(index) for index in missing],
        "warnings": list(warnings),
        "conclusion": conclusion(times),
        "advice": advice(times),
        **times.as_dict(),
    }
    return report, inferred, finalized


def _collect(commits: Iterable[Commit], chunks: set[Index]) -> Iterator[Commit]:
    """Yield commit records and add their chunks to a set."""
    for commit in commits:
        chunks.add(commit.chunk)
        yield commit


def _count_chunks(missing: Sequence[Index]) -> str:
    return f"{len(missing)} chunks are not computed yet: {_names(missing)}"


def _names(chunks: Sequence[Index]) -> str:
    names = ", ".join(chunk_name(index) for index in chunks[:20])
    return names + (f" and {len(chunks) - 20} more" if len(chunks) > 20 else "")
