"""Arrays in memory behind the interface of a stored one."""

from typing_extensions import override

from chunkq.geometry.box import Box
from chunkq.storage.array import Array, Voxels


class ArrayInMemory(Array):
    """An array that can be read."""

    path = "memory"

    def __init__(self, values: Voxels) -> None:
        self._values, self.shape, self.dtype = values, values.shape, values.dtype

    @override
    def read(self, box: Box) -> Voxels:
        return self._values[box.slices((0,) * len(self.shape))].copy()
