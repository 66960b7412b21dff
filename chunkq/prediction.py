"""What a network says about one volume, as arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkq.combine import Array, to_numpy
from chunkq.errors import ChunkqError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Prediction:
    """The result for one volume of shape (*S), spatial axes in the volume's order.

    Attributes:
        labels: `(*S)` uint8, uint16 past 256 classes: the most likely class, the lowest of several;
            of a single channel, whether it reaches 0.5.
        input: The volume `(*S)` as it was passed, in its own dtype; of several inputs a tuple.
        probabilities: `(C, *S)` float32 (float16 if `output_dtype` says so): what the network
            returns, activated and averaged; None where patches were combined into labels
            (`combine` soft or hard).

    Arrays are NumPy arrays, or torch tensors after `to`.
    """

    labels: Array
    input: Array | tuple[Array, ...]
    probabilities: Array | None = None

    def numpy(self) -> Prediction:
        """Return the same with NumPy arrays, on the host; NumPy arrays are shared, not copied."""
        return self._each(to_numpy)

    def to(self, device: str) -> Prediction:
        """Return the same as torch tensors on a device such as `cpu`, `cuda` or `cuda:1`.

        `numpy` is `numpy()`. On the CPU memory is shared where it can be. torch knows little of
        wide unsigned integers: uint16 becomes int32, uint32 int64, with the same values. Raises
        ChunkqError where torch is not installed or has no such device.
        """
        if device == "numpy":
            return self.numpy()
        try:
            import torch
        except ImportError as error:
            raise ChunkqError(
                f"Prediction.to: torch is not installed here ({error}); pip install 'chunkq[torch]'"
            ) from None
        try:
            place = torch.device(device)
            return self._each(lambda array: torch.as_tensor(_for_torch(array), device=place))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ChunkqError(f"Prediction.to: no device {device!r} here: {reason}") from None

    def plot(self, path: str | Path | None = None, *, at: Sequence[int] | None = None) -> Figure:
        """Draw the labels over the input; returns the figure, and saves it where `path` is given.

        A 3-D volume shows in the three planes through voxel `at`, a 2-D one whole, a 1-D one as
        a line; of a 4-D volume, entry `at[0]` of its first axis. `at` has one entry per axis; by
        default it is the middle of what is labelled. Label 0 is left clear. The suffix of `path`
        chooses the format. Raises ChunkqError where matplotlib is not installed, ValueError where
        `at` lies outside.
        """
        try:
            from chunkq.plot import draw
        except ImportError as error:
            raise ChunkqError(
                f"Prediction.plot: matplotlib is not installed here ({error}); "
                "pip install 'chunkq[plot]'"
            ) from None
        first = self.input[0] if isinstance(self.input, tuple) else self.input
        figure = draw(to_numpy(first), to_numpy(self.labels), at)
        if path is not None:
            figure.savefig(path)
        return figure

    def _each(self, change: Callable[[Array], Array]) -> Prediction:
        given = self.input
        return replace(
            self,
            labels=change(self.labels),
            input=tuple(map(change, given)) if isinstance(given, tuple) else change(given),
            probabilities=None if self.probabilities is None else change(self.probabilities),
        )


def _for_torch(array: Array) -> Any:
    """Return an array of a dtype and layout that torch takes."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(f"i{min(8, array.dtype.itemsize * 2)}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch refuses negative strides and warns of read-only memory.
    plain = array.flags.writeable and all(step >= 0 for step in array.strides)
    return array if plain else array.copy()
