"""The outputs of a job: what is stored of the network's predictions, and how they are combined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import log
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from chunkq.plan.value_range import ValueRange

Combine = Literal["weighted_avg", "soft", "hard", "std", "entropy"]
Activation = Literal["none", "softmax", "sigmoid"]
HeadName = str | int | None
"""Key or index of an array in what the network returns; None if it returns one array."""


@dataclass(frozen=True, slots=True)
class CombineKind:
    """What the sums and the stored values of a value of `combine` are.

    has_labels      whether labels are stored
    is_per_channel  whether a value is stored for each channel, and not one for all of them
    is_spread       whether the values measure disagreement, which is 0 without predictions
    has_moments     whether the sums are moments in float64, and not sums in float32
    """

    has_labels: bool = False
    is_per_channel: bool = False
    is_spread: bool = False
    has_moments: bool = False


KINDS: Mapping[Combine, CombineKind] = MappingProxyType(
    {
        "weighted_avg": CombineKind(is_per_channel=True),
        "soft": CombineKind(has_labels=True),
        "hard": CombineKind(has_labels=True),
        "std": CombineKind(is_per_channel=True, is_spread=True, has_moments=True),
        "entropy": CombineKind(is_spread=True),
    }
)


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
    def kind(self) -> CombineKind:
        """What the sums and the stored values are."""
        return KINDS[self.combine]

    @property
    def has_labels(self) -> bool:
        """Whether labels are stored."""
        return self.kind.has_labels

    @property
    def returned_channels(self) -> int:
        """Number of channels of its head."""
        return self.head_channels or self.network_channels

    @property
    def is_average(self) -> bool:
        """Whether averages are stored."""
        return self.combine == "weighted_avg"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored array."""
        return self.label_dtype if self.has_labels else np.dtype(self.average_dtype)

    @property
    def value_range(self) -> ValueRange | None:
        """How values are stored as integers; None for labels and floating-point numbers."""
        if self.range is None or self.has_labels:
            return None
        return ValueRange(*self.range, self.average_dtype)

    @property
    def outside(self) -> float:
        """Value of voxels outside the mask, and where all patches are empty: 0 for a spread."""
        return 0.0 if self.kind.is_spread else self.fill_value

    @property
    def fill(self) -> Any:
        """The value of voxels without a prediction as a NumPy scalar in the stored dtype."""
        if self.value_range is not None:
            return self.value_range.stored(np.array([self.outside]))[0]
        return self.dtype.type(self.outside)

    @property
    def nothing_is_class(self) -> bool:
        """Whether an empty patch predicts the class `fill_value`, and else that value."""
        return self.has_labels or (self.kind.is_spread and self.activation != "none")

    @property
    def nothing(self) -> npt.NDArray[np.float32]:
        """The prediction of a patch that is skipped because it is empty, float32 (channels,).

        It is the fill value in every channel, or a vote for its class.
        """
        if not self.nothing_is_class or self.channels == 1:
            return np.full(self.channels, self.fill_value, np.float32)
        votes = np.zeros(self.channels, np.float32)
        votes[int(self.fill_value)] = 1
        return votes

    @property
    def nothing_counts(self) -> bool:
        """Whether empty patches change the sums."""
        return self.kind.has_moments or bool(self.nothing.any())

    @property
    def label_dtype(self) -> np.dtype[Any]:
        """Dtype of labels of the output's channels."""
        return label_dtype(max(2, self.channels))

    @property
    def sums_dtype(self) -> np.dtype[Any]:
        """Dtype of the sums and of the blend weights."""
        return np.dtype(np.float64 if self.kind.has_moments else np.float32)

    @property
    def sums_channels(self) -> int:
        """Number of sums per voxel: one per channel, or the entries of moments."""
        return 1 + 2 * self.channels if self.kind.has_moments else self.channels

    @property
    def sums_bytes(self) -> int:
        """Bytes of the sums per voxel."""
        return self.sums_channels * self.sums_dtype.itemsize

    @property
    def stores_sums(self) -> bool:
        """Whether the stored values are the sums, without a further step."""
        is_plain = self.combine == "weighted_avg" and self.activation_after == "none"
        return is_plain and self.dtype == self.sums_dtype

    @property
    def result_bytes(self) -> int:
        """Bytes per voxel of the result of complete sums before it is cast.

        It is 0 if the result are the sums; labels have their dtype from the start.
        """
        is_plain = self.combine == "weighted_avg" and self.activation_after == "none"
        return 0 if is_plain or self.has_labels else 4 * self.stored_channels

    @property
    def stored_channels(self) -> int:
        """Number of values stored per voxel."""
        return self.channels if self.kind.is_per_channel else 1

    @property
    def voxel_bytes(self) -> int:
        """Bytes stored per voxel."""
        return self.stored_channels * self.dtype.itemsize


def is_integer(dtype: str | None) -> bool:
    """Return whether a dtype of an output is one of integers; None is the default."""
    return dtype is not None and np.dtype(dtype).kind in "iu"


def default_range(
    combine: Combine, activation: Activation, activation_after: Activation, channels: int
) -> tuple[float, float] | None:
    """Return the range of what softmax and sigmoid make, None if a job must set it."""
    if combine == "entropy":
        return 0.0, log(max(2, channels))
    is_share = (activation, activation_after) != ("none", "none")
    return (0.0, 1.0) if is_share else None
