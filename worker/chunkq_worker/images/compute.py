"""Compute a chunk of a job over images: read its rows, run the network, store its tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from threading import Lock

from chunkq.images.decoding import Decoded, Reserve, decode
from chunkq.images.image_list import is_video
from chunkq.images.reading import read_image
from chunkq.job.job_file import Job
from chunkq.job.job_handle import ItemHandle
from chunkq.job.object_checksums import encode_checksums
from chunkq.job.task_records import Commit
from chunkq.plan.chunk import Index
from chunkq.queue.contract.executor import Attempt
from chunkq.stages.tables import PIECE, put_results
from chunkq.system.cores import available_cores
from chunkq.system.memory import peak_bytes
from chunkq_worker.device import get_device
from chunkq_worker.images.chunk_rows import chunk_rows
from chunkq_worker.images.frames import check_videos, frame_inputs
from chunkq_worker.images.rows import RowInput, run_rows

MAX_READERS = 16
"""Threads of a chunk that read images, at most."""
_lock = Lock()


def compute_rows(item: ItemHandle, index: Index, attempt: Attempt) -> bool:
    """Compute and commit one chunk; return that the network ran."""
    job, ledger, started = item.job, item.ledger, time.time()
    keys = job.record.job
    block = item.plan.chunk(index).block
    first, stop = block.start[0], block.stop[0]
    rows = job.rows.part(first, stop)
    network, moved = get_device().images(item, index), {"input": 0}
    paths, states, access = rows.paths, rows.states, keys.inputs[0].access
    check_videos(paths, states, access)
    results = run_rows(
        row_inputs(keys, paths, rows.frames, states, moved),
        keys.image_spec,
        network,
        max_batch_size=keys.model.max_batch_size,
        threads=readers(keys),
    )
    result = chunk_rows(keys, rows, first, results)
    seconds = network.seconds
    computed = time.time()
    seconds = {"read": max(0.0, computed - started - sum(seconds.values())), **seconds}
    if ledger.is_committed("infer", index):
        return True  # another worker committed it first; the output may be sealed
    check_videos(paths, states, access)
    job.check_unchanged()
    moved["pieces"], checksum = put_results(item, index, result.to_bytes())
    seconds["write"] = time.time() - computed
    if ledger.is_committed("infer", index):
        return True
    job.check_unchanged()
    ledger.commit(
        Commit(
            kind="infer",
            item=item.number,
            chunk=index,
            attempt=attempt.number,
            worker=attempt.worker,
            started=started,
            finished=time.time(),
            seconds=seconds,
            moved={**moved, "output": 0},
            checksums={PIECE: checksum},
            patches=len(rows),
            peak_rss=peak_bytes(),
            stored=encode_checksums([]),
            errors=result.errors.num_rows,
        )
    )
    return True


def row_inputs(
    job: Job,
    paths: Sequence[str],
    frames: Sequence[int | None],
    states: Sequence[str | None],
    moved: dict[str, int] | None = None,
) -> Iterator[RowInput]:
    """Yield the images at paths, numbered from 0, where `frames` are numbers in videos.

    `states` are those of the videos, None if they are not known. `moved` counts the bytes of images
    that are read.
    """
    access, mode = job.inputs[0].access, job.image_spec.mode

    def read(path: str, reserve: Reserve) -> Decoded:
        content = read_image(path, access)
        if moved is not None:
            with _lock:
                moved["input"] += len(content)
        return decode(content, mode, reserve)

    videos = frame_inputs(paths, frames, states, access, mode)
    for number, path in enumerate(paths):
        yield next(videos) if is_video(path) else RowInput(number, partial(read, path))


def readers(job: Job) -> int:
    """Return the number of threads of a chunk that read images."""
    return job.threads or min(MAX_READERS, 2 * available_cores())
