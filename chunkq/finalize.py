"""Completing blocks: add the pieces of all contributors, decide, write, commit, seal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from statistics import median
from typing import Any

from chunkq import __version__
from chunkq.blend import Own, complete
from chunkq.errors import IncompleteError, PieceError
from chunkq.executors.base import Attempt
from chunkq.ledger import Commit
from chunkq.opened import OpenJob, open_job
from chunkq.plan import Chunk, Index, Piece
from chunkq.stores import set_attributes
from chunkq.tasks import Task, chunk_name

OWN = "own"
"""Name of the piece a chunk leaves for its own block."""
FINALIZER_BYTES = 2 << 30
"""Memory that blocks being finalized at once stay below, as far as one of them does."""


def finalize_block(task: Task, attempt: Attempt) -> None:
    """Complete the block of one chunk, unless that is done already.

    Raises IncompleteError while a contributor is not committed, PieceError if a piece is gone
    or damaged: then its contributor is taken back and must be computed again.
    """
    job = open_job(task.job)
    if job.folder.is_committed("finalize", task.chunk):
        return
    missing = [c for c in job.plan.contributors(task.chunk) if not _is_inferred(job, c)]
    if missing:
        raise IncompleteError(f"block {chunk_name(task.chunk)} waits for others", missing)
    started = time.time()
    chunk = job.plan.chunk(task.chunk)
    try:
        own, pieces, read_bytes = _gather(job, chunk)
    except PieceError:
        # Another finalizer may have completed the block, and tidied up, in between.
        if job.folder.is_committed("finalize", task.chunk):
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
            chunk=task.chunk,
            attempt=attempt.number,
            worker=attempt.worker,
            started=started,
            finished=finished,
            seconds={"read": read - started, "write": finished - read},
            moved={"pieces_read": read_bytes, "output": written},
        )
    )
    job.folder.delete_pieces(task.chunk)


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


def finalize_job(
    job: OpenJob,
    *,
    worker: str,
    allow_missing: bool = False,
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Complete every block that can be, then seal the output; returns the report.

    Raises IncompleteError with the list of chunks if some are not computed, unless
    `allow_missing`: then the blocks they touch stay empty, and the output says so.
    """
    before = standing(job)
    if before.unfinished and not allow_missing:
        raise IncompleteError(_how_many(before.unfinished), before.unfinished)
    missing = set(before.unfinished)
    ready = [i for i in before.to_finalize if not missing.intersection(job.plan.contributors(i))]
    fitting = max(1, FINALIZER_BYTES // max(1, job.plan.costs.finalizer_bytes))
    progress(0, len(ready))
    with ThreadPoolExecutor(min(threads, fitting)) as pool:
        waiting = [
            pool.submit(finalize_block, Task("finalize", job.folder.path, i), Attempt(1, worker))
            for i in ready
        ]
        try:
            for done, future in enumerate(as_completed(waiting), start=1):
                future.result()
                progress(done, len(ready))
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
    return _seal(job, before.unfinished)


def _is_inferred(job: OpenJob, index: Index) -> bool:
    return job.folder.is_committed("infer", index)


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
    """Sum up all commit records: chunks, patches, bytes moved, seconds per stage and worker."""
    folder, costs = job.folder, job.plan.costs
    infer = folder.commits("infer", folder.committed("infer"))
    blocks = folder.commits("finalize", folder.committed("finalize"))
    every = [*infer, *blocks]
    moved = {
        "input": _total(infer, "moved", "input"),
        "output": _total(every, "moved", "output"),
        "pieces_written": _total(infer, "moved", "pieces"),
        "pieces_read": _total(blocks, "moved", "pieces_read"),
    }
    wall = max(c.finished for c in every) - min(c.started for c in every) if every else 0.0
    return {
        "chunkq_version": __version__,
        "digest": job.record.digest,
        "chunks": len(infer),
        "missing": [chunk_name(index) for index in missing],
        "finalized_blocks": len(blocks),
        "patches": sum(c.patches for c in infer),
        "planned_patches": costs.patches,
        "wall_seconds": wall,
        "seconds": {
            s: _total(infer, "seconds", s) for s in ("read", "wait", "load", "compute", "write")
        }
        | {"finalize": sum(c.finished - c.started for c in blocks)},
        "chunk_seconds_median": median(c.finished - c.started for c in infer) if infer else 0.0,
        "bytes": moved,
        "planned_bytes": {
            "input": costs.input_bytes,
            "output": costs.output_bytes,
            "pieces_written": costs.piece_bytes,
            "pieces_read": costs.piece_bytes,
        },
        "peak_rss_bytes": max((c.peak_rss for c in infer), default=0),
        "retried": sum(c.attempt > 1 for c in infer),
        "workers": {name: _worker_share(infer, name) for name in sorted({c.worker for c in infer})},
    }


def _worker_share(commits: list[Commit], worker: str) -> dict[str, float]:
    mine = [c for c in commits if c.worker == worker]
    span = max(c.finished for c in mine) - min(c.started for c in mine)
    busy = sum(c.seconds.get("compute", 0.0) for c in mine)
    return {"chunks": len(mine), "seconds": span, "device_busy_share": min(1.0, busy / (span or 1))}


def _total(commits: list[Commit], part: str, key: str) -> Any:
    return sum(getattr(c, part).get(key, 0) for c in commits)


def _how_many(missing: tuple[Index, ...]) -> str:
    names = ", ".join(chunk_name(index) for index in missing[:20])
    more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
    return f"{len(missing)} chunks are not computed yet: {names}{more}"
