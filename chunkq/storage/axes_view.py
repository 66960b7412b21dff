"""Present a stored array with its channels first and its spatial axes in the network's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from typing_extensions import override

from chunkq.geometry.box import Box
from chunkq.storage.array import Array, Voxels
from chunkq.system import buffers

READ_FACTOR = 2
"""Channels read in one request are at most so many times those that are used."""


class AxesView(Array):
    """A read-only view ([C,] *S) of a stored array.

    `order` has the stored numbers of the spatial axes. `fixed` maps every other axis to the index
    that is read, except the axis `channel_axis`, along which `channels` are read in this order.
    `stored` is the array that is presented.
    """

    def __init__(
        self,
        array: Array,
        order: Sequence[int],
        fixed: Mapping[int, int],
        channel_axis: int | None = None,
        channels: Sequence[int] = (),
    ) -> None:
        self.path, self.dtype = array.path, array.dtype
        self.stored, self._order, self._fixed = array, tuple(order), dict(fixed)
        self._channel_axis, self._channels = channel_axis, tuple(channels)
        self.has_channels = channel_axis is not None
        leading = (len(self._channels),) if self.has_channels else ()
        self.shape = (*leading, *(array.shape[axis] for axis in self._order))

    @override
    def read(self, box: Box) -> Voxels:
        if self._channel_axis is None:
            return buffers.contiguous(self._read(box, range(0, 1))[0])
        first, last = box.start[0], box.stop[0]
        picks = self._channels[first:last]
        spatial = Box(box.start[1:], box.stop[1:])
        requests = list(_requests(picks))
        if len(requests) == 1 and picks == tuple(requests[0][1]):
            return buffers.contiguous(self._read(spatial, requests[0][1]))
        values = buffers.zeros(box.shape, self.dtype)
        for positions, channels in requests:
            part = self._read(spatial, channels)
            for position in positions:
                values[position] = part[picks[position] - channels.start]
        return values

    def _read(self, spatial: Box, channels: range) -> Voxels:
        """Read a box of the spatial axes of a range of channels; shape (C, *box.shape)."""
        ranges = {axis: (index, index + 1) for axis, index in self._fixed.items()}
        ranges |= dict(zip(self._order, zip(spatial.start, spatial.stop, strict=True), strict=True))
        leading = [] if self._channel_axis is None else [self._channel_axis]
        ranges |= dict.fromkeys(leading, (channels.start, channels.stop))
        stored = [ranges[axis] for axis in range(len(ranges))]
        values = self.stored.read(Box(tuple(r[0] for r in stored), tuple(r[1] for r in stored)))
        fixed = (0,) * len(self._fixed)
        view: Voxels = values.transpose(*self._fixed, *leading, *self._order)[fixed]
        return view if leading else view[np.newaxis]


def _requests(picks: Sequence[int]) -> list[tuple[range, range]]:
    """Return the ranges of channels to read, each with the positions in `picks` that it serves."""
    requests: list[tuple[range, range]] = []
    first = 0
    for position in range(1, len(picks) + 1):
        used = picks[first : position + 1]
        if position < len(picks) and max(used) - min(used) < READ_FACTOR * len(used):
            continue
        used = picks[first:position]
        requests.append((range(first, position), range(min(used), max(used) + 1)))
        first = position
    return requests
