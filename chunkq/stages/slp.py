"""Write the keypoints of a job over images as a `.slp` file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import pyarrow as pa

from chunkq import __version__
from chunkq.images.poses import read_poses
from chunkq.images.slp_file import Row, SlpFrame, places_of, videos_of, write_slp
from chunkq.job.job_handle import ItemHandle, JobHandle
from chunkq.job.keypoints import skeleton_of


def write_keypoints(
    item: ItemHandle, path: str, chunks: Iterable[tuple[pa.Table, pa.Table]]
) -> None:
    """Write the tables of results and of errors of all chunks as a `.slp` file.

    Rows that failed have no frame.
    """
    job = item.job
    skeleton = skeleton_of(job.record.job)
    if skeleton is None:
        raise ValueError("the keypoints of the job have no names")
    model = job.record.job.model
    network = [*(model.package or model.files.values())]
    provenance = {"software": f"chunkq {__version__}", "model": network}
    frames = _frames(chunks, places_of(_rows(job)), skeleton.names)
    write_slp(path, skeleton, videos_of(_rows(job)), frames, provenance)


def _rows(job: JobHandle) -> Iterator[Row]:
    for part in job.rows.parts():
        yield from zip(part.paths, part.frames, strict=True)


def _frames(
    chunks: Iterable[tuple[pa.Table, pa.Table]],
    places: Iterator[tuple[int, int]],
    names: Sequence[str],
) -> Iterator[SlpFrame]:
    row = 0
    for results, errors in chunks:
        count = len(results) + len(errors)
        failed = {*errors.column("row").to_pylist()}
        of_chunk = enumerate(islice(places, count), row)
        good = (place for number, place in of_chunk if number not in failed)
        for (video, frame), poses in zip(good, read_poses(results, names), strict=True):
            yield SlpFrame(video, frame, poses)
        row += count
