"""The volume that a network reads: its shape, dtype and channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Volume:
    """Spatial shape in voxels and dtype name of the input.

    For several inputs, `dtype` is their common dtype and `dtypes` lists the dtype of each. Each
    input has `channels` channels.
    """

    shape: tuple[int, ...]
    dtype: str
    dtypes: tuple[str, ...] = ()
    channels: int = 1

    @classmethod
    def joined(cls, volumes: Sequence[Volume]) -> Volume:
        """Return one volume for several inputs, which have the same shape and channels."""
        dtypes = tuple(volume.dtype for volume in volumes)
        if len(dtypes) == 1:
            return volumes[0]
        common = np.result_type(*dtypes).name
        return cls(volumes[0].shape, common, dtypes, volumes[0].channels)

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return len(self.dtypes) or 1

    @property
    def voxel_bytes(self) -> int:
        """Bytes per voxel, summed over the channels of all inputs."""
        itemsizes = (np.dtype(dtype).itemsize for dtype in self.dtypes or (self.dtype,))
        return self.channels * sum(itemsizes)
