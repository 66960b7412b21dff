"""Write the keypoints of a job over images as a `.slp` file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from chunkq import __version__
from chunkq.images.poses import read_poses
from chunkq.images.slp_file import SlpFrame, places_of, write_slp
from chunkq.job.job_handle import ItemHandle
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
    videos, places = places_of(job.rows.paths, job.rows.frames)
    model = job.record.job.model
    network = [*(model.package or model.files.values())]
    provenance = {"software": f"chunkq {__version__}", "model": network}
    write_slp(path, skeleton, videos, _frames(chunks, places, skeleton.names), provenance)


def _frames(
    chunks: Iterable[tuple[pa.Table, pa.Table]],
    places: npt.NDArray[np.int64],
    names: Sequence[str],
) -> Iterator[SlpFrame]:
    row = 0
    for results, errors in chunks:
        count = len(results) + len(errors)
        failed = {*errors.column("row").to_pylist()}
        rows = (number for number in range(row, row + count) if number not in failed)
        for number, poses in zip(rows, read_poses(results, names), strict=True):
            video, frame = places[number]
            yield SlpFrame(int(video), int(frame), poses)
        row += count
