"""Write `.slp` files of SLEAP, which hold the poses of all videos, with sleap-io."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.images.image_list import is_video
from chunkq.images.poses import Poses
from chunkq.images.skeleton import Skeleton
from chunkq.images.slp_packages import check_slp_packages

PREDICTED = 1
"""Number of predicted instances in `.slp` files, beside 0 for those that a user has drawn."""
NONE = -1
"""Number of no track, and of no instance."""
ROWS = 8192
"""Rows of a chunk of the datasets, and rows that are written at once."""
LEVEL = 1
"""Level of gzip, which keeps the last chunk of a dataset small."""
DEFAULT_NAME = "skeleton"


@dataclass(frozen=True)
class SlpVideo:
    """A video of a `.slp` file: one file, or a list of images, which are its frames.

    shape  number of frames, height and width in pixels, channels; None if it is not known
    """

    path: str | tuple[str, ...]
    shape: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class SlpFrame:
    """The poses in a frame: number of the video, and of the frame in it."""

    video: int
    frame: int
    poses: Poses


Row = tuple[str, int | None]
"""A row of a list: its path, and the number of the frame in a video, None for an image."""


def videos_of(rows: Iterable[Row]) -> list[SlpVideo]:
    """Return the videos of the rows of a list, in the order of their first row.

    All images are one video, in which they have the order of the list.
    """
    images: list[str] = []
    paths: dict[str | None, None] = {}
    for path, _ in rows:
        is_image = not is_video(path)
        if is_image:
            images.append(path)
        paths.setdefault(None if is_image else path)
    return [SlpVideo(tuple(images) if path is None else path) for path in paths]


def places_of(rows: Iterable[Row]) -> Iterator[tuple[int, int]]:
    """Yield the place of each row: the number of its video in `videos_of`, and of the frame.

    The place of a video that could not be read has no meaning.
    """
    numbers: dict[str | None, int] = {}
    image = 0
    for path, frame in rows:
        is_image = not is_video(path)
        video = numbers.setdefault(None if is_image else path, len(numbers))
        yield video, image if is_image else frame or 0
        image += is_image


def write_slp(
    path: str,
    skeleton: Skeleton,
    videos: Sequence[SlpVideo],
    frames: Iterable[SlpFrame],
    provenance: dict[str, Any],
) -> int:
    """Write a `.slp` file; return the number of frames.

    sleap-io writes all but the frames, which are appended to its datasets in their order, so that
    memory does not grow with their number. Equal arguments give equal bytes.

    Raises StoreError if sleap-io is missing, and OSError.
    """
    check_slp_packages()
    import h5py
    import sleap_io as sio

    skeletons = [_skeleton(skeleton, sio)]
    labels = sio.Labels(
        videos=[_video(video, sio) for video in videos],
        skeletons=skeletons,
        provenance=provenance,
    )
    labels.save(path, format="slp", embed=False, verbose=False)
    with h5py.File(path, "r+") as file:
        tables = {name: _Table(file, name) for name in ("frames", "instances", "pred_points")}
        count = 0
        for frame in frames:
            _append(tables, frame)
            count += 1
        for table in tables.values():
            table.flush()
    return count


def _append(tables: dict[str, _Table], frame: SlpFrame) -> None:
    frames, instances, points = tables["frames"], tables["instances"], tables["pred_points"]
    poses = frame.poses
    animals, keypoints = poses.point_scores.shape
    first, first_point, number = instances.count, points.count, frames.count
    frames.append(
        1,
        frame_id=number,
        video=frame.video,
        frame_idx=frame.frame,
        instance_id_start=first,
        instance_id_end=first + animals,
    )
    starts = first_point + keypoints * np.arange(animals)
    instances.append(
        animals,
        instance_id=first + np.arange(animals),
        instance_type=PREDICTED,
        frame_id=number,
        skeleton=0,
        track=NONE,
        from_predicted=NONE,
        score=poses.scores,
        point_id_start=starts,
        point_id_end=starts + keypoints,
        tracking_score=0,
    )
    is_found = np.isfinite(poses.points).all(axis=2).reshape(-1)
    points.append(
        animals * keypoints,
        x=poses.points[..., 0].reshape(-1),
        y=poses.points[..., 1].reshape(-1),
        visible=is_found,
        complete=False,
        score=np.where(is_found, poses.point_scores.reshape(-1), 0),
    )


class _Table:
    """A dataset of records of a fixed type, to which rows are appended."""

    def __init__(self, file: Any, name: str) -> None:
        """Replace the empty dataset that sleap-io has written by one that can grow."""
        dtype = file[name].dtype
        del file[name]
        self._dataset = file.create_dataset(
            name, shape=(0,), maxshape=(None,), chunks=(ROWS,), dtype=dtype, compression=LEVEL
        )
        self._dtype, self._waiting, self.count = dtype, list[npt.NDArray[Any]](), 0
        self._written = 0

    def append(self, rows: int, **columns: Any) -> None:
        """Append rows; each column is an array with a value per row, or one value for all."""
        records = np.zeros(rows, self._dtype)
        for name, values in columns.items():
            records[name] = values
        self._waiting.append(records)
        self.count += rows
        if self.count - self._written >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if self.count > self._written:
            self._dataset.resize((self.count,))
            self._dataset[self._written :] = np.concatenate(self._waiting)
        self._waiting, self._written = [], self.count


def _skeleton(skeleton: Skeleton, sio: Any) -> Any:
    return sio.Skeleton(
        nodes=list(skeleton.names),
        edges=[(skeleton.names[a], skeleton.names[b]) for a, b in skeleton.edges],
        name=skeleton.name or DEFAULT_NAME,
    )


def _video(video: SlpVideo, sio: Any) -> Any:
    """Return a video that is neither opened nor decoded."""
    if isinstance(video.path, tuple):
        filename: str | list[str] = list(video.path)
        metadata: dict[str, Any] = {
            "type": "ImageVideo",
            "filename": video.path[0],
            "filenames": filename,
        }
        if video.shape is not None:
            metadata |= dict(zip(("height_", "width_", "channels_"), video.shape[1:], strict=True))
    else:
        filename = video.path
        metadata = {
            "type": "MediaVideo",
            "filename": filename,
            "bgr": True,
            "dataset": "",
            "input_format": "",
        }
    if video.shape is not None:
        metadata |= {"shape": list(video.shape), "grayscale": video.shape[3] == 1}
    return sio.Video(filename=filename, backend=None, backend_metadata=metadata, open_backend=False)
