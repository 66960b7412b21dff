"""The result of inference on one volume, as arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkq.blend.combine import Array, to_numpy
from chunkq.errors import ChunkqError
from chunkq.install_hint import install_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Prediction:
    """The result for one volume of shape (*S), with spatial axes in the volume's order.

    Attributes:
        labels: `(*S)` uint8, or uint16 for more than 256 classes: the class with the largest
            probability, the lowest one in a tie; for a single channel, whether it is at least 0.5.
        input: The input volume `([C,] *S)` in its own dtype; a tuple of them for several inputs.
        probabilities: `(C, *S)` float32, or float16 with `output_dtype: float16`: the outputs of
            the network after activation and averaging; None with `combine` soft or hard.

    Arrays are NumPy arrays, or torch tensors after `to`.
    """

    labels: Array
    input: Array | tuple[Array, ...]
    probabilities: Array | None = None

    def numpy(self) -> Prediction:
        """Return the prediction with NumPy arrays; arrays in host memory are shared, not copied."""
        return self._map(to_numpy)

    def to(self, device: str) -> Prediction:
        """Return the prediction with torch tensors on a device such as `cpu`, `cuda` or `cuda:1`.

        `to("numpy")` is the same as `numpy()`. On the CPU, memory is shared where torch allows it.
        uint16 arrays become int32 and uint32 arrays int64, with the same values, because torch
        supports few operations on them. Raises ChunkqError if torch is not installed or the device
        does not exist.
        """
        if device == "numpy":
            return self.numpy()
        try:
            import torch
        except ImportError as error:
            raise ChunkqError(
                f"Prediction.to: torch is not installed ({error}); run `{install_command('torch')}`"
            ) from None
        try:
            target = torch.device(device)
            return self._map(lambda array: torch.as_tensor(_for_torch(array), device=target))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ChunkqError(
                f"Prediction.to: cannot use device {device!r}: {reason}; "
                "use 'cpu' or another available device"
            ) from None

    def plot(self, path: str | Path | None = None, *, at: Sequence[int] | None = None) -> Figure:
        """Draw the labels over the first channel and return the figure; save it to `path` if set.

        Draws three planes through voxel `at` of a 3-D volume, all of a 2-D volume, and a line for a
        1-D volume. For a 4-D volume, draws entry `at[0]` of its first axis. `at` has one entry per
        axis; the default is the median of the labeled voxels. Label 0 is transparent. The suffix
        of `path` sets the format. Raises ChunkqError if matplotlib is not installed, and ValueError
        if `at` is outside the volume.
        """
        try:
            from chunkq.blend.plot import draw
        except ImportError as error:
            raise ChunkqError(
                f"Prediction.plot: matplotlib is not installed ({error}); "
                f"run `{install_command('plot')}`"
            ) from None
        first = self.input[0] if isinstance(self.input, tuple) else self.input
        image, labels = to_numpy(first), to_numpy(self.labels)
        figure = draw(image if image.ndim == labels.ndim else image[0], labels, at)
        if path is not None:
            figure.savefig(path)
        return figure

    def _map(self, convert: Callable[[Array], Array]) -> Prediction:
        """Return the prediction with every array converted."""
        is_tuple = isinstance(self.input, tuple)
        return replace(
            self,
            labels=convert(self.labels),
            input=tuple(map(convert, self.input)) if is_tuple else convert(self.input),
            probabilities=None if self.probabilities is None else convert(self.probabilities),
        )


def _for_torch(array: Array) -> Any:
    """Return the array with a dtype and memory layout that torch supports."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(f"i{min(8, array.dtype.itemsize * 2)}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch rejects negative strides and warns about read-only memory.
    is_supported = array.flags.writeable and all(step >= 0 for step in array.strides)
    return array if is_supported else array.copy()
