"""The outputs of a job: what is stored of the network's predictions, and how they are combined."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Combine = Literal["weighted_avg", "soft", "hard", "std", "entropy"]
Activation = Literal["none", "softmax", "sigmoid"]
HeadName = str | int | None
"""Key or index of an array in what the network returns; None if it returns one array."""


def label_dtype(classes: int) -> np.dtype[Any]:
    """Return the dtype of labels: uint8 for up to 256 classes, else uint16."""
    return np.dtype(np.uint8 if classes <= 256 else np.uint16)


@dataclass(frozen=True)
class Head:
    """One array that the network returns: (n, channels, *patch), and which one it is.

    `patch` is the output patch in voxels of the outputs that are made of it.
    """

    name: HeadName
    channels: int
    patch: tuple[int, ...]


@dataclass(frozen=True)
class OutputSpec:
    """One output of a job.

    name              name of the output; empty for the only output of a job without names
    channels          number of channels of its predictions
    channel_axis      whether the stored array has the channels as its first axis
    activation        applied to each prediction
    combine           how overlapping predictions are combined
    average_dtype     dtype of averages; labels have the smallest dtype that holds them
    nan               whether a non-finite prediction fails the chunk or counts as zero
    from_labels       whether the network returns labels in one channel; predictions are votes, one
                      channel per class
    fill_value        value of voxels without a prediction: an average, or a class
    head              the array that the network returns for it
    head_channels     number of channels of that array; 0 if the output uses all of them
    picks             channels of that array that the output uses, in order; None for all
    activation_after  applied to averages
    range             values that become the smallest and the largest of an integer dtype
    class_names       names of the classes; empty without any

    The rest is set only if it differs from the grid of the plan, for outputs that have a grid of
    their own (`Plan.of_output`), else empty. There is one entry per spatial axis.

    patch             shape of the output patch, in voxels of the output
    storage           shape of a storage chunk, in voxels of the output
    shard             shape of a shard, in voxels of the output
    scale             voxels of the input per voxel of the output
    """

    name: str
    channels: int
    channel_axis: bool
    activation: Activation
    combine: Combine
    average_dtype: str = "float32"
    nan: Literal["fail", "zero"] = "fail"
    from_labels: bool = False
    fill_value: float = 0.0
    head: HeadName = None
    head_channels: int = 0
    picks: tuple[int, ...] | None = None
    activation_after: Activation = "none"
    range: tuple[float, float] | None = None
    class_names: tuple[str, ...] = ()
    patch: tuple[int, ...] = ()
    storage: tuple[int, ...] = ()
    shard: tuple[int, ...] = ()
    scale: tuple[Fraction, ...] = ()

    @property
    def network_channels(self) -> int:
        """Number of channels that the output has of its head, before labels become votes."""
        return 1 if self.from_labels else self.channels

    @property
    def returned_channels(self) -> int:
        """Number of channels of its head."""
        return self.head_channels or self.network_channels

    @property
    def is_average(self) -> bool:
        """Whether averages are stored, and not labels."""
        return self.combine == "weighted_avg"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored array."""
        return np.dtype(self.average_dtype) if self.is_average else self.label_dtype

    @property
    def fill(self) -> Any:
        """The fill value as a NumPy scalar in the dtype of the stored array."""
        return self.dtype.type(self.fill_value)

    @property
    def nothing(self) -> npt.NDArray[np.float32]:
        """The prediction of a patch that is skipped because it is empty, float32 (channels,).

        It is the fill value in every channel of an average, and else a vote for its class.
        """
        if self.is_average or self.channels == 1:
            return np.full(self.channels, self.fill_value, np.float32)
        votes = np.zeros(self.channels, np.float32)
        votes[int(self.fill_value)] = 1
        return votes

    @property
    def label_dtype(self) -> np.dtype[Any]:
        """Dtype of labels of the output's channels."""
        return label_dtype(max(2, self.channels))

    @property
    def sums_dtype(self) -> np.dtype[Any]:
        """Dtype of the weighted sums of its predictions, and of pieces."""
        return np.dtype(np.float32)

    @property
    def sums_channels(self) -> int:
        """Number of weighted sums per voxel."""
        return self.channels

    @property
    def sums_bytes(self) -> int:
        """Bytes of the weighted sums per voxel."""
        return self.sums_channels * self.sums_dtype.itemsize

    @property
    def stored_channels(self) -> int:
        """Number of values stored per voxel."""
        return self.channels if self.is_average else 1

    @property
    def voxel_bytes(self) -> int:
        """Bytes stored per voxel."""
        return self.stored_channels * self.dtype.itemsize
