"""Completing blocks: add the pieces of all contributors, decide, write, commit, seal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from typing import Any

from chunkq import __version__
from chunkq.blend import Own, complete
from chunkq.errors import IncompleteError, PieceError
from chunkq.executors.base import Attempt
from chunkq.footprint import footprint
from chunkq.ledger import Commit
from chunkq.memory import peak_bytes
from chunkq.opened import OpenJob, open_job
from chunkq.plan import Chunk, Index, Piece, Plan
from chunkq.stores import set_attributes
from chunkq.tally import times_of
from chunkq.tasks import Task, chunk_name
from chunkq.verdict import advice, conclusion

OWN = "own"
"""Name of the piece a chunk leaves for its own block."""
BATCH = 1000
"""Blocks given to the pool, and commit records read, at a time; bounds memory."""
FINALIZER_BYTES = 2 << 30
FINALIZER_THREADS = 2
"""Memory that blocks being finalized at once stay below, as far as one of them does."""


def finalize_block(task: Task, attempt: Attempt) -> None:
    """Complete the block of one chunk, unless that is done already.

    Raises IncompleteError while a contributor is not committed, and what `complete_block` raises.
    """
    job = open_job(task.job)
    if job.folder.is_committed("finalize", task.chunk):
        return
    waits = [
        c for c in job.plan.contributors(task.chunk) if not job.folder.is_committed("infer", c)
    ]
    if waits:
        raise IncompleteError(f"block {chunk_name(task.chunk)} waits for others", waits)
    complete_block(job, task.chunk, attempt)


def complete_block(job: OpenJob, index: Index, attempt: Attempt) -> None:
    """Add up a block whose contributors are all committed, write, commit, delete its pieces.

    Raises PieceError if a piece is gone or damaged: then its contributor is taken back and must
    be computed again.
    """
    started = time.time()
    chunk = job.plan.chunk(index)
    try:
        own, pieces, read_bytes = _gather(job, chunk)
    except PieceError:
        # Another finalizer may have completed the block, and tidied up, in between.
        if job.folder.is_committed("finalize", index):
            return
        raise
    read = time.time()
    written = 0
    for box, values in complete(job.plan, chunk, own, pieces):
        written += job.write(box, values)
    finished = time.time()
    job.folder.commit(
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
    job.folder.delete_pieces(index)


@dataclass(frozen=True)
class Standing:
    """What of a job is done. `unfinished` are the chunks without a commit record."""

    unfinished: tuple[Index, ...]
    to_finalize: tuple[Index, ...]


def standing(job: OpenJob) -> Standing:
    """Compare the plan with the ledger: two listings, whatever the job's size."""
    inferred = job.folder.committed("infer")
    finalized = job.folder.committed("finalize")
    return Standing(
        tuple(index for index in job.plan.indices() if index not in inferred),
        tuple(index for index in job.plan.to_finalize() if index not in finalized),
    )


def checked_standing(job: OpenJob, *, allow_missing: bool = False) -> Standing:
    """Compare the plan with the ledger before blocks are completed.

    Raises IncompleteError with the list of chunks if some are not computed, unless `allow_missing`.
    """
    now = standing(job)
    if now.unfinished and not allow_missing:
        raise IncompleteError(_how_many(now.unfinished), now.unfinished)
    return now


def ready_blocks(job: OpenJob, now: Standing) -> list[Index]:
    """Return the blocks that can be completed: all but those that a missing chunk touches."""
    missing = set(now.unfinished)
    if not missing:
        return list(now.to_finalize)
    return [i for i in now.to_finalize if not missing.intersection(job.plan.contributors(i))]


def finalize_job(
    job: OpenJob,
    *,
    worker: str,
    allow_missing: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Complete every block that can be, then seal the output; returns the report.

    Raises IncompleteError with the list of chunks if some are not computed, unless
    `allow_missing`: then the blocks they touch stay empty, and the output says so. `threads`
    blocks are completed at once, by default as many as `blocks_at_once` says.
    """
    before = checked_standing(job, allow_missing=allow_missing)
    ready = ready_blocks(job, before)
    attempt, done = Attempt(1, worker), 0
    progress(done, len(ready))
    with ThreadPoolExecutor(threads or blocks_at_once(job.plan)) as pool:
        for first in range(0, len(ready), BATCH):
            batch = ready[first : first + BATCH]
            waiting = [pool.submit(complete_block, job, index, attempt) for index in batch]
            try:
                for future in as_completed(waiting):
                    future.result()
                    done += 1
                    progress(done, len(ready))
            except BaseException:
                for future in waiting:
                    future.cancel()
                raise
    return _seal(job, before.unfinished)


def blocks_at_once(plan: Plan) -> int:
    """Return how many blocks a finalizer completes at once, so that 2 GiB hold them."""
    fitting = FINALIZER_BYTES // max(1, footprint(plan).completing)
    return max(1, min(FINALIZER_THREADS, fitting))


def _gather(job: OpenJob, chunk: Chunk) -> tuple[Own | None, dict[Piece, Any], int]:
    """Read what the contributors left; a contributor whose piece is unfit loses its commit."""
    folder, total, own = job.folder, 0, None
    source = chunk.index
    try:
        if chunk.active:
            arrays, size = folder.get_piece(chunk.index, OWN)
            bands = len(chunk.band_boxes)
            own, total = Own(tuple(arrays[:bands]), tuple(arrays[bands:])), size
        pieces = {}
        for piece in job.plan.awaits(chunk):
            source = piece.source
            arrays, size = folder.get_piece(chunk.index, piece.name)
            pieces[piece], total = arrays[0], total + size
    except PieceError as error:
        if not folder.is_committed("finalize", chunk.index):
            folder.objects.delete(f"done/infer/{chunk_name(source)}")
        raise PieceError(
            f"{error}; chunk {chunk_name(source)} must be computed again: "
            "run `chunkq produce --resume` and a worker"
        ) from None
    return own, pieces, total


def _seal(job: OpenJob, missing: tuple[Index, ...]) -> dict[str, Any]:
    report = job_report(job, missing)
    state = "incomplete" if missing else "complete"
    set_attributes(
        job.folder.output,
        {"chunkq": {"state": state, "digest": job.record.digest, "version": __version__}},
    )
    if not missing:
        job.folder.delete_pieces()
    job.folder.write_report(report)
    return report


def job_report(job: OpenJob, missing: Iterable[Index] = ()) -> dict[str, Any]:
    """Sum up all commit records: what was done, what was moved, and where the time went."""
    times = times_of(job.plan, _records(job, "infer"), _records(job, "finalize"))
    return {
        "chunkq_version": __version__,
        "digest": job.record.digest,
        "missing": [chunk_name(index) for index in missing],
        "conclusion": conclusion(times),
        "advice": advice(times),
        **times.as_dict(),
    }


def _records(job: OpenJob, kind: str) -> Iterator[Commit]:
    """Yield the commit records of a kind, read a batch at a time."""
    names = iter(job.folder.committed(kind))
    while batch := list(islice(names, BATCH)):
        yield from job.folder.commits(kind, batch)


def _how_many(missing: tuple[Index, ...]) -> str:
    names = ", ".join(chunk_name(index) for index in missing[:20])
    more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
    return f"{len(missing)} chunks are not computed yet: {names}{more}"
