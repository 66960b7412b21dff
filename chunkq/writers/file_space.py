"""Where an image lies in the NIfTI file from which it comes: order of the axes, and affine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chunkq.storage.formats.base import AFFINE
from chunkq.storage.images import ImageSource

Matrix = tuple[tuple[float, ...], ...]
RANK = 3
ALIGNED = 2
"""sform_code of coordinates that are aligned with something."""


@dataclass(frozen=True)
class FileSpace:
    """How an image lies in a NIfTI file.

    dimensions  for each of x, y, z the number of the spatial axis of the image, and its direction:
                -1 if the first voxel of the image is the last one of the file; None without one
    affine      (4, 4) of the voxel indices x, y, z of the image in the order of the file
    qform       that of the qform, if it is another one
    codes       sform_code and qform_code
    """

    dimensions: tuple[tuple[int, int] | None, ...]
    affine: Matrix
    qform: Matrix | None
    codes: tuple[int, int]


def file_space(
    source: ImageSource,
    shape: Sequence[int],
    start: Sequence[int] = (),
    scale: Sequence[float] = (),
) -> FileSpace | None:
    """Return how an image of a NIfTI file lies in it; None if the source is of another format.

    The image has the spatial axes of `source`, in the order of the network, and this spatial shape.
    Its first voxel begins at voxel `start` of the source, and its voxels have `scale` voxels of the
    source along each axis.
    """
    if AFFINE not in source.options:
        return None
    from chunkq.storage.formats.nifti import CODES, QFORM, affines_of  # for such images only

    rank = len(source.spatial_numbers)
    start, scale = start or (0,) * rank, scale or (1,) * rank
    stored = source.stored_axes
    # Colours are a last axis behind x.
    last = len(stored) - 1 - (stored[-1].kind == "channel")
    dimensions: list[tuple[int, int] | None] = [None] * RANK
    first, step = np.zeros(RANK), np.ones(RANK)
    is_whole = True
    for number, presented in enumerate(source.spatial_numbers):
        place, direction = presented, 1
        if source.orientation:
            place, direction = source.orientation[presented]
        dimension = last - place
        if not 0 <= dimension < RANK:
            return None
        size, count = stored[place].size, shape[number]
        dimensions[dimension] = (number, direction)
        step[dimension] = scale[number]
        center = start[number] + (scale[number] - 1) / 2
        if direction < 0:
            center = size - 1 - center - (count - 1) * scale[number]
        first[dimension] = center
        is_whole &= count == size
    moved = np.eye(RANK + 1)
    moved[:RANK, :RANK], moved[:RANK, RANK] = np.diag(step), first
    sform, qform = affines_of(source.options)
    s_code, q_code = (int(source.options.get(code, 0)) for code in CODES)
    if not is_whole and not s_code and not q_code:
        s_code = ALIGNED  # readers without codes center the image by its shape
    return FileSpace(
        tuple(dimensions),
        _matrix(sform @ moved),
        None if QFORM not in source.options else _matrix(qform @ moved),
        (s_code, q_code),
    )


def _matrix(values: npt.NDArray[np.float64]) -> Matrix:
    return tuple(tuple(float(value) for value in row) for row in values)
